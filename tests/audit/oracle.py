"""What an audit should find, from the text that `objdump -d` prints: none of the project's code is used.

Sensitive instructions are told by objdump's mnemonics and operands, sites come from the caller.
"""

from __future__ import annotations

import re
import subprocess
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_LINE = re.compile(r"^ *([0-9a-f]+):\t([0-9a-f ]+?) *\t(.*)$")
_SECTION = re.compile(r"^Disassembly of section (\S+):$")
_SEGMENT = re.compile(r"%[cdefgs]s")
_CONTROL = re.compile(r"%(?:cr|db|dr)\d+")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PREFIXES = _words(
    "lock rep repz repnz repe repne cs ds es ss fs gs data16 data32 addr16 addr32 notrack bnd xacquire xrelease"
)
_PREFIX = re.compile(rf"^(?:{'|'.join(sorted(PREFIXES))}|rex(?:\.[WRXB]+)?) ")
SILENT = _words(
    """
    sgdt sgdtl sgdtw sidt sidtl sidtw sldt smsw smswl smsww str pushf pushfw pushfl pushfq popf popfw popfl
    popfq lar lsl verr verw into int iret iretw iretl iretq cpuid xgetbv rdpkru wrpkru rdfsbase rdgsbase
    wrfsbase wrgsbase rdpid lret lretw lretl lretq lcall lcallw lcalll ljmp ljmpw ljmpl lds les lss lfs lgs
    """
)
TRAPS = _words(
    """
    cli sti in out insb insw insl outsb outsw outsl hlt lgdt lgdtl lgdtw lidt lidtl lidtw lldt ltr lkgs lmsw
    clts invd wbinvd wbnoinvd invlpg invpcid rdmsr wrmsr wrmsrns rdpmc rdtsc rdtscp sysexit sysexitl sysret
    sysretl sysretq swapgs clac stac xsetbv xsaves xsaves64 xrstors xrstors64 monitor mwait rsm encls enclv
    pconfig setssbsy clrssbsy wrussd wrussq vmxon vmclear vmptrld vmptrst vmread vmwrite vmlaunch vmresume
    vmxoff invept invvpid vmrun vmload vmsave stgi clgi skinit invlpga invlpgb tlbsync rmpupdate rmpadjust
    rmpquery rmpread pvalidate psmash erets eretu tdcall seamret seamops seamcall enqcmds rdmsrlist wrmsrlist
    """
)


@dataclass
class Expected:
    """Virtual addresses: sensitive instructions by set, indirect calls and jumps through memory, and branches."""

    silent: set[int] = field(default_factory=set)
    traps: set[int] = field(default_factory=set)
    slots: dict[int, int] = field(default_factory=dict)
    branches: list[tuple[int, int]] = field(default_factory=list)
    symbols: dict[int, str] = field(default_factory=dict)


def disassemble(path: Path, bits: int, skip: Iterable[str]) -> Expected:
    """All of a file's code but that of the sections in ``skip``."""
    command = ["objdump", "-d", "-z", "-w", str(path)]
    mask = (1 << bits) - 1
    found = Expected()
    skipped, symbol = False, ""
    emulated = -1
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            match = _LINE.match(line)
            if match is None:
                section = _SECTION.match(line)
                if section is not None:
                    skipped = section[1] in set(skip)
                elif line.endswith(">:\n"):
                    symbol = line[line.index("<") + 1 : -3]
                continue
            if skipped:
                continue
            address, text = int(match[1], 16), match[3]
            # Xen's emulation prefix, UD2 and the letters xen, is no instruction (Xen's public/arch-x86/xen.h).
            if address < emulated:
                continue
            if text.strip() == "ud2":
                emulated = address + 5 if _is_prefix(path, address) else -1
                found.symbols[address] = symbol
                continue
            _sort(found, address, text, mask, symbol)
    assert process.returncode == 0
    return found


_FILES: dict[Path, tuple[bytes, list[tuple[int, int, int]]]] = {}


def _is_prefix(path: Path, address: int) -> bool:
    if path not in _FILES:
        out = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True).stdout
        rows = re.findall(r"^\s+\[\s*\d+\] \S+\s+PROGBITS\s+(\w+) (\w+) (\w+) \S+\s+\S*AX", out, re.MULTILINE)
        _FILES[path] = path.read_bytes(), [(int(a, 16), int(o, 16), int(s, 16)) for a, o, s in rows]
    data, places = _FILES[path]
    for start, offset, size in places:
        if start <= address < start + size:
            at = address - start + offset
            return data[at + 2 : at + 5] in (b"xen", b"kvm")
    return False


def split(text: str) -> tuple[str, list[str]]:
    """The mnemonic of an instruction, without its prefixes, and its operands."""
    while _PREFIX.match(text):
        text = text.split(" ", 1)[1].lstrip()
    mnemonic, _, rest = text.partition(" ")
    return mnemonic, re.split(r",(?![^(]*\))", rest.split(" #")[0].split(" <")[0].strip())


def set_of(mnemonic: str, operands: list[str]) -> str:
    """What kind of sensitive instruction it is, "silent" or "traps"; "" for any other."""
    moves = mnemonic.startswith(("mov", "push", "pop"))
    if mnemonic in SILENT or (moves and any(map(_SEGMENT.fullmatch, operands))):
        return "silent"
    return "traps" if mnemonic in TRAPS or (moves and any(map(_CONTROL.fullmatch, operands))) else ""


def _sort(found: Expected, address: int, text: str, mask: int, symbol: str) -> None:
    mnemonic, parts = split(text)
    which = set_of(mnemonic, parts)
    if which:
        (found.silent if which == "silent" else found.traps).add(address)
        found.symbols[address] = symbol
    elif mnemonic in ("call", "jmp") and parts[0].startswith("*"):
        place = re.search(r"# (?:0x)?([0-9a-f]+)", text) or re.fullmatch(r"\*(?:%[c-g]s:)?0x([0-9a-f]+)", parts[0])
        if place:
            found.slots[address] = int(place[1], 16) & mask
            found.symbols[address] = symbol
    elif re.fullmatch(r"j\w+|call|loop\w*|xbegin", mnemonic):
        target = re.match(r"(?:0x)?([0-9a-f]+)", parts[0])
        if target:
            found.branches.append((address, int(target[1], 16) & mask))


class Covered:
    """Whether an address is in one of some sites ``(address, length)``."""

    def __init__(self, sites: Iterable[tuple[int, int]]) -> None:
        self.sites = sorted({s for s in sites if s[1]})
        self.starts = [s[0] for s in self.sites]

    def holding(self, address: int) -> list[tuple[int, int]]:
        """The sites that hold an address: none of them is longer than 255 bytes."""
        found = []
        i = bisect_right(self.starts, address) - 1
        while i >= 0 and self.starts[i] > address - 256:
            if address < sum(self.sites[i]):
                found.append(self.sites[i])
            i -= 1
        return found

    def __contains__(self, address: int) -> bool:
        return bool(self.holding(address))

    def entered(self, branches: Iterable[tuple[int, int]]) -> set[int]:
        """Branches from elsewhere into a site beyond its first byte."""
        return {
            source
            for source, target in branches
            for start, length in self.holding(target)
            if target != start and not start <= source < start + length
        }
