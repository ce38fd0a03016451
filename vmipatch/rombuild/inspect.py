"""Any option ROM, read: images, headers, VMI call table.  Shares no code with the writer.

Offsets are in bytes from the start of the ROM file, but for those in a header, which count from their image.
Reads facts through :mod:`~vmipatch.rombuild.abi`; capstone only where stubs are disassembled.

Layouts: PCI Firmware Specification 3.0 section 5 (option ROM header, PCIR), Plug and Play BIOS Specification
1.0a section 3.2 ($PnP), Linux 2.6.32 asm/vmi.h (the VMI header), docs/abis.md (the private block of our ROMs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vmipatch.errors import RomError
from vmipatch.rombuild import abi as abis
from vmipatch.rombuild.relocations import Relocation, Relocations, RelocationType

MAX_FILE = 32 * 1024 * 1024  # bytes; the largest flash parts that carry option ROMs
_MAX_IMAGES = 64
_MAX_PNP = 16
_VMI = b"cVmi"
_BLOCK = 0x20
CODE_TYPES = {0: "x86 PC-AT", 1: "Open Firmware", 2: "HP PA-RISC", 3: "EFI"}


@dataclass(frozen=True)
class Pci:
    """The PCIR block; lengths in 512-byte units, ``length`` in bytes."""

    offset: int
    vendor: int
    device: int
    length: int
    revision: int
    class_code: tuple[int, int, int]  # base, sub, interface
    image_units: int
    rom_version: tuple[int, int]
    code_type: int
    last: bool


@dataclass(frozen=True)
class Pnp:
    """One $PnP block of the chain."""

    offset: int
    revision: int
    length: int  # bytes
    next: int
    checksum: int  # byte sum of the block, 0 if right
    device_id: int
    manufacturer: str | None
    product: str | None
    manufacturer_offset: int
    product_offset: int


@dataclass(frozen=True)
class Block:
    """The private block at 0x20 of ROMs of ours, as it stands: nothing in it has been checked."""

    version: int
    generation: int
    count: int
    table: int
    state: int
    state_count: int
    hypervisor: str | None
    abi: str | None
    slot_size: int
    virtual_top: int


@dataclass(frozen=True)
class Field:
    """A named field of the state page: offset and size in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Vmi:
    """The VMI header. ``abi`` is the ABI it was read as; ``fields`` all header fields by name."""

    major: int
    minor: int
    abi: str | None
    fields: dict[str, int]
    license: str | None
    virtual_top: int
    block: Block | None
    state: tuple[Field, ...]
    calls: tuple[CallEntry, ...]


@dataclass(frozen=True)
class CallEntry:
    """One call's answer: the raw type and offset of the table (or the slot)."""

    number: int
    name: str
    type: int
    offset: int
    padding: int = 0


@dataclass
class Image:
    """One image: ``offset`` in the file, ``data`` as far as the file has it, ``units`` as the header says."""

    offset: int
    units: int
    data: bytes
    missing: int  # bytes that the header promises and the file does not hold
    entry: bytes = b""
    efi: bool = False
    pci_pointer: int = 0
    pnp_pointer: int = 0
    pci: Pci | None = None
    pnp: list[Pnp] = field(default_factory=list)
    vmi: Vmi | None = None

    @property
    def byte_sum(self) -> int:
        """The 8-bit sum over the image: 0 if the checksum is right."""
        return sum(self.data) & 0xFF


@dataclass(frozen=True)
class Instruction:
    """One instruction of a stub; ``offset`` from the image."""

    offset: int
    code: bytes
    text: str


def images(rom: bytes) -> list[Image]:
    """All images of a ROM file, by the chain of their PCIR blocks.

    Raises :class:`RomError` if the file does not begin with an option ROM.
    """
    if len(rom) > MAX_FILE:
        raise RomError(f"{len(rom)} bytes: more than {MAX_FILE >> 20} MiB is no option ROM")
    if rom[:2] != b"\x55\xaa" or len(rom) < 3:
        what = "the file is empty" if not rom else f"it begins with {rom[:2].hex(' ')}, not 55 aa"
        raise RomError(f"not an option ROM: {what}", offset=0)
    found: list[Image] = []
    offset = 0
    while offset + 3 <= len(rom) and rom[offset : offset + 2] == b"\x55\xaa" and len(found) < _MAX_IMAGES:
        image = _image(rom, offset)
        found.append(image)
        # A PCIR says how long its image is on the medium; the byte at 2 how much of it is run.
        units = image.pci.image_units if image.pci and image.pci.image_units else image.units
        if units == 0 or (image.pci is not None and image.pci.last):
            break
        offset += 512 * units
    return found


