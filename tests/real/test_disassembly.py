"""Where instructions begin and which are sensitive: ours against objdump, over all text of real kernels.

Both begin anew at every symbol (ours of kallsyms, which objdump is given as a symbol table).  Every disagreement is of
a kind in KINDS, which says who is right and by which section of the manual; another kind fails.  SDM is Intel's "64
and IA-32 Architectures Software Developer's Manual", APM AMD's "AMD64 Architecture Programmer's Manual".
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.audit.oracle import PREFIXES, SILENT, TRAPS, set_of, split
from tests.elfwriter import ElfWriter
from vmipatch.audit.text import pieces, ranges
from vmipatch.image import open_image
from vmipatch.isa import opcodes, sensitive, sweep

from . import binutils
from .binutils import Objdump
from .conftest import RealKernel
from .packages import RegistryAway


@dataclass(frozen=True)
class Kind:
    """One kind of disagreement: objdump's text, our bytes (regular expressions), who is right and why.

    ``lacking`` is the newest version of objdump that was seen to disagree so, if newer ones do not.
    """

    text: str
    code: str
    right: str
    why: str
    lacking: tuple[int, int] | None = None

    def of(self, text: str, code: bytes, version: tuple[int, int]) -> bool:
        """Whether a disagreement at an instruction of these bytes, for that objdump this text, is of this kind."""
        if self.lacking is not None and version > self.lacking:
            return False
        return bool(re.fullmatch(self.text, text) and re.fullmatch(self.code, code.hex()))


Get = Callable[[str], RealKernel]
CASES = [("686", "installed"), ("6.12-amd64", "installed"), ("7.3-amd64", "installed"), ("7.3-amd64", "newest")]
_WORDS = SILENT | TRAPS | PREFIXES

KINDS = (
    Kind(
        "ud2", "0f0b(78656e|6b766d)", "ours",
        "UD2 and the letters xen or kvm are a prefix that a hypervisor takes off (Xen's public/arch-x86/xen.h, Linux's "
        "asm/emulate_prefix.h); to a processor without one objdump is right (SDM 2, UD)",
    ),
    Kind(
        r"repnz \(bad\)", "f2(4[0-7])?0f00f[0-7]", "ours",
        "LKGS, of which 2.40 knows nothing: F2 0F 00 /6 (Intel's FRED specification, LKGS)", (2, 40),
    ),
    Kind(
        r"\(bad\)", "f20f01fd", "ours",
        "RMPREAD, of which 2.40 knows nothing: F2 0F 01 FD (APM 3, RMPREAD)", (2, 40),
    ),
    Kind(
        "f(init|stcw|stsw|stenv|save|clex)", "9b", "ours",
        "the mnemonic without N stands for two instructions, and a fault may lie between (SDM 2, FINIT/FNINIT: the "
        "assembler issues FWAIT, then FNINIT, and the processor executes them separately)",
    ),
)  # fmt: skip


_MAY_BE = re.compile(r"(?:mov|push|pop).*%(?:[c-gs]s|cr|db|dr)")


class Text:
    """The code of one kernel: by our sweep, and as an ELF file for objdump that has the same symbols."""

    def __init__(self, kernel: RealKernel, folder: Path) -> None:
        image = open_image(kernel.elf)
        self.bits = image.bits
        self.ranges, _ = ranges(image)
        self.cuts = pieces(image, self.ranges)
        self.path = folder / f"{kernel.name}-text.elf"
        elf = ElfWriter(bits=self.bits)
        for place, cuts in zip(self.ranges, self.cuts, strict=True):
            elf.section(place.section, place.data, address=place.address, flags="ax")
            for cut in cuts[:-1]:
                elf.symbol(f"s{place.address + cut:x}", place.address + cut, place.section)
        self.path.write_bytes(elf.build())

    def starts(self) -> array[int]:
        """Where instructions begin, by our sweep; the end of the last is the last."""
        found = array("Q")
        for place, cuts in zip(self.ranges, self.cuts, strict=True):
            found.extend(place.address + first for first in sweep.starts(place.data, cuts, self.bits))
        found.append((1 << 64) - 1)
        return found

    def sensitive(self) -> dict[int, str]:
        """Addresses of sensitive instructions, by our sweep, and whether each is silent or traps."""
        found = {}
        wanted = sensitive.wanted(self.bits)
        for place, cuts in zip(self.ranges, self.cuts, strict=True):
            nowhere = bytes(len(place.data))
            for stop in sweep.sweep(place.data, place.address, cuts, self.bits, wanted, nowhere):
                if stop.what == sweep.WANTED:
                    code = place.data[stop.first : stop.last]
                    parts = opcodes.parts(code, self.bits)
                    assert parts is not None
                    kind = sensitive.classify(code, parts, self.bits)
                    if kind is not None:
                        found[place.address + stop.first] = kind.set
        return found

    def code(self, address: int) -> bytes:
        """The bytes of our instruction at an address; one where none begins."""
        place = next(r for r in self.ranges if r.address <= address < r.end)
        at = address - place.address
        cuts = self.cuts[self.ranges.index(place)]
        end = cuts[bisect_right(cuts, at)]
        size = opcodes.emulated(place.data, self.bits, at, end)
        if not size:
            parts = opcodes.parts(place.data, self.bits, at, end)
            size = 1 if parts is None else parts.size
        return place.data[at : at + size]


class Compared:
    """What a listing of objdump's says otherwise than our sweep."""

    def __init__(self, text: Text, listing: Iterable[tuple[int, str]]) -> None:
        self.instructions = self.sensitive = 0
        self.wrong: dict[int, str] = {}
        starts, mine = text.starts(), text.sensitive()
        at, last, before = 0, "", 0
        in_step = True
        for address, line in listing:
            if starts[at] != address:
                if in_step:
                    self.wrong[before] = last
                while starts[at] < address:
                    at += 1
            in_step = starts[at] == address
            at += in_step
            self.instructions += 1
            before, last = address, line
            # Out of step, what it reads follows from the disagreement before, which is in the list.
            if in_step and (line.split(" ", 1)[0].rstrip() in _WORDS or _MAY_BE.match(line) or address in mine):
                said = set_of(*split(line.strip()))
                self.sensitive += bool(said)
                if said != mine.pop(address, ""):
                    self.wrong[address] = line
        for address in mine:
            self.wrong.setdefault(address, "")


@pytest.mark.parametrize(("name", "version"), CASES)
def test_every_instruction(name: str, version: str, real_kernel: Get, tmp_path: Path) -> None:
    try:
        objdump: Objdump = getattr(binutils, version)()
    except RegistryAway as away:
        pytest.skip(f"NOT TESTED: no newer objdump: {away}")
    text = Text(real_kernel(name), tmp_path)
    found = Compared(text, binutils.disassemble(objdump, text.path))
    said = ".".join(map(str, objdump.version))
    print(f"{name}, objdump {said}: {found.instructions:,} instructions, {found.sensitive:,} sensitive")
    counts: Counter[Kind] = Counter()
    unknown = []
    for address, line in found.wrong.items():
        code = text.code(address)
        kind = next((k for k in KINDS if k.of(line.strip(), code, objdump.version)), None)
        if kind is None:
            unknown.append(f"{address:#x} {code.hex(' ')}: objdump {line.strip()!r}")
        else:
            counts[kind] += 1
    for kind, count in counts.items():
        print(f"  {count:5} x {kind.text} ({kind.code}): right is {kind.right}: {kind.why}")
    assert not unknown, "\n".join(unknown[:60])
