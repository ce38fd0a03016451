"""Static calls: the trampolines through which they are made, and the sites that call past them (5.10 on).

A trampoline is a jump to the function that its key holds.  With objtool
(x86-64) a table names every call of a trampoline, and the kernel makes each
call the function itself; on i386 only the trampolines change.
"""

from __future__ import annotations

import struct

from vmipatch import facts
from vmipatch.annotate.hidden import CodeBytes, Found, Valid, find
from vmipatch.annotate.site import Site, StaticCall, TableInfo, many
from vmipatch.annotate.tables import FamilyScan, Layout
from vmipatch.image import Image
from vmipatch.isa import branch

FAMILY = "static_calls"

LENGTH, JCC_LENGTH = 5, 6
"""Of a call or jump, and of the conditional tail call that clang makes (``0F 8x``, ``__is_Jcc`` of static_call.c)."""
CONDITIONS = range(0x80, 0x90)
FLAGS = 3
TAIL = 1
SINCE, MARKED = (5, 10), (5, 18)
"""The releases that began with static calls, and with a mark behind each trampoline; between, symbols name them."""
KEY = "__SCK__"
SECTION = ".static_call.text"
"""Where trampolines lie; a kernel's are in its .text, after it is linked."""
_RET = b"\xc3"


def scan(image: Image, layout: str | None = None) -> FamilyScan:
    """Every trampoline, then every site of the table; ``op`` is the call's name where symbols tell it."""
    code = CodeBytes(image)
    prefix = facts.load("tables", FAMILY)["trampoline"]["names"]
    places = trampolines(image, code)
    names = {address: _name(image, address, prefix) for address in places}
    tables: list[TableInfo] = []
    inline: list[Site] = []
    keys: dict[int, int] = {}
    module = image.container == "module"
    for found in _tables(image, code, frozenset(places)):
        tables.append(_info(found))
        rows = [(entry.address, *entry.values) for entry in found.layout.entries(found.table, image.bits)]
        bodies = code.read_all([address for _, address, _ in rows], JCC_LENGTH, LENGTH)
        there = []
        for (entry, address, word), body in zip(rows, bodies, strict=True):
            length, target = branch_at(body, address, image.bits)
            if not length or (target not in names and not module):
                continue
            if target not in names:
                # Modules call the kernel's trampolines.
                names[target] = _name(image, target, prefix)
            key = keys[target] = _key(image, word & ~FLAGS, prefix)
            there.append((entry, address, length, StaticCall(key, target, bool(word & TAIL))))
        addresses = [row[1] for row in there]
        inline += many(
            FAMILY, addresses, [row[2] for row in there], [names[row[3].trampoline] for row in there],
            code.sections(addresses), found.table.name, [row[0] for row in there], [row[3] for row in there],
        )  # fmt: skip
    sites = [
        Site(FAMILY, a, LENGTH, names[a], code.section(a), SECTION, a, StaticCall(keys.get(a, 0), a, True))
        for a in places
    ]
    return [*tables, *_trampoline_table(places)], sites + inline, []


def _trampoline_table(places: list[int]) -> list[TableInfo]:
    if not places:
        return []
    size = facts.load("tables", FAMILY)["trampoline"]["size"] * len(places)
    how = "by the mark behind each, or by name"
    return [TableInfo(FAMILY, SECTION, places[0], size, "trampoline", len(places), found=how)]


def count(image: Image) -> FamilyScan:
    """The tables alone."""
    code = CodeBytes(image)
    places = trampolines(image, code)
    tables = [_info(found) for found in _tables(image, code, frozenset(places))]
    return [*tables, *_trampoline_table(places)], [], []


def trampolines(image: Image, code: CodeBytes) -> list[int]:
    """The virtual addresses of all trampolines, ascending: a jump or a return in front of their mark, or by name."""
    spec = facts.load("tables", FAMILY)["trampoline"]
    mark, prefix = bytes.fromhex(spec["mark"]), spec["names"]
    module = image.container == "module"
    result = []
    for start, end, offset, name in code.ranges:
        if module and name != SECTION:
            continue
        data = bytes(image.data[offset : offset + end - start])
        at = data.find(mark, LENGTH)
        while at >= 0:
            first = at - LENGTH
            address = start + first
            # A module's lead to the kernel, or where its file does not say.
            if not address & 3 and _is_jump(data[first:at], address, image.bits, code, anywhere=module):
                result.append(address)
            at = data.find(mark, at + 1)
    version = image.version
    if not result and version is not None and SINCE <= version < MARKED:
        result = [a for a, _, name in image.symbols.all() if name.startswith(prefix) and code.offset(a, LENGTH) >= 0]
    return sorted(set(result))


