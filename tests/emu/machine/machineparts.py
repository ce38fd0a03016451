"""Parts that the device tests share: a counter to drive virtual time, plain memory, a pin."""

from __future__ import annotations

from vmipatch.emu.machine.clock import Clock


class Counter:
    """Instructions that a test retires by hand; 10 ns each."""

    def __init__(self) -> None:
        self.instructions = 0


class PlainMemory:
    """A page map over one buffer, as the engine's memory is, in a few lines of Python."""

    def __init__(self, length: int = 0x200000) -> None:
        self.store = bytearray(length)
        self.pages: dict[int, tuple[int, bool]] = {}

    def allocate(self, length: int) -> int:
        start = len(self.store)
        self.store += bytes(-(-length // 4096) * 4096)
        return start

    def map(self, physical: int, length: int, backing: int, *, readable: bool = True, writable: bool = True) -> None:
        for offset in range(0, length, 4096):
            self.pages[(physical + offset) >> 12] = (backing + offset, writable)

    def unmap(self, physical: int, length: int) -> None:
        for offset in range(0, length, 4096):
            self.pages.pop((physical + offset) >> 12, None)

    def read(self, physical: int, length: int) -> bytes:
        out = bytearray()
        for address in range(physical, physical + length):
            page = self.pages.get(address >> 12)
            out.append(0xFF if page is None else self.store[page[0] + (address & 0xFFF)])
        return bytes(out)

    def write_backing(self, offset: int, data: bytes) -> None:
        self.store[offset : offset + len(data)] = data

    def write(self, physical: int, data: bytes) -> None:
        for address, byte in enumerate(data, physical):
            page = self.pages.get(address >> 12)
            if page is not None:
                self.store[page[0] + (address & 0xFFF)] = byte


class Line:
    """An output pin that remembers its edges."""

    def __init__(self) -> None:
        self.level = False
        self.rises = 0

    def __call__(self, level: bool) -> None:
        if level and not self.level:
            self.rises += 1
        self.level = level


class Time:
    """A clock with a hand on it."""

    def __init__(self) -> None:
        self.counter = Counter()
        self.clock = Clock(self.counter)

    def pass_ns(self, nanoseconds: int) -> None:
        """Let time pass, stopping at every deadline on the way."""
        end = self.clock.now + nanoseconds
        while self.clock.next_deadline <= end:
            self.clock.skip_to(self.clock.next_deadline)
            self.clock.run_due()
        self.clock.skip_to(end)
