"""Sensitive instructions by hand: bytes from the opcode columns of the manuals, none from our own decoder.

SDM: Intel's "64 and IA-32 Architectures Software Developer's Manual", volume 2 (VMX: volume 3, chapter 31; SGX and
TDX: volume 3D and the TDX module's specification).  APM: AMD's "AMD64 Architecture Programmer's Manual", volume 3.
FRED: Intel's "Flexible Return and Event Delivery" specification.
"""

from __future__ import annotations

import pytest

from vmipatch import facts
from vmipatch.isa import opcodes, sensitive, sweep

BOTH, ONLY_32, ONLY_64 = (32, 64), (32,), (64,)

# Bytes, name, whether it traps outside ring 0, sizes of code in which it exists.
ROWS = [
    ("0f 01 00", "sgdt", False, BOTH),
    ("0f 01 0d 00 00 00 00", "sidt", False, BOTH),
    ("0f 00 c0", "sldt", False, BOTH),
    ("0f 00 45 08", "sldt", False, BOTH),
    ("0f 01 e0", "smsw", False, BOTH),
    ("0f 01 20", "smsw", False, BOTH),
    ("0f 00 c8", "str", False, BOTH),
    ("9c", "pushf", False, BOTH),
    ("66 9c", "pushf", False, BOTH),
    ("9d", "popf", False, BOTH),
    ("0f 02 c1", "lar", False, BOTH),
    ("0f 03 c1", "lsl", False, BOTH),
    ("0f 00 e1", "verr", False, BOTH),
    ("0f 00 e9", "verw", False, BOTH),
    ("0f 00 2d 10 00 00 00", "verw", False, BOTH),
    ("06", "push segment", False, ONLY_32),
    ("0e", "push segment", False, ONLY_32),
    ("16", "push segment", False, ONLY_32),
    ("1e", "push segment", False, ONLY_32),
    ("0f a0", "push segment", False, BOTH),
    ("0f a8", "push segment", False, BOTH),
    ("07", "pop segment", False, ONLY_32),
    ("17", "pop segment", False, ONLY_32),
    ("1f", "pop segment", False, ONLY_32),
    ("0f a1", "pop segment", False, BOTH),
    ("0f a9", "pop segment", False, BOTH),
    ("8c d8", "mov segment", False, BOTH),
    ("8e d8", "mov segment", False, BOTH),
    ("8e 5d 00", "mov segment", False, BOTH),
    ("9a 78 56 34 12 08 00", "call far", False, ONLY_32),
    ("ff 1d 00 00 00 00", "call far", False, BOTH),
    ("ff 18", "call far", False, BOTH),
    ("48 ff 18", "call far", False, ONLY_64),
    ("ea 78 56 34 12 08 00", "jmp far", False, ONLY_32),
    ("ff 28", "jmp far", False, BOTH),
    ("ff 2d 00 00 00 00", "jmp far", False, BOTH),
    ("48 ff 28", "jmp far", False, ONLY_64),
    ("ca 04 00", "ret far", False, BOTH),
    ("cb", "ret far", False, BOTH),
    ("48 cb", "ret far", False, ONLY_64),
    ("cd 80", "int", False, BOTH),
    ("ce", "into", False, ONLY_32),
    ("cf", "iret", False, BOTH),
    ("48 cf", "iret", False, ONLY_64),
    ("c4 06", "load far pointer", False, ONLY_32),
    ("c5 06", "load far pointer", False, ONLY_32),
    ("0f b2 06", "load far pointer", False, BOTH),
    ("0f b4 06", "load far pointer", False, BOTH),
    ("0f b5 06", "load far pointer", False, BOTH),
    ("0f a2", "cpuid", False, BOTH),
    ("0f 01 d0", "xgetbv", False, BOTH),
    ("0f 01 ee", "rdpkru", False, BOTH),
    ("0f 01 ef", "wrpkru", False, BOTH),
    ("f3 0f ae c0", "rdfsbase", False, ONLY_64),
    ("f3 48 0f ae c8", "rdgsbase", False, ONLY_64),
    ("f3 0f ae d0", "wrfsbase", False, ONLY_64),
    ("f3 48 0f ae d8", "wrgsbase", False, ONLY_64),
    ("f3 0f c7 f8", "rdpid", False, BOTH),
    ("fa", "cli", True, BOTH),
    ("fb", "sti", True, BOTH),
    ("e4 21", "in", True, BOTH),
    ("e5 21", "in", True, BOTH),
    ("ec", "in", True, BOTH),
    ("66 ed", "in", True, BOTH),
    ("e6 21", "out", True, BOTH),
    ("e7 21", "out", True, BOTH),
    ("ee", "out", True, BOTH),
    ("ef", "out", True, BOTH),
    ("f3 6c", "ins", True, BOTH),
    ("6d", "ins", True, BOTH),
    ("f3 6e", "outs", True, BOTH),
    ("6f", "outs", True, BOTH),
    ("f4", "hlt", True, BOTH),
    ("0f 01 10", "lgdt", True, BOTH),
    ("0f 01 18", "lidt", True, BOTH),
    ("0f 00 d0", "lldt", True, BOTH),
    ("0f 00 d8", "ltr", True, BOTH),
    ("f2 0f 00 f0", "lkgs", True, ONLY_64),
    ("f2 0f 00 30", "lkgs", True, ONLY_64),
    ("0f 01 f0", "lmsw", True, BOTH),
    ("0f 01 30", "lmsw", True, BOTH),
    ("0f 06", "clts", True, BOTH),
    ("0f 20 d8", "mov cr", True, BOTH),
    ("0f 22 d8", "mov cr", True, BOTH),
    ("44 0f 22 c0", "mov cr", True, ONLY_64),
    ("0f 21 f8", "mov dr", True, BOTH),
    ("0f 23 f8", "mov dr", True, BOTH),
    ("0f 08", "invd", True, BOTH),
    ("0f 09", "wbinvd", True, BOTH),
    ("f3 0f 09", "wbinvd", True, BOTH),
    ("0f 01 38", "invlpg", True, BOTH),
    ("66 0f 38 82 00", "invpcid", True, BOTH),
    ("0f 32", "rdmsr", True, BOTH),
    ("0f 30", "wrmsr", True, BOTH),
    ("0f 01 c6", "wrmsrns", True, BOTH),
    ("f2 0f 01 c6", "rdmsrlist", True, ONLY_64),
    ("f3 0f 01 c6", "wrmsrlist", True, ONLY_64),
    ("0f 33", "rdpmc", True, BOTH),
    ("0f 31", "rdtsc", True, BOTH),
    ("0f 01 f9", "rdtscp", True, BOTH),
    ("0f 35", "sysexit", True, BOTH),
    ("48 0f 35", "sysexit", True, ONLY_64),
    ("0f 07", "sysret", True, BOTH),
    ("48 0f 07", "sysret", True, ONLY_64),
    ("0f 01 f8", "swapgs", True, ONLY_64),
    ("0f 01 ca", "clac", True, BOTH),
    ("0f 01 cb", "stac", True, BOTH),
    ("f2 0f 01 ca", "erets", True, ONLY_64),
    ("f3 0f 01 ca", "eretu", True, ONLY_64),
    ("0f 01 d1", "xsetbv", True, BOTH),
    ("0f c7 28", "xsaves", True, BOTH),
    ("48 0f c7 28", "xsaves", True, ONLY_64),
    ("0f c7 18", "xrstors", True, BOTH),
    ("0f 01 c8", "monitor", True, BOTH),
    ("0f 01 c9", "mwait", True, BOTH),
    ("0f aa", "rsm", True, BOTH),
    ("0f 01 cf", "encls", True, BOTH),
    ("0f 01 c0", "enclv", True, BOTH),
    ("0f 01 c5", "pconfig", True, BOTH),
    ("f3 0f 01 e8", "setssbsy", True, BOTH),
    ("f3 0f ae 30", "clrssbsy", True, BOTH),
    ("66 0f 38 f5 08", "wruss", True, BOTH),
    ("f3 0f 38 f8 06", "enqcmds", True, BOTH),
    ("f3 0f c7 30", "vmxon", True, BOTH),
    ("66 0f c7 30", "vmclear", True, BOTH),
    ("0f c7 30", "vmptrld", True, BOTH),
    ("0f c7 38", "vmptrst", True, BOTH),
    ("0f 78 d0", "vmread", True, BOTH),
    ("0f 79 d0", "vmwrite", True, BOTH),
    ("0f 01 c2", "vmlaunch", True, BOTH),
    ("0f 01 c3", "vmresume", True, BOTH),
    ("0f 01 c4", "vmxoff", True, BOTH),
    ("66 0f 38 80 00", "invept", True, BOTH),
    ("66 0f 38 81 00", "invvpid", True, BOTH),
    ("66 0f 01 cc", "tdcall", True, BOTH),
    ("66 0f 01 cd", "seamret", True, ONLY_64),
    ("66 0f 01 ce", "seamops", True, ONLY_64),
    ("66 0f 01 cf", "seamcall", True, ONLY_64),
    ("0f 01 d8", "vmrun", True, BOTH),
    ("0f 01 da", "vmload", True, BOTH),
    ("0f 01 db", "vmsave", True, BOTH),
    ("0f 01 dc", "stgi", True, BOTH),
    ("0f 01 dd", "clgi", True, BOTH),
    ("0f 01 de", "skinit", True, BOTH),
    ("0f 01 df", "invlpga", True, BOTH),
    ("0f 01 fe", "invlpgb", True, BOTH),
    ("0f 01 ff", "tlbsync", True, BOTH),
    ("f2 0f 01 fe", "rmpupdate", True, ONLY_64),
    ("f3 0f 01 fe", "rmpadjust", True, ONLY_64),
    ("f2 0f 01 ff", "pvalidate", True, BOTH),
    ("f3 0f 01 ff", "psmash", True, ONLY_64),
    ("f3 0f 01 fd", "rmpquery", True, ONLY_64),
    ("f2 0f 01 fd", "rmpread", True, ONLY_64),
]

