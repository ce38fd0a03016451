"""What is wrong with an option ROM: every fault with its place.  Shares no code with the writer.

Findings are errors (no BIOS or guest should accept the ROM, or it would fail when used) or notes.  Of a ROM
without a VMI header only the general rules are asked.  Imports the inspector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmipatch.rombuild import abi as abis
from vmipatch.rombuild.inspect import (
    ENDS,
    Block,
    Image,
    Vmi,
    branch_target,
    decode_one,
    images,
)

_MAX_INSTRUCTIONS = 4000  # of one stub
_FULL_SIZE = 0x18


@dataclass(frozen=True)
class Finding:
    """One fault. ``rule`` is a stable name, ``offset`` in the file in bytes."""

    severity: str  # "error" or "note"
    rule: str
    offset: int
    message: str


def check(rom: bytes) -> list[Finding]:
    """All findings, in the order of the file; raises :class:`RomError` if it is no option ROM at all."""
    found = images(rom)
    out: list[Finding] = []
    for number, image in enumerate(found):
        out += _image(rom, image, number == len(found) - 1)
        if number and image.vmi is not None and image.offset % 2048:
            out.append(_error("image-alignment", image.offset, "a guest's scan goes in steps of 2048 and misses it"))
    last = found[-1]
    if last.pci is not None and not last.pci.last:
        end = last.offset + 512 * (last.pci.image_units or last.units)
        out.append(_error("pci-last", last.offset + last.pci.offset + 0x15, f"another image is promised at {end:#x}"))
    return sorted(out, key=lambda f: (f.offset, f.rule))


def _error(rule: str, offset: int, message: str) -> Finding:
    return Finding("error", rule, offset, message)


def _image(rom: bytes, image: Image, last: bool) -> Iterator[Finding]:
    at, data = image.offset, image.data
    if image.units == 0:
        yield _error("length-zero", at + 2, "the header gives a length of 0")
        return
    if image.missing:
        yield _error(
            "length-past-end",
            at + 2,
            f"the header promises {512 * image.units} bytes, {image.missing} of them past the end of the file",
        )
        # What lies there cannot be judged, and all that points there would be told again.
        return
    if image.byte_sum and not image.efi:
        yield _error("checksum", at + len(data) - 1, f"the bytes sum to {image.byte_sum:#04x}, not 0")
    yield from _pci(image)
    if not image.efi:
        yield from _pnp(image)
    if image.vmi is not None:
        yield from _entry(image)
        yield from _vmi(image, image.vmi)
    elif data[8:12] == b"cVmi":
        yield _error("vmi-short", at + 8, "the VMI header runs past the end of the image")
    elif data[_BLOCK_AT : _BLOCK_AT + 4] == b"vmiP":
        yield _error("vmi-signature", at + 8, f"{data[8:12].hex(' ')} where the VMI signature belongs")


_BLOCK_AT = 0x20


def _pci(image: Image) -> Iterator[Finding]:
    at, pci = image.offset, image.pci
    if pci is None:
        # 16 is the least that a header can be long; smaller values are no pointer (old ROMs have code there).
        if image.vmi is not None and image.pci_pointer:
            yield _error("pci-block", at + 0x18, f"no PCIR block at {image.pci_pointer:#x}")
        return
    block = at + pci.offset
    if pci.length < _FULL_SIZE:
        yield _error("pci-length", block + 0x0A, f"the PCIR block says {pci.length} bytes, there are at least 24")
    if not image.efi and pci.code_type == 0 and pci.image_units < image.units:
        yield _error("pci-image-length", block + 0x10, f"{pci.image_units} units, but the header says {image.units}")
    if image.vmi is not None:
        if pci.image_units != image.units:
            yield _error("pci-image-length", block + 0x10, f"{pci.image_units} units, the header says {image.units}")
        if pci.code_type != 0:
            yield _error("pci-code-type", block + 0x14, f"code type {pci.code_type}: a VMI ROM is x86 code, 0")
        if pci.offset % 4:
            yield _error("pci-alignment", at + 0x18, "the PCIR block is not on a 4-byte boundary")


def _pnp(image: Image) -> Iterator[Finding]:
    at = image.offset
    if image.vmi is not None and image.pnp_pointer and not image.pnp:
        yield _error("pnp-block", at + 0x1A, f"no $PnP block at {image.pnp_pointer:#x}")
    for block in image.pnp:
        where = at + block.offset
        if block.length < 0x20:
            yield _error("pnp-length", where + 5, f"the $PnP block says {block.length} bytes, there are 32")
        elif block.checksum:
            # QEMU's own loaders leave this sum wrong, and no BIOS of today looks at it.
            severity = "note" if image.vmi is None else "error"
            yield Finding(severity, "pnp-checksum", where + 9, f"the $PnP block sums to {block.checksum:#04x}, not 0")
        if block.revision == 0:
            yield _error("pnp-revision", where + 4, "$PnP revision 0")
        if image.vmi is not None:
            for name, offset, text in (
                ("manufacturer", block.manufacturer_offset, block.manufacturer),
                ("product", block.product_offset, block.product),
            ):
                if offset and text is None:
                    place = where + (0x0E if name == "manufacturer" else 0x10)
                    yield _error(f"pnp-{name}", place, f"no string at {offset:#x} in the image")
    if image.vmi is not None and image.pnp and image.pnp[-1].next:
        last = image.pnp[-1]
        yield _error(
            "pnp-chain", at + last.offset + 6, f"the chain goes on at {last.next:#x}, where no block is, or in a circle"
        )


def _entry(image: Image) -> Iterator[Finding]:
    """The BIOS far-calls offset 3: it must return (0xCB), or jump to somewhere inside."""
    code, at = image.entry, image.offset + 3
    if code[:1] == b"\xcb":
        return
    if code[:1] == b"\xe9":
        target = (6 + int.from_bytes(code[1:3], "little")) & 0xFFFF
    elif code[:1] == b"\xeb":
        target = (5 + int.from_bytes(code[1:2], "little", signed=True)) & 0xFFFF
    else:
        yield _error("entry", at, f"the BIOS entry is {code.hex(' ')}: neither a jump nor a far return")
        return
    if not 0x1C <= target < len(image.data):
        yield _error("entry", at, f"the BIOS entry jumps to {target:#x}, outside the image")


def _vmi(image: Image, vmi: Vmi) -> Iterator[Finding]:
    at = image.offset
    if vmi.abi is None:
        yield _error("api-version", at + 0x0C, f"no ABI has version {vmi.major}.{vmi.minor}")
        return
    abi = abis.load(vmi.abi)
    if vmi.minor != abi.minor:
        yield _error(
            "api-version", at + 0x0C, f"version {vmi.major}.{vmi.minor}: {abi.name} is {abi.major}.{abi.minor}"
        )
    if len(image.data) > abi.limits["max_bytes"]:
        yield _error("too-long", at + 2, f"{len(image.data)} bytes: {abi.name} allows {abi.limits['max_bytes']}")
    if image.units > abi.limits["max_units"]:
        yield _error("too-long", at + 2, f"{image.units} units: {abi.name} allows {abi.limits['max_units']}")
    for name, (offset, size) in abi.header.items():
        zero = (name.startswith(("pad", "reserved")) and name != "reserved") or name in (
            "private1",
            "data_pages",
            "jump_slots",
        )
        if zero and any(image.data[offset : offset + size]):
            yield _error("reserved", at + offset, f"{name} is not 0")
    if abi.guest["pci_required"] and not image.pci_pointer:
        yield _error("pci-missing", at + 0x18, f"a guest of {abi.name} refuses a ROM without a PCIR block")
    allowed = abi.guest["license"]
    if allowed and vmi.license not in allowed:
        what = f"{vmi.license!r}" if vmi.license is not None else f"nothing readable at {vmi.fields['license_off']:#x}"
        yield _error(
            "license",
            at + abi.header["license_off"][0],
            f"the licence is {what}: a guest of {abi.name} takes {' or '.join(allowed)}",
        )
    pci = image.pci
    if pci is not None and (pci.vendor, pci.device) != (abi.guest["pci_vendor"], abi.guest["pci_device"]):
        yield Finding(
            "note",
            "pci-identity",
            at + pci.offset + 4,
            f"PCI {pci.vendor:04x}:{pci.device:04x}: mainline Linux warns of an unknown manufacturer",
        )
    if vmi.virtual_top % 4096 or (vmi.virtual_top and vmi.virtual_top < 0xC0000000):
        yield _error(
            "virtual-top", at + 0x10, f"virtual_top {vmi.virtual_top:#x} is not a page at the top of the kernel's half"
        )
    walker = _Walker(image)
    for key in ("init", "get_relocation"):
        if key in abi.dispatch:
            yield from walker.walk(f"{key} entry", abi.dispatch[key])
    if vmi.block is None:
        yield Finding("note", "not-ours", at + _BLOCK_AT, "no private block: only running it tells where its calls are")
        if abi.slot_size is not None:
            for call in vmi.calls:
                yield from walker.walk(f"call {call.number} ({call.name})", call.offset)
        return
    yield from _block(image, vmi, vmi.block, abi, walker)


def _block(image: Image, vmi: Vmi, block: Block, abi: abis.Abi, walker: _Walker) -> Iterator[Finding]:
    at = image.offset + _BLOCK_AT
    if block.version != 1:
        yield _error("block-version", at + 4, f"private block version {block.version}: known is 1")
    if block.abi != abi.name:
        yield _error("block-abi", at + 16, f"the private block names {block.abi!r}, the header is {abi.name}'s")
    if block.generation != abi.generation:
        yield _error("block-generation", at + 5, f"generation {block.generation}: {abi.name} is {abi.generation}")
    if block.hypervisor is None:
        yield _error("block-hypervisor", at + 14, "no hypervisor's name where the private block points")
    if block.slot_size != (abi.slot_size or 0):
        yield _error(
            "block-slot-size", at + 18, f"slots of {block.slot_size} bytes: {abi.name} has {abi.slot_size or 0}"
        )
    if block.virtual_top != vmi.virtual_top or (
        "private0" in abi.header and vmi.fields["private0"] != block.virtual_top
    ):
        yield _error("block-virtual-top", at + 24, "virtual_top is not the same in the header and in the private block")
    if block.count != abi.count:
        yield _error("block-count", at + 6, f"{block.count} calls: {abi.name} has {abi.count}")
    if block.table % 4 or block.table < 0x80 or block.table + 8 * abi.count > len(image.data):
        yield _error("block-table", at + 8, f"the relocation table at {block.table:#x} is not inside the image")
        return
    yield from _state(image, vmi, block)
    table = image.offset + block.table
    names = {value: key for key, value in abi.relocation_types.items()}
    for call in vmi.calls:
        where, label = table + 8 * call.number, f"call {call.number} ({call.name})"
        known = abi.calls.get(call.name)
        if call.padding:
            yield _error("table-padding", where + 5, f"{label}: the reserved bytes are not 0")
        if call.type not in names:
            yield _error("table-type", where + 4, f"{label}: relocation type {call.type} does not exist")
            continue
        kind = names[call.type]
        if kind == "NONE":
            if call.offset:
                yield _error("table-offset", where, f"{label}: NONE, with an offset")
        elif not 0x80 <= call.offset < len(image.data):
            yield _error("table-offset", where, f"{label}: {call.offset:#x} lies outside the image")
            continue
        elif abi.slot_size is not None and call.offset != abi.slot_size * call.number:
            yield _error("table-slot", where, f"{label}: {call.offset:#x} is not its slot")
        if known is None:
            if kind != "NONE":
                yield _error("table-unused", where + 4, f"{label}: no such call, but {kind}")
            continue
        if kind != "NONE" and kind not in known.relocations:
            yield _error("table-kind", where + 4, f"{label}: {kind}, the ABI allows {' or '.join(known.relocations)}")
        needed = abi.needs.get(call.name, abi.needs.get("*", ()))
        if needed and kind not in needed:
            yield _error("table-needed", where + 4, f"{label}: {kind}, a guest needs {' or '.join(needed)}")
        if kind != "NONE":
            yield from walker.walk(label, call.offset)
    yield from _together(vmi, abi, table)


def _together(vmi: Vmi, abi: abis.Abi, table: int) -> Iterator[Finding]:
    types = {call.name: call.type for call in vmi.calls}
    for rule in abi.together:
        if types.get(rule["when"], 0) == 0:
            continue
        for name in rule["then"]:
            if types.get(name) != abi.relocation_types["CALL_REL"]:
                yield _error(
                    "table-together",
                    table + 8 * abi.calls[name].number + 4,
                    f"{name} must be CALL_REL where {rule['when']} is answered",
                )


def _state(image: Image, vmi: Vmi, block: Block) -> Iterator[Finding]:
    at = image.offset + block.state
    if len(vmi.state) != block.state_count:
        yield _error(
            "block-state",
            image.offset + _BLOCK_AT + 10,
            f"{len(vmi.state)} of {block.state_count} state fields are readable at {block.state:#x}",
        )
    if block.state_count and not block.virtual_top:
        yield _error("block-state", image.offset + _BLOCK_AT + 12, "state fields, but no page for them")
    taken: list[tuple[int, int, str]] = []
    for entry in vmi.state:
        if entry.size == 0 or entry.offset + entry.size > 4096:
            yield _error("state-field", at, f"state field {entry.name} lies outside its page")
        for start, end, other in taken:
            if entry.offset < end and start < entry.offset + entry.size:
                yield _error("state-overlap", at, f"state fields {other} and {entry.name} overlap")
        taken.append((entry.offset, entry.offset + entry.size, entry.name))


class _Walker:
    """Follows the code of stubs through the image, each instruction once."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.seen: set[int] = set()
        self.told: set[int] = set()

    def walk(self, label: str, start: int) -> Iterator[Finding]:
        data, base = self.image.data, self.image.offset
        todo = [start]
        steps = 0
        while todo and steps < _MAX_INSTRUCTIONS:
            at = todo.pop()
            if at in self.seen:
                continue
            self.seen.add(at)
            steps += 1
            found = decode_one(data, at) if at < len(data) else None
            if found is None or at + found[0] > len(data):
                what = "no instruction" if at < len(data) else "past the end"
                yield _error("stub-code", base + min(at, len(data)), f"{label}: its code reaches {at:#x}, {what}")
                continue
            size, mnemonic, operands = found
            if mnemonic == "int3":
                yield _error("stub-code", base + at, f"{label}: its code reaches the filling at {at:#x}")
                continue
            target = branch_target(mnemonic, operands)
            if target is not None:
                if 0x80 <= target < len(data):
                    todo.append(target)
                else:
                    yield _error("stub-jump", base + at, f"{label}: {mnemonic} to {target:#x}, out of the image")
            if mnemonic not in ENDS and mnemonic != "jmp":
                todo.append(at + size)
