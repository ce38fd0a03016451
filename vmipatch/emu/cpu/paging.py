"""From linear addresses to backing memory: page tables, the TLB, physical accesses.

May import words, state, memory, faults, host and the code cache's invalidation.
A translation is one number: 0 or more is an offset into the backing buffer,
-1 is a fault, and -2 - p is the physical address p that the bus answers.

A TLB entry is four words: the tags of pages that may be read, written and
executed (-1: none), and what to add to a linear address to get a backing
offset.  Bit 0 of a read or write tag makes the access take the slow path, which
still trusts the entry: the page holds decoded code, is watched, is hooked, or
is not yet in the dirty log.  So when the guest changes a page table and forgets
INVLPG, it meets stale translations as on a real processor, whatever the cache
of decoded code did meanwhile.
"""

from __future__ import annotations

from vmipatch.emu.cpu.faults import PAGE_FAULT, fault, gp, leave
from vmipatch.emu.cpu.host import bus_read, bus_write
from vmipatch.emu.cpu.memory import HOOKED, MAP_READ, MAP_WRITE
from vmipatch.emu.cpu.pause import OP_STALE, OP_STALE_FIRST
from vmipatch.emu.cpu.state import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    EXIT_PAGE_WRITE,
    TLB_ENTRIES,
    TLB_HALF,
    TLB_WORDS,
    Core,
)
from vmipatch.emu.cpu.words import cast, i64, load32, mask32, store32, u32, u64

READ = 0
WRITE = 1
FETCH = 4
USER = 8

PTE_P = 1
PTE_W = 2
PTE_U = 4
PTE_A = 0x20
PTE_D = 0x40
PTE_PS = 0x80
PTE_G = 0x100
FRAME = 0xFFFFF000

GONE = -2  # in the hash table of blocks: the slot of one that was dropped


def flush_tlb(c: Core, keep_global: i64) -> None:
    """Forget translations; with ``keep_global`` those of global pages stay."""
    i: i64
    c.generation = c.generation + 1
    if keep_global and c.cr[4] & CR4_PGE:
        for i in range(2 * TLB_ENTRIES):
            if c.tlb_global[i] == 0:
                c.tlb[4 * i] = -1
                c.tlb[4 * i + 1] = -1
                c.tlb[4 * i + 2] = -1
        return
    for i in range(0, TLB_WORDS, 4):
        c.tlb[i] = -1
        c.tlb[i + 1] = -1
        c.tlb[i + 2] = -1
    for i in range(2 * TLB_ENTRIES):
        c.tlb_global[i] = 0


def flush_page(c: Core, linear: u32) -> None:
    """INVLPG: forget one page, global or not."""
    i: i64 = ((linear >> 12) & (TLB_ENTRIES - 1)) * 4
    j: i64
    c.generation = c.generation + 1
    for j in range(3):
        c.tlb[i + j] = -1
        c.tlb[i + TLB_HALF + j] = -1


def physical_place(c: Core, physical: u64, write: i64) -> i64:
    """Where a physical address is: backing offset, or -2 - physical for the bus."""
    if physical >> 32:
        return -2 - cast(i64, physical)
    at: u32 = mask32(physical) & c.a20_mask
    entry: u32 = c.pages[at >> 12]
    if (entry & (MAP_WRITE if write else MAP_READ)) == 0:
        return -2 - cast(i64, at)
    return (cast(i64, entry) >> 2 << 12) + (at & 0xFFF)


def physical_read32(c: Core, physical: u64) -> u32:
    """An aligned word, as the page walk reads it."""
    place: i64 = physical_place(c, physical, 0)
    if place >= 0:
        return load32(c.host, place)
    return bus_read(c, -2 - place, 4)


def physical_write32(c: Core, physical: u64, value: u32) -> None:
    """An aligned word, as the page walk writes accessed and dirty bits."""
    place: i64 = physical_place(c, physical, 1)
    if place >= 0:
        note_write(c, place, 4)
        store32(c.host, place, value)
    else:
        bus_write(c, -2 - place, 4, value)


def note_write(c: Core, place: i64, size: i64) -> None:
    """Log a write to backing memory and drop code decoded from the bytes written."""
    page: i64 = place >> 12
    if c.dirty[page] == 0:
        c.dirty[page] = 1
        c.memory.dirty_list[c.memory.dirty_count] = mask32(page)
        c.memory.dirty_count = c.memory.dirty_count + 1
    bits: u32 = c.code_bits[page]
    if bits != 0:
        first: u32 = mask32((place >> 7) & 31)
        last: u32 = mask32(((place + size - 1) >> 7) & 31)
        if (bits >> first) & 1 or (bits >> last) & 1:
            forget_code(c, page)


