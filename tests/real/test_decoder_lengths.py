"""The decoder's lengths against capstone's, over all code of real programs; each disagreement is named and judged.

The 32-bit kernels of Debian (their .text) and memtest86+ (its whole loaded image, code and data) are swept from
instruction to instruction.  Where the two disagree, the manual decides, and the sweep goes on behind the
instruction as the manual has it.  SDM is Intel's "64 and IA-32 Architectures Software Developer's Manual", APM is
AMD's "AMD64 Architecture Programmer's Manual".
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest

from vmipatch.emu.cpu import COMPILED, Cpu, Exit, Memory
from vmipatch.emu.cpu.engine import api
from vmipatch.image import open_image

from .kernels import KERNELS
from .packages import RegistryAway, fetch

pytestmark = pytest.mark.skipif(not COMPILED, reason="NOT TESTED: the engine is not compiled, this would take an hour")

UNDEFINED = -3  # the decoder's word for "no instruction"
PREFIXES = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))

# What both read the same way, but that came later than the processor that is emulated: #UD there, as its CPUID says.
LATER = {
    "0f c3": "MOVNTI: SSE2 (SDM 2, MOVNTI)",
    "0f 77": "EMMS: MMX (SDM 2, EMMS)",
    "0f ae /2": "LDMXCSR: SSE (SDM 2, LDMXCSR)",
    "0f ae /4": "XSAVE (SDM 2, XSAVE)",
    "0f ae /5": "XRSTOR (SDM 2, XRSTOR)",
    "0f ae /7": "CLFLUSH, CLFLUSHOPT (SDM 2, CLFLUSH)",
    "0f ae e8": "LFENCE: SSE2 (SDM 2, LFENCE)",
    "0f ae f0": "MFENCE: SSE2 (SDM 2, MFENCE)",
    "0f ae f8": "SFENCE: SSE (SDM 2, SFENCE)",
    "66 0f ae /6": "TPAUSE: WAITPKG (SDM 2, TPAUSE)",
    "0f c7 /3": "XRSTORS (SDM 2, XRSTORS)",
    "0f c7 /5": "XSAVES (SDM 2, XSAVES)",
    "0f c7 /6": "RDRAND (SDM 2, RDRAND)",
    "0f c7 /7": "RDSEED (SDM 2, RDSEED)",
    "0f 01 c8": "MONITOR: SSE3 (SDM 2, MONITOR)",
    "0f 01 c9": "MWAIT: SSE3 (SDM 2, MWAIT)",
    "0f 01 d0": "XGETBV (SDM 2, XGETBV)",
    "0f 01 d1": "XSETBV (SDM 2, XSETBV)",
    "0f 01 d9": "VMMCALL: SVM (APM 3, VMMCALL)",
    "0f 01 dc": "STGI: SVM (APM 3, STGI)",
    "0f 01 fa": "MONITORX (APM 3, MONITORX)",
    "0f 01 fb": "MWAITX (APM 3, MWAITX)",
    "66 0f 38 82": "INVPCID (SDM 2, INVPCID)",
}
SERIALIZE = b"\x0f\x01\xe8"  # of later processors (SDM 2, SERIALIZE), and younger than this capstone
UD1 = "UD1 has a ModRM byte (SDM 2, UD: 0F B9 /r); capstone leaves it out. Ours is right"
UD0 = "UD0: #UD whatever its length (SDM 2, UD: some processors read no ModRM byte). No instruction to either"
SECOND = {(0xD9, 0xD8): "FSTP", (0xDD, 0xC8): "FXCH", (0xDF, 0xC0): "FFREEP", (0xDF, 0xC8): "FXCH"}
SECOND |= {(0xDF, 0xD0): "FSTP", (0xDF, 0xD8): "FSTP"}
RESERVED = {
    "x87": "a reserved x87 encoding: no length is defined (SDM 2, A.5.2)",
    "8e": "MOV to a segment register that does not exist: #UD (SDM 2, MOV)",
}


@dataclass
class Group:
    """Disagreements about one encoding."""

    reason: str
    count: int = 0
    example: str = ""


@dataclass
class Sweep:
    """What a sweep found; ``unexplained`` is the test's verdict."""

    instructions: int = 0
    undecodable: list[str] = field(default_factory=list)
    groups: dict[str, Group] = field(default_factory=dict)
    unexplained: list[str] = field(default_factory=list)

    def show(self, name: str) -> str:
        """The list, one line a group."""
        total = sum(group.count for group in self.groups.values())
        lines = [
            f"{name}: {self.instructions:,} instructions, {total} of another length in capstone; "
            f"{len(self.undecodable)} bytes begin no instruction in either: {', '.join(self.undecodable[:10])}"
        ]
        for key, group in sorted(self.groups.items(), key=lambda item: -item[1].count):
            lines.append(f"  {group.count:5} x {key:<12} e.g. {group.example}: {group.reason}")
        return "\n".join(lines + self.unexplained)


