"""Spec and ABI to ROM image.  Imports the specs, the stubs and the contract check.

The image, in order: header (with the slots, where the ABI has them), the private block's tables, PCIR, $PnP,
strings, 16-bit entry, code packed so that no stub of up to 32 bytes crosses a 32-byte line, checksum byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vmipatch.errors import RomError, SpecError
from vmipatch.rombuild import abi as abis
from vmipatch.rombuild import contract, entry
from vmipatch.rombuild import hypervisor as hypervisors
from vmipatch.rombuild.stubs import BASE_MARK, Stub, Writer, write_all

_LINE = 32  # a stub that fits one cache line of 2006 stays in one
_FILL = 0xCC
BLOCK_OFFSET = 0x20
BLOCK_MAGIC = b"vmiP"
BLOCK_VERSION = 1


@dataclass(frozen=True)
class Symbol:
    """A name in the ROM: offset and size in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Rom:
    """A built image: its bytes and what is where in it."""

    data: bytes
    abi: str
    hypervisor: str
    symbols: tuple[Symbol, ...]


def build(spec: str | hypervisors.Hypervisor, abi: str = "vmi-3.0", *, last: bool = True) -> Rom:
    """One image; ``last`` is False if another follows in the same ROM.

    Raises :class:`UsageError` for a pair that is not supported, :class:`SpecError`, :class:`AssemblyError` or
    :class:`RomError` for a spec that makes no sound ROM.
    """
    hv = hypervisors.load(spec) if isinstance(spec, str) else spec
    return _Builder(abis.require(abi), hv, last).build()


def build_many(spec: str | hypervisors.Hypervisor, names: Iterable[str]) -> list[Rom]:
    """A ROM of several images, one for each ABI, all but the last padded to the step of the guests' scan."""
    hv = hypervisors.load(spec) if isinstance(spec, str) else spec
    order = list(names)
    if len(set(order)) != len(order):
        raise RomError("one ABI given twice: a ROM holds one image for each")
    roms = [build(hv, name, last=name == order[-1]) for name in order]
    size = sum(len(rom.data) for rom in roms)
    if size > 65536:
        raise RomError(f"the images take {size} bytes together: a ROM has at most 65536")
    return roms


