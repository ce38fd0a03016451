"""Which lines of a console may differ, and that all others may not. The texts are the kernels' printk formats."""

from __future__ import annotations

import re

import pytest

from vmipatch import facts
from vmipatch.validate.console import NATURES, first_difference, known

LAYOUT = b"""Memory: %dk/65536k available (781k kernel code, %dk reserved, 257k data, 176k init, 0k highmem)
virtual kernel memory layout:
    fixmap  : 0x%08x - 0x%08x   ( 592 kB)
    pkmap   : 0x%08x - 0x%08x   (2048 kB)
    vmalloc : 0xc4800000 - 0x%08x   ( %d MB)
    lowmem  : 0xc0000000 - 0xc4000000   (  64 MB)
"""
NATIVELY = LAYOUT % (63136, 1988, 0xFFF6B000, 0xFFFFF000, 0xFFC00000, 0xFFE00000, 0xFFBFE000, 947)
ON_ROM = LAYOUT % (63132, 1992, 0xFBF6B000, 0xFBFFF000, 0xFBC00000, 0xFBE00000, 0xFBBFE000, 883)
TOTAL = b"Total of %d processors activated (200.01 BogoMIPS).\n"
# Of a release: what the native kernel prints, and what it prints on a ROM.
CONSOLES = {
    (2, 6, 21): (
        b"Booting paravirtualized kernel on bare hardware\nDetected 100.006 MHz processor.\n" + NATIVELY
        + b"Calibrating delay using timer specific routine.. 200.14 BogoMIPS (lpj=1000729)\n"
        + b"Compat vDSO mapped to ffffe000.\n"
        + b"Checking 'hlt' instruction... OK.\nTime: tsc clocksource has been installed.\n",
        b"VMI: Found vmipatch VMware VMI ROM, API version 3.0, ROM version 1.0\n"
        + b"Reserving virtual address space above 0xfc000000\nBooting paravirtualized kernel on vmi\n"
        + b"VMI timer cycles/sec = 100000000 ; cycles/jiffy = 1000000 ;cycles/alarm = 1000000\n"
        + b"Detected 100.000 MHz processor.\n" + ON_ROM
        + b"Calibrating delay using timer specific routine.. 200.00 BogoMIPS (lpj=1000000)\n"
        + b"Compat vDSO mapped to fbffe000.\n",
    ),
    (2, 6, 29): (
        b"Booting paravirtualized kernel on bare hardware\nFast TSC calibration using PIT\n"
        + b"Detected 100.006 MHz processor.\nChecking 'hlt' instruction... OK.\n"
        + b"Calibrating delay loop (skipped), value calculated using timer frequency.. 200.01 BogoMIPS (lpj=1000060)\n"
        + b"Switched to high resolution mode on CPU 0\n",
        b"VMI: Found x y, API version 3.0, ROM version 1.0\nBooting paravirtualized kernel on vmi\n"
        + b"vmi: registering clock event vmi-timer. mult=419430 shift=22\nDetected 100.000 MHz processor.\n"
        + b"Calibrating delay loop (skipped), value calculated using timer frequency.. 200.00 BogoMIPS (lpj=1000000)\n"
        + b"vmi: registering clock source khz=100000\nTime: vmi-timer clocksource has been installed.\n",
    ),
    (2, 6, 36): (
        b"Booting paravirtualized kernel on bare hardware\nrtc_cmos rtc_cmos: setting system clock to "
        + b"2010-01-01 00:00:01 UTC (1262304001)\nTotal of 1 processors activated (200.01 BogoMIPS).\n",
        b"Booting paravirtualized kernel on vmi [deprecated]\nrtc_cmos rtc_cmos: setting system clock to "
        + b"2010-01-01 00:00:02 UTC (1262304002)\nTotal of 1 processors activated (200.00 BogoMIPS).\n"
        + b"Switching to clocksource vmi-timer\n",
    ),
}  # fmt: skip


def _area(name: bytes, first: int, last: int, size: bytes) -> bytes:
    return b"    %s : 0x%08x - 0x%08x   ( %s)\n" % (name, first, last, size)