def forget_code(c: Core, page: i64) -> None:
    """Drop every block decoded from a backing page, the running one included.

    Each record of such a block turns into one that leaves the block, so a run
    inside it stops before the next instruction.
    """
    cell: i64 = c.page_list[page]
    c.page_list[page] = 0
    c.code_bits[page] = 0
    c.invalidations = c.invalidations + 1
    while cell != 0:
        head: i64 = c.cells[cell]
        if c.code[head + 2] != 0:
            forget_block(c, head)
        cell = c.cells[cell + 1]
    i: i64
    for i in range(1, c.code[2] + 1):  # the scratch block may hold copies
        c.code[8 * i] = OP_STALE


def forget_block(c: Core, head: i64) -> None:
    """Make one block unusable; see blocks.py for its layout."""
    slot: i64 = c.code[head + 5]
    count: i64 = c.code[head + 2]
    i: i64
    c.hash_key[slot] = GONE
    c.code[head + 8] = OP_STALE_FIRST
    for i in range(2, count + 1):
        c.code[head + 8 * i] = OP_STALE
    c.code[head + 2] = 0


def page_fault(c: Core, linear: u32, access: i64, present: u32) -> i64:
    """#PF; the error code has P, W/R, U/S and, with NX in use, I/D."""
    error: u32 = present
    if access & WRITE:
        error |= 2
    if access & USER:
        error |= 4
    if access & FETCH and c.efer_nx and c.cr[4] & CR4_PAE:
        error |= 16
    c.cr[2] = linear
    return fault(c, PAGE_FAULT, error)


def translate(c: Core, linear: u32, access: i64) -> i64:
    """Translate for an access (READ, WRITE or FETCH, or-ed with USER); fills the TLB."""
    t: i64 = ((linear >> 12) & (TLB_ENTRIES - 1)) * 4
    if access & USER:
        t = t + TLB_HALF
    which: i64 = t + (2 if access & FETCH else access & WRITE)
    page: i64 = linear & FRAME
    if c.tlb[which] >= 0 and (c.tlb[which] & FRAME) == page:
        return c.tlb[t + 3] + linear
    is_global: u32 = 0
    frame: u64 = page
    if c.cr[0] & CR0_PG:
        walked: i64
        walked = walk_pae(c, linear, access) if c.cr[4] & CR4_PAE else walk_two_level(c, linear, access)
        if walked < 0:
            return -1
        frame = cast(u64, walked >> 12) << 12
        is_global = mask32(walked) & 1
    place: i64 = physical_place(c, frame, access & WRITE)
    if place < 0:
        return place - (linear & 0xFFF)
    fill_tlb(c, t, which, page, place, is_global)
    return place + (linear & 0xFFF)


def fill_tlb(c: Core, t: i64, which: i64, page: i64, place: i64, is_global: u32) -> None:
    """Enter a translation of ``page`` to the backing page at ``place``."""
    i: i64
    if c.tlb[t + 3] != place - page:
        for i in range(3):
            c.tlb[t + i] = -1
        c.tlb[t + 3] = place - page
    for i in range(3):
        if c.tlb[t + i] >= 0 and (c.tlb[t + i] & FRAME) != page:
            c.tlb[t + i] = -1
    tag: i64 = page
    if which == t + 1 and (must_be_slow(c, place >> 12) or c.dirty[place >> 12] == 0):
        tag = page | 1
    if c.watchpoints and which != t + 2:
        tag = page | 1
    c.tlb[which] = tag
    c.tlb_global[t >> 2] = is_global & 1


def must_be_slow(c: Core, page: i64) -> u32:
    """Whether writes to a backing page must be seen."""
    if c.code_bits[page] != 0 or c.page_flags[page] & HOOKED or c.watchpoints:
        return 1
    return 0


def slow_writes(c: Core) -> None:
    """Make every write look at its page once more (a new dirty log, new hooks)."""
    i: i64
    for i in range(0, TLB_WORDS, 4):
        if c.tlb[i + 1] >= 0:
            c.tlb[i + 1] = c.tlb[i + 1] | 1


def slow_page(c: Core, place: i64) -> None:
    """Make writes to one backing page take the slow path: it holds decoded code now."""
    i: i64
    for i in range(0, TLB_WORDS, 4):
        if c.tlb[i + 1] >= 0 and c.tlb[i + 3] + (c.tlb[i + 1] & FRAME) == place:
            c.tlb[i + 1] = c.tlb[i + 1] | 1


def allowed(c: Core, linear: u32, access: i64, rights: u32) -> i64:
    """Check the and-ed W and U bits of a walk; 0, or -1 with #PF raised."""
    if access & USER:
        if (rights & PTE_U) == 0 or (access & WRITE and (rights & PTE_W) == 0):
            return page_fault(c, linear, access, 1)
    elif access & WRITE and (rights & PTE_W) == 0 and c.cr[0] & CR0_WP:
        return page_fault(c, linear, access, 1)
    return 0


