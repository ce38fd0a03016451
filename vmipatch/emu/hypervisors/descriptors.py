"""The processor's own descriptor tables: the guest's, with ring 0 turned into ring 1 and the hole cut off.

May import layout and violation.  The guest's tables stay the guest's; what the processor loads from are copies
in the hole.  A descriptor of ring 0 becomes one of ring 1, a limit that reaches into the hole is cut, and
system descriptors (TSS, LDT, gates) are left out: the task register and the LDT register are loaded by the
host.  Interrupt gates become trap gates, so that the real interrupt flag stays on.
Facts: Intel SDM 3A, chapters "Protected-Mode Memory Management" and "Interrupt and Exception Handling".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vmipatch.emu.hypervisors import layout
from vmipatch.emu.hypervisors.layout import PAGE, HostMemory
from vmipatch.emu.hypervisors.violation import NotMapped

if TYPE_CHECKING:
    from vmipatch.emu.hypervisors.base import Base

PRESENT = 0x8000
SEGMENT, CODE, EXPAND_DOWN = 0x1000, 0x800, 0x400
GRANULAR, BIG = 0x80_0000, 0x40_0000
ACCESSED = 0x100
INTERRUPT_GATE, TRAP_GATE = 0xE00, 0xF00
NO_TASK = 0x8B  # access byte of a busy 32-bit TSS


def base_of(low: int, high: int) -> int:
    """The base address in a segment descriptor."""
    return low >> 16 | (high & 0xFF) << 16 | high & 0xFF00_0000


def limit_of(low: int, high: int) -> int:
    """The limit in a segment descriptor, in bytes."""
    limit = low & 0xFFFF | high & 0xF0000
    return limit << 12 | 0xFFF if high & GRANULAR else limit


def confined(low: int, high: int, top: int) -> tuple[int, int]:
    """The descriptor for ring 1, reaching no byte above the linear address ``top``; not present if none is left."""
    if not high & PRESENT:
        return low, high
    if not high & SEGMENT:
        return 0, 0
    if not high & 0x6000:
        high |= 0x2000
    high |= ACCESSED  # so that the processor has nothing to write there
    base, limit = base_of(low, high), limit_of(low, high)
    is_down = high & (CODE | EXPAND_DOWN) == EXPAND_DOWN
    room = top - base
    if base > top + layout.BEHIND and limit == 0xFFFF_FFFF and not is_down:
        # Nothing is ever mapped from there to the end of the address space; round it, the segment ends at the hole.
        room &= 0xFFFF_FFFF
    elif base > top:
        return low, high & ~PRESENT
    if is_down:
        # Above its limit, up to 64 KiB, or up to 4 GiB: then it must wrap round to below its base at once.
        harmless = base > 0 and base + limit >= 0xFFFF_FFFF if high & BIG else base + 0xFFFF <= top
        return (low, high) if harmless else (0, 0)
    if limit > room:
        limit = room
        if limit > 0xFFFFF:
            units = (limit + 1 >> 12) - 1
            low = low & 0xFFFF_0000 | units & 0xFFFF
            high = high & ~0xF0000 | units & 0xF0000 | GRANULAR
        else:
            low = low & 0xFFFF_0000 | limit & 0xFFFF
            high = high & ~(0xF0000 | GRANULAR) | limit & 0xF0000
    return low, high


def shadow_gate(low: int, high: int) -> tuple[int, int]:
    """The gate as the processor gets it; a task gate is not there at all."""
    kind = high >> 8 & 0x1F
    if not high & PRESENT or kind not in (6, 7, 14, 15):
        return 0, 0
    if not high & 0x6000:
        high |= 0x2000  # the kernel's INT n: the caller has looked at the guest's own privilege level
    return low, high | 0x100


class Tables:
    """GDT, LDT, IDT and task state of one virtual processor.

    ``gdt`` and ``idt`` are base and limit as the guest set them; ``gates`` the 256 gates in force, as (low, high)
    words; ``stack`` is the guest's ring 1 stack (SS, ESP).
    """

    def __init__(self, owner: Base, host: HostMemory) -> None:
        self._owner, self._host = owner, host
        self._cpu = owner.machine.cpu
        self._pages = {
            number: host.page()
            for number in (
                layout.IDT,
                layout.TSS,
                *range(layout.GDT, layout.GDT + layout.TABLE_PAGES),
                *range(layout.LDT, layout.LDT + layout.TABLE_PAGES),
            )
        }
        self.gdt = (0, 0)
        self.idt = (0, 0)
        self.ldt = (0, 0, 0)  # selector, base, limit
        self.task = 0
        self.task_base = 0
        self._task_limit = 0
        self.stack = (0, 0)
        self.gates: list[tuple[int, int]] = [(0, 0)] * 256
        self.direct: frozenset[int] = frozenset()
        self._frames: dict[str, frozenset[int]] = {"gdt": frozenset(), "ldt": frozenset(), "idt": frozenset()}
        owner.paging.on_watched = self._changed

    def hole_pages(self) -> list[tuple[int, int]]:
        """Page number behind virtual_top, physical address: what the hole shows of the tables."""
        return list(self._pages.items())

    def _linear(self, page: int) -> int:
        return self._owner.virtual_top + page * PAGE

    # --- GDT and LDT ------------------------------------------------------------------

    def load_gdt(self, base: int, limit: int) -> None:
        """The guest's GDT is at this linear address; raises Violation where it is not mapped."""
        entries = self._owner.guest.read(base, limit + 1 & ~7, "GDT")
        self.gdt = (base, limit)
        self._watch("gdt", base, limit)
        self.put_gdt(0, struct.unpack(f"<{len(entries) // 4}I", entries))
        self._cpu.set("gdtr_base", self._linear(layout.GDT))
        self._cpu.set("gdtr_limit", limit)
        self.refresh_segments()

    def put_gdt(self, index: int, words: Sequence[int]) -> None:
        """Entries from ``index`` on are these pairs of words now."""
        self._put(layout.GDT, index, words)

    def put_ldt(self, index: int, words: Sequence[int]) -> None:
        """The same for the LDT in force."""
        self._put(layout.LDT, index, words)

    def _put(self, first: int, index: int, words: Sequence[int]) -> None:
        top = self._owner.hole - 1
        out = bytearray()
        for low, high in zip(words[::2], words[1::2], strict=True):
            out += struct.pack("<II", *confined(low, high, top))
        at = index * 8
        done = 0
        while done < len(out) and at + done < layout.TABLE_PAGES * PAGE:
            page, offset = divmod(at + done, PAGE)
            size = min(len(out) - done, PAGE - offset)
            self._host.write(self._pages[first + page] + offset, bytes(out[done : done + size]))
            done += size

    def load_ldt(self, selector: int) -> None:
        """LLDT: the guest's descriptor of it stands in the guest's GDT; 0 or a wrong one: no LDT."""
        self._owner.state.put("ldt", selector)
        base, limit = self.gdt
        low = high = 0
        if selector & 0xFFFC and selector | 7 <= limit and not selector & 4:
            low, high = struct.unpack("<II", self._owner.guest.read(base + (selector & 0xFFF8), 8, "LDT descriptor"))
        if high & 0x9F00 == 0x8200:
            self.place_ldt(selector, base_of(low, high), limit_of(low, high))
        else:
            self.place_ldt(selector, 0, 0)

    def place_ldt(self, selector: int, base: int, limit: int) -> None:
        """The LDT is ``limit`` + 1 bytes at ``base``; a limit of 0: there is none. Raises :class:`NotMapped`."""
        limit = min(limit, layout.TABLE_PAGES * PAGE - 1)
        if limit and base + limit < self._owner.hole:
            for at in (base, *range((base | 0xFFF) + 1, base + limit + 1, PAGE)):
                if self._cpu.translate(at) < 0:
                    raise NotMapped("LDT", at)
        self.ldt = (selector, base, limit)
        self._watch("ldt", base, limit)
        if limit:
            entries = self._owner.guest.read(base, limit + 1 & ~7, "LDT")
            self.put_ldt(0, struct.unpack(f"<{len(entries) // 4}I", entries))
            self._cpu.set_segment("ldtr", selector, self._linear(layout.LDT), limit, 0x82)
        else:
            self._cpu.set_segment("ldtr", 0, 0, 0, 0)

    def _watch(self, name: str, base: int, limit: int) -> None:
        """Follow what the guest writes to its table without a call, where the hypervisor does so."""
        old = self._frames[name]
        new: frozenset[int] = frozenset()
        if limit and name in self._owner.watched_tables:
            pages = range(base & ~0xFFF, base + limit + 1, PAGE)
            new = frozenset(self._cpu.translate(page & 0xFFFF_FFFF) // PAGE for page in pages)
        if new != old:
            self._frames[name] = new
            others = frozenset().union(*(frames for key, frames in self._frames.items() if key != name))
            self._owner.paging.watch(old - others, new)

    def _changed(self, frame: int) -> None:
        """A page with a table in it was written to: the copies follow."""
        read = self._owner.guest.read
        for name, table, put in (("gdt", self.gdt, self.put_gdt), ("ldt", self.ldt[1:], self.put_ldt)):
            if frame in self._frames[name]:
                entries = read(table[0], table[1] + 1 & ~7, name)
                put(0, struct.unpack(f"<{len(entries) // 4}I", entries))
        if frame in self._frames["idt"]:
            base, limit = self.idt
            for vector in range(min(256, (limit + 1) // 8)):
                gate = struct.unpack("<II", read(base + 8 * vector, 8, "IDT"))
                if gate != self.gates[vector]:
                    self.put_gate(vector, *gate)

    def written(self, table: int, index: int) -> None:
        """The guest's entry ``index`` of the table at linear ``table`` was written: the copy follows."""
        for base, limit, put in ((*self.gdt, self.put_gdt), (*self.ldt[1:], self.put_ldt)):
            if table == base and limit and index * 8 + 7 <= limit:
                put(index, struct.unpack("<II", self._owner.guest.read(table + index * 8, 8, "descriptor")))
        if table == self.idt[0] and index * 8 + 7 <= self.idt[1]:
            self.put_gate(index, *struct.unpack("<II", self._owner.guest.read(table + index * 8, 8, "gate")))

    def refresh_segments(self) -> None:
        """Load the data segments anew, as after a change of the GDT; what is no segment any more stays as it is."""
        for name in ("es", "ds", "fs", "gs", "ss"):
            selector = self._cpu.get(name)
            if selector & 0xFFFC and self.descriptor(selector)[1] & PRESENT:
                self._cpu.set(name, selector)

    def descriptor(self, selector: int) -> tuple[int, int]:
        """What the processor finds for a selector: two words, (0, 0) past a limit."""
        first, limit = (layout.LDT, self.ldt[2]) if selector & 4 else (layout.GDT, self.gdt[1])
        if selector & 0xFFFC == 0 or selector | 7 > limit:
            return 0, 0
        page, offset = divmod(selector & 0xFFF8, PAGE)
        low, high = struct.unpack("<II", self._host.read(self._pages[first + page] + offset, 8))
        return low, high

    def own_descriptor(self, selector: int) -> tuple[int, int]:
        """What stands in the guest's own table for a selector: two words, (0, 0) where there is nothing to read."""
        base, limit = self.ldt[1:] if selector & 4 else self.gdt
        at = base + (selector & 0xFFF8) & 0xFFFF_FFFF
        if selector & 0xFFFC == 0 or selector & 0xFFF8 | 7 > limit or not self._owner.guest.reaches(at, 8):
            return 0, 0
        low, high = struct.unpack("<II", self._owner.guest.read(at, 8))
        return low, high

    # --- IDT --------------------------------------------------------------------------

    def load_idt(self, base: int, limit: int) -> None:
        """The guest's IDT is at this linear address."""
        count = min(256, (limit + 1) // 8)
        words = struct.unpack(f"<{2 * count}I", self._owner.guest.read(base, 8 * count, "IDT")) if count else ()
        self.idt = (base, limit)
        self._watch("idt", base, limit)
        for vector in range(256):
            low, high = (words[2 * vector], words[2 * vector + 1]) if vector < count else (0, 0)
            self.put_gate(vector, low, high)

    def put_gate(self, vector: int, low: int, high: int) -> None:
        """One gate of the guest's is in force now."""
        self.gates[vector] = (low, high)
        self._host.write(self._pages[layout.IDT] + 8 * vector, struct.pack("<II", *shadow_gate(low, high)))
        # A trap gate that user code may call needs no exit: nothing about virtual interrupts changes.
        is_direct = vector > 31 and high & 0xFF00 == 0xEF00 and vector not in self._owner.own_vectors
        if is_direct != (vector in self.direct):
            self.direct ^= {vector}
            self._owner.hook_vector(vector, not is_direct)

    # --- tasks ------------------------------------------------------------------------

    def load_task(self, selector: int) -> None:
        """LTR: the guest's TSS says which stack is the kernel's."""
        self._owner.state.put("tr", selector)
        self.task = selector
        base, limit = self.gdt
        if selector & 0xFFFC == 0 or selector & 4 or selector | 7 > limit:
            return
        low, high = struct.unpack("<II", self._owner.guest.read(base + (selector & 0xFFF8), 8, "TSS descriptor"))
        if high & 0x9D00 != 0x8900:
            return
        self.task_base, self._task_limit = base_of(low, high), limit_of(low, high)
        esp, ss = struct.unpack("<II", self._owner.guest.read(self.task_base + 4, 8, "TSS"))
        self.set_stack(ss & 0xFFFF, esp)

    def follow_task(self) -> None:
        """The TSS that the state page names, where the ROM's SetTR only writes it there; the stack stays."""
        selector = self._owner.state.get("tr")
        if selector != self.task:
            stack = self.stack
            self.load_task(selector)
            self.set_stack(*stack)

    def task_limit(self) -> int:
        """The limit of the guest's TSS, in bytes: its I/O bitmap ends there."""
        return self._task_limit

    def set_stack(self, ss: int, esp: int) -> None:
        """The kernel's stack, for entries from ring 3."""
        if ss & 3 == 0:
            ss |= 1
        self.stack = (ss, esp)
        # SS1:ESP1 of a 32-bit TSS (SDM 3A, figure 8-2); there is no I/O bitmap.
        tss = bytearray(layout.TSS_LIMIT + 1)
        struct.pack_into("<II", tss, 12, esp, ss)
        struct.pack_into("<H", tss, 102, layout.TSS_LIMIT + 1)
        self._host.write(self._pages[layout.TSS], bytes(tss))

    def begin(self) -> None:
        """Put the processor on the copies."""
        self._cpu.set("idtr_base", self._linear(layout.IDT))
        self._cpu.set("idtr_limit", 0x7FF)
        self._cpu.set_segment("tr", self.task or 8, self._linear(layout.TSS), layout.TSS_LIMIT, NO_TASK)

    # --- snapshots --------------------------------------------------------------------

    def save(self) -> Any:
        """What is not in machine-owned memory or in the processor."""
        return (
            self.gdt,
            self.idt,
            self.ldt,
            self.task,
            self.task_base,
            self._task_limit,
            self.stack,
            tuple(self.gates),
            self.direct,
            dict(self._frames),
        )

    def restore(self, saved: Any) -> None:
        """Bring back what :meth:`save` returned."""
        self.gdt, self.idt, self.ldt, self.task, self.task_base, self._task_limit = saved[:6]
        self.stack, gates, self.direct, frames = saved[6:]
        self._frames = dict(frames)
        self.gates = list(gates)
