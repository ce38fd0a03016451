"""Direct paging: the guest's page tables are used where they lie, its directories through copies.

May import layout and violation.  A page table in use is hooked: the guest's own writes to it leave the engine
and are let through once they are found harmless, as Xen and KVM did it with write protection.  Of a directory
the processor walks a copy in machine-owned memory, which has the hole in it; so no entry of the guest's can
reach the hole.  No entry may name a frame of the hypervisor's: :class:`Violation` ``forged-page-table``.

Entries become valid as on the bare machine, when they are written; translations are forgotten when the guest
says so.  Accessed and dirty bits of directory entries stay in the copy.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vmipatch.emu.hypervisors.layout import HOST, HOST_MASK, PAGE, HostMemory, is_host
from vmipatch.emu.hypervisors.violation import Violation

if TYPE_CHECKING:
    from vmipatch.emu.machine.machine import Machine

PRESENT, LARGE = 1, 0x80
KERNEL_TABLE = 0x63  # present, writable, accessed, dirty; no user
LEGACY = range(0xA0, 0x100)  # frames below 1 MiB that are video memory, ROM or what the chipset makes of them
PAGE_WRITE_LIMIT = 64  # hooked pages that one instruction may write to


@dataclass
class Directory:
    """The copy of one page directory: guest frame number, physical address of the copy, its entries, its users."""

    frame: int
    copy: int
    top: bool
    entries: list[int] = field(default_factory=list)
    users: int = 0


@dataclass
class Root:
    """What a value of the guest's CR3 stands for; ``top`` is PAE's page of four entries, or 0."""

    directories: tuple[tuple[int, bool] | None, ...]
    top: int


class Paging:
    """The page tables of one guest."""

    def __init__(self, machine: Machine, host: HostMemory, virtual_top: int) -> None:
        self._memory, self._cpu, self._host = machine.memory, machine.cpu, host
        self._exit = machine.exit
        self._linear_top = virtual_top
        self._ram_frames = machine.options.ram_bytes // PAGE
        self.pae = False
        self.current = 0
        self._hole_table = 0
        self._hole: list[tuple[int, int]] = []
        self._tables: dict[int, int] = {}  # frame -> directory entries that point to it
        self._pinned: set[int] = set()
        self._directories: dict[tuple[int, bool], Directory] = {}
        self._roots: dict[int, Root] = {}  # in order of last use
        self._watched: set[int] = set()
        self.on_watched: Callable[[int], None] | None = None
        """Told of every change in a watched page, by its frame number."""

    # --- the switch -----------------------------------------------------------------

    def begin(self, cr3: int, pae: bool, hole: Iterable[tuple[int, int]]) -> None:
        """Take over the tables at ``cr3``; ``hole``: page number behind virtual_top, physical address."""
        self._hole = list(hole)
        self._hole_table = self._host.page()
        self._take_form(pae)
        self.switch(cr3)

    def _take_form(self, pae: bool) -> None:
        """Entries are 8 bytes from now on, or 4; the hole's own table follows."""
        self.pae = pae
        table = bytearray(PAGE)
        for number, physical in self._hole:
            at = number * self._size
            table[at : at + self._size] = (physical | KERNEL_TABLE).to_bytes(self._size, "little")
        self._host.write(self._hole_table, bytes(table))

    def change_form(self, pae: bool) -> None:
        """CR4.PAE changes while paging is on: the page that CR3 names is read in the other form from now on.

        Linux 2.6.21 to 2.6.24 with PAE boots so (arch/x86/mm/init_32.c, paging_init): the four pointers lie over
        the boot directory's first entries. Raises :class:`Violation` ``paging-off`` where that does not map the
        instruction that comes next; nothing is changed then.
        """
        key = self.current & (0xFFFF_FFE0 if pae else 0xFFFF_F000)
        if not self._would_map(key, pae, self._cpu.linear_eip):
            raise Violation("paging-off", "CR4.PAE changes, and the page tables are not of that form", key)
        for root in list(self._roots):
            self._forget(root)
        self._take_form(pae)
        self.switch(key)

    def _would_map(self, cr3: int, pae: bool, linear: int) -> bool:
        """Whether the guest's own tables at ``cr3``, read in that form, map a linear address."""
        size, bits = (8, 9) if pae else (4, 10)
        at = cr3
        if pae:
            pointer = int.from_bytes(self._memory.read(cr3 + 8 * (linear >> 30), 8), "little")
            if not pointer & PRESENT or pointer >> 32:
                return False
            at = pointer & 0xFFFF_F000
        for shift in (12 + bits, 12):
            index = linear >> shift & (1 << bits) - 1
            entry = int.from_bytes(self._memory.read(at + index * size, size), "little")
            if not entry & PRESENT:
                return False
            if shift > 12 and entry & LARGE:
                return True
            at = entry & 0xFFFF_F000
        return True

    def switch(self, cr3: int) -> None:
        """The guest loads CR3."""
        key = cr3 & (0xFFFF_FFE0 if self.pae else 0xFFFF_F000)
        wanted = self._named_by(key)
        root = self._roots.pop(key, None)
        if root is None or root.directories != wanted:
            if root is not None:
                self._drop(root)
            root = self._build(wanted)
        self._roots[key] = root
        self.current = key
        if self.pae:
            tops = [0 if d is None else self._directories[d].copy | PRESENT for d in root.directories]
            self._host.write(root.top, struct.pack("<4Q", *tops))
            self._cpu.pdpte = [*tops, 0, 0, 0, 0]
            self._cpu.set("cr3", root.top)
        else:
            assert root.directories[0] is not None
            self._cpu.set("cr3", self._directories[root.directories[0]].copy)

    def _named_by(self, key: int) -> tuple[tuple[int, bool] | None, ...]:
        """The directories that a CR3 names, from the guest's memory."""
        if not self.pae:
            self._require_ram(key >> 12, "CR3")
            return ((key >> 12, True),)
        self._require_ram(key >> 12, "CR3")
        found: list[tuple[int, bool] | None] = []
        for slot, entry in enumerate(struct.unpack("<4Q", self._memory.read(key, 32))):
            if entry & PRESENT:
                self._require_ram(entry >> 12 & 0xFF_FFFF, "page directory pointer")
                found.append((entry >> 12 & 0xFF_FFFF, slot == 3))
            else:
                found.append((-1, True) if slot == 3 else None)
        return tuple(found)

    def _require_ram(self, frame: int, what: str) -> None:
        if is_host(frame << 12):
            raise Violation("forged-page-table", f"{what} names a page of the hypervisor", frame << 12)
        if not 0 <= frame < self._ram_frames or frame in LEGACY:
            raise Violation("forged-page-table", f"{what} names a page that is no memory", frame << 12)

    def _build(self, wanted: tuple[tuple[int, bool] | None, ...]) -> Root:
        while len(self._host.free) < 8 and self._roots:
            self._forget(next(iter(self._roots)))
        held: list[tuple[int, bool]] = []
        try:
            for key in wanted:
                if key is not None:
                    self._hold_directory(key)
                    held.append(key)
        except Violation:
            for key in held:
                self._release_directory(key)
            raise
        return Root(wanted, self._host.page() if self.pae else 0)

    def _forget(self, cr3: int) -> None:
        self._drop(self._roots.pop(cr3))

    def _drop(self, root: Root) -> None:
        for key in root.directories:
            if key is not None:
                self._release_directory(key)
        if root.top:
            self._host.give_back(root.top)

    # --- directories ------------------------------------------------------------------

    def _hold_directory(self, key: tuple[int, bool]) -> None:
        frame, top = key
        directory = self._directories.get(key)
        if directory is None:
            directory = Directory(frame, self._host.page(), top, [0] * (PAGE // self._size))
            self._directories[key] = directory
            if top:
                at = (self._linear_top >> (21 if self.pae else 22)) % (PAGE // self._size)
                entry = (self._hole_table | KERNEL_TABLE).to_bytes(self._size, "little")
                self._host.write(directory.copy + at * self._size, entry)
            if frame >= 0:
                try:
                    self._copy_directory(directory)
                except Violation:
                    self._empty(directory)
                    raise
                self._hook(frame, True)
        directory.users += 1

    def _release_directory(self, key: tuple[int, bool]) -> None:
        directory = self._directories[key]
        directory.users -= 1
        if directory.users == 0:
            self._empty(directory)

    def _empty(self, directory: Directory) -> None:
        del self._directories[directory.frame, directory.top]
        for entry in directory.entries:
            if self._names_table(entry):
                self._release_table(self._frame(entry))
        self._host.give_back(directory.copy)
        if directory.frame >= 0:
            self._hook(directory.frame, self._in_use(directory.frame))

    def _copy_directory(self, directory: Directory) -> None:
        """Bring the copy to what the guest's directory says; on a Violation it is as far as it came."""
        now = self._entries(directory.frame)
        size = self._size
        end = len(now)
        if directory.top:
            end = (self._linear_top >> (21 if self.pae else 22)) % len(now)
        old = directory.entries
        changed = [i for i in range(end) if now[i] != old[i]]
        for i in changed:
            entry = now[i]
            if entry & PRESENT:
                self._check_entry(entry, "directory")
            if self._names_table(entry):
                self._hold_table(self._frame(entry))
            if self._names_table(old[i]):
                self._release_table(self._frame(old[i]))
            old[i] = entry
            self._host.write(directory.copy + i * size, entry.to_bytes(size, "little"))

    @property
    def _size(self) -> int:
        return 8 if self.pae else 4

    def _entries(self, frame: int) -> tuple[int, ...]:
        return struct.unpack("<512Q" if self.pae else "<1024I", self._memory.read(frame << 12, PAGE))

    def _frame(self, entry: int) -> int:
        return entry >> 12 & 0xFF_FFFF if self.pae else entry >> 12

    @staticmethod
    def _names_table(entry: int) -> bool:
        return entry & (PRESENT | LARGE) == PRESENT

    def _check_entry(self, entry: int, what: str) -> None:
        if entry & 0xF_0000_0000 == 0 and entry & HOST_MASK == HOST:
            raise Violation("forged-page-table", f"a {what} entry names a page of the hypervisor", entry & 0xFFFF_F000)

    # --- tables -----------------------------------------------------------------------

    def _hold_table(self, frame: int) -> None:
        self._require_ram(frame, "directory entry")
        if not self._tables.get(frame):
            self._check_table(frame)
        if frame not in self._tables:
            self._tables[frame] = 0
            self._hook(frame, True)
        self._tables[frame] += 1

    def _release_table(self, frame: int) -> None:
        self._tables[frame] -= 1
        if self._tables[frame] == 0 and frame not in self._pinned:
            del self._tables[frame]
            self._hook(frame, self._in_use(frame))

    def _check_table(self, frame: int) -> None:
        mask, value = HOST_MASK | PRESENT, HOST | PRESENT
        if self.pae:
            mask |= 0xF_0000_0000
        for entry in self._entries(frame):
            if entry & mask == value:
                self._check_entry(entry, "page table")

    def _in_use(self, frame: int) -> bool:
        if frame in self._tables or frame in self._watched:
            return True
        return (frame, False) in self._directories or (frame, True) in self._directories

    def _hook(self, frame: int, hooked: bool) -> None:
        backing = self._memory.backing_of(frame << 12)
        if backing >= 0:
            self._memory.hook_page(backing >> 12, hooked)

    # --- what the guest says ------------------------------------------------------------

    def allocate(self, frame: int, is_table: bool) -> None:
        """AllocatePage or a pin: from now on the page is a page table (or a directory) and is guarded.

        What is in it counts when a directory names it: Linux allocates first and fills the page then (2.6.21 to
        2.6.24, mm/pageattr.c, split_large_page).
        """
        self._require_ram(frame, "AllocatePage")
        if is_table and frame not in self._pinned:
            self._pinned.add(frame)
            if frame not in self._tables:
                self._tables[frame] = 0
                self._hook(frame, True)

    def release(self, frame: int) -> None:
        """ReleasePage or an unpin: an ordinary page again, unless something still points to it."""
        if frame in self._pinned:
            self._pinned.discard(frame)
            if self._tables.get(frame) == 0:
                del self._tables[frame]
                self._hook(frame, self._in_use(frame))
        for key, root in list(self._roots.items()):
            if key != self.current and (key >> 12 == frame or any(d and d[0] == frame for d in root.directories)):
                self._forget(key)

    def is_guarded(self, frame: int) -> bool:
        """Whether the guest's writes to this page are looked at."""
        return self._in_use(frame)

    def watch(self, old: Iterable[int], new: Iterable[int]) -> None:
        """Other pages than page tables whose changes somebody follows: descriptor tables."""
        before = set(self._watched)
        self._watched.difference_update(old)
        self._watched.update(new)
        for frame in before ^ self._watched:
            self._hook(frame, self._in_use(frame))

    def rights(self, linear: int) -> int:
        """What the tables in force allow at a linear address: present 1, writable 2, users 4, and-ed over the walk."""
        size, bits = self._size, 9 if self.pae else 10
        at = self._cpu.get("cr3")
        if self.pae:
            pointer = int.from_bytes(self._memory.read(at + 8 * (linear >> 30), 8), "little")
            if not pointer & PRESENT:
                return 0
            at = pointer & 0xFFFF_F000
        found = 7
        for shift in (12 + bits, 12):
            index = linear >> shift & (1 << bits) - 1
            entry = int.from_bytes(self._memory.read(at + index * size, size), "little")
            if not entry & PRESENT:
                return 0
            found &= entry
            if shift > 12 and entry & LARGE:
                break
            at = entry & 0xFFFF_F000
        return found

    def invalidate(self, linear: int) -> None:
        """INVLPG."""
        self._cpu.flush_page(linear)

    def flush(self) -> None:
        """Forget every translation; with PAE the four pointers are read anew, as by the load of CR3 that this is."""
        if self.pae:
            self.switch(self.current)
        self._cpu.flush()

    # --- writes -------------------------------------------------------------------------

    def store(self, backing: int, data: bytes) -> None:
        """A write that the host does for the guest, at a backing offset inside one page."""
        frame = backing >> 12  # RAM's backing is at its physical address
        if frame < self._ram_frames and self._in_use(frame):
            before = self._memory.read_backing(backing, len(data))
            self._memory.write_backing(backing, data)
            self._settle(frame, backing, before)
        else:
            self._memory.write_backing(backing, data)

    def store_physical(self, physical: int, data: bytes) -> bool:
        """The same at a physical address; False where there is no memory of the guest's."""
        backing = self._memory.backing_of(physical)
        if backing < 0 or backing >= self._ram_frames << 12:
            return False
        self.store(backing, data)
        return True

    def page_write(self, again: Callable[[], int] | None = None) -> int:
        """A hooked page is about to be written: let the instruction through, then look at what it wrote.

        ``again`` does what left with PAGE_WRITE once more: one instruction if it is not given. Returns its exit
        reason (LIMIT: an instruction is done).
        """
        step = again or self._cpu.step
        opened: dict[int, bytes] = {}
        reason = self._exit.PAGE_WRITE
        while reason == self._exit.PAGE_WRITE and len(opened) < PAGE_WRITE_LIMIT:
            frame = self._cpu.exit_physical >> 12
            if frame >= self._ram_frames:
                self._refuse(opened)
            if not self._in_use(frame):
                self._memory.hook_page(frame, False)
            elif frame not in opened:
                opened[frame] = self._memory.read_backing(frame << 12, PAGE)
                self._memory.hook_page(frame, False)
            reason = step()
        try:
            for frame, before in opened.items():
                self._settle(frame, frame << 12, before)
        finally:
            for frame in opened:
                self._memory.hook_page(frame, self._in_use(frame))
        return reason

    def _refuse(self, opened: dict[int, bytes]) -> None:
        """One instruction that forged an entry and went on through it: the page tables are as they were before."""
        for frame, before in opened.items():
            self._memory.write_backing(frame << 12, before)
            self._memory.hook_page(frame, True)
        raise Violation("forged-page-table", "a write through a forged page table", self._cpu.exit_address)

    def _settle(self, frame: int, backing: int, before: bytes) -> None:
        """Judge what a write changed; the old bytes are put back when it is a violation."""
        after = self._memory.read_backing(backing, len(before))
        if after == before:
            return
        try:
            if frame in self._tables:
                self._judge(backing, before, after)
            for top in (False, True):
                directory = self._directories.get((frame, top))
                if directory is not None:
                    self._copy_directory(directory)
        except Violation:
            if self.is_live(frame):
                self._memory.write_backing(backing, before)
                for top in (False, True):
                    directory = self._directories.get((frame, top))
                    if directory is not None:
                        self._copy_directory(directory)
                raise
            # Memory that was a page table once and is something else now, without ReleasePage.
            self.abandon(frame)
        if frame in self._watched and self.on_watched is not None:
            self.on_watched(frame)

    def _judge(self, backing: int, before: bytes, after: bytes) -> None:
        """Look at the entries of a page table from the first to the last that a write at a backing offset changed."""
        changed = int.from_bytes(before, "little") ^ int.from_bytes(after, "little")
        first = backing + ((changed & -changed).bit_length() - 1 >> 3)
        last = backing + (changed.bit_length() - 1 >> 3)
        size = self._size
        for at in range(first - first % size, last + 1, size):
            self._check_word(int.from_bytes(self._memory.read_backing(at, size), "little"))

    def _check_word(self, entry: int) -> None:
        if entry & PRESENT:
            self._check_entry(entry, "page table")

    def is_live(self, frame: int) -> bool:
        """Whether the current address space walks this page, or the guest said that it is a table."""
        if frame in self._pinned:
            return True
        root = self._roots.get(self.current)
        if root is None:
            return True
        for key in root.directories:
            if key is None:
                continue
            directory = self._directories[key]
            if key[0] == frame or any(self._names_table(e) and self._frame(e) == frame for e in directory.entries):
                return True
        return False

    def abandon(self, frame: int) -> None:
        """Drop every address space that walks this page: it is something else now."""
        for key, root in list(self._roots.items()):
            for name in root.directories:
                if name is None or key not in self._roots:
                    continue
                entries = self._directories[name].entries
                if name[0] == frame or any(self._names_table(e) and self._frame(e) == frame for e in entries):
                    self._forget(key)

    # --- snapshots ----------------------------------------------------------------------

    def save(self) -> Any:
        """Everything but the machine-owned pages themselves."""
        return (
            self.pae,
            self.current,
            self._hole_table,
            dict(self._tables),
            set(self._pinned),
            {key: (d.copy, tuple(d.entries), d.users) for key, d in self._directories.items()},
            dict(self._roots),
            tuple(self._host.free),
            set(self._watched),
            tuple(self._hole),
        )

    def restore(self, saved: Any) -> None:
        """Bring back what :meth:`save` returned; hooks follow."""
        before = self._guarded()
        self.pae, self.current, self._hole_table, tables, pinned, directories, roots, free = saved[:8]
        self._watched, self._hole = set(saved[8]), list(saved[9])
        self._tables, self._pinned, self._roots = dict(tables), set(pinned), dict(roots)
        for key, (copy, entries, users) in directories.items():
            had = self._directories.get(key)
            if had is None or had.copy != copy or tuple(had.entries) != entries or had.users != users:
                self._directories[key] = Directory(key[0], copy, key[1], list(entries), users)
        for key in [key for key in self._directories if key not in directories]:
            del self._directories[key]
        self._host.free = list(free)
        after = self._guarded()
        if after != before:
            for frame in before ^ after:
                self._hook(frame, frame in after)

    def _guarded(self) -> set[int]:
        return {*self._tables, *self._watched, *(key[0] for key in self._directories if key[0] >= 0)}
