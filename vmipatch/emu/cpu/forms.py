"""From the opcode table to handlers: one small function per instruction, size and operand form.

May import table.  The semantics are the functions of alu.py, general.py and
their kin; what is made here is only the fetching and storing around them, as
source text: :mod:`amalgam` puts it behind the engine's parts for the compiler,
:mod:`handlers` runs it when the engine is not compiled.

Numbers 0..6 are the records that are no instruction (see flow.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache

from vmipatch.emu.cpu.table import CLASSES, SEGMENT_NAMES, Row, rows

# Immediate kinds, for the decoder
IMM_NONE, IMM_BYTE, IMM_SIGNED, IMM_FULL, IMM_WORD, IMM_FAR, IMM_OFFSET, IMM_REL8, IMM_REL, IMM_ENTER, IMM_ONE = range(
    11
)
# Where a register number comes from
FROM_NOWHERE, FROM_REG, FROM_RM, FROM_OPCODE = range(4)

BINARY = {n: f"alu_{n}" for n in ("add", "or", "adc", "sbb", "and", "sub", "xor")}
COMPARE = {"cmp": "alu_sub", "test": "alu_and"}
UNARY = {n: f"alu_{n}" for n in ("inc", "dec", "neg", "not")}
SHIFT = {n: f"alu_{n}" for n in ("rol", "ror", "rcl", "rcr", "shl", "shr", "sar")}
DOUBLE = {"shld": "alu_shld", "shrd": "alu_shrd"}
BIT = {"bt": 0, "bts": 1, "btr": 2, "btc": 3}
SEGMENTS = {name: i for i, name in enumerate(SEGMENT_NAMES)}
STRINGS = {"movs": 0, "stos": 1, "lods": 2, "cmps": 3, "scas": 4, "ins": 5, "outs": 6}

CONDITIONS = (
    "get_of(c)", "get_of(c) ^ 1", "get_cf(c)", "get_cf(c) ^ 1", "get_zf(c)", "get_zf(c) ^ 1",
    "get_cf(c) | get_zf(c)", "(get_cf(c) | get_zf(c)) ^ 1", "get_sf(c)", "get_sf(c) ^ 1",
    "get_pf(c)", "get_pf(c) ^ 1", "get_sf(c) ^ get_of(c)", "(get_sf(c) ^ get_of(c)) ^ 1",
    "(get_sf(c) ^ get_of(c)) | get_zf(c)", "((get_sf(c) ^ get_of(c)) | get_zf(c)) ^ 1",
)  # fmt: skip

# Mnemonics whose semantics is one function (c, p, *arguments); "size" stands for the operand size in bytes.
PLAIN: dict[str, str] = {
    "daa": "op_daa(c, p)",
    "das": "op_das(c, p)",
    "aaa": "op_ascii_adjust(c, p, 0)",
    "aas": "op_ascii_adjust(c, p, 1)",
    "aam": "op_aam(c, p)",
    "aad": "op_aad(c, p)",
    "pusha": "op_pusha(c, p, size)",
    "popa": "op_popa(c, p, size)",
    "bound": "op_bound(c, p, size)",
    "arpl": "op_arpl(c, p)",
    "movfs": "op_mov_from_segment(c, p)",
    "movts": "op_mov_to_segment(c, p)",
    "pope": "op_pop_e(c, p, size)",
    "nop": "op_nothing(c, p)",
    "prefetch": "op_nothing(c, p)",
    "hintnop": "op_nothing(c, p)",
    "cbw": "op_widen(c, p, size)",
    "cwd": "op_widen_pair(c, p, size)",
    "wait": "op_wait(c, p)",
    "pushf": "op_pushf(c, p, size)",
    "popf": "op_popf(c, p, size)",
    "sahf": "op_sahf(c, p)",
    "lahf": "op_lahf(c, p)",
    "enter": "op_enter(c, p, size)",
    "leave": "op_leave(c, p, size)",
    "callf": "op_far(c, p, 1, size)",
    "jmpf": "op_far(c, p, 0, size)",
    "retf": "return_far(c, p, c.code[p + 4], size)",
    "iret": "return_interrupt(c, p, size)",
    "int3": "software_interrupt(c, p, 3, 0)",
    "int": "software_interrupt(c, p, c.code[p + 4] & 0xFF, 1)",
    "into": "op_into(c, p)",
    "int1": "op_int1(c, p)",
    "salc": "op_salc(c, p)",
    "xlat": "op_xlat(c, p)",
    "fpu": "op_fpu(c, p)",
    "hlt": "op_halt(c, p)",
    "cmc": "op_change_flag(c, p, 0)",
    "clc": "op_change_flag(c, p, 1)",
    "stc": "op_change_flag(c, p, 2)",
    "cld": "op_change_flag(c, p, 3)",
    "std": "op_change_flag(c, p, 4)",
    "cli": "op_cli(c, p)",
    "sti": "op_sti(c, p)",
    "mul": "op_mul(c, p, size)",
    "imul1": "op_imul(c, p, size)",
    "div": "op_div(c, p, size)",
    "idiv": "op_idiv(c, p, size)",
    "sldt": "op_store_selector(c, p, 7)",
    "str": "op_store_selector(c, p, 6)",
    "lldt": "op_lldt(c, p)",
    "ltr": "op_ltr(c, p)",
    "verr": "op_verify(c, p, 0)",
    "verw": "op_verify(c, p, 1)",
    "sgdt": "op_store_table(c, p, 0)",
    "sidt": "op_store_table(c, p, 1)",
    "lgdt": "op_load_table(c, p, 0)",
    "lidt": "op_load_table(c, p, 1)",
    "smsw": "op_smsw(c, p)",
    "lmsw": "op_lmsw(c, p)",
    "invlpg": "op_invlpg(c, p)",
    "vmcall": "op_vmcall(c, p)",
    "lar": "op_lar(c, p, 0)",
    "lsl": "op_lar(c, p, 1)",
    "clts": "op_clts(c, p)",
    "invd": "op_flush_cache(c, p)",
    "wbinvd": "op_flush_cache(c, p)",
    "ud2": "op_undefined(c, p)",
    "ud1": "op_undefined(c, p)",
    "movfc": "op_mov_from_control(c, p)",
    "movtc": "op_mov_to_control(c, p)",
    "movfd": "op_mov_from_debug(c, p)",
    "movtd": "op_mov_to_debug(c, p)",
    "wrmsr": "op_wrmsr(c, p)",
    "rdtsc": "op_rdtsc(c, p)",
    "rdmsr": "op_rdmsr(c, p)",
    "rdpmc": "op_rdpmc(c, p)",
    "sysenter": "sysenter(c, p)",
    "sysexit": "sysexit(c, p)",
    "cpuid": "op_cpuid(c, p)",
    "fxsave": "op_fxsave(c, p)",
    "fxrstor": "op_fxrstor(c, p)",
    "les": "op_load_far(c, p, 0, size)",
    "lds": "op_load_far(c, p, 3, size)",
    "lss": "op_load_far(c, p, 2, size)",
    "lfs": "op_load_far(c, p, 4, size)",
    "lgs": "op_load_far(c, p, 5, size)",
    "bsf": "op_bit_scan(c, p, 0, size)",
    "bsr": "op_bit_scan(c, p, 1, size)",
    "xadd": "op_xadd(c, p, size)",
    "cmpxchg": "op_cmpxchg(c, p, size)",
    "cmpxchg8b": "op_cmpxchg8b(c, p)",
    "bswap": "op_bswap(c, p, size)",
}


# The first handlers are written by hand, in flow.py.
FIXED = (
    "handle_stale",
    "handle_stale_first",
    "handle_stop",
    "handle_end",
    "handle_undefined",
    "handle_too_long",
    "handle_class_exit",
)


@dataclass
class Leaf:
    """What the decoder needs to know of one row."""

    row: Row
    modrm: bool
    a_from: int
    b_from: int
    immediate: int
    # Handler numbers: register and memory form with 32-bit operands, then with 16-bit operands; 0: #UD.
    handlers: list[int] = field(default_factory=lambda: [0] * 4)
    # Fast versions of the first two (see _fast), and of the second with an index; 0: none.
    simple: list[int] = field(default_factory=lambda: [0] * 3)


@dataclass
class Engine:
    """Everything that was made from the table."""

    leaves: list[Leaf]
    names: list[str]
    sources: dict[str, str]


def _function(name: str, lines: list[str]) -> str:
    body = "\n".join("    " + line for line in lines)
    # A register number that is used twice is fetched once: the compiler cannot know that the store between changes
    # no record.
    for register in ("reg_a", "reg_b"):
        if body.count(f"{register}(c, p)") > 1:
            body = f"    {register}_: i64 = {register}(c, p)\n" + body.replace(f"{register}(c, p)", f"{register}_")
    return f"def {name}(c: Core, p: i64) -> i64:\n{body}\n"


def _size(operand: str, wide: int) -> int:
    kind = operand[1:] if operand[0] in "EGZIO" else ""
    return {"b": 8, "w": 16, "v": wide, "z": wide, "s": wide, "d": 32}.get(kind, wide)


def _fetch(size: int) -> str:
    return f"read(c, p, segment_of(c, p), effective(c, p), {size // 8})"


def _modify(size: int) -> list[str]:
    return [
        f"h: i64 = modify(c, p, segment_of(c, p), effective(c, p), {size // 8})",
        "if h < 0:",
        "    return FAULT",
    ]


def _stored(size: int, value: str) -> list[str]:
    return [f"store{size}(c.host, h, {value})", "modified(c, h)", "return advance(c, p)"]


def _source(operand: str, size: int) -> str:
    """An operand that needs no memory access."""
    if operand[0] == "G" or operand in ("AL", "eAX"):
        return f"get{size}(c, reg_a(c, p))"
    if operand == "CL":
        return "c.reg[ECX] & 0xFF"
    return "c.code[p + 4]"


def _fast(lines: list[str], slow: str, address: str = "effective_simple") -> list[str] | None:
    """A handler's common case: a 32-bit address in a page that the TLB has; None if it has no use.

    ``address`` works out that address, without or with an index.  Where the case
    is another, the slow handler starts from the beginning, in tail position: so
    the fast one calls nothing and needs no stack frame.
    """
    text = "\n".join(lines)
    otherwise = f":\n    return {slow}(c, p)"
    changed = text
    for pattern, replacement in (
        (
            r"v: i64 = read\(c, p, segment_of\(c, p\), effective\(c, p\), (\d)\)\nif v < 0:\n    return FAULT",
            r"e: i64 = ADDRESS(c, p)\nif misses_read(c, segment_of(c, p), e, \1)OTHERWISE\n"
            r"v: i64 = load\1(c.host, known_place(c, segment_of(c, p), e))",
        ),
        (
            r"if write\(c, p, segment_of\(c, p\), effective\(c, p\), (.*), (\d)\) < 0:\n    return FAULT",
            r"e: i64 = ADDRESS(c, p)\nif misses_write(c, segment_of(c, p), e, \2)OTHERWISE\n"
            r"store\2(c.host, known_place(c, segment_of(c, p), e), \1)",
        ),
        (
            r"h: i64 = modify\(c, p, segment_of\(c, p\), effective\(c, p\), (\d)\)\nif h < 0:\n    return FAULT",
            r"e: i64 = ADDRESS(c, p)\nif misses_write(c, segment_of(c, p), e, \1)OTHERWISE\n"
            r"h: i64 = known_place(c, segment_of(c, p), e)",
        ),
        (
            r"if push\(c, p, (.*), (\d)\) < 0:\n    return FAULT",
            r"e: i64 = mask32(c.reg[ESP] - \2) & c.stack_mask\nif misses_write(c, SS, e, \2)OTHERWISE\n"
            r"store\2(c.host, known_place(c, SS, e), \1)\nc.reg[ESP] = (c.reg[ESP] & ~c.stack_mask) | mask32(e)",
        ),
        (
            r"if check_target\(c, p, mask32\(v\)\) < 0 or push\(c, p, (.*), (\d)\) < 0:\n    return FAULT",
            r"e: i64 = mask32(c.reg[ESP] - \2) & c.stack_mask\n"
            r"if v >= c.cs_top or misses_write(c, SS, e, \2)OTHERWISE\n"
            r"store\2(c.host, known_place(c, SS, e), \1)\nc.reg[ESP] = (c.reg[ESP] & ~c.stack_mask) | mask32(e)",
        ),
        (
            r"v: i64 = pop\(c, p, (\d)\)\nif v < 0:\n    return FAULT",
            r"e: i64 = c.reg[ESP] & c.stack_mask\nif misses_read(c, SS, e, \1)OTHERWISE\n"
            r"v: i64 = load\1(c.host, known_place(c, SS, e))\ndrop(c, \1)",
        ),
        (
            r"v: i64 = peek\(c, p, 0, (\d)\)\nif v < 0 or check_target\(c, p, mask32\(v\)\) < 0:\n    return FAULT",
            r"e: i64 = c.reg[ESP] & c.stack_mask\nif misses_read(c, SS, e, \1)OTHERWISE\n"
            r"v: i64 = load\1(c.host, known_place(c, SS, e))\nif v >= c.cs_topOTHERWISE",
        ),
    ):
        changed = re.sub(pattern, replacement, changed)
    if changed == text or changed.count("e: i64") != 1:
        return None
    changed = changed.replace("modified(c, h)\n", "").replace("OTHERWISE", otherwise).replace("ADDRESS", address)
    for size in (1, 2, 4):
        changed = re.sub(rf"\b(load|store){size}\(", rf"\g<1>{8 * size}(", changed)
    return changed.split("\n")


class _Maker:
    """Writes the body of a handler: ``lines(row, wide, memory)``, or None where the form does not exist."""

    def lines(self, row: Row, wide: int, memory: bool) -> list[str] | None:
        name = row.mnemonic
        ops = row.operands
        if name in PLAIN:
            return self.plain(row, wide, PLAIN[name])
        if name in BINARY or name in COMPARE:
            return self.binary(row, wide, memory)
        if name in UNARY or name in SHIFT or name in DOUBLE:
            return self.change(row, wide, memory)
        if name in BIT:
            return self.bit(row, wide, memory)
        if name[:-1] in STRINGS and not ops:
            size = 1 if name[-1] == "b" else wide // 8
            return self.call(f"op_string(c, p, {STRINGS[name[:-1]]}, {size})")
        if name[:-1] in ("in", "out"):
            size = 1 if name[-1] == "b" else wide // 8
            return self.call(f"op_{name[:-1]}(c, p, {size}, {int(ops[0] == 'Ib')})")
        method = getattr(self, "make_" + name)
        result: list[str] | None = method(row, wide, memory)
        return result

    def call(self, expression: str) -> list[str]:
        return [
            "c.p = p",
            f"r: i64 = {expression}",
            "if r != 0:",
            "    return finish(c, p, r)",
            "return advance(c, p)",
        ]

    def plain(self, row: Row, wide: int, expression: str) -> list[str]:
        size = wide // 8
        if row.operands and row.operands[0] in ("Eb", "Gb"):
            size = 1
        return self.call(expression.replace("size", str(size)))

    def binary(self, row: Row, wide: int, memory: bool) -> list[str]:
        to, by = row.operands
        size = 8 if to == "AL" else _size(to, wide)
        compares = row.mnemonic in COMPARE
        operation = COMPARE.get(row.mnemonic) or BINARY[row.mnemonic]
        if to[0] == "G":
            if memory:
                lines = [f"v: i64 = {_fetch(size)}", "if v < 0:", "    return FAULT"]
                value = "mask32(v)"
            else:
                lines, value = [], f"get{size}(c, reg_b(c, p))"
            result = f"{operation}(c, get{size}(c, reg_a(c, p)), {value}, {size})"
            lines.append(result if compares else f"put{size}(c, reg_a(c, p), {result})")
            return [*lines, "return advance(c, p)"]
        source = f"get{size}(c, reg_a(c, p))" if by[0] == "G" else "c.code[p + 4]"
        if not memory:
            result = f"{operation}(c, get{size}(c, reg_b(c, p)), {source}, {size})"
            return [result if compares else f"put{size}(c, reg_b(c, p), {result})", "return advance(c, p)"]
        if compares:
            return [
                f"v: i64 = {_fetch(size)}",
                "if v < 0:",
                "    return FAULT",
                f"{operation}(c, mask32(v), {source}, {size})",
                "return advance(c, p)",
            ]
        return _modify(size) + _stored(size, f"{operation}(c, load{size}(c.host, h), {source}, {size})")

    def change(self, row: Row, wide: int, memory: bool) -> list[str]:
        size = _size(row.operands[0], wide)
        operation = UNARY.get(row.mnemonic) or SHIFT.get(row.mnemonic) or DOUBLE[row.mnemonic]
        arguments = "".join(f", {_source(o, size)}" for o in row.operands[1:])
        if memory:
            return _modify(size) + _stored(size, f"{operation}(c, load{size}(c.host, h){arguments}, {size})")
        value = f"{operation}(c, get{size}(c, reg_b(c, p)){arguments}, {size})"
        return [f"put{size}(c, reg_b(c, p), {value})", "return advance(c, p)"]

    def bit(self, row: Row, wide: int, memory: bool) -> list[str]:
        what = BIT[row.mnemonic]
        if row.operands[1] == "Gv":
            return self.call(f"op_bit_register(c, p, {what}, {wide // 8})")
        operation = f"alu_{row.mnemonic}"
        if not memory:
            value = f"{operation}(c, get{wide}(c, reg_b(c, p)), c.code[p + 4], {wide})"
            return [value if what == 0 else f"put{wide}(c, reg_b(c, p), {value})", "return advance(c, p)"]
        if what == 0:
            return [
                f"v: i64 = {_fetch(wide)}",
                "if v < 0:",
                "    return FAULT",
                f"alu_bt(c, mask32(v), c.code[p + 4], {wide})",
                "return advance(c, p)",
            ]
        return _modify(wide) + _stored(wide, f"{operation}(c, load{wide}(c.host, h), c.code[p + 4], {wide})")

    def make_mov(self, row: Row, wide: int, memory: bool) -> list[str]:
        to, by = row.operands
        size = 8 if "AL" in row.operands or to.endswith("b") else wide
        if to[0] == "G" or (to in ("AL", "eAX") and by[0] == "O"):
            if memory:
                return [
                    f"v: i64 = {_fetch(size)}",
                    "if v < 0:",
                    "    return FAULT",
                    f"put{size}(c, reg_a(c, p), mask32(v))",
                    "return advance(c, p)",
                ]
            return [f"put{size}(c, reg_a(c, p), get{size}(c, reg_b(c, p)))", "return advance(c, p)"]
        source = f"get{size}(c, reg_a(c, p))" if by[0] == "G" or by in ("AL", "eAX") else "c.code[p + 4]"
        if memory:
            return [
                f"if write(c, p, segment_of(c, p), effective(c, p), {source}, {size // 8}) < 0:",
                "    return FAULT",
                "return advance(c, p)",
            ]
        return [f"put{size}(c, reg_b(c, p), {source})", "return advance(c, p)"]

    def make_movzx(self, row: Row, wide: int, memory: bool) -> list[str]:
        size = _size(row.operands[1], wide)
        if memory:
            return [
                f"v: i64 = {_fetch(size)}",
                "if v < 0:",
                "    return FAULT",
                f"put{wide}(c, reg_a(c, p), mask32({self.widened(row, 'mask32(v)', size)}))",
                "return advance(c, p)",
            ]
        value = self.widened(row, f"get{size}(c, reg_b(c, p))", size)
        return [f"put{wide}(c, reg_a(c, p), mask32({value}))", "return advance(c, p)"]

    make_movsx = make_movzx

    def widened(self, row: Row, value: str, size: int) -> str:
        return f"signed{size}({value})" if row.mnemonic == "movsx" else value

    def make_lea(self, row: Row, wide: int, memory: bool) -> list[str]:
        return [f"put{wide}(c, reg_a(c, p), mask32(effective(c, p)))", "return advance(c, p)"]

    def make_xchg(self, row: Row, wide: int, memory: bool) -> list[str]:
        size = _size(row.operands[0], wide)
        if memory or size != 32:
            return self.call(f"op_xchg(c, p, {size // 8})")
        return [
            "v: u32 = c.reg[reg_a(c, p)]",
            "c.reg[reg_a(c, p)] = c.reg[reg_b(c, p)]",
            "c.reg[reg_b(c, p)] = v",
            "return advance(c, p)",
        ]

    def make_imul(self, row: Row, wide: int, memory: bool) -> list[str]:
        other = "c.code[p + 4]" if len(row.operands) == 3 else f"get{wide}(c, reg_a(c, p))"
        if memory:
            lines = [f"v: i64 = {_fetch(wide)}", "if v < 0:", "    return FAULT"]
            value = "mask32(v)"
        else:
            lines, value = [], f"get{wide}(c, reg_b(c, p))"
        return [
            *lines,
            f"put{wide}(c, reg_a(c, p), alu_imul(c, {value}, {other}, {wide}))",
            "return advance(c, p)",
        ]

    def make_push(self, row: Row, wide: int, memory: bool) -> list[str]:
        operand = row.operands[0]
        if operand in SEGMENTS:
            return self.call(f"op_push_segment(c, p, {SEGMENTS[operand]}, {wide // 8})")
        if operand[0] == "I":
            value = "c.code[p + 4]"
        elif memory:
            return [
                f"v: i64 = {_fetch(wide)}",
                f"if v < 0 or push(c, p, mask32(v), {wide // 8}) < 0:",
                "    return FAULT",
                "return advance(c, p)",
            ]
        else:
            value = f"get{wide}(c, reg_b(c, p))"
        return [f"if push(c, p, {value}, {wide // 8}) < 0:", "    return FAULT", "return advance(c, p)"]

    def make_pop(self, row: Row, wide: int, memory: bool) -> list[str]:
        operand = row.operands[0]
        if operand in SEGMENTS:
            return self.call(f"op_pop_segment(c, p, {SEGMENTS[operand]}, {wide // 8})")
        return [
            f"v: i64 = pop(c, p, {wide // 8})",
            "if v < 0:",
            "    return FAULT",
            f"put{wide}(c, reg_b(c, p), mask32(v))",
            "return advance(c, p)",
        ]

    def make_set(self, row: Row, wide: int, memory: bool) -> list[str]:
        value = CONDITIONS[row.condition]
        if memory:
            return [
                f"if write(c, p, segment_of(c, p), effective(c, p), {value}, 1) < 0:",
                "    return FAULT",
                "return advance(c, p)",
            ]
        return [f"put8(c, reg_b(c, p), {value})", "return advance(c, p)"]

    def make_cmov(self, row: Row, wide: int, memory: bool) -> list[str]:
        lines = []
        value = f"get{wide}(c, reg_b(c, p))"
        if memory:
            lines = [f"v: i64 = {_fetch(wide)}", "if v < 0:", "    return FAULT"]
            value = "mask32(v)"
        return [
            *lines,
            f"if {CONDITIONS[row.condition]}:",
            f"    put{wide}(c, reg_a(c, p), {value})",
            "return advance(c, p)",
        ]

    def make_jcc(self, row: Row, wide: int, memory: bool) -> list[str]:
        return self.branch(CONDITIONS[row.condition], wide)

    def branch(self, condition: str, wide: int) -> list[str]:
        taken = "linked(c, p, mask32(c.eip + c.code[p + 3]), 5)"
        if wide == 16:
            taken = "jump_to(c, p, mask32(c.eip + c.code[p + 3]) & 0xFFFF)"
        return [f"if {condition}:", f"    return {taken}", "return fall_linked(c, p, mask32(c.eip + c.code[p + 4]), 7)"]

    def make_jmp(self, row: Row, wide: int, memory: bool) -> list[str]:
        if row.operands[0][0] == "J":
            if wide == 32:
                return ["return linked(c, p, mask32(c.eip + c.code[p + 3]), 5)"]
            return ["return jump_to(c, p, mask32(c.eip + c.code[p + 3]) & 0xFFFF)"]
        if memory:
            return [f"v: i64 = {_fetch(wide)}", "if v < 0:", "    return FAULT", "return jump_to(c, p, mask32(v))"]
        return [f"return jump_to(c, p, get{wide}(c, reg_b(c, p)))"]

    def make_call(self, row: Row, wide: int, memory: bool) -> list[str]:
        near = row.operands[0][0] == "J"
        if near:
            lines = [f"v: i64 = mask32(c.eip + c.code[p + 3]){'' if wide == 32 else ' & 0xFFFF'}"]
        elif memory:
            lines = [f"v: i64 = {_fetch(wide)}", "if v < 0:", "    return FAULT"]
        else:
            lines = [f"v: i64 = get{wide}(c, reg_b(c, p))"]
        lines += [
            f"if check_target(c, p, mask32(v)) < 0 or push(c, p, next_of(c, p), {wide // 8}) < 0:",
            "    return FAULT",
        ]
        if near and wide == 32:
            return [*lines, "return linked(c, p, mask32(v), 5)"]
        return [*lines, "return jump_to(c, p, mask32(v))"]

    def make_ret(self, row: Row, wide: int, memory: bool) -> list[str]:
        more = f"{wide // 8} + c.code[p + 4]" if row.operands else f"{wide // 8}"
        return [
            f"v: i64 = peek(c, p, 0, {wide // 8})",
            "if v < 0 or check_target(c, p, mask32(v)) < 0:",
            "    return FAULT",
            f"drop(c, {more})",
            "return jump_to(c, p, mask32(v))",
        ]

    def make_loop(self, row: Row, wide: int, memory: bool) -> list[str]:
        extra = {"loop": "", "loope": " and get_zf(c)", "loopne": " and get_zf(c) == 0"}[row.mnemonic]
        return [
            "count: u32 = mask32(c.reg[ECX] - 1) & c.code[p + 5]",
            f"return op_loop(c, p, count, 1 if count{extra} else 0, {wide // 8})",
        ]

    make_loope = make_loop
    make_loopne = make_loop

    def make_jcxz(self, row: Row, wide: int, memory: bool) -> list[str]:
        return [
            "count: u32 = c.reg[ECX] & c.code[p + 5]",
            f"return op_loop(c, p, count, 1 if count == 0 else 0, {wide // 8})",
        ]


def _leaf(row: Row) -> tuple[Leaf, bool, bool]:
    """The decoding of a row, and whether it has a register and a memory form."""
    a_from, b_from, immediate = FROM_NOWHERE, FROM_NOWHERE, IMM_NONE
    register, memory = True, False
    for operand in row.operands:
        if operand in ("E", "Eb", "Ew", "Ev"):
            b_from, memory = FROM_RM, True
        elif operand == "M":
            register, memory = False, True
        elif operand in ("R", "Rd"):
            b_from = FROM_RM
        elif operand[0] in "GSCD" and operand not in (*SEGMENT_NAMES, "CL", "DX"):
            a_from = FROM_REG
        elif operand[0] == "Z":
            b_from = FROM_OPCODE
        elif operand in ("Ob", "Ov"):
            immediate, register, memory = IMM_OFFSET, False, True
        elif operand == "1":
            immediate = IMM_ONE
        elif operand == "A":
            immediate = IMM_FAR
        elif operand in ("Ib", "Is", "Iz", "Iw", "Jb", "Jz"):
            immediate = {
                "Ib": IMM_BYTE, "Is": IMM_SIGNED, "Iz": IMM_FULL,
                "Iw": IMM_WORD, "Jb": IMM_REL8, "Jz": IMM_REL,
            }[operand] if row.mnemonic != "enter" else IMM_ENTER  # fmt: skip
    return Leaf(row, row.has_modrm, a_from, b_from, immediate), register, memory


class _Handlers:
    """The handlers made so far; rows with the same body share one."""

    def __init__(self) -> None:
        self.names = [*FIXED]
        self.sources: dict[str, str] = {}
        self._by_body: dict[str, int] = {}

    def number(self, row: Row, where: str, lines: list[str]) -> int:
        """The number of the handler with this body, named after the first row that needs it."""
        body = "\n".join(lines)
        if body not in self._by_body:
            base = f"h_{row.mnemonic}_{'_'.join(row.operands)}".rstrip("_").replace(",", "_")
            if row.condition >= 0:
                base += f"_{row.condition:x}"
            name = f"{base}_{where}"
            if name in self.sources:
                name = f"{name}_{row.opcode:02x}"
            self._by_body[body] = len(self.names)
            self.sources[name] = _function(name, lines)
            self.names.append(name)
        return self._by_body[body]


@cache
def engine() -> Engine:
    """Make everything from the table."""
    maker = _Maker()
    handlers = _Handlers()
    leaves = []
    for row in rows():
        leaf, register, memory = _leaf(row)
        for index, (wide, is_memory) in enumerate(((32, False), (32, True), (16, False), (16, True))):
            if not (memory if is_memory else register):
                continue
            lines = maker.lines(row, wide, is_memory)
            if lines is None:
                continue
            where = f"{wide}{'m' if is_memory else 'r'}"
            leaf.handlers[index] = handlers.number(row, where, lines)
            if wide == 32:
                fast = _fast(lines, handlers.names[leaf.handlers[index]])
                if fast is not None:
                    leaf.simple[int(is_memory)] = handlers.number(row, where + "f", fast)
                    if is_memory:
                        fast = _fast(lines, handlers.names[leaf.handlers[index]], "effective_indexed")
                        assert fast is not None
                        leaf.simple[2] = handlers.number(row, where + "x", fast)
        leaves.append(leaf)
    return Engine(leaves, handlers.names, handlers.sources)


ONE_BYTE_MAP = 0
TWO_BYTE_MAP = 256
GROUPS = 512
LEAVES = 2048
IS_GROUP = 0x8000
NO_LEAF = 0

FLAG_MODRM = 1
FLAG_END = 2
FLAG_LOCK = 4


def decoder_tables() -> list[int]:
    """The numbers by which decode.py works.

    Two maps of 256 opcodes hold a leaf's place, 0 for #UD, or ``IS_GROUP`` and
    the place of 16 leaf places (register field, plus 8 for a register operand).
    A leaf is flags and kinds, four handlers, the exit class, whether its relative
    jump may be linked, the fast handlers of the 32-bit register and memory form
    (in two halves of a word), and that of the memory form with an index.
    """
    made = engine()
    table = [0] * LEAVES
    next_group = GROUPS
    for leaf in made.leaves:
        row = leaf.row
        at = len(table)
        flags = (FLAG_MODRM if leaf.modrm else 0) | (FLAG_END if row.end else 0) | (FLAG_LOCK if row.lock else 0)
        exit_class = CLASSES.index(row.exit_class) + 1 if row.exit_class else 0
        kinds = flags | leaf.a_from << 4 | leaf.b_from << 8 | leaf.immediate << 12
        handlers = leaf.handlers
        table += [
            kinds,
            *handlers,
            exit_class,
            int(row.mnemonic in ("jcc", "jmp", "call")),
            leaf.simple[0] | leaf.simple[1] << 16,
            leaf.simple[2],
        ]
        slot = (TWO_BYTE_MAP if row.two_byte else ONE_BYTE_MAP) + row.opcode
        if row.group < 0:
            table[slot] = at
            continue
        if table[slot] == 0:
            table[slot] = IS_GROUP | next_group
            next_group += 16
        group = table[slot] & ~IS_GROUP
        if handlers[0] or handlers[2]:
            table[group + row.group + 8] = at
        if handlers[1] or handlers[3]:
            table[group + row.group] = at
    return table