class Bus:
    """No device is met."""


@pytest.fixture(scope="module")
def cpu() -> Cpu:
    return Cpu(Memory(1 << 16, 1 << 16), Bus())


def encoding(code: bytes) -> str:
    """The opcode as the manual writes it: bytes, the 66 prefix of what it belongs to, and /digit or the ModRM byte."""
    at = 0
    while code[at] in PREFIXES:
        at += 1
    operand_size = 0x66 in code[:at]
    if code[at] != 0x0F:
        return f"{code[at]:02x}"
    if code[at + 1] in (0x38, 0x3A):
        return ("66 " if operand_size else "") + code[at : at + 3].hex(" ")
    name = code[at : at + 2].hex(" ")
    if code[at + 1] not in (0x01, 0xAE, 0xC7):
        return name
    modrm = code[at + 2]
    digit = f"/{modrm >> 3 & 7}"
    if name == "0f c7" or modrm < 0xC0:
        return f"{name} {digit}"
    return f"66 {name} {digit}" if operand_size else f"{name} {modrm:02x}"


def undefined_when_executed(code: bytes) -> bool:
    """Whether the engine raises #UD for it, with every segment flat and the x87 unit at hand."""
    memory = Memory(1 << 16, 1 << 16)
    memory.map(0, 1 << 16, 0)
    cpu = Cpu(memory, Bus())
    cpu.set("cr0", 0x11)
    cpu.set_segment("cs", 8, 0, 0xFFFFFFFF, 0xC09B)
    for name in ("ss", "ds", "es"):
        cpu.set_segment(name, 16, 0, 0xFFFFFFFF, 0xC093)
    cpu.set("eip", 0x1000)
    memory.write(0x1000, code)
    for vector in range(32):
        cpu.hook_vector(vector)
    reason = cpu.run(cpu.instructions + 1)
    return bool(reason == Exit.VECTOR and cpu.exit_vector == 6)


def judge(code: bytes, theirs: int, ours: int) -> str:
    """Why the lengths differ, by the manual; "" where that is not known."""
    name = encoding(code)
    if name == "0f b9" and ours > 0:
        return UD1
    if name == "0f ff" and ours == UNDEFINED:
        return UD0
    if theirs > 0 and ours == UNDEFINED and name in LATER:
        return f"{LATER[name]}: of a later processor"
    if theirs == 0 and ours == 2 and (code[0], code[1] & 0xF8) in SECOND:
        return f"a second encoding of {SECOND[code[0], code[1] & 0xF8]}, which every processor has and no manual names"
    if theirs == 0 and (int(name[:2], 16) & 0xF8 == 0xD8 or name == "8e") and undefined_when_executed(code[:15]):
        return RESERVED["8e" if name == "8e" else "x87"]
    return ""