def relocations(rom: bytes, generation: int | None = None) -> Relocations:
    """What GetRelocationInfo of a ROM of ours answers, from its table, without running it.

    The first VMI image counts, or the first of that ``generation``. Raises :class:`RomError` for a file that is
    no option ROM, has no such VMI image, is not ours, or whose table is damaged.
    """
    candidates = [image for image in images(rom) if image.vmi is not None]
    if not candidates:
        raise RomError("no VMI image in this ROM")
    ours = [i for i in candidates if i.vmi and i.vmi.block is not None]
    if not ours:
        raise RomError("a VMI ROM that is not ours: it must be run to know where its calls are")
    if generation is not None:
        ours = [i for i in ours if i.vmi and i.vmi.block and i.vmi.block.generation == generation]
        if not ours:
            raise RomError(f"no image of generation {generation} in this ROM")
    image = ours[0]
    vmi = image.vmi
    assert vmi is not None
    assert vmi.block is not None
    block = vmi.block
    if image.missing or vmi.abi is None or block.abi != vmi.abi or block.hypervisor is None:
        raise RomError("its private block is damaged (see rom check)", offset=image.offset + _BLOCK)
    abi = abis.load(vmi.abi)
    calls: dict[int, Relocation] = {}
    for entry in vmi.calls:
        where = image.offset + block.table + 8 * entry.number
        if entry.type not in abi.relocation_types.values() or entry.padding:
            raise RomError(f"call {entry.number} has relocation type {entry.type}", offset=where)
        if entry.type and not 0 < entry.offset < len(image.data):
            raise RomError(f"call {entry.number} points out of the image, to {entry.offset:#x}", offset=where)
        calls[entry.number] = Relocation(RelocationType(entry.type), entry.offset)
    if len(calls) != abi.count:
        raise RomError("its relocation table is cut short", offset=image.offset + block.table)
    return Relocations(
        abi=vmi.abi,
        generation=abi.generation,
        hypervisor=block.hypervisor,
        calls=calls,
        slot_size=abi.slot_size,
        virtual_top=vmi.virtual_top,
        image_offset=image.offset,
        image_size=len(image.data),
    )


def disassemble(image: Image, offset: int, limit: int = 96) -> list[Instruction]:
    """A stub from its first instruction to where no path goes on, at most ``limit`` instructions."""
    out: list[Instruction] = []
    reach = offset  # the furthest target of a forward branch so far
    while len(out) < limit:
        found = decode_one(image.data, offset)
        if found is None:
            out.append(Instruction(offset, image.data[offset : offset + 1], "(bad)"))
            break
        size, mnemonic, operands = found
        out.append(Instruction(offset, image.data[offset : offset + size], f"{mnemonic} {operands}".strip()))
        target = branch_target(mnemonic, operands)
        if mnemonic == "jmp" and len(out) == 1 and target is not None and 0x80 <= target < len(image.data):
            offset = reach = target  # a slot too small for its stub: show the stub
            continue
        if target is not None and mnemonic != "call" and offset < target < offset + 256:
            reach = max(reach, target)
        offset += size
        stops = mnemonic in ENDS or (
            mnemonic == "jmp" and (target is None or target >= offset + 256 or target < offset)
        )
        if (stops or mnemonic == "jmp") and offset > reach:
            break
        if offset >= len(image.data):
            break
    return out


ENDS = frozenset(["ret", "retf", "iretd", "iret", "sysexit", "sysret", "ud2"])


def decode_one(data: bytes, offset: int) -> tuple[int, str, str] | None:
    """Size, mnemonic and operands of the 32-bit instruction at an offset, None if there is none."""
    from vmipatch.isa.decode import engine

    if data[offset : offset + 5] == b"\x0f\x0bxen":
        return 5, "(xen)", "emulate the next"  # begins like UD2, but Xen goes on behind it
    for _, size, mnemonic, operands in engine(32).disasm_lite(data[offset : offset + 15], offset, 1):
        return size, mnemonic, operands
    return None


def branch_target(mnemonic: str, operands: str) -> int | None:
    """Where a direct branch goes, None for what is none; may lie outside the image."""
    if not (mnemonic[0] == "j" or mnemonic in ("call", "loop", "loope", "loopne")):
        return None
    try:
        return int(operands, 0)
    except ValueError:
        return None


