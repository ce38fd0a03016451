"""One processor's whole state, the layout that every part of the engine works on.

May import words and memory.  The annotations are the declaration: compiled
they become the fields of a C structure (arrays take their length from
``LENGTHS``), uncompiled :class:`Core` makes plain attributes and lists of them.
"""

from __future__ import annotations

from typing import Any

from vmipatch.emu.cpu.memory import Memory
from vmipatch.emu.cpu.words import COMPILED, bytes_of, i64, p8, p32, p64, u32, zeros8, zeros32, zeros64

release: Any = None

# Segment registers, in the order of their encoding; then the two system segments.
ES = 0
CS = 1
SS = 2
DS = 3
FS = 4
GS = 5
TR = 6
LDTR = 7

EAX = 0
ECX = 1
EDX = 2
EBX = 3
ESP = 4
EBP = 5
ESI = 6
EDI = 7
ZERO = 8  # reg[8] is always 0: the base or the index of an address that has none

# EFLAGS
CF = 0x1
PF = 0x4
AF = 0x10
ZF = 0x40
SF = 0x80
TF = 0x100
IF = 0x200
DF = 0x400
OF = 0x800
IOPL = 0x3000
NT = 0x4000
RF = 0x10000
VM = 0x20000
AC = 0x40000
VIF = 0x80000
VIP = 0x100000
ID = 0x200000
ARITHMETIC = 0x8D5

CR0_PE = 0x1
CR0_MP = 0x2
CR0_EM = 0x4
CR0_TS = 0x8
CR0_ET = 0x10
CR0_NE = 0x20
CR0_WP = 0x10000
CR0_AM = 0x40000
CR0_NW = 0x20000000
CR0_CD = 0x40000000
CR0_PG = 0x80000000
CR4_VME = 0x1
CR4_PVI = 0x2
CR4_TSD = 0x4
CR4_DE = 0x8
CR4_PSE = 0x10
CR4_PAE = 0x20
CR4_MCE = 0x40
CR4_PGE = 0x80
CR4_PCE = 0x100
CR4_OSFXSR = 0x200

# What a handler returns instead of the place of the next record.
FAULT = -1  # c.vector and c.error say which; c.p is the record at fault
LOOKUP = -2  # c.eip is exact: find the block there
STOP = -3  # as LOOKUP, and look at the pending events first
LEAVE = -4  # c.exit_reason is set; c.eip is exact

# Exit reasons of Cpu.run.
EXIT_NONE = 0
EXIT_LIMIT = 1
EXIT_HALT = 2
EXIT_SHUTDOWN = 3
EXIT_BREAKPOINT = 4
EXIT_WATCHPOINT = 5
EXIT_HYPERCALL = 6
EXIT_VECTOR = 7
EXIT_INSTRUCTION = 8
EXIT_PORT = 9
EXIT_PAGE_WRITE = 10
EXIT_REQUESTED = 11

TLB_ENTRIES = 1024
TLB_HALF = 4096  # words of one half: supervisor first, then user
TLB_WORDS = 8192

ARENA_WORDS = 0x800000  # 32 MiB of decoded records, 8 words each
ARENA_WORDS_UNCOMPILED = 0x80000
SCRATCH_WORDS = 1024  # at the start of the arena: blocks that are not kept
HASH_SIZE = 0x40000
MOST_BLOCKS = HASH_SIZE // 2  # a full table would be searched for ever, and a crowded one for long
JUMP_SIZE = 4096

LENGTHS = {
    "reg": 16,
    "sel": 8,
    "base": 8,
    "limit": 8,
    "attr": 8,
    "read_top": 8,
    "write_top": 8,
    "cr": 8,
    "dr": 8,
    "pdpte": 8,
    "exit_vectors": 8,
    "tlb": 8192,
    "watch_table": 48,
    "task_words": 16,
    "mm_low": 8,
    "mm_high": 8,
}


