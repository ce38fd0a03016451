"""vmipatch: the toolchain for VMware's Virtual Machine Interface and for kernels that patch themselves.

    import vmipatch

    image = vmipatch.open_image("vmlinux")
    found = vmipatch.scan(image)
    target = vmipatch.Native(vmipatch.from_features("features.txt"), cpus=1)
    planned = vmipatch.plan(image, found, target)
    vmipatch.apply(image, planned, "vmlinux.patched")
    vmipatch.restore("vmlinux.patched")

The names are imported when they are first used: ``import vmipatch`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmipatch.errors import VmipatchError
from vmipatch.lazily import attributes

if TYPE_CHECKING:
    from vmipatch.annotate import Finding, Scan, Site, scan
    from vmipatch.image import Image, open_image
    from vmipatch.patch import Native, OnRom, Patch, Plan, apply, from_features, from_spec, plan, restore

__version__ = "0.1.0"

__all__ = [
    "Finding", "Image", "Native", "OnRom", "Patch", "Plan", "Scan", "Site", "VmipatchError", "apply",
    "from_features", "from_spec", "open_image", "plan", "restore", "scan",
]  # fmt: skip

__getattr__ = attributes(
    __name__,
    {
        **dict.fromkeys(("Finding", "Scan", "Site", "scan"), "vmipatch.annotate"),
        **dict.fromkeys(("Image", "open_image"), "vmipatch.image"),
        **dict.fromkeys(
            ("Native", "OnRom", "Patch", "Plan", "apply", "from_features", "from_spec", "plan", "restore"),
            "vmipatch.patch",
        ),
    },
)
