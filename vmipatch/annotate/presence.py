"""What a scan says of the image as a whole: what it is, and which tables it must have and has not.

Imports image and its sisters.
"""

from __future__ import annotations

from vmipatch.annotate.site import Finding
from vmipatch.image import Image

_KINDS = {
    "user-mode-linux": (
        "user-mode-linux",
        "User-mode Linux, a program: it carries alternatives and never applies them, so there is nothing to patch",
    ),
    "xen": (
        "xen-hypervisor",
        "the Xen hypervisor, no Linux kernel: its alternatives are in tables of its own, which are not read",
    ),
}


def of_kind(image: Image) -> list[Finding]:
    """The finding that names an image which no kernel's patcher runs in; none for Linux on hardware."""
    if image.kind not in _KINDS:
        return []
    id, message = _KINDS[image.kind]
    return [Finding(id, "error", message, "image")]