def walk_two_level(c: Core, linear: u32, access: i64) -> i64:
    """A 32-bit walk (SDM 3A, 4.3): the frame with bit 0 for global, or -1."""
    directory: u64 = (c.cr[3] & FRAME) + (linear >> 22) * 4
    pde: u32 = physical_read32(c, directory)
    if (pde & PTE_P) == 0:
        return page_fault(c, linear, access, 0)
    frame: u64
    if pde & PTE_PS and c.cr[4] & CR4_PSE:
        if pde & 0x200000:  # bit 21 is reserved with PSE-36 and 36-bit addresses
            return page_fault(c, linear, access, 9)
        if allowed(c, linear, access, pde) < 0:
            return -1
        wanted: u32 = pde | PTE_A
        if access & WRITE:
            wanted |= PTE_D
        if wanted != pde:
            physical_write32(c, directory, wanted)
        frame = cast(u64, pde & 0xFFC00000) | cast(u64, (pde >> 13) & 0xF) << 32 | (linear & 0x3FF000)
        return cast(i64, frame) | ((pde >> 8) & 1)
    table: u64 = (pde & FRAME) + ((linear >> 12) & 0x3FF) * 4
    pte: u32 = physical_read32(c, table)
    if (pte & PTE_P) == 0:
        return page_fault(c, linear, access, 0)
    if allowed(c, linear, access, pde & pte) < 0:
        return -1
    if (pde & PTE_A) == 0:
        physical_write32(c, directory, pde | PTE_A)
    marked: u32 = pte | PTE_A
    if access & WRITE:
        marked |= PTE_D
    if marked != pte:
        physical_write32(c, table, marked)
    return cast(i64, pte & FRAME) | ((pte >> 8) & 1)


def walk_pae(c: Core, linear: u32, access: i64) -> i64:
    """A PAE walk (SDM 3A, 4.4): the frame with bit 0 for global, or -1."""
    top: u64 = cast(u64, c.pdpte[linear >> 30])
    if (top & PTE_P) == 0:
        return page_fault(c, linear, access, 0)
    directory: u64 = (top & PAE_FRAME) + ((linear >> 21) & 0x1FF) * 8
    pde: u32 = physical_read32(c, directory)
    pde_high: u32 = physical_read32(c, directory + 4)
    if (pde & PTE_P) == 0:
        return page_fault(c, linear, access, 0)
    if pde_high & 0x7FFFFFF0 or (pde_high >> 31 and c.efer_nx == 0):
        return page_fault(c, linear, access, 9)
    no_execute: u32 = pde_high >> 31
    frame: u64
    if pde & PTE_PS:
        if pde & 0x1FE000:
            return page_fault(c, linear, access, 9)
        if access & FETCH and no_execute:
            return page_fault(c, linear, access, 1)
        if allowed(c, linear, access, pde) < 0:
            return -1
        wanted: u32 = pde | PTE_A
        if access & WRITE:
            wanted |= PTE_D
        if wanted != pde:
            physical_write32(c, directory, wanted)
        frame = cast(u64, pde_high & 0xF) << 32 | (pde & 0xFFE00000) | (linear & 0x1FF000)
        return cast(i64, frame) | ((pde >> 8) & 1)
    table: u64 = (cast(u64, pde_high & 0xF) << 32 | (pde & FRAME)) + ((linear >> 12) & 0x1FF) * 8
    pte: u32 = physical_read32(c, table)
    pte_high: u32 = physical_read32(c, table + 4)
    if (pte & PTE_P) == 0:
        return page_fault(c, linear, access, 0)
    if pte_high & 0x7FFFFFF0 or (pte_high >> 31 and c.efer_nx == 0):
        return page_fault(c, linear, access, 9)
    if access & FETCH and (no_execute or pte_high >> 31):
        return page_fault(c, linear, access, 1)
    if allowed(c, linear, access, pde & pte) < 0:
        return -1
    if (pde & PTE_A) == 0:
        physical_write32(c, directory, pde | PTE_A)
    marked: u32 = pte | PTE_A
    if access & WRITE:
        marked |= PTE_D
    if marked != pte:
        physical_write32(c, table, marked)
    frame = cast(u64, pte_high & 0xF) << 32 | (pte & FRAME)
    return cast(i64, frame) | ((pte >> 8) & 1)


PAE_FRAME = 0xFFFFFF000


def load_pdptes(c: Core, cr3: u32) -> i64:
    """Load the four PDPTEs of PAE paging; #GP(0) where a reserved bit is set."""
    i: i64
    low: u32
    high: u32
    base: u64 = cr3 & 0xFFFFFFE0
    for i in range(4):
        low = physical_read32(c, base + 8 * i)
        high = physical_read32(c, base + 8 * i + 4)
        if low & PTE_P and (low & 0x1E6 or high & 0xFFFFFFF0):
            return gp(c, 0)
    for i in range(4):
        low = physical_read32(c, base + 8 * i)
        high = physical_read32(c, base + 8 * i + 4)
        c.pdpte[i] = cast(i64, cast(u64, high & 0xF) << 32 | low)
    return 0


def page_write_exit(c: Core, linear: u32, place: i64, size: i64) -> i64:
    """Leave with PAGE_WRITE where the host asked to see writes to this page."""
    c.exit_address = linear
    c.exit_physical = place
    c.exit_size = size
    return leave(c, EXIT_PAGE_WRITE)