def sweep(cpu: Cpu, code: bytes, address: int) -> Sweep:
    """Every instruction of ``code``, one behind the other, by both decoders."""
    import capstone

    disassembler: Any = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    length = api.decode_length
    found = Sweep()
    at, end = 0, len(code)

    def disagree(theirs: int, ours: int, text: str) -> None:
        piece = code[at : at + 16].ljust(16, b"\x90")
        reason = judge(piece, theirs, ours)
        size = max(theirs, ours)
        example = f"{address + at:#x} {piece[:size].hex(' ')} ({text}, {theirs}; ours {ours})"
        if not reason:
            found.unexplained.append(f"NOT EXPLAINED: {example}")
            return
        key = piece[:2].hex(" ") if theirs == 0 else encoding(piece)
        group = found.groups.setdefault(key, Group(reason))
        group.count += 1
        group.example = group.example or example

    while at < end:
        for start, size, mnemonic, operands in disassembler.disasm_lite(code[at : at + (1 << 20)], at):
            at = start
            found.instructions += 1
            ours = length(cpu, code[at : at + 16], 1)
            if ours != size:
                disagree(size, ours, f"{mnemonic} {operands}".strip())
                at += ours if ours > 0 else size
                break  # capstone goes on behind what it took: begin again where the manual does
            at += size
        else:
            if at >= end or next(disassembler.disasm_lite(code[at : at + 16], at), None) is not None:
                continue  # the piece ended inside an instruction
            ours = length(cpu, code[at : at + 16], 1)
            if ours > 0:
                found.instructions += 1
                disagree(0, ours, "nothing")
                at += ours
            else:
                found.undecodable.append(f"{address + at:#x} {code[at : at + 3].hex(' ')}")
                at += 3 if code[at : at + 3] == SERIALIZE else 1
    return found


@pytest.mark.parametrize("name", ["686", "686-pae"])
def test_every_instruction_of_a_kernel(cpu: Cpu, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        image = open_image(KERNELS[name].fetch())
    except RegistryAway as away:
        pytest.skip(f"NOT TESTED: no kernel {name}: {away}")
    text = next(section for section in image.sections if section.name == ".text")
    found = sweep(cpu, bytes(image.data[text.offset : text.offset + text.size]), text.address)
    with capsys.disabled():
        print(f"\n{found.show(f'.text of {name}')}")
    assert not found.unexplained
    assert found.instructions > 2_500_000
    assert all(place.endswith(SERIALIZE.hex(" ")) for place in found.undecodable)
    assert set(found.groups) <= {"0f b9", *LATER}


def test_every_instruction_of_memtest(cpu: Cpu, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        tree = fetch(r"memtest86\+", "amd64")
    except RegistryAway as away:
        pytest.skip(f"NOT TESTED: no memtest86+: {away}")
    image = (tree / "boot" / "memtest86+ia32.bin").read_bytes()
    # The 32-bit part follows the setup sectors (Linux boot protocol, setup_sects) and is loaded at 1 MiB.
    found = sweep(cpu, image[512 * (image[0x1F1] + 1) :], 0x100000)
    with capsys.disabled():
        print(f"\n{found.show('memtest86+, code and data')}")
    assert not found.unexplained
    assert found.instructions > 30_000


def test_the_sweep_sees_a_decoder_that_is_wrong(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """One opcode in 256 read a byte too long, or not at all, is found and not explained away."""
    true_length = api.decode_length
    code = b"\x89\xd8\xa9\x01\x02\x03\x04\x0f\xaf\xc3\xc3" * 40
    for wrong in (0xA9, 0xC3, 0x89):
        for change in (1, UNDEFINED):

            def length(c: Cpu, piece: bytes, wide: int, wrong: int = wrong, change: int = change) -> int:
                size: int = true_length(c, piece, wide)
                return size if piece[0] != wrong else size + 1 if change == 1 else UNDEFINED

            monkeypatch.setattr(api, "decode_length", length)
            assert sweep(cpu, code, 0).unexplained, (wrong, change)
    monkeypatch.undo()
    assert sweep(cpu, code, 0).unexplained == []


def test_16_bit_code_has_capstones_lengths_too(cpu: Cpu) -> None:
    """The real-mode parts of both boot images are too small to sweep: random instructions stand in for them."""
    import capstone

    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_16)
    rng = random.Random(686)
    wrong: defaultdict[str, int] = defaultdict(int)
    compared = 0
    for _ in range(100_000):
        code = rng.randbytes(16)
        theirs = next(disassembler.disasm_lite(code, 0), None)
        ours = api.decode_length(cpu, code, 0)
        if theirs is None or ours < 0:
            continue
        compared += 1
        if ours != theirs[1] and encoding(code) != "0f b9":
            wrong[encoding(code)] += 1
    assert compared > 50_000
    assert not wrong
