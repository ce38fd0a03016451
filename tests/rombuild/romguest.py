"""A guest under Unicorn for the ROM tests: memory, a GDT with rings 0 and 1, a ROM, and calls into it.

Unicorn is the oracle for what stubs do; hypercalls and ports end in Python functions given by the test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import unicorn
from unicorn import x86_const as x86

from vmipatch.rombuild.build import Rom, build

BASE = 0xC00C8000
STACK = 0x00200000
CODE = 0x00300000
DATA = 0x00400000
GDT = 0x00100000
TOP = 0xFC000000  # as docs/abis.md says: where the state page is
REGISTERS = ("eax", "ecx", "edx", "ebx", "ebp", "esi", "edi")
_IDS = {name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in (*REGISTERS, "esp", "eip", "eflags")}

PAIRS = [
    *[(hv, abi) for hv in ("native", "vmware", "xen", "kvm", "lguest", "l4ka") for abi in ("vmi-3.0", "vmi-13.0")],
    ("native", "vmi-6.1"),
    ("l4ka", "vmi-6.1"),
    ("l4ka", "vmi-13.3"),
    ("l4ka", "vmi-13.0-l4ka"),
]
DEPRIVILEGED = ("vmware", "xen", "kvm", "lguest", "l4ka")


@cache
def rom(hypervisor: str, abi: str) -> Rom:
    """A built ROM, made once."""
    return build(hypervisor, abi)


class Guest:
    """A flat 32-bit machine with the ROM at ``base``; ``ring`` 0 or 1."""

    def __init__(self, data: bytes, ring: int = 0, base: int = BASE) -> None:
        self.base = base
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
        self.traps: list[tuple[str, dict[str, int]]] = []
        self.on_trap: Callable[[str, Guest], None] = lambda kind, guest: None
        for start, size in (
            (base & ~0xFFFF, 0x20000),
            (STACK, 0x2000),
            (CODE, 0x1000),
            (DATA, 0x10000),
            (TOP, 0x1000),
            (GDT, 0x1000),
        ):
            self.uc.mem_map(start, size)
        # Position independence is shown by running from read-only memory at any base.
        self.uc.mem_write(base, data)
        self.uc.mem_protect(base & ~0xFFFF, 0x20000, unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC)
        self._segments(ring)
        self.uc.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)
        self.uc.hook_add(unicorn.UC_HOOK_INSN_INVALID, self._invalid)
        self.uc.hook_add(unicorn.UC_HOOK_INSN, self._input, None, 1, 0, x86.UC_X86_INS_IN)

    def _segments(self, ring: int) -> None:
        def flat(access: int) -> bytes:
            return bytes([0xFF, 0xFF, 0, 0, 0, access, 0xCF, 0])

        table = bytes(8) + b"".join(flat(kind | level << 5) for level in (0, 1, 3, 3) for kind in (0x9B, 0x93))
        self.uc.mem_write(GDT, table)
        self.uc.reg_write(x86.UC_X86_REG_GDTR, (0, GDT, len(table) - 1, 0))
        for name in ("CS", "SS", "DS", "ES", "FS", "GS"):
            self.uc.reg_write(getattr(x86, f"UC_X86_REG_{name}"), 8 if name == "CS" else 16)
        if ring:
            # To an outer ring as a processor goes there: by a far return.
            code, data = 8 + 16 * ring | ring, 16 + 16 * ring | ring
            frame = (CODE + 1, code, STACK + 0x1000, data)
            self.uc.mem_write(CODE, b"\xcb" + b"\x8e\xd8\x8e\xc0\x90")  # retf; mov ds, eax; mov es, eax; nop
            self.uc.mem_write(STACK + 0xFF0, b"".join(word.to_bytes(4, "little") for word in frame))
            self["esp"], self["eax"] = STACK + 0xFF0, data
            self.uc.emu_start(CODE, CODE + 5)
        assert self.uc.reg_read(x86.UC_X86_REG_CS) & 3 == ring

    # -- traps -----------------------------------------------------------------

    def _note(self, kind: str) -> None:
        self.traps.append((kind, self.registers()))
        self.on_trap(kind, self)

    def _interrupt(self, _uc: unicorn.Uc, number: int, _data: object) -> None:
        self._note(f"int {number:#x}")

    def _invalid(self, uc: unicorn.Uc, _data: object) -> bool:
        eip = self["eip"]
        code = bytes(uc.mem_read(eip, 5))
        if code[:3] == b"\x0f\x01\xc1":
            self["eip"] = eip + 3
            self._note("vmcall")
        elif code == b"\x0f\x0bxen":
            self["eip"] = eip + 5
            self._note("xen prefix")
        else:
            return False
        return True

    def _input(self, _uc: unicorn.Uc, port: int, _size: int, _data: object) -> int:
        before = len(self.traps)
        self._note(f"in {port:#x}")
        assert len(self.traps) == before + 1
        return self["eax"]

    # -- registers and memory ------------------------------------------------------

    def __getitem__(self, register: str) -> int:
        return int(self.uc.reg_read(_IDS[register]))

    def __setitem__(self, register: str, value: int) -> None:
        self.uc.reg_write(_IDS[register], value & 0xFFFFFFFF)

    def registers(self) -> dict[str, int]:
        return {name: self[name] for name in (*REGISTERS, "esp")}

    def u32(self, address: int) -> int:
        return int.from_bytes(self.uc.mem_read(address, 4), "little")

    def write(self, address: int, value: int, size: int = 4) -> None:
        self.uc.mem_write(address, value.to_bytes(size, "little"))

    # -- calls ---------------------------------------------------------------------

    def call(self, offset: int, *stack: int, limit: int = 2000, **registers: int) -> dict[str, int]:
        """Call the ROM at ``offset`` as a guest does; returns the registers after the return.

        Every register not given holds a mark of its own, so that a change is seen. The stack must be level.
        """
        esp = STACK + 0x1000
        for number, name in enumerate(REGISTERS):
            self[name] = registers.get(name, 0xA0B0C000 + 0x11 * number)
        for number, word in enumerate(stack):
            self.write(esp + 4 * number, word)
        self.write(esp - 4, CODE + 0x800)
        self["esp"] = esp - 4
        self.uc.emu_start(self.base + offset, CODE + 0x800, count=limit)
        assert self["eip"] == CODE + 0x800, f"did not return, at {self['eip']:#x}"
        assert self["esp"] == esp, "the stack is not level"
        return self.registers()

    def jump(self, offset: int, frame: list[int], limit: int = 500, **registers: int) -> dict[str, int]:
        """Jump to the ROM at ``offset`` with ``frame`` on top of the stack, until CODE + 0x800 is reached."""
        esp = STACK + 0x1000
        for number, name in enumerate(REGISTERS):
            self[name] = registers.get(name, 0xA0B0C000 + 0x11 * number)
        for number, word in enumerate(frame):
            self.write(esp + 4 * number, word)
        self["esp"] = esp
        self.uc.emu_start(self.base + offset, CODE + 0x800, count=limit)
        return self.registers()
