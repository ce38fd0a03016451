"""A VGA in text mode: enough registers that its screen can be rendered as text.

May import ``bus``, ``clock``, ``contract`` and ``device`` of this package.
Facts: IBM PS/2 Hardware Interface Technical Reference, "Video Subsystem";
register values of mode 3 from the same book.  Text memory at 0xB8000 is
ordinary guest memory; the planes behind 0xA0000 keep what is stored through the
map mask (fonts), without the logic unit of the graphics modes.
"""

from __future__ import annotations

from typing import ClassVar

from vmipatch.emu.machine.bus import Bus
from vmipatch.emu.machine.clock import Clock
from vmipatch.emu.machine.contract import PhysicalMemory
from vmipatch.emu.machine.device import Device

TEXT, TEXT_LENGTH = 0xB8000, 0x8000
PLANES, PLANE_LENGTH = 0xA0000, 0x10000
FRAME_NS, LINE_NS = 14_268_000, 31_778  # 70 Hz, 31.47 kHz
MODE3_CRTC = bytes.fromhex("5f4f50825581bf1f004f0d0e000000009c8e8f281f96b9a3ff")
MODE3_SEQUENCER = bytes.fromhex("0300030002")
MODE3_GRAPHICS = bytes.fromhex("0000000000100e00ff")
MODE3_ATTRIBUTE = bytes.fromhex("000102030405140738393a3b3c3d3e3f0c000f0800")


