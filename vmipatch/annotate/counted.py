"""Tables that name no site to patch: exception table, bug table, ORC unwinder.  Their entries are counted.

Some entries of each are looked at, so that a table that is not what its section
says is a finding.
"""

from __future__ import annotations

from vmipatch.annotate import bugs, bycontent, hidden
from vmipatch.annotate.site import Finding, TableInfo
from vmipatch.annotate.tables import Code, FamilyScan, Layout, Reason, choose, find_tables, guarded, load_format
from vmipatch.image import Image

# EX_TYPE_* of arch/x86/include/asm/extable_fixup_types.h go to 20 in 6.1.
_MOST_KINDS = 31


def scan(image: Image, family: str, layout: str | None = None) -> FamilyScan:
    """The tables of a family, no sites."""
    form = load_format(family)
    code = Code(image)

    def executable(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        # The unwinder's table ends behind the last instruction.
        return code.executable(values[0], 0)

    def fixed(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        instr, fixup = values[:2]
        # The kind of fixup, under a register and a number of any value (5.16 on; a handler's distance before that).
        kind = values[2] & 0xFF if len(values) > 2 else 0
        if kind > _MOST_KINDS:
            return hidden.OUTSIDE
        # Unlike the names of an export, which look like this otherwise, a fixup is known code.
        place = image.section_at(fixup)
        return code.executable(instr, 1) if place is not None and place.exec else hidden.OUTSIDE

    def within(layout: Layout, values: tuple[int, ...]) -> Reason | None:
        # Tables of functions are pairs of addresses too; what may fault stands within a function.
        named = image.symbols.at(values[0])
        return fixed(layout, values) if named is None or named[1] else hidden.OUTSIDE

    check = bugs.checker(image) if family == bugs.FAMILY else executable
    if family == bugs.FAMILY:
        bycontent.locate(image, family, check, check)
    elif family == "ex_table":
        bycontent.locate(image, family, fixed, within)
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