def branch_at(body: bytes, address: int, bits: int) -> tuple[int, int]:
    """Length and target of the call, jump or conditional jump that ``body`` starts with; ``(0, -1)`` for none."""
    if body[:1] in (b"\xe8", b"\xe9") and len(body) >= LENGTH:
        return LENGTH, branch.target_of(body[:LENGTH], address, bits) or 0
    if len(body) >= JCC_LENGTH and body[0] == 0x0F and body[1] in CONDITIONS:
        distance = int.from_bytes(body[2:JCC_LENGTH], "little", signed=True)
        return JCC_LENGTH, (address + JCC_LENGTH + distance) & ((1 << bits) - 1)
    return 0, -1


def _is_jump(body: bytes, address: int, bits: int, code: CodeBytes, *, anywhere: bool) -> bool:
    if body[:1] == _RET:
        return True
    target = branch.target_of(body, address, bits) if body[0] == branch.JMP else None
    return target is not None and (anywhere or code.offset(target, 1) >= 0)


def _key(image: Image, address: int, prefix: str) -> int:
    """The key that an entry names.

    A module that may not change a call names its trampoline instead of its key, which is not exported
    (kernel/static_call_inline.c, static_call_add_module); 0 where no symbol tells the key then.
    """
    if image.container != "module":
        return address
    named = image.symbols.at(address)
    if named is None or named[1] or not named[0].startswith(prefix):
        return address
    return image.symbols.lookup(KEY + named[0].removeprefix(prefix)) or 0


def _name(image: Image, address: int, prefix: str) -> str:
    named = image.symbols.at(address)
    if named is not None and named[1] == 0 and named[0].startswith(prefix):
        return named[0].removeprefix(prefix)
    return f"{address:#x}"


def _tables(image: Image, code: CodeBytes, known: frozenset[int]) -> list[Found]:
    if not known and image.container != "module":
        return []
    mask = (1 << image.bits) - 1
    data_ranges = [(s.address, s.end) for s in image.sections if s.alloc and s.write]
    module = image.container == "module"

    def validator(layout: Layout) -> Valid:
        form, lowest, highest = layout.form, code.low, code.high

        def valid(start: int, data: bytes, at: int) -> bool:
            first, second = form.unpack_from(data, at)
            address = (start + first) & mask
            if not lowest <= address < highest:
                return False
            body = code.read(address, JCC_LENGTH) or code.read(address, LENGTH)
            length, target = branch_at(body, address, image.bits)
            if not length:
                return False
            if module:
                # Modules call the kernel's trampolines, with the kernel's keys.
                return True
            if target not in known:
                return False
            key = (start + 4 + second) & mask
            return any(low <= key < high for low, high in data_ranges)

        return valid

    low, high = code.ranges[0][:2] if code.ranges else (0, 0)
    text = code.read(low, high - low)
    signed = struct.Struct("<i").unpack_from

    def ahead(layout: Layout, place: int, data: bytes, at: int) -> int:
        """Calls and jumps in the largest section: nearly all are."""
        count, room = 0, len(text) - JCC_LENGTH
        first_key = last_key = 0
        rest = memoryview(data)[at : len(data) - (len(data) - at) % layout.size]
        for first, second in layout.form.iter_unpack(rest):
            where = first + place - low
            if not (0 <= where < room):
                break
            key = second + place + 4
            if not first_key <= key < last_key:
                first_key, last_key = next((one for one in data_ranges if one[0] <= key < one[1]), (0, 0))
                if not last_key:
                    break
            if text[where] not in (branch.CALL, branch.JMP):
                break
            if first + place + LENGTH + signed(text, where + 1)[0] not in known:
                break
            place += layout.size
            count += 1
        return count

    return find(image, FAMILY, validator, None if module else ahead)


def _info(found: Found) -> TableInfo:
    table = found.table
    count = len(table.data) // found.layout.size
    return TableInfo(FAMILY, table.name, table.address, len(table.data), found.layout.name, count, found=found.found)
