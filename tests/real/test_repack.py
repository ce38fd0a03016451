"""A sealed, patched kernel as a bzImage again: it boots, wherever KASLR puts it, with the text that was planned.

The expected text is taken from the patched ELF and moved here, by the relocation
table of the untouched kernel for what was not patched; the patched sites of a
kernel that has been moved must still be whole.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Cli, RealKernel
from .initramfs import REACHED
from .qemu import Capture, Machine, boot
from .test_running_text import patched_for
from .vmlinux import Vmlinux

BOOTS = 4
STEP = 0x200000  # CONFIG_PHYSICAL_ALIGN of Debian's kernels, or a multiple of it


@pytest.mark.parametrize("name", ["686"])
def test_a_repacked_kernel_boots_wherever_it_is_put(
    name: str,
    real_kernel: Callable[[str], RealKernel],
    captured: Callable[[str, str, int], Capture],
    initrd: Callable[[int], Path],
    cli: Cli,
    tmp_path: Path,
) -> None:
    kernel = real_kernel(name)
    # A CPU with RDRAND or a TSC gives the decompressor its random number; this one has the TSC.
    running = captured(name, "Nehalem", 1)
    out = patched_for(kernel, running, 1, tmp_path, cli, "--seal", "--repack")
    assert out.read_bytes()[0x202:0x206] == b"HdrS"
    assert out.stat().st_size == kernel.image.stat().st_size
    (tmp_path / "elf").mkdir()
    patched = Vmlinux(patched_for(kernel, running, 1, tmp_path / "elf", cli, "--seal"))
    section = patched.text
    slides = set()
    for _ in range(BOOTS):
        machine = Machine(out, initrd(32), 32, "Nehalem", append="vmipatch", memory=1024, kaslr=True)
        with boot(machine) as guest:
            guest.wait_for(REACHED)
            guest.stop()
            slide, text = found_text(guest, patched)
            slides.add(slide)
        expected = patched.bytes_of(".text")
        wrong = apart(expected, text, slide)
        # Jump labels, static calls and ftrace sites are patched by every boot; the sites of the patch are not.
        for address, length in sites_of(cli, kernel):
            if section.address <= address < section.address + section.size:
                start = address - section.address
                assert wrong.isdisjoint(range(start, start + length)), f"{address:#x}, slide {slide:#x}"
    print(f"slides: {sorted(map(hex, slides))}")
    assert slides != {0}, "no boot moved the kernel: this test has shown nothing"


def found_text(guest: object, patched: Vmlinux) -> tuple[int, bytes]:
    """Where the kernel's text is in physical memory: the first page of it is free of addresses and of sites."""
    section = patched.text
    expected = patched.bytes_of(".text")
    linked = patched.physical(section.address)
    for slide in range(0, 0x30000000, STEP):
        page = guest.physical(linked + slide, 0x1000)  # type: ignore[attr-defined]
        same = sum(a == b for a, b in zip(page, expected, strict=False))
        if same > 0xE00:
            return slide, guest.physical(linked + slide, section.size)  # type: ignore[attr-defined]
    raise AssertionError("the kernel's text is nowhere")


def apart(expected: bytes, found: bytes, slide: int) -> set[int]:
    """Offsets of bytes that differ and are in no 32-bit field that is exactly ``slide`` apart."""
    differ = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    moved = set()
    for i in differ:
        for start in range(max(0, i - 3), i + 1):
            (old,), (new,) = struct.unpack_from("<I", expected, start), struct.unpack_from("<I", found, start)
            if (old + slide) & 0xFFFFFFFF == new and slide:
                moved.add(i)
    return set(differ) - moved


def sites_of(cli: Cli, kernel: RealKernel) -> list[tuple[int, int]]:
    """Address and length of every site of the three families."""
    found = cli.json("scan", kernel.elf)
    return [(s["address"], s["length"]) for s in found["sites"]]
