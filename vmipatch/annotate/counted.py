"""Tables that name no site to patch: exception table, bug table, ORC unwinder.  Their entries are counted.

Some entries of each are looked at, so that a table that is not what its section
says is a finding.
"""

from __future__ import annotations

from vmipatch.annotate import bugs, bycontent, hidden
from vmipatch.annotate.site import Finding, TableInfo
from vmipatch.annotate.tables import Code, FamilyScan, Layout, Reason, choose, find_tables, guarded, load_format
from vmipatch.image import Image


def scan(image: Image, family: str, layout: str | None = None) -> FamilyScan:
    """The tables of a family, no sites."""
    form = load_format(family)
    code = Code(image)

    def executable(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        # The unwinder's table ends behind the last instruction.
        return code.executable(values[0], 0)

    def fixed(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        instr, fixup = values[:2]
        # The kind of fixup and its operands, or (to 5.15) the distance of a handler.
        kind = values[2] if len(values) > 2 else 0
        if instr == fixup or (kind & 0xFF > 0x1F and kind & 0xFFFF0000 not in (0, 0xFFFF0000)):
            return hidden.OUTSIDE
        return code.executable(instr, 1) or code.executable(fixup, 1)

    check = bugs.checker(image) if family == bugs.FAMILY else executable
    if family == bugs.FAMILY:
        bycontent.locate(image, family, check, check)
    elif family == "ex_table":
        bycontent.locate(image, family, fixed, fixed)
    tables, findings = [], []
    for table in find_tables(image, form):
        found, why, where = choose(table, form, image.bits, guarded(check), layout)
        if found is None:
            findings.append(Finding(why.id, "warning", why.message, table.name, where))
        count = len(table.data) // found.size if found else 0
        tables.append(
            TableInfo(family, table.name, table.address, len(table.data), found.name if found else None, count)
        )
    return tables, [], findings
