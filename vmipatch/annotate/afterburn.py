"""``.afterburn``: the L4Ka afterburner's annotations, one sensitive instruction and its padding each."""

from __future__ import annotations

from vmipatch.annotate.site import Afterburn, Site
from vmipatch.annotate.tables import Code, Entry, FamilyScan, Layout, Reason, Table, scan_family
from vmipatch.image import Image
from vmipatch.isa import decode

FAMILY = "afterburn"

MOST = 254


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every annotated instruction; ``op`` is the first instruction's mnemonic and operands."""
    code = Code(image)
    bits = image.bits

    def check(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        start, end = values
        if not 1 <= end - start <= MOST:
            return Reason("entry-length", f"{end - start} bytes from {start:#x} to {end:#x}; 1 to {MOST} are possible")
        reason = code.executable(start, end - start)
        if reason is not None:
            return reason
        if not decode.covers(image.read(start, end - start), bits):
            return Reason("site-not-instructions", f"{end - start} bytes at {start:#x} are no whole instructions")
        return None

    def make(table: Table, layout: Layout, entry: Entry) -> Site:
        start, end = entry.values
        first = decode.disassemble(image.read(start, end - start), bits, start)[0]
        device = table.name.removeprefix(".afterburn").removeprefix("32").removeprefix(".")
        return Site(FAMILY, start, end - start, first.text, code.section, table.name, entry.address, Afterburn(device))

    return scan_family(image, FAMILY, check, make, layout)