class Core:
    """The fields; see the part named in each comment for their meaning."""

    memory: Memory
    bus: object
    host_error: object
    msrs: object
    leaves: object
    # memory.py's buffers
    host: p8
    pages: p32
    dirty: p8
    page_flags: p8
    code_bits: p32
    scratch: i64
    # registers
    reg: list[u32]
    eip: u32
    flags: u32
    res: i64
    aux: u32
    sel: list[u32]
    base: list[u32]
    limit: list[u32]
    attr: list[u32]
    read_top: list[i64]
    write_top: list[i64]
    cs_top: i64
    stack_mask: u32
    cpl: u32
    vm: u32
    protected: u32
    key: i64
    user_set: i64
    cr: list[u32]
    dr: list[u32]
    gdt_base: u32
    gdt_limit: u32
    idt_base: u32
    idt_limit: u32
    desc_low: u32
    desc_high: u32
    desc_at: u32
    task_words: list[u32]
    task_done: u32
    tss_ss: u32
    tss_esp: u32
    sysenter_cs: u32
    sysenter_esp: u32
    sysenter_eip: u32
    efer_nx: u32
    has_nx: u32
    pdpte: list[i64]
    a20_mask: u32
    cr4_allowed: u32
    tsc_offset: i64
    tsc_adjust: i64
    # run.py
    until: i64
    remaining: i64
    p: i64
    vector: i64
    error: u32
    external: u32
    shadow: u32
    halted: u32
    shut_down: u32
    interrupt_pin: u32
    nmi_pending: u32
    nmi_blocked: u32
    stop: u32
    host_stop: u32
    no_trap: u32
    single: u32
    pending_trap: u32
    debug_active: u32
    skip_break: u32
    skip_exit: u32
    running: u32
    exit_reason: i64
    exit_vector: i64
    exit_error: u32
    exit_kind: i64
    exit_class: i64
    exit_address: u32
    exit_physical: i64
    exit_size: i64
    exit_value: u32
    exit_write: u32
    exit_length: i64
    exit_vectors: list[u32]
    exit_classes: i64
    exit_ports: p8
    hooked_ports: u32
    breakpoints: u32
    break_table: p32
    watchpoints: u32
    watch_hit: u32
    watch_table: list[u32]
    # access.py
    tlb: list[i64]
    tlb_global: p8
    modify_linear: u32
    modify_size: i64
    modify_h1: i64
    modify_h2: i64
    physical: i64
    # blocks.py
    arena: i64
    arena_size: i64
    code: p32
    code8: p8
    next_free: i64
    hash_key: p64
    hash_block: p32
    page_list: p32
    cells: p32
    next_cell: i64
    jump_tag: p64
    jump_block: p32
    generation: i64
    flushes: i64
    invalidations: i64
    link_from: i64
    patched_at: i64
    patched_op: u32
    # decode.py
    tables: p32
    leaf: i64
    instruction: p8
    # x87.py
    fpu_control: u32
    fpu_status: u32
    fpu_tag: u32
    fpu_opcode: u32
    fpu_ip: u32
    fpu_next_ip: u32
    fpu_cs: u32
    fpu_dp: u32
    fpu_ds: u32
    mxcsr: u32
    mm_low: list[i64]
    mm_high: list[u32]
    ferr: u32

    def __init__(self, memory: Memory, bus: object) -> None:
        if not COMPILED:
            for name, kind in Core.__annotations__.items():
                if name in LENGTHS:
                    setattr(self, name, [0] * LENGTHS[name])
                elif kind in ("u32", "i64"):
                    setattr(self, name, 0)
        self.memory = memory
        self.bus = bus
        self.host_error = None
        self.msrs = {}
        self.leaves = {}
        self.host = memory.host
        self.pages = memory.pages
        self.dirty = memory.dirty
        self.page_flags = memory.page_flags
        self.code_bits = memory.code_bits
        self.scratch = memory.scratch
        self.arena_size = ARENA_WORDS if COMPILED else ARENA_WORDS_UNCOMPILED
        self.code = zeros32(self.arena_size)
        self.code8 = bytes_of(self.code)
        self.hash_key = zeros64(HASH_SIZE)
        self.hash_block = zeros32(HASH_SIZE)
        self.page_list = zeros32(memory.total_pages)
        self.cells = zeros32(2 * MOST_BLOCKS + 4)
        self.jump_tag = zeros64(JUMP_SIZE)
        self.jump_block = zeros32(JUMP_SIZE)
        self.tlb_global = zeros8(2 * TLB_ENTRIES)
        self.exit_ports = zeros8(8192)
        self.break_table = zeros32(1024)
        self.instruction = zeros8(32)
        self.tables = zeros32(16384)
        self.next_free = SCRATCH_WORDS
        self.next_cell = 2
        self.generation = 1
        self.a20_mask = 0xFFFFFFFF
        self.patched_at = 0

    def __dealloc__(self) -> None:
        if COMPILED:
            release(self.code)
            release(self.hash_key)
            release(self.hash_block)
            release(self.page_list)
            release(self.cells)
            release(self.jump_tag)
            release(self.jump_block)
            release(self.tlb_global)
            release(self.exit_ports)
            release(self.break_table)
            release(self.instruction)
            release(self.tables)
