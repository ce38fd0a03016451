"""Afterburn sites that call into a ROM: the sensitive instruction decoded, a call sequence of the same effect.

A call may change EAX, ECX, EDX and the flags (the ABI's contract), the
instruction that it replaces may not: all registers are saved around it and the
result is put into the saved image of its destination (PUSHAD, Intel SDM vol. 2:
EDI at the stack's top, EAX 28 bytes above).  Flags after CLI, STI and the other
replaced instructions are lost, as the VMI contract says of every call.
What does not fit into the site, or has no call, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vmipatch.annotate import Site
from vmipatch.errors import PatchError
from vmipatch.isa import branch
from vmipatch.isa.nops import table
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rom import OPCODE, Rom
from vmipatch.patch.text import Text
from vmipatch.rombuild.relocations import RelocationType

PUSHAD, POPAD = b"\x60", b"\x61"
_REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")


@dataclass(frozen=True, slots=True)
class Sequence:
    """Bytes before and after one call of the ROM; ``jump`` where a 3.0 ROM is jumped to and no byte may follow."""

    call: str
    before: bytes = b""
    after: bytes = b""


class _Refusal(Exception):
    """Why an instruction has no call sequence."""


def plan(text: Text, sites: Iterable[Site], rom: Rom) -> Iterator[Patch]:
    """One patch a site; :class:`PatchError` names the first site that cannot call the ROM."""
    nops = table("single")
    for site in sites:
        old = text.read(site.address, site.length)
        try:
            sequence = sequence_for(old)
            new = _assemble(site, sequence, rom)
        except _Refusal as refusal:
            raise PatchError(
                f"{site.op}: {refusal}", file=text.image.path, section=site.section, address=site.address
            ) from None
        if new is None:
            new, reason = old, "the ROM answers NONE: native code stays"
        elif len(new) > site.length:
            raise PatchError(
                f"{site.op}: the call sequence takes {len(new)} bytes, the site has {site.length}",
                file=text.image.path, section=site.section, address=site.address,
            )  # fmt: skip
        else:
            new, reason = new + nops.fill(site.length - len(new)), f"{sequence.call} of {rom.name}"
        text.write(site.address, new)
        yield Patch(site.address, old, new, Cause("afterburn", site.op, reason), site)


def _assemble(site: Site, sequence: Sequence, rom: Rom) -> bytes | None:
    number = rom.number(sequence.call)
    if number is None:
        raise _Refusal(f"{rom.relocations.abi} has no call {sequence.call}")
    kind = rom.relocations.of(number).type
    if kind is RelocationType.NONE:
        return None
    if kind is RelocationType.NOP:
        return b""
    at = site.address + len(sequence.before)
    return sequence.before + branch.near(OPCODE[kind], at, rom.target(number), 32) + sequence.after


def sequence_for(code: bytes) -> Sequence:
    """The call sequence for the instruction that ``code`` starts with; raises for one that has none."""
    import capstone

    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    decoder.detail = True
    found = next(decoder.disasm(code, 0, 1), None)
    if found is None:
        raise _Refusal("its first byte starts no instruction")
    rule = _RULES.get(found.mnemonic)
    if rule is None:
        raise _Refusal("no VMI call does this")
    return rule(found, code[: found.size])


def _plain(call: str) -> Callable[[Any, bytes], Sequence]:
    """Interrupt calls change no register; IRET does not come back; CPUID's results are the instruction's own."""
    return lambda found, code: Sequence(call)


def _saved(call: str) -> Callable[[Any, bytes], Sequence]:
    return lambda found, code: Sequence(call, PUSHAD, POPAD)


def _into_edx_eax(call: str) -> Callable[[Any, bytes], Sequence]:
    """Results in EDX:EAX as the instruction has them; only ECX needs saving."""
    return lambda found, code: Sequence(call, b"\x51", b"\x59")


def _push_flags(found: Any, code: bytes) -> Sequence:
    """push eax; call; xchg [esp], eax."""
    return Sequence("GetInterruptMask", b"\x50", b"\x87\x04\x24")


def _pop_flags(found: Any, code: bytes) -> Sequence:
    """xchg [esp], eax; call; xchg [esp], eax; popfd: the mask by the call, the other flags by POPFD."""
    return Sequence("SetInterruptMask", b"\x87\x04\x24", b"\x87\x04\x24\x9d")


def _store(register: int) -> bytes:
    """mov [esp + saved register], eax."""
    return bytes((0x89, 0x44, 0x24, 4 * (7 - register)))


def _register(found: Any, position: int) -> int:
    name = found.reg_name(found.operands[position].reg)
    if name not in _REGISTERS or name == "esp":
        raise _Refusal(f"not with {name}")
    return _REGISTERS.index(name)


def _move(found: Any, code: bytes) -> Sequence:
    """MOV to and from control and debug registers (``0F 20`` to ``0F 23``)."""
    kinds = {0x20: "GetCR", 0x21: "GetDR", 0x22: "SetCR", 0x23: "SetDR"}
    if found.opcode[0] != 0x0F or found.opcode[1] not in kinds:
        raise _Refusal("no VMI call does this")
    kind = kinds[found.opcode[1]]
    special, general = code[-1] >> 3 & 7, code[-1] & 7
    if general == 4:
        raise _Refusal("not with esp")
    number = b""
    name = f"{kind}{special}"
    if kind.endswith("DR"):
        name, number = kind, bytes((0x6A, special, 0x58))
    if kind.startswith("Get"):
        return Sequence(name, PUSHAD + number, _store(general) + POPAD)
    wanted = 2 if kind == "SetDR" else 0
    move = b"" if general == wanted else bytes((0x89, 0xC0 | general << 3 | wanted))
    return Sequence(name, PUSHAD + move + number, POPAD)


def _address(call: str) -> Callable[[Any, bytes], Sequence]:
    """LGDT, LIDT, INVLPG …: the operand's address in EAX, by LEA with the same ModRM."""

    def rule(found: Any, code: bytes) -> Sequence:
        operand = found.operands[0].mem
        if "esp" in (found.reg_name(operand.base), found.reg_name(operand.index)):
            raise _Refusal("not with an operand on the stack: saving registers moves it")
        if found.addr_size != 4 or found.prefix[1]:
            raise _Refusal("not with an address prefix or a segment override")
        # 0F 01 /r: LEA EAX takes the ModRM with its reg field cleared, then SIB and displacement as they are.
        at = found.modrm_offset
        return Sequence(call, PUSHAD + bytes((0x8D, code[at] & 0xC7)) + code[at + 1 :], POPAD)

    return rule


