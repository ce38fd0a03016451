"""Original, patched and expected, site by site."""

from __future__ import annotations

from typing import NamedTuple

from vmipatch.annotate import Scan, Site
from vmipatch.image import Image
from vmipatch.patch.patch import Patch, Plan


class Row(NamedTuple):
    """One site: its bytes in the original, in the patched image and as planned; ``patch`` is the last of the plan."""

    site: Site
    original: bytes
    patched: bytes
    expected: bytes
    patch: Patch | None

    @property
    def right(self) -> bool:
        """Whether the patched image holds what is expected."""
        return self.patched == self.expected


def compare(image: Image, patched: Image, scan: Scan, plan: Plan) -> list[Row]:
    """One row a site, in table order: of the scan, and of what the plan looked at besides.

    Raises :class:`AddressError` if the patched image lacks a site's bytes.
    """
    changes = plan.changes()
    rows = []
    more = [site for family, sites in plan.sites.items() if family not in scan.families for site in sites]
    for site in (*scan.sites, *more):
        original = image.read(site.address, site.length)
        expected = bytearray(original)
        patch = None
        for i in range(site.length):
            change = changes.get(site.address + i)
            if change is not None:
                expected[i] = change[1]
                patch = change[2]
        rows.append(Row(site, original, patched.read(site.address, site.length), bytes(expected), patch))
    return rows