# What looks like one and is none: another prefix, another ModRM byte, or trapping is what it is for.
OTHERS = [
    ("0f 01 e8", BOTH),  # SERIALIZE runs in every ring
    ("0f b9 c8", BOTH),  # UD1
    ("67 48 0f b9 3a", ONLY_64),
    ("0f ff c8", BOTH),  # UD0
    ("0f 0b", BOTH),
    ("0f 01 d9", BOTH),  # VMMCALL
    ("0f 01 c1", BOTH),  # VMCALL
    ("0f 05", ONLY_64),
    ("0f 34", BOTH),
    ("cc", BOTH),
    ("ff 10", BOTH),
    ("ff 20", BOTH),
    ("f3 0f 1e fa", BOTH),
    ("0f ae e8", BOTH),  # LFENCE
    ("0f ae f8", BOTH),
    ("0f c7 08", BOTH),  # CMPXCHG8B
    ("0f c7 f0", BOTH),  # RDRAND
    ("0f c7 f8", BOTH),  # RDSEED
    ("f2 0f 38 f8 06", BOTH),  # ENQCMD runs in every ring
    ("0f 01 d5", BOTH),  # XEND
    ("90", BOTH),
]

SIZES = [(row, bits) for row in ROWS for bits in row[3]]


def whole(code: bytes, bits: int) -> opcodes.Parts:
    """The parts, of bytes with more behind them: the length must come from the instruction itself."""
    parts = opcodes.parts(code + b"\x90" * 16, bits)
    assert parts is not None, code.hex(" ")
    assert parts.size == len(code), code.hex(" ")
    return parts


