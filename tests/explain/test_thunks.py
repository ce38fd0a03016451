"""Branches to thunks against Indirect Target Selection, which no CPU of QEMU's TCG takes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import cast

from tests.elfwriter import ElfWriter
from vmipatch.annotate import scan
from vmipatch.explain import thunks
from vmipatch.explain.ground import Ground
from vmipatch.explain.running import Running
from vmipatch.image import open_image

TEXT, TABLE, PAGE = 0xFFFFFFFF81000000, 0xFFFFFFFF81100000, 0xFFFFFFFFC0200000
ARRAY = TEXT + 0x1000


class Modules:
    """A running kernel of which only some memory outside the image is known."""

    def __init__(self, slide: int, held: dict[int, bytes]) -> None:
        self.slide = slide
        self.held = held

    def read_running(self, address: int, length: int) -> bytes | None:
        return next((code[:length] for at, code in self.held.items() if at == address), None)


def branch(opcode: bytes, address: int, target: int) -> bytes:
    return opcode + struct.pack("<i", target - address - len(opcode) - 4)


# Opcode, place in the text, register.  The jump through r8 and up has one byte more.
SITES = [
    (b"\xe8", 0x000, 0), (b"\xe9", 0x041, 3), (b"\x2e\xe8", 0x080, 9), (b"\x0f\x85", 0x0C0, 11), (b"\xe8", 0x120, 1),
    (b"\xe8", 0x15E, 2), (b"\x2e\xe8", 0x19E, 10),
]  # fmt: skip


def test_branches_to_proved_thunks_are_explained(tmp_path: Path) -> None:
    slide = 0x2000000
    text = bytearray(b"\xcc" * 0x2000)
    running = bytearray(text)
    held, table = {}, b""
    for number, (opcode, place, register) in enumerate(SITES):
        site = TEXT + place
        text[place : place + len(opcode) + 4] = branch(opcode, site, ARRAY + 32 * register)
        thunk = PAGE + 0x40 * number
        running[place : place + len(opcode) + 4] = branch(opcode, site, thunk - slide)
        held[thunk] = (b"\x41" if register > 7 else b"") + bytes((0xFF, 0xE0 + register % 8)) + b"\xcc" * 8
        table += struct.pack("<i", site - TABLE - 4 * number)
    elf = ElfWriter(bits=64, entry=TEXT)
    elf.section(".text", bytes(text), address=TEXT, flags="ax", align=4096)
    elf.section(".retpoline_sites", table, address=TABLE, flags="a", align=4)
    elf.symbol("__x86_indirect_thunk_array", ARRAY, ".text")
    path = tmp_path / "vmlinux"
    path.write_bytes(elf.build())
    image = open_image(path)
    sites = scan(image, ["retpoline_sites"]).sites
    assert len(sites) == len(SITES)

    def left(memory: dict[int, bytes]) -> set[int]:
        ground = Ground(image, TEXT, bytes(text), bytes(running))
        thunks.prove(ground, cast(Running, Modules(slide, memory)), sites)
        return {address - TEXT & ~0x1F for address, _ in ground.differences()}

    # Bit 5 of the address of the last byte of FF E0 or 41 FF E0 decides: it is clear at 15F and set at 121 and 1A0.
    assert left(held) == {0x120, 0x1A0}
    assert len(left({})) == len(SITES)
    # Another register's thunk, and one that falls through.
    assert 0x000 in left(held | {PAGE: b"\xff\xe1" + b"\xcc" * 8})
    assert 0x000 in left(held | {PAGE: b"\xff\xe0\x90\x90\x90"})
