"""The 16-bit entry under Unicorn in real mode: far-called at offset 3, it speaks and comes back."""

from __future__ import annotations

import pytest
import unicorn
from romguest import PAIRS, rom
from unicorn import x86_const as x86

SEGMENT = 0xCB00  # where SeaBIOS puts a first option ROM
NAMES = ("AX", "BX", "CX", "DX", "SI", "DI", "BP", "SP", "DS", "ES", "SS")


# What the line status register reads: an idle port, no port, and, once, a port that never gets ready.
CASES = [(h, a, ready) for h, a in PAIRS for ready in (0x60, 0xFF)] + [("native", "vmi-3.0", 0x00)]


@pytest.mark.parametrize(("hypervisor", "abi", "ready"), CASES)
def test_entry(hypervisor: str, abi: str, ready: int) -> None:
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_16)
    uc.mem_map(0, 0x100000)
    uc.mem_write(SEGMENT << 4, rom(hypervisor, abi).data)
    values = {name: 0x1110 + n for n, name in enumerate(NAMES)}
    values.update(SP=0x7000, SS=0x0100, DS=0x2000, ES=0x3000)
    for name, value in values.items():
        uc.reg_write(getattr(x86, f"UC_X86_REG_{name}"), value)
    uc.reg_write(x86.UC_X86_REG_CS, SEGMENT)
    uc.reg_write(x86.UC_X86_REG_EFLAGS, 0x0C97)
    stack = (0x0100 << 4) + 0x7000
    uc.mem_write(stack, bytes.fromhex("34120050"))  # the BIOS's return address, 5000:1234
    said: dict[int, bytearray] = {}
    uc.hook_add(unicorn.UC_HOOK_INSN, lambda *_: ready, None, 1, 0, x86.UC_X86_INS_IN)

    def out(_uc: unicorn.Uc, port: int, size: int, value: int, _data: object) -> None:
        assert size == 1
        said.setdefault(port, bytearray()).append(value)

    uc.hook_add(unicorn.UC_HOOK_INSN, out, None, 1, 0, x86.UC_X86_INS_OUT)
    uc.emu_start((SEGMENT << 4) + 3, 0x51234)
    assert uc.reg_read(x86.UC_X86_REG_CS) == 0x5000
    assert uc.reg_read(x86.UC_X86_REG_IP) == 0x1234
    values["SP"] += 4
    for name, value in values.items():
        assert uc.reg_read(getattr(x86, f"UC_X86_REG_{name}")) == value, name
    assert uc.reg_read(x86.UC_X86_REG_EFLAGS) & 0xFD5 == 0x0C97 & 0xFD5
    line = f"{hypervisor} {abi} 1.0\r\n".encode()
    assert said == {0x402: line, 0xE9: line, 0x3F8: line}