@dataclass
class _Builder:
    abi: abis.Abi
    hv: hypervisors.Hypervisor
    last: bool
    image: bytearray = field(default_factory=bytearray)
    symbols: list[Symbol] = field(default_factory=list)
    placed: dict[str, int] = field(default_factory=dict)
    pieces: list[Stub] = field(default_factory=list)
    slots: dict[str, int] = field(default_factory=dict)

    def build(self) -> Rom:
        abi = self.abi
        writer, stubs = write_all(abi, self.hv)
        contract.answers(abi, stubs)
        self.image = bytearray(self._fixed_size())
        table = self._tables()
        self._code(writer, stubs, table)
        self._finish(stubs, table)
        data = bytes(self.image)
        contract.check(abi, data, self.pieces, self.placed)
        return Rom(data, abi.name, self.hv.name, tuple(sorted(self.symbols, key=lambda s: (s.offset, s.name))))

    # -- data ------------------------------------------------------------------

    def _fixed_size(self) -> int:
        slot = self.abi.slot_size
        return int(self.abi.dispatch["header_size"]) if slot is None else slot * self.abi.count

    def _put(self, name: str, data: bytes, align: int = 1) -> int:
        """Append data; returns its offset."""
        self.image += bytes(-len(self.image) % align)
        offset = len(self.image)
        self.image += data
        self.symbols.append(Symbol(name, offset, len(data)))
        return offset

    def _string(self, name: str, text: str) -> int:
        return self._put(name, text.encode("ascii") + b"\0")

    def _field(self, name: str, value: int | bytes) -> None:
        offset, size = self.abi.header[name]
        raw = value if isinstance(value, bytes) else value.to_bytes(size, "little")
        self.image[offset : offset + size] = raw.ljust(size, b"\0")

    def _tables(self) -> int:
        """Everything that is not code, and the private block; returns the relocation table's offset."""
        hv, abi, identity = self.hv, self.abi, self.hv.identity
        table = self._put("relocation_table", bytes(8 * abi.count), 8)
        state = b"".join(
            place.offset.to_bytes(2, "little")
            + place.size.to_bytes(2, "little")
            + bytes([len(name)])
            + name.encode("ascii")
            for name, place in hv.state.items()
        )
        state_at = self._put("state_layout", state + bytes(5), 4)
        name_at = self._string("hypervisor_name", hv.name)
        abi_at = self._string("abi_name", abi.name)
        license_at = self._string("license", hv.license)
        maker_at = self._string("manufacturer", str(identity.get("manufacturer", "")))
        product_at = self._string("product", str(identity.get("product", hv.title)))
        version = "{}.{}".format(*hv.version)
        text_at = self._string("banner", f"{hv.name} {abi.name} {version}\r\n")
        pci_at = self._put("PCIR", self._pcir(), 4)
        pnp_at = self._put("PnP", self._pnp(maker_at, product_at), 16)
        entry_at = self._put("entry16", entry.entry(text_at), 4)
        self._field("rom_sig", b"\x55\xaa")
        self._field("rom_entry", entry.jump(entry_at))
        self._field("vrom_sig", b"cVmi")
        self._field("api_min", abi.minor)
        self._field("api_maj", abi.major)
        self._field("virtual_top" if "virtual_top" in abi.header else "private0", hv.virtual_top)
        if "license_off" in abi.header:
            self._field("license_off", license_at)
        self._field("pci_off", pci_at)
        self._field("pnp_off", pnp_at)
        words = (abi.count, table, state_at, len(hv.state), name_at, abi_at, abi.slot_size or 0, license_at)
        block = BLOCK_MAGIC + bytes([BLOCK_VERSION, abi.generation])
        block += b"".join(word.to_bytes(2, "little") for word in words)
        block += bytes(-len(block) % 4) + hv.virtual_top.to_bytes(4, "little")
        self.image[BLOCK_OFFSET : BLOCK_OFFSET + len(block)] = block
        return table

    def _pcir(self) -> bytes:
        identity = self.hv.identity
        base, sub, interface = identity.get("class", [5, 0x80, 0])
        return (
            b"PCIR"
            + int(identity.get("vendor", 0)).to_bytes(2, "little")
            + int(identity.get("device", 0)).to_bytes(2, "little")
            + bytes([0, 0, 0x18, 0, 0, interface, sub, base])
            + bytes([0, 0])  # length, filled in at the end
            + bytes([self.hv.version[1], self.hv.version[0], 0, 0x80 if self.last else 0, 0, 0])
        )

    def _pnp(self, maker: int, product: int) -> bytes:
        identity = self.hv.identity
        device = int(identity.get("vendor", 0)) | int(identity.get("device", 0)) << 16
        block = bytearray(32)
        block[0:6] = b"$PnP\x01\x02"
        block[10:14] = device.to_bytes(4, "little")
        block[14:16] = maker.to_bytes(2, "little")
        block[16:18] = product.to_bytes(2, "little")
        block[18:21] = bytes(identity.get("class", [5, 0x80, 0]))
        block[9] = -sum(block) & 0xFF
        return bytes(block)

    # -- code ------------------------------------------------------------------

    def _code(self, writer: Writer, stubs: list[Stub], table: int) -> None:
        abi = self.abi
        code = [stub for stub in stubs if stub.assembly.code]
        if abi.slot_size is None:
            # A NOP's eip is used by kernels that look at nothing else: let it be a plain return.
            nothing = writer.assembled("nothing", None, "", "ret", "(builder)", 1)
            code.append(nothing)
        wanted = [writer.init()]
        if "get_relocation" in abi.dispatch:
            wanted.append(writer.get_relocation(table, abi.count))
        code += wanted
        known = {stub.name for stub in code}
        queue = list(code)
        while queue:
            stub = queue.pop()
            for fixup in stub.assembly.fixups:
                if fixup.name in known:
                    continue
                routine = writer.routine(fixup.name)
                if routine is None:
                    raise SpecError(
                        f"no label and no routine is named {fixup.name!r}",
                        file=stub.file,
                        section=stub.name,
                        line=fixup.line,
                    )
                known.add(fixup.name)
                code.append(routine)
                queue.append(routine)
        self.pieces = code
        slots = self._slots(code)
        free: list[list[int]] = []
        for stub in sorted(code, key=lambda s: (-len(s.assembly.code), s.name)):
            if stub.name not in slots:
                self._pack(stub, free)
        for stub in code:
            self._link(stub)
        self._jumps(slots)

    def _slots(self, code: list[Stub]) -> dict[str, int]:
        """Find the offset of every slot by name, and place what fits its slot; returns what was placed."""
        slot = self.abi.slot_size
        inside: dict[str, int] = {}
        if slot is None:
            self.slots = {
                "VMI_Init": int(self.abi.dispatch["init"]),
                "GetRelocationInfo": int(self.abi.dispatch["get_relocation"]),
            }
            return inside
        for call in self.abi.calls.values():
            name = "VMI_Init" if call.init else "GetRelocationInfo" if call.get_relocation else call.name
            self.slots[name] = slot * call.number
        for stub in code:
            at = self.slots.get(stub.name)
            if at is None:
                continue
            self.image[at : at + slot] = bytes([_FILL]) * slot
            if len(stub.assembly.code) <= slot:
                self._place(stub, at)
                inside[stub.name] = at
        return inside

    def _pack(self, stub: Stub, free: list[list[int]]) -> None:
        size = len(stub.assembly.code)
        for hole in free:
            if hole[1] >= size:
                self._place(stub, hole[0])
                hole[0] += size
                hole[1] -= size
                return
        self.image += bytes([_FILL]) * (-len(self.image) % _LINE)
        at = len(self.image)
        room = -(-size // _LINE) * _LINE
        if at + room > self.abi.limits["max_bytes"]:
            raise RomError(
                f"does not fit: the image would pass {self.abi.limits['max_bytes']} bytes, the limit of "
                f"{self.abi.name}",
                file=f"{stub.file}:{stub.line}",
                section=stub.name,
            )
        self.image += bytes([_FILL]) * room
        self._place(stub, at)
        if room > size:
            free.append([at + size, room - size])

    def _place(self, stub: Stub, at: int) -> None:
        self.placed[stub.name] = at
        self.symbols.append(Symbol(stub.name, at, len(stub.assembly.code)))
        self.image[at : at + len(stub.assembly.code)] = stub.assembly.code

    def _link(self, stub: Stub) -> None:
        at = self.placed[stub.name]
        for fixup in stub.assembly.fixups:
            end = at + fixup.offset + fixup.size
            relative = self.placed[fixup.name] - end
            self.image[at + fixup.offset : end] = relative.to_bytes(fixup.size, "little", signed=True)
        mark = BASE_MARK.to_bytes(4, "little")
        for item in stub.assembly.items:
            if item.code.endswith(mark) and item.text.startswith("sub "):
                # The value that the POP in front of this took is the address of that POP, one byte long.
                value = at + item.offset - 1
                end = at + item.offset + len(item.code)
                self.image[end - 4 : end] = value.to_bytes(4, "little")

    def _jumps(self, inside: dict[str, int]) -> None:
        """From the slots and entries whose code lies elsewhere, a jump to it."""
        for name, at in self.slots.items():
            if name in inside or name not in self.placed:
                continue
            relative = self.placed[name] - at - 5
            self.image[at : at + 5] = b"\xe9" + relative.to_bytes(4, "little", signed=True)
            if self.abi.slot_size is None:
                self.image[at + 5 : at + int(self.abi.dispatch["entry_size"])] = b"\xcc" * 3
            self.symbols.append(Symbol(f"{name}.slot", at, 5))

    # -- the end ---------------------------------------------------------------

    def _finish(self, stubs: list[Stub], table: int) -> None:
        abi = self.abi
        for stub in stubs:
            assert stub.call is not None
            if stub.answer == "NONE":
                continue
            slot = abi.slot_size
            offset = self.placed["nothing" if stub.answer == "NOP" else stub.name]
            if slot is not None:
                offset = slot * stub.call.number
            self._answer(table, stub.call.number, abi.relocation_types[stub.answer], offset)
        for call in abi.calls.values():
            if call.init or call.get_relocation:
                self._answer(table, call.number, abi.relocation_types["CALL_REL"], (abi.slot_size or 0) * call.number)
        unit = abi.limits["unit"]
        # The last byte makes the sum right, so it must not be code's.
        step = unit if self.last else abi.limits["alignment"]
        self.image += bytes(-(len(self.image) + 1) % step + 1)
        units = len(self.image) // unit
        if units > abi.limits["max_units"] or len(self.image) > abi.limits["max_bytes"]:
            raise RomError(
                f"the image has {len(self.image)} bytes, {abi.name} allows {abi.limits['max_bytes']}",
                file=self.hv.file,
            )
        self._field("rom_len", units)
        pci = next(s.offset for s in self.symbols if s.name == "PCIR")
        self.image[pci + 0x10 : pci + 0x12] = units.to_bytes(2, "little")
        self.image[-1] = -sum(self.image) & 0xFF

    def _answer(self, table: int, number: int, kind: int, offset: int) -> None:
        self.image[table + 8 * number : table + 8 * number + 8] = offset.to_bytes(4, "little") + bytes([kind, 0, 0, 0])
