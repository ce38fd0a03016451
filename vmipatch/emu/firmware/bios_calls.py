"""The BIOS services that loaders, option ROMs and kernels use, as host code.

May import this package's lower modules and the machine.  Facts: IBM PS/2 and PC
BIOS Interface Technical Reference; ACPI specification, chapter "System Address
Map Interfaces" (INT 15h E820h, E801h); Phoenix BIOS handbook for 88h.  Disks
(INT 13h) are not there: every call fails with "invalid function".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmipatch.emu.firmware.bios import RETURN_STUB, SEGMENT, STUBS, TRAP_PORT
from vmipatch.emu.firmware.memory_map import BASE_MEMORY_END, e820

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

CARRY, ZERO = 1, 0x40
SMAP = 0x534D4150
TICKS = 0x46C
CURSOR = 0x450


class Services:
    """The handlers of one machine; :meth:`attach` claims the trap port."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.returned = False
        """A far call of the host's came back (see :mod:`option_rom`)."""
        self.calls: dict[str, int] = {}
        self._handlers: dict[int, Callable[[], None]] = {
            0x10: self._video,
            0x11: self._equipment,
            0x12: self._memory_size,
            0x13: self._fail,
            0x14: self._fail,
            0x15: self._system,
            0x16: self._keyboard,
            0x17: self._fail,
            0x18: self._no_boot,
            0x19: self._no_boot,
            0x1A: self._time,
        }

    def attach(self) -> None:
        """Listen on the trap port."""
        self.machine.bus.claim_ports(TRAP_PORT, TRAP_PORT, self._read, self._trap)

    def _read(self, port: int, size: int) -> int:
        return 0xFF

    def _trap(self, port: int, size: int, value: int) -> None:
        self.machine.defer(self._serve)

    def _serve(self, machine: Machine) -> None:
        cpu = machine.cpu
        if cpu.get("cs") != SEGMENT:
            return  # somebody else's write to this port
        offset = cpu.get("eip") - 2
        if offset == RETURN_STUB:
            self.returned = True
            machine.stop("firmware call returned")
        elif STUBS <= offset < STUBS + 0x400:
            number = (offset - STUBS) >> 2
            name = f"int {number:02X}h AH={cpu.get('eax') >> 8 & 0xFF:02X}h"
            self.calls[name] = self.calls.get(name, 0) + 1
            self._handlers.get(number, self._fail)()

    # --- registers and flags --------------------------------------------------------

    def _get(self, name: str) -> int:
        return int(self.machine.cpu.get(name))

    def _set16(self, name: str, value: int) -> None:
        self.machine.cpu.set(name, self._get(name) & 0xFFFF0000 | value & 0xFFFF)

    def _set_ah(self, value: int) -> None:
        self.machine.cpu.set("eax", self._get("eax") & ~0xFF00 | value << 8)

    def _flag(self, bit: int, on: bool) -> None:
        """Change a flag in the image that IRET will pop."""
        esp = self._get("esp")
        # Stack addresses wrap at 64 KiB in the modes that get here.
        at = self._base("ss") + (esp + 4 & 0xFFFF)
        memory = self.machine.memory
        flags = int.from_bytes(memory.read(at, 2), "little")
        flags = flags | bit if on else flags & ~bit
        memory.write(at, flags.to_bytes(2, "little"))

    def _base(self, name: str) -> int:
        return int(self.machine.cpu.get(f"{name}_base"))

    def _fail(self) -> None:
        self._set_ah(0x86 if self._get("eax") >> 8 & 0xFF != 0 else 0x01)
        self._flag(CARRY, True)

    # --- INT 10h ---------------------------------------------------------------------

    def _video(self) -> None:
        function, low = self._get("eax") >> 8 & 0xFF, self._get("eax") & 0xFF
        memory = self.machine.memory
        if function == 0x00:
            self._clear()
        elif function == 0x02:
            memory.write(CURSOR, struct.pack("<H", self._get("edx") & 0xFFFF))
        elif function == 0x03:
            self._set16("edx", int.from_bytes(memory.read(CURSOR, 2), "little"))
            self._set16("ecx", 0x0D0E)
        elif function in (0x06, 0x07) and low == 0:
            self._clear()
        elif function == 0x06:
            for _ in range(min(low, 25)):
                self._scroll()
        elif function in (0x09, 0x0A):
            row, column = self._cursor()
            self._put(row, column, low)
        elif function == 0x0E:
            self.teletype(low)
        elif function == 0x0F:
            self.machine.cpu.set("eax", self._get("eax") & 0xFFFF0000 | 80 << 8 | 3)
            self._set16("ebx", self._get("ebx") & 0xFF)
        elif function == 0x13:
            self._write_string()

    def _cursor(self) -> tuple[int, int]:
        column, row = self.machine.memory.read(CURSOR, 2)
        return min(row, 24), min(column, 79)

    def _put(self, row: int, column: int, character: int) -> None:
        if self.machine.board.vga is not None:
            self.machine.board.vga.put(row, column, character)

    def _scroll(self) -> None:
        if self.machine.board.vga is not None:
            self.machine.board.vga.scroll()

    def _clear(self) -> None:
        for _ in range(25):
            self._scroll()
        self.machine.memory.write(CURSOR, b"\0\0")

    def teletype(self, character: int) -> None:
        """One character at the cursor; also on the debug console, as SeaBIOS prints."""
        self.machine.board.consoles.put("debug", character)
        row, column = self._cursor()
        if character == 8:
            column = max(0, column - 1)
        elif character == 10:
            row += 1
        elif character == 13:
            column = 0
        elif character != 7:
            self._put(row, column, character)
            column += 1
        if column > 79:
            row, column = row + 1, 0
        if row > 24:
            self._scroll()
            row = 24
        self.machine.memory.write(CURSOR, bytes((column, row)))

    def _write_string(self) -> None:
        text = self._base("es") + (self._get("ebp") & 0xFFFF)
        length = min(self._get("ecx") & 0xFFFF, 2000)
        step = 2 if self._get("eax") & 2 else 1
        edx = self._get("edx") & 0xFFFF
        self.machine.memory.write(CURSOR, struct.pack("<H", edx))
        for byte in self.machine.memory.read(text, length * step)[::step]:
            self.teletype(byte)

    # --- INT 11h, 12h, 15h -------------------------------------------------------------

    def _equipment(self) -> None:
        self._set16("eax", int.from_bytes(self.machine.memory.read(0x410, 2), "little"))

    def _memory_size(self) -> None:
        self._set16("eax", BASE_MEMORY_END >> 10)

    def _system(self) -> None:
        eax = self._get("eax") & 0xFFFF
        ram = self.machine.options.ram_bytes
        extended = max(0, ram - 0x100000)
        if eax == 0xE820:
            self._e820()
        elif eax == 0xE801:
            low = min(extended >> 10, 15 * 1024)
            high = max(0, ram - (16 << 20)) >> 16
            for name, value in (("eax", low), ("ecx", low), ("ebx", high), ("edx", high)):
                self._set16(name, value)
            self._flag(CARRY, False)
        elif eax >> 8 == 0x88:
            self._set16("eax", min(extended >> 10, 0xFFFF))
            self._flag(CARRY, False)
        elif eax >> 8 == 0x24:
            self._a20(eax & 0xFF)
        elif eax >> 8 == 0x86:
            # Wait CX:DX microseconds: the guest's time passes.
            micros = (self._get("ecx") & 0xFFFF) << 16 | self._get("edx") & 0xFFFF
            self.machine.sleep_until(self.machine.clock.now + 1000 * micros)
            self._flag(CARRY, False)
        else:
            self._set_ah(0x86)
            self._flag(CARRY, True)

    def _a20(self, function: int) -> None:
        system = self.machine.board.system
        if function in (0, 1):
            system.drive_a20(bool(function))
        elif function == 2:
            self._set16("eax", int(system.is_a20()))
        elif function == 3:
            self._set16("ebx", 3)
        self._set_ah(0)
        self._flag(CARRY, False)

    def _e820(self) -> None:
        entries = e820(self.machine.options.ram_bytes)
        index = self._get("ebx")
        if self._get("edx") != SMAP or index >= len(entries) or self._get("ecx") < 20:
            self._set_ah(0x86)
            self._flag(CARRY, True)
            return
        start, length, kind = entries[index]
        target = self._base("es") + (self._get("edi") & 0xFFFF)
        self.machine.memory.write(target, struct.pack("<QQI", start, length, kind))
        cpu = self.machine.cpu
        cpu.set("eax", SMAP)
        cpu.set("ebx", index + 1 if index + 1 < len(entries) else 0)
        cpu.set("ecx", 20)
        self._flag(CARRY, False)

    # --- INT 16h, 18h, 19h, 1Ah -----------------------------------------------------------

    def _keyboard(self) -> None:
        function = self._get("eax") >> 8 & 0xFF
        if function in (0x00, 0x10):
            # There is no key and never will be: the guest waits for good.
            self.machine.stop("asleep")
        elif function in (0x01, 0x11):
            self._flag(ZERO, True)
        elif function in (0x02, 0x12):
            self._set16("eax", 0)

    def _no_boot(self) -> None:
        self.machine.stop("no boot device")

    def _time(self) -> None:
        function = self._get("eax") >> 8 & 0xFF
        memory = self.machine.memory
        date = self.machine.board.rtc.now()
        if function == 0x00:
            ticks = int.from_bytes(memory.read(TICKS, 4), "little")
            self._set16("ecx", ticks >> 16)
            self._set16("edx", ticks)
            self.machine.cpu.set("eax", self._get("eax") & ~0xFF)
        elif function == 0x01:
            value = (self._get("ecx") & 0xFFFF) << 16 | self._get("edx") & 0xFFFF
            memory.write(TICKS, value.to_bytes(4, "little"))
        elif function == 0x02:
            self._set16("ecx", _bcd(date.hour) << 8 | _bcd(date.minute))
            self._set16("edx", _bcd(date.second) << 8)
            self._flag(CARRY, False)
        elif function == 0x04:
            self._set16("ecx", _bcd(date.year // 100) << 8 | _bcd(date.year % 100))
            self._set16("edx", _bcd(date.month) << 8 | _bcd(date.day))
            self._flag(CARRY, False)
        else:
            self._fail()


def _bcd(value: int) -> int:
    return value // 10 << 4 | value % 10