@pytest.mark.parametrize(("row", "bits"), SIZES, ids=lambda x: f"{x[0]} ({x[1]})" if isinstance(x, tuple) else str(x))
def test_every_row(row: tuple[str, str, bool, tuple[int, ...]], bits: int) -> None:
    text, name, traps, _ = row
    code = bytes.fromhex(text)
    kind = sensitive.classify(code, whole(code, bits), bits)
    assert kind is not None
    assert (kind.name, kind.set) == (name, "traps" if traps else "silent")
    around = b"\x90" * 5 + code + b"\x90" * 20
    found = list(sweep.sweep(around, 0x1000, [0, len(around)], bits, sensitive.wanted(bits), bytes(len(around))))
    assert found == [(sweep.WANTED, 5, 5 + len(code), 0, whole(code, bits))]


@pytest.mark.parametrize(("text", "bits"), [(text, bits) for text, sizes in OTHERS for bits in sizes])
def test_what_is_not_sensitive(text: str, bits: int) -> None:
    code = bytes.fromhex(text)
    assert sensitive.classify(code, whole(code, bits), bits) is None


@pytest.mark.parametrize("bits", [32, 64])
def test_no_row_of_the_table_is_untried(bits: int) -> None:
    """Every kind that exists in code of that size has bytes above."""
    spec = facts.load("isa", "sensitive")
    named = {row["name"] for which in sensitive.SETS for row in spec[which] if opcodes.applies(row, bits)}
    assert named == {name for _, name, _, sizes in ROWS if bits in sizes}