def _load_selector(call: str) -> Callable[[Any, bytes], Sequence]:
    """LLDT, LTR: movzx eax, operand."""

    def rule(found: Any, code: bytes) -> Sequence:
        at = found.modrm_offset
        if code[at] >> 6 != 3:
            raise _Refusal("only with a register operand")
        return Sequence(call, PUSHAD + bytes((0x0F, 0xB7, code[at] & 0xC7)), POPAD)

    return rule


def _store_selector(call: str) -> Callable[[Any, bytes], Sequence]:
    def rule(found: Any, code: bytes) -> Sequence:
        at = found.modrm_offset
        if code[at] >> 6 != 3 or found.prefix[2]:
            raise _Refusal("only with a 32-bit register operand")
        return Sequence(call, PUSHAD, _store(code[at] & 7) + POPAD)

    return rule


def _port(code: bytes) -> bytes:
    """xor edx, edx; mov dl, port: for the forms whose port is an immediate byte."""
    return b"\x31\xd2\xb2" + code[-1:] if code[-2] & 0xF8 == 0xE0 else b""


def _in(found: Any, code: bytes) -> Sequence:
    size = found.operands[0].size
    store = {1: b"\x88\x44\x24\x1c", 2: b"\x66\x89\x44\x24\x1c", 4: b"\x89\x44\x24\x1c"}[size]
    port = _port(code) if len(code) > 1 else b""
    return Sequence({1: "INB", 2: "INW", 4: "IN"}[size], PUSHAD + port, store + POPAD)


def _out(found: Any, code: bytes) -> Sequence:
    size = found.operands[1].size
    port = _port(code) if len(code) > 1 else b""
    return Sequence({1: "OUTB", 2: "OUTW", 4: "OUT"}[size], PUSHAD + port, POPAD)


_RULES: dict[str, Callable[[Any, bytes], Sequence]] = {
    "cli": _plain("DisableInterrupts"),
    "sti": _plain("EnableInterrupts"),
    "pushfd": _push_flags,
    "popfd": _pop_flags,
    "iretd": _plain("IRET"),
    "cpuid": _plain("CPUID"),
    "hlt": _saved("Halt"),
    "clts": _saved("CLTS"),
    "wbinvd": _saved("WBINVD"),
    "invd": _saved("INVD"),
    "wrmsr": _saved("WRMSR"),
    "rdmsr": _into_edx_eax("RDMSR"),
    "rdpmc": _into_edx_eax("RDPMC"),
    "rdtsc": _into_edx_eax("RDTSC"),
    "mov": _move,
    "lgdt": _address("SetGDT"),
    "lidt": _address("SetIDT"),
    "sgdt": _address("GetGDT"),
    "sidt": _address("GetIDT"),
    "invlpg": _address("InvalPage"),
    "lldt": _load_selector("SetLDT"),
    "ltr": _load_selector("SetTR"),
    "sldt": _store_selector("GetLDT"),
    "str": _store_selector("GetTR"),
    "in": _in,
    "out": _out,
}