def _u16(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")


def _u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")


def string_at(data: bytes, offset: int, limit: int = 256) -> str | None:
    """The NUL-terminated printable ASCII string there, None if there is none."""
    if not 0 < offset < len(data):
        return None
    end = data.find(b"\0", offset, offset + limit)
    if end < 0:
        return None
    raw = data[offset:end]
    return raw.decode("ascii") if all(0x20 <= b < 0x7F for b in raw) else None


def _image(rom: bytes, offset: int) -> Image:
    head = rom[offset : offset + 0x20]
    efi = _u32(head, 4) == 0x0EF1 and len(head) == 0x20
    units = _u16(head, 2) if efi else head[2]
    pci_pointer, pnp_pointer = _u16(head, 0x18), _u16(head, 0x1A)
    pci = _pci(rom, offset, pci_pointer)
    if efi and pci is not None:
        units = pci.image_units
    size = 512 * units
    data = rom[offset : offset + size]
    image = Image(offset, units, data, size - len(data), head[3:7], efi, pci_pointer, 0 if efi else pnp_pointer)
    image.pci = pci
    if not efi:
        image.pnp = list(_pnp_chain(data, pnp_pointer))
        if data[8:12] == _VMI and len(data) >= 0x90:
            image.vmi = _vmi(data)
    return image


def _pci(rom: bytes, offset: int, pointer: int) -> Pci | None:
    block = rom[offset + pointer : offset + pointer + 0x18]
    if not pointer or len(block) < 0x18 or block[:4] != b"PCIR":
        return None
    return Pci(
        offset=pointer,
        vendor=_u16(block, 4),
        device=_u16(block, 6),
        length=_u16(block, 0x0A),
        revision=block[0x0C],
        class_code=(block[0x0F], block[0x0E], block[0x0D]),
        image_units=_u16(block, 0x10),
        rom_version=(block[0x13], block[0x12]),
        code_type=block[0x14],
        last=bool(block[0x15] & 0x80),
    )


def _pnp_chain(data: bytes, pointer: int) -> Iterator[Pnp]:
    seen: set[int] = set()
    while pointer and pointer not in seen and len(seen) < _MAX_PNP:
        seen.add(pointer)
        block = data[pointer : pointer + 0x20]
        if len(block) < 0x20 or block[:4] != b"$PnP":
            return
        length = 16 * block[5]
        maker, product = _u16(block, 0x0E), _u16(block, 0x10)
        yield Pnp(
            offset=pointer,
            revision=block[4],
            length=length,
            next=_u16(block, 6),
            checksum=sum(data[pointer : pointer + length]) & 0xFF,
            device_id=_u32(block, 0x0A),
            manufacturer=string_at(data, maker),
            product=string_at(data, product),
            manufacturer_offset=maker,
            product_offset=product,
        )
        pointer = _u16(block, 6)


def _vmi(data: bytes) -> Vmi:
    major, minor = data[0x0D], data[0x0C]
    block = _block(data)
    candidates = abis.by_version(major, minor)
    name = block.abi if block and block.abi in candidates else (candidates[0] if candidates else None)
    fields: dict[str, int] = {}
    calls: list[CallEntry] = []
    top = 0
    license_: str | None = None
    if name is not None:
        abi = abis.load(name)
        fields = {
            key: int.from_bytes(data[at : at + size], "little") for key, (at, size) in abi.header.items() if size <= 4
        }
        top = fields.get("virtual_top", block.virtual_top if block else 0)
        license_ = string_at(data, fields.get("license_off", 0))
        calls = list(_calls(data, abi, block))
    return Vmi(major, minor, name, fields, license_, top, block, _state(data, block), tuple(calls))


def _block(data: bytes) -> Block | None:
    if data[_BLOCK : _BLOCK + 4] != b"vmiP":
        return None
    count, table, state, state_count, name, abi, slot = (_u16(data, _BLOCK + 6 + 2 * n) for n in range(7))
    return Block(
        version=data[_BLOCK + 4],
        generation=data[_BLOCK + 5],
        count=count,
        table=table,
        state=state,
        state_count=state_count,
        hypervisor=string_at(data, name),
        abi=string_at(data, abi),
        slot_size=slot,
        virtual_top=_u32(data, _BLOCK + 24),
    )


def _state(data: bytes, block: Block | None) -> tuple[Field, ...]:
    out: list[Field] = []
    at = block.state if block else 0
    for _ in range(min(block.state_count, 256) if block else 0):
        size = data[at + 4] if at + 5 <= len(data) else 0
        raw = data[at + 5 : at + 5 + size]
        if not size or len(raw) < size or not raw.isascii():
            break
        out.append(Field(raw.decode("ascii"), _u16(data, at), _u16(data, at + 2)))
        at += 5 + size
    return tuple(out)


def _calls(data: bytes, abi: abis.Abi, block: Block | None) -> Iterator[CallEntry]:
    """The table of our ROMs; for a ROM with slots that is not ours, the slots."""
    names = abi.numbers
    if block is not None:
        for number in range(min(block.count, abi.count)):
            entry = data[block.table + 8 * number : block.table + 8 * number + 8]
            if len(entry) == 8:
                name = names.get(number, "(header)" if number < 4 and abi.slot_size else "(unused)")
                yield CallEntry(number, name, entry[4], _u32(entry, 0), int.from_bytes(entry[5:8], "little"))
    elif abi.slot_size is not None:
        for number, name in sorted(names.items()):
            if (number + 1) * abi.slot_size <= len(data):
                yield CallEntry(number, name, 1, number * abi.slot_size)
