"""`vmipatch run` and a guest that breaks a rule: exit status 1, a line that says which rule and where, JSON."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from pagedguest import DEPRIVILEGED, code, rom, segment

LOAD = 0x100000
ENTRY, GDT, DIRECTORY = LOAD + 0x20, LOAD + 0x1000, LOAD + 0x2000
VMI_INIT = 0xC0080  # of a ROM at C0000


def kernel(end: str) -> bytes:
    """A flat Multiboot kernel that turns paging on, calls VMI_Init, and then does ``end``."""
    flat = struct.pack("<III", 0x1BADB002, 1 << 16, -(0x1BADB002 + (1 << 16)) & 0xFFFFFFFF)
    flat += struct.pack("<5I", LOAD, LOAD, 0, 0, ENTRY)
    # lgdt; push 0x60; push the place behind; retf
    begin = code(f"mov esp, {GDT:#x}") + b"\x0f\x01\x15" + struct.pack("<I", GDT + 0x80) + b"\x6a\x60\x68"
    begin += struct.pack("<I", ENTRY + len(begin) + 5) + b"\xcb"
    program = begin + code(
        "mov eax, 0x68; mov ss, eax; mov ds, eax; mov es, eax; xor eax, eax; mov fs, eax; mov gs, eax; "
        f"mov eax, 0x10; mov cr4, eax; mov eax, {DIRECTORY:#x}; mov cr3, eax; mov eax, 0x80010011; mov cr0, eax; "
        f"mov eax, {VMI_INIT:#x}; call eax; {end}"
    )
    image = bytearray(0x3000)
    image[: len(flat)] = flat
    image[ENTRY - LOAD : ENTRY - LOAD + len(program)] = program
    image[GDT - LOAD + 0x60 : GDT - LOAD + 0x70] = segment(0x9B) + segment(0x93)
    image[GDT - LOAD + 0x80 : GDT - LOAD + 0x86] = struct.pack("<HI", 0x7F, GDT)
    image[DIRECTORY - LOAD : DIRECTORY - LOAD + 8] = struct.pack("<II", 0x83, 0x400083)  # 8 MiB as they are
    return bytes(image)


@pytest.mark.parametrize("hypervisor", DEPRIVILEGED)
def test_a_violation_is_reported(hypervisor: str, tmp_path: Path) -> None:
    image, file = tmp_path / "kernel.bin", tmp_path / "hypervisor.rom"
    image.write_bytes(kernel("mov dword ptr [0xFC002000], eax; hlt"))
    file.write_bytes(rom(hypervisor, "vmi-3.0").data)
    command = [sys.executable, "-m", "vmipatch", "run", image, "--rom", file, "--hypervisor", hypervisor]
    command += ["--memory", "16", "--json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["reason"] == "violation", done.stderr
    violation = summary["violation"]
    assert violation["rule"] == "hole-write"
    assert (violation["address"], violation["address_hex"]) == (0xFC002000, "0xfc002000")
    assert f"{hypervisor} stopped the guest: hole-write: " in done.stderr
    assert "0xfc002000" in done.stderr
