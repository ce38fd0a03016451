"""``runtime_ptr_*`` and ``runtime_shift_*``: immediates that become a variable's value at boot (6.11 on, x86-64)."""

from __future__ import annotations

from vmipatch import facts
from vmipatch.annotate import codesites
from vmipatch.annotate.hidden import CodeBytes
from vmipatch.annotate.site import RuntimeConst, Site
from vmipatch.annotate.tables import FamilyScan, find_tables, load_format
from vmipatch.image import Image

FAMILY = "runtime_consts"


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every immediate; ``op`` is the variable's name."""
    code = CodeBytes(image)
    tables, _, findings = count(image)
    sites = []
    for table in find_tables(image, load_format(FAMILY)):
        kind, name = _named(table.name)
        length = len(_placeholder(kind))
        detail = RuntimeConst(kind, name)
        for entry, address in codesites.addresses(table, image.bits):
            if code.read(address, length):
                where = code.section(address)
                sites.append(Site(FAMILY, address, length, name, where, table.name, entry, detail))
    return tables, sites, findings


def count(image: Image) -> FamilyScan:
    """The tables alone; an entry that names no placeholder is a finding."""

    def read(body: bytes, address: int) -> tuple[int, str, RuntimeConst] | None:
        known = [k for k in facts.load("tables", FAMILY)["kinds"] if body.startswith(_placeholder(k)[: len(body)])]
        return (len(_placeholder(known[0])), known[0], RuntimeConst(known[0], "")) if known else None

    return codesites.count(image, FAMILY, read, "runtime-const-none")


def _named(section: str) -> tuple[str, str]:
    """Kind and variable of a table."""
    _, kind, name = section.split("_", 2)
    return kind, name


def _placeholder(kind: str) -> bytes:
    return bytes.fromhex(facts.load("tables", FAMILY)["kinds"][kind]["placeholder"])