@pytest.mark.parametrize("release", CONSOLES, ids=str)
def test_back_end_and_clocks_may_differ(release: tuple[int, ...]) -> None:
    native, rom = CONSOLES[release]
    assert first_difference(native, rom, known(release)) == ""
    stamped = [b"".join(b"[%5d.%06d] %s\n" % (n, 7 * n, line) for n, line in enumerate(text.splitlines()))
               for text in (native, rom)]  # fmt: skip
    assert first_difference(stamped[0], stamped[1], known(release)) == ""
    # Of a kernel that is none of these, nothing is known.
    assert first_difference(native, rom, known((3, 0, 0))) != ""
    assert first_difference(native, rom, known(None)) != ""


@pytest.mark.parametrize("release", CONSOLES, ids=str)
def test_every_other_line_counts(release: tuple[int, ...]) -> None:
    native, rom = CONSOLES[release]
    said = first_difference(native + b"CPU: 1\n", rom + b"CPU: 2\n", known(release))
    assert re.fullmatch(r"console line \d+: 'CPU: 1' natively, 'CPU: 2' here", said)
    assert "native console alone goes on: 'last'" in first_difference(native + b"last\n", rom, known(release))
    assert "patched console alone goes on" in first_difference(native, rom + b"last\n", known(release))


@pytest.mark.parametrize(
    ("native", "rom"),
    [
        # A boot that is native cannot have met a ROM, and one on a ROM cannot have missed its back end's name.
        (b"VMI: Found a b, API version 3.0, ROM version 1.0\n", b""),
        (b"", b"Checking 'hlt' instruction... OK.\n"),
        (b"Booting paravirtualized kernel on bare hardware\n", b"Booting paravirtualized kernel on Xen\n"),
        # What stands in both must stand at the same place, and only its reading may differ.
        (b"Detected 100.006 MHz processor.\nx\n", b"x\nDetected 100.000 MHz processor.\n"),
        (b"Detected 100.006 MHz processor.\n", b""),
        (TOTAL % 1, TOTAL % 2),
        (_area(b"fixmap ", 0xFFF6B000, 0xFFFFF000, b"592 kB"), _area(b"fixmap ", 0xFBF6B000, 0xFBFFF000, b"596 kB")),
        (_area(b"vmalloc", 0xC4800000, 0xFFBFE000, b"947 MB"), _area(b"vmalloc", 0xC5800000, 0xFBBFE000, b"867 MB")),
        (_area(b"lowmem ", 0xC0000000, 0xC4000000, b" 64 MB"), _area(b"lowmem ", 0xC0000000, 0xC3000000, b" 48 MB")),
        (b"Detected 100.006 MHz processor.\n", b"Detected 100.006 MHz processor. And more\n"),
    ],
)  # fmt: skip
def test_what_is_near_a_known_line_is_not_one(native: bytes, rom: bytes) -> None:
    for release in ((2, 6, 21), (2, 6, 32), (2, 6, 36)):
        assert first_difference(b"a\n" + native, b"a\n" + rom, known(release)) != ""
        assert first_difference(native, rom, known(release)) != ""


def test_the_example_guest_names_its_back_end() -> None:
    of = known((2, 6, 32))
    assert first_difference(b"vmi-guest: backend native\n", b"vmi-guest: backend vmware\n", of) == ""
    assert first_difference(b"vmi-guest: backend native\n", b"", of) != ""


def test_line_ends_and_early_ends() -> None:
    of = known(None)
    assert first_difference(b"a\r\nb\n", b"a\nb\n", of) == ""
    assert "native console alone goes on: 'b'" in first_difference(b"a\nb", b"a", of)


def test_each_kind_of_line_is_whole() -> None:
    spec = facts.load("guests", "consoles")
    for row in spec["line"]:
        assert row["where"] in NATURES
        assert row["of"] in ("back end", "clock", "hole")
        assert row["read"]
        assert ("since" in row) == ("until" in row)
        pattern = re.compile(row["match"].encode())
        assert (row["where"] == "both") == bool(pattern.groups)
        assert not pattern.fullmatch(b"")