class Vga(Device):
    """Registers at 0x3B0-0x3DF (colour addressing) and the text screen."""

    FIELDS: ClassVar[tuple[str, ...]] = (
        "crtc", "crtc_index", "sequencer", "sequencer_index", "graphics", "graphics_index", "attribute",
        "attribute_index", "attribute_data", "misc", "feature", "palette", "dac_read", "dac_write",
        "dac_mask", "planes",
    )  # fmt: skip

    def __init__(self, clock: Clock, memory: PhysicalMemory) -> None:
        self._clock = clock
        self._memory = memory
        self._backing = memory.allocate(TEXT_LENGTH)
        self.reset()

    def attach(self, bus: Bus) -> None:
        """Claim ports and the plane window, map the text memory."""
        bus.claim_ports(0x3C0, 0x3CF, self.port_read, self.port_write)
        for port in (0x3D4, 0x3D5, 0x3DA):
            bus.claim_ports(port, port, self.port_read, self.port_write)
        bus.claim_memory(PLANES, PLANE_LENGTH, self._plane_read, self._plane_write)
        self._memory.map(TEXT, TEXT_LENGTH, self._backing)
        self._memory.write(TEXT, b" \x07" * (TEXT_LENGTH // 2))

    def reset(self) -> None:
        """As a video BIOS leaves it in mode 3."""
        self.crtc = bytearray(MODE3_CRTC.ljust(256, b"\0"))
        self.sequencer = bytearray(MODE3_SEQUENCER.ljust(8, b"\0"))
        self.graphics = bytearray(MODE3_GRAPHICS.ljust(16, b"\0"))
        self.attribute = bytearray(MODE3_ATTRIBUTE.ljust(32, b"\0"))
        self.crtc_index = self.sequencer_index = self.graphics_index = 0
        self.attribute_index = 0x20
        self.attribute_data = False
        self.misc, self.feature = 0x67, 0
        self.palette = bytearray(768)
        self.dac_read = self.dac_write = 0
        self.dac_mask = 0xFF
        self.planes: dict[int, int] = {}  # plane << 16 | offset -> byte

    # --- the screen ---------------------------------------------------------------

    def size(self) -> tuple[int, int]:
        """Columns and rows of the text screen."""
        columns = self.crtc[1] + 1
        lines = (self.crtc[0x12] | (self.crtc[7] & 2) << 7 | (self.crtc[7] & 0x40) << 3) + 1
        return columns, min(max(lines // ((self.crtc[9] & 0x1F) + 1), 1), 100)

    def text(self) -> list[str]:
        """The lines of the screen, blanks at their ends removed."""
        columns, rows = self.size()
        start = 2 * (self.crtc[0x0C] << 8 | self.crtc[0x0D])
        memory = self._memory.read(TEXT, TEXT_LENGTH)
        lines = []
        for row in range(rows):
            at = start + 2 * columns * row
            cells = bytes([memory[(at + 2 * column) % TEXT_LENGTH] for column in range(columns)])
            lines.append("".join([_GLYPHS[cell] for cell in cells]).rstrip())
        return lines

    def put(self, row: int, column: int, character: int) -> None:
        """Store one character with the normal attribute (BIOS services)."""
        columns, _ = self.size()
        self._memory.write(TEXT + 2 * (row * columns + column), bytes((character, 7)))

    def scroll(self) -> None:
        """Move the screen up by one line (BIOS services)."""
        columns, rows = self.size()
        line = 2 * columns
        rest = self._memory.read(TEXT + line, line * (rows - 1))
        self._memory.write(TEXT, rest + b" \x07" * columns)

    # --- registers -----------------------------------------------------------------

    def port_read(self, port: int, size: int) -> int:
        """Every register that can be read."""
        if port == 0x3DA:
            self.attribute_data = False
            now = self._clock.now % FRAME_NS
            vertical = now > FRAME_NS - FRAME_NS // 12
            return (8 if vertical else 0) | (1 if vertical or now % LINE_NS > LINE_NS * 4 // 5 else 0)
        if port == 0x3C9:
            value = self.palette[self.dac_read]
            self.dac_read = (self.dac_read + 1) % 768
            return value
        simple: dict[int, int] = {
            0x3C0: self.attribute_index,
            0x3C1: self.attribute[self.attribute_index & 0x1F],
            0x3C2: 0x10,  # switch sense: a colour monitor
            0x3C4: self.sequencer_index,
            0x3C5: self.sequencer[self.sequencer_index & 7],
            0x3C6: self.dac_mask,
            0x3C7: 3,
            0x3C8: self.dac_write // 3,
            0x3CA: self.feature,
            0x3CC: self.misc,
            0x3CE: self.graphics_index,
            0x3CF: self.graphics[self.graphics_index & 15],
            0x3D4: self.crtc_index,
            0x3D5: self.crtc[self.crtc_index],
        }
        return simple.get(port, 0xFF)

    def port_write(self, port: int, size: int, value: int) -> None:
        """Every register."""
        if port == 0x3C0:
            if self.attribute_data:
                self.attribute[self.attribute_index & 0x1F] = value
            else:
                self.attribute_index = value & 0x3F
            self.attribute_data = not self.attribute_data
        elif port == 0x3C2:
            self.misc = value
        elif port == 0x3C4:
            self.sequencer_index = value & 7
        elif port == 0x3C5:
            self.sequencer[self.sequencer_index & 7] = value
        elif port == 0x3C6:
            self.dac_mask = value
        elif port == 0x3C7:
            self.dac_read = 3 * value
        elif port == 0x3C8:
            self.dac_write = 3 * value
        elif port == 0x3C9:
            self.palette[self.dac_write] = value & 0x3F
            self.dac_write = (self.dac_write + 1) % 768
        elif port == 0x3CE:
            self.graphics_index = value & 15
        elif port == 0x3CF:
            self.graphics[self.graphics_index & 15] = value
        elif port == 0x3D4:
            self.crtc_index = value
        elif port == 0x3D5:
            self._write_crtc(value)
        elif port == 0x3DA:
            self.feature = value

    def _write_crtc(self, value: int) -> None:
        index = self.crtc_index
        if index > 0x18:
            return
        if self.crtc[0x11] & 0x80 and index <= 7:
            if index == 7:  # protected but for the line-compare bit
                self.crtc[7] = self.crtc[7] & ~0x10 | value & 0x10
            return
        self.crtc[index] = value

    def _plane_read(self, physical: int, size: int) -> int:
        plane = (self.graphics[4] & 3) << 16
        offset = physical - PLANES
        return sum(self.planes.get(plane | offset + index, 0) << (8 * index) for index in range(size))

    def _plane_write(self, physical: int, size: int, value: int) -> None:
        offset = physical - PLANES
        for plane in range(4):
            if self.sequencer[2] >> plane & 1:
                for index in range(size):
                    self.planes[plane << 16 | offset + index] = value >> (8 * index) & 0xFF


_GLYPHS = bytes(range(256)).decode("cp437").translate(dict.fromkeys((*range(32), 127, 0xA0), " "))
