"""The x87 unit: its registers, and the instructions of the eight escape opcodes.

May import words, state, faults, host, flags, access, operands, float80 and
transcendental.  The arithmetic is float80's, on whole numbers: exact, and the
same compiled and uncompiled.  ``mm_low`` and ``mm_high`` hold the eight
physical registers (significand as a signed 64-bit word, sign and exponent),
``fpu_status`` has TOP in bits 11..13, ``fpu_tag`` two bits a register of which
only "empty" (3) is kept up; the others are worked out when somebody looks.
"""

from __future__ import annotations

from typing import Any

from vmipatch.emu.cpu import float80, transcendental
from vmipatch.emu.cpu.access import effective, read, write
from vmipatch.emu.cpu.faults import MF, NM, fault, ud
from vmipatch.emu.cpu.flags import set_flags
from vmipatch.emu.cpu.operands import MARK_MEMORY, MARK_SIZE16, marks, put16, read_sized, segment_of, write_sized
from vmipatch.emu.cpu.state import CR0_EM, CR0_MP, CR0_NE, CR0_TS, CS, EAX, Core
from vmipatch.emu.cpu.transfer import this_eip
from vmipatch.emu.cpu.words import calls_python, cast, i64, mask32, u32

SW_C0 = 0x100
SW_C1 = 0x200
SW_C2 = 0x400
SW_C3 = 0x4000
SW_ES = 0x80
SW_BUSY = 0x8000
FAULTED = -1


def fpu_top(c: Core) -> i64:
    """The register that is ST(0)."""
    return (c.fpu_status >> 11) & 7


def fpu_set_tag(c: Core, at: i64, tag: u32) -> None:
    """Set the tag of a register."""
    c.fpu_tag = (c.fpu_tag & ~(cast(u32, 3) << (2 * at))) | tag << (2 * at)


def fpu_set_top(c: Core, top: i64) -> None:
    """Make a register ST(0)."""
    c.fpu_status = (c.fpu_status & ~mask32(0x3800)) | mask32((top & 7) << 11)


def fpu_reset(c: Core) -> None:
    """FNINIT, and RESET."""
    c.fpu_control = 0x37F
    c.fpu_status = 0
    c.fpu_tag = 0xFFFF
    c.fpu_opcode = 0
    c.fpu_ip = 0
    c.fpu_cs = 0
    c.fpu_dp = 0
    c.fpu_ds = 0
    c.mxcsr = 0x1F80


def fpu_summary(c: Core) -> None:
    """Work out ES and B from the flags and the masks."""
    if c.fpu_status & ~c.fpu_control & 0x3F:
        c.fpu_status |= SW_ES | SW_BUSY
    else:
        c.fpu_status &= ~(SW_ES | SW_BUSY)


def fpu_pending(c: Core) -> i64:
    """What an unmasked exception of an earlier instruction does to a waiting one: #MF, or FERR#."""
    if c.fpu_status & SW_ES:
        if c.cr[0] & CR0_NE:
            return fault(c, MF, 0)
        c.ferr = 1
    return 0


def op_wait(c: Core, p: i64) -> i64:
    """WAIT."""
    if c.cr[0] & CR0_MP and c.cr[0] & CR0_TS:
        return fault(c, NM, 0)
    return fpu_pending(c)


def op_fpu(c: Core, p: i64) -> i64:
    """Any instruction of the opcodes D8..DF."""
    if c.cr[0] & (CR0_EM | CR0_TS):
        return fault(c, NM, 0)
    which: u32 = c.code[p + 7] >> 8
    modrm: u32 = c.code[p + 7] & 0xFF
    reg: u32 = (modrm >> 3) & 7
    memory: u32 = marks(c, p) & MARK_MEMORY
    waits: u32 = 1
    control: u32 = 0
    if memory:
        control = 1 if (which == 1 or which == 5) and reg >= 4 else 0
        if (which == 1 and reg >= 6) or (which == 5 and reg >= 6):
            waits = 0
        if which == 5 and reg == 5:
            return ud(c)
    elif which == 3 and reg == 4:
        control = 1
        waits = 0
    elif which == 7 and modrm == 0xE0:
        control = 1
        waits = 0
    if waits and fpu_pending(c) < 0:
        return -1
    if control == 0:
        c.fpu_next_ip = this_eip(c, p)
    if memory:
        return fpu_memory(c, p, which, reg, mask32(effective(c, p)), segment_of(c, p), control)
    return fpu_register(c, p, which, modrm)


def fpu_note(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64) -> None:
    """Keep the pointers of a non-control instruction that was carried out."""
    c.fpu_ip = c.fpu_next_ip
    c.fpu_cs = c.sel[CS]
    c.fpu_opcode = which << 8 | (c.code[p + 7] & 0xFF)
    if seg >= 0:
        c.fpu_dp = ea
        c.fpu_ds = c.sel[seg]


def fpu_settings(c: Core) -> Any:
    """Precision, rounding and masks of the control word."""
    word = c.fpu_control
    return float80.Control((24, 64, 53, 64)[word >> 8 & 3], word >> 10 & 3, word & 0x3F)


def whole(value: object) -> object:
    """A C number as a Python integer, which a shift cannot overflow."""
    return value


def fpu_raw(c: Core, index: int) -> Any:
    """The pattern of ST(index), whatever its tag."""
    at: i64 = (fpu_top(c) + index) & 7
    high: Any = whole(c.mm_high[at])
    low: Any = whole(c.mm_low[at])
    return high << 64 | low & 0xFFFFFFFFFFFFFFFF


def fpu_put(c: Core, index: i64, value: object) -> None:
    """Set ST(index), which becomes full."""
    at: i64 = (fpu_top(c) + index) & 7
    pattern: Any = value
    low: Any = pattern & 0xFFFFFFFFFFFFFFFF
    c.mm_low[at] = low - 0x10000000000000000 if low >> 63 else low
    c.mm_high[at] = (pattern >> 64) & 0xFFFF
    fpu_set_tag(c, at, 0)


def fpu_is_empty(c: Core, index: int) -> bool:
    at = (c.fpu_status >> 11) + index & 7
    return bool(c.fpu_tag >> 2 * at & 3 == 3)


@calls_python
def fpu_pop(c: Core) -> None:
    """Free ST(0) and move the stack."""
    top = c.fpu_status >> 11 & 7
    c.fpu_tag |= 3 << 2 * top
    c.fpu_status = c.fpu_status & ~0x3800 | (top + 1 & 7) << 11


def fpu_raise(c: Core, flags: int) -> bool:
    """Take an operation's exceptions into the status word; whether its result may be stored."""
    c.fpu_status = c.fpu_status & ~SW_C1 | flags & 0x7F | flags & float80.UP
    unmasked = flags & ~c.fpu_control & 0x3F
    if c.fpu_status & ~c.fpu_control & 0x3F:
        c.fpu_status |= SW_ES | SW_BUSY
    return not unmasked & float80.BEFORE


def fpu_stack_underflow(c: Core) -> bool:
    """A read of an empty register; whether the indefinite may be stored in its place."""
    return fpu_raise(c, float80.INVALID | float80.STACK)


def fpu_push(c: Core, value: int, flags: int = 0) -> None:
    """Load a value on the stack; onto a full register it is a stack fault and loads the indefinite."""
    if not fpu_is_empty(c, 7):
        stored = fpu_raise(c, float80.INVALID | float80.STACK)
        c.fpu_status |= SW_C1
        if not stored:
            return
        value = float80.INDEFINITE
    elif not fpu_raise(c, flags):
        return
    c.fpu_status = c.fpu_status & ~0x3800 | ((c.fpu_status >> 11) - 1 & 7) << 11
    fpu_put(c, 0, value)


def fpu_arithmetic(c: Core, operation: int, to: int, a: int, b: int, flags: int = 0) -> bool:
    """ADD MUL SUB SUBR DIV DIVR (0 1 4 5 6 7) of two patterns into ST(to); whether it was stored."""
    control = fpu_settings(c)
    if operation in (5, 7):
        a, b = b, a
    if operation == 0:
        result, more = float80.add(a, b, control)
    elif operation == 1:
        result, more = float80.multiply(a, b, control)
    elif operation in (4, 5):
        result, more = float80.add(a, b, control, subtract=True)
    else:
        result, more = float80.divide(a, b, control)
    if not fpu_raise(c, flags | more):
        return False
    fpu_put(c, to, result)
    return True


def fpu_set_order(c: Core, order: int) -> None:
    """C0, C2 and C3 for an order of -1, 0, 1 or 2 (unordered)."""
    bits = {-1: SW_C0, 0: SW_C3, 1: 0, 2: SW_C0 | SW_C2 | SW_C3}[order]
    c.fpu_status = c.fpu_status & ~(SW_C0 | SW_C1 | SW_C2 | SW_C3) | bits


def fpu_order(c: Core, b: int | None, pops: int, quiet: bool, flags: int = 0) -> None:
    """FCOM and its kin: ST(0) with ``b`` (None: an empty register)."""
    if b is None or fpu_is_empty(c, 0):
        order, more = 2, float80.INVALID | float80.STACK
    else:
        order, more = float80.compare(fpu_raw(c, 0), b, unordered_is_quiet=quiet)
    stored = fpu_raise(c, flags | more)
    fpu_set_order(c, order)
    if stored:
        for _ in range(pops):
            fpu_pop(c)


@calls_python
def fpu_order_flags(c: Core, index: i64, pops: i64, quiet: i64) -> None:
    """FCOMI and its kin: into ZF, PF and CF."""
    if fpu_is_empty(c, 0) or fpu_is_empty(c, index):
        order, more = 2, float80.INVALID | float80.STACK
    else:
        order, more = float80.compare(fpu_raw(c, 0), fpu_raw(c, index), unordered_is_quiet=bool(quiet))
    stored = fpu_raise(c, more)
    if not stored and order == 2:
        return
    bits: u32 = {-1: 1, 0: 0x40, 1: 0, 2: 0x45}[order]
    set_flags(c, bits)
    if stored and pops:
        fpu_pop(c)


@calls_python
def fpu_memory(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64, control: u32) -> i64:
    """The forms with a memory operand."""
    result: i64 = FAULTED
    if control:
        return fpu_environment(c, p, which, reg, ea, seg)
    if which == 0 or which == 2 or which == 4 or which == 6:
        result = fpu_arithmetic_memory(c, p, which, reg, ea, seg)
    elif reg == 0 or (which == 7 and (reg == 4 or reg == 5)) or (which == 3 and reg == 5):
        result = fpu_load(c, p, which, reg, ea, seg)
    elif reg == 1 or reg == 4 or (which == 1 and reg == 1) or (which == 5 and reg == 1):
        return ud(c)
    else:
        result = fpu_store(c, p, which, reg, ea, seg)
    if result == 0:
        fpu_note(c, p, which, reg, ea, seg)
    return result


def fpu_fetch(c: Core, p: i64, ea: u32, seg: i64, size: i64) -> object:
    """A little-endian number of ``size`` bytes; None with a fault raised."""
    value: object = 0
    done: i64 = 0
    part: i64
    step: i64
    while done < size:
        step = 4 if size - done >= 4 else 2
        part = read_sized(c, p, seg, mask32(ea + done) & c.code[p + 5], step)
        if part < 0:
            return None
        value = value | whole(part) << whole(8 * done)  # type: ignore[operator]
        done = done + step
    return value


@calls_python
def fpu_deposit(c: Core, p: i64, ea: u32, seg: i64, size: i64, value: object) -> i64:
    """Store ``size`` bytes; every page is tried before the first byte is written. 0 or -1."""
    done: i64 = 0
    step: i64
    word: u32
    if size > 4:
        last: i64 = read_sized(c, p, seg, mask32(ea + size - 2) & c.code[p + 5], 2)
        if last < 0 or write_sized(c, p, seg, mask32(ea + size - 2) & c.code[p + 5], mask32(last), 2) < 0:
            return -1
    while done < size:
        step = 4 if size - done >= 4 else 2
        word = value >> whole(8 * done) & 0xFFFFFFFF  # type: ignore[operator]
        if step == 2:
            word &= 0xFFFF
        if write_sized(c, p, seg, mask32(ea + done) & c.code[p + 5], word, step) < 0:
            return -1
        done = done + step
    return 0


@calls_python
def fpu_arithmetic_memory(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64) -> i64:
    """FADD..FDIVR and FCOM with a 32 or 64 bit number, or a 16 or 32 bit integer."""
    size: i64 = 4 if which == 0 or which == 2 else (8 if which == 4 else 2)
    pattern = fpu_fetch(c, p, ea, seg, size)
    if pattern is None:
        return -1
    flags = 0
    if which == 0 or which == 4:
        value, flags = float80.from_float(pattern, whole(8 * size), load=False)
    else:
        value = fpu_load_integer(pattern, whole(8 * size))
    if reg == 2 or reg == 3:
        fpu_order(c, value, int(reg) - 2, False, flags)
    elif fpu_is_empty(c, 0):
        if fpu_stack_underflow(c):
            fpu_put(c, 0, float80.INDEFINITE)
    else:
        fpu_arithmetic(c, int(reg), 0, fpu_raw(c, 0), value, flags)
    return 0


def fpu_load_integer(pattern: int, bits: int) -> int:
    """A two's complement integer as an 80-bit number."""
    value = pattern - (1 << bits) if pattern >> bits - 1 else pattern
    return float80.from_integer(value)[0]


@calls_python
def fpu_load(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64) -> i64:
    """FLD, FILD and FBLD."""
    size: i64
    if which == 7:
        size = 2 if reg == 0 else (10 if reg == 4 else 8)
    elif which == 3:
        size = 4 if reg == 0 else 10
    else:
        size = 4 if which == 1 else 8
    pattern = fpu_fetch(c, p, ea, seg, size)
    if pattern is None:
        return -1
    if which == 7 and reg == 4:
        fpu_push(c, float80.from_bcd(pattern))
    elif which == 7 or (which == 3 and reg == 0):
        fpu_push(c, fpu_load_integer(pattern, whole(8 * size)))
    elif which == 3:
        fpu_push(c, pattern)
    else:
        value, flags = float80.from_float(pattern, whole(8 * size))
        fpu_push(c, value, flags)
    return 0


@calls_python
def fpu_store(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64) -> i64:
    """FST, FSTP, FIST, FISTP and FBSTP."""
    size: i64 = 4
    pops: i64 = 1 if reg != 2 else 0
    integer: i64 = 1 if which == 3 or which == 7 else 0
    if which == 3 and reg == 7:
        size = 10
        integer = 0
    elif which == 5:
        size = 8
    elif which == 7:
        size = 2 if reg == 2 or reg == 3 else (10 if reg == 6 else 8)
    bits = whole(8 * size)
    settings = fpu_settings(c)
    status = c.fpu_status
    if fpu_is_empty(c, 0):
        stored = fpu_stack_underflow(c)
        pattern = float80.INDEFINITE
        if which == 7 and reg == 6:
            pattern = 0xFFFFC000000000000000
        elif integer:
            pattern = 1 << bits - 1
        elif size != 10:
            pattern = 0xFFC00000 if size == 4 else 0xFFF8000000000000
    else:
        value, flags = fpu_raw(c, 0), 0
        if which == 7 and reg == 6:
            pattern, flags = float80.to_bcd(value, settings)
        elif integer:
            pattern, flags = float80.to_integer(value, bits, settings)
        elif size == 10:
            pattern = value
        else:
            pattern, flags = float80.to_float(value, bits, settings)
        stored = fpu_raise(c, flags)
        # An unmasked overflow or underflow of a store to memory leaves memory and stack as they were.
        if flags & ~c.fpu_control & (float80.OVERFLOW | float80.UNDERFLOW):
            stored = False
    if not stored:
        return 0
    if fpu_deposit(c, p, ea, seg, size, pattern) < 0:
        c.fpu_status = status
        return -1
    if pops:
        fpu_pop(c)
    return 0


def fpu_full_tag(c: Core) -> int:
    """The tag word as it is stored: valid, zero, special or empty."""
    word = 0
    for at in range(8):
        tag = c.fpu_tag >> 2 * at & 3
        if tag != 3:
            exponent, low = c.mm_high[at] & 0x7FFF, c.mm_low[at]
            if exponent == 0 and low == 0:
                tag = 1
            elif exponent in (0, 0x7FFF) or low >= 0:
                tag = 2
            else:
                tag = 0
        word |= tag << 2 * at
    return word


@calls_python
def fpu_environment(c: Core, p: i64, which: u32, reg: u32, ea: u32, seg: i64) -> i64:
    """FLDENV, FLDCW, FNSTENV, FNSTCW, FRSTOR, FNSAVE and FNSTSW m16."""
    word: i64
    if which == 1 and reg == 5:
        word = read(c, p, seg, ea, 2)
        if word < 0:
            return -1
        c.fpu_control = mask32(word) & 0xF7F | 0x40
        fpu_summary(c)
        return 0
    if which == 1 and reg == 7:
        return write(c, p, seg, ea, c.fpu_control, 2)
    if which == 5 and reg == 7:
        return write(c, p, seg, ea, c.fpu_status, 2)
    size: i64 = 2 if marks(c, p) & MARK_SIZE16 else 4
    if reg == 4:
        return fpu_load_environment(c, p, ea, seg, size, 1 if which == 5 else 0)
    return fpu_store_environment(c, p, ea, seg, size, 1 if which == 5 else 0)


def fpu_environment_words(c: Core, size: int) -> list[int]:
    """The seven words of the environment (SDM 1, 8.1.10), in protected or real format."""
    if size == 4:
        head = [c.fpu_control | 0xFFFF0000, c.fpu_status | 0xFFFF0000, fpu_full_tag(c) | 0xFFFF0000]
        if c.protected:
            return [*head, c.fpu_ip, c.fpu_cs | (c.fpu_opcode & 0x7FF) << 16, c.fpu_dp, c.fpu_ds | 0xFFFF0000]
        ip = c.fpu_ip + (c.fpu_cs << 4) & 0xFFFFFFFF
        dp = c.fpu_dp + (c.fpu_ds << 4) & 0xFFFFFFFF
        return [*head, ip & 0xFFFF | 0xFFFF0000, (ip >> 16) << 12 | c.fpu_opcode & 0x7FF,
                dp & 0xFFFF | 0xFFFF0000, (dp >> 16) << 12]  # fmt: skip
    head = [c.fpu_control, c.fpu_status, fpu_full_tag(c)]
    if c.protected:
        return [*head, c.fpu_ip & 0xFFFF, c.fpu_cs, c.fpu_dp & 0xFFFF, c.fpu_ds]
    ip = c.fpu_ip + (c.fpu_cs << 4) & 0xFFFFF
    dp = c.fpu_dp + (c.fpu_ds << 4) & 0xFFFFF
    return [*head, ip & 0xFFFF, (ip >> 16) << 12 | c.fpu_opcode & 0x7FF, dp & 0xFFFF, (dp >> 16) << 12]


@calls_python
def fpu_store_environment(c: Core, p: i64, ea: u32, seg: i64, size: i64, everything: i64) -> i64:
    """FNSTENV and FNSAVE."""
    image = 0
    step = whole(8 * size)
    words = fpu_environment_words(c, size)
    for number, word in enumerate(words):
        image |= word << step * number
    length: i64 = 7 * size
    if everything:
        for number in range(8):
            image |= fpu_raw(c, number) << 7 * step + 80 * number
        length = length + 80
    if fpu_deposit(c, p, ea, seg, length, image) < 0:
        return -1
    if everything:
        fpu_reset_registers(c)
    else:
        c.fpu_control |= 0x3F
        fpu_summary(c)
    return 0


@calls_python
def fpu_reset_registers(c: Core) -> None:
    """FNINIT, which leaves MXCSR alone."""
    mxcsr: u32 = c.mxcsr
    fpu_reset(c)
    c.mxcsr = mxcsr


@calls_python
def fpu_load_environment(c: Core, p: i64, ea: u32, seg: i64, size: i64, everything: i64) -> i64:
    """FLDENV and FRSTOR."""
    length: i64 = 7 * size + (80 if everything else 0)
    image = fpu_fetch(c, p, ea, seg, length)
    if image is None:
        return -1
    bits = whole(8 * size)
    mask = (1 << bits) - 1
    words = [image >> bits * index & mask for index in range(7)]
    c.fpu_control = words[0] & 0xF7F | 0x40
    c.fpu_status = words[1] & 0xFFFF
    c.fpu_tag = words[2] & 0xFFFF
    if c.protected:
        c.fpu_ip = words[3]
        c.fpu_cs = words[4] & 0xFFFF
        if size == 4:
            c.fpu_opcode = words[4] >> 16 & 0x7FF
        c.fpu_dp = words[5]
        c.fpu_ds = words[6] & 0xFFFF
    else:
        c.fpu_ip = words[3] & 0xFFFF | words[4] >> 12 << 16
        c.fpu_cs = 0
        c.fpu_opcode = words[4] & 0x7FF
        c.fpu_dp = words[5] & 0xFFFF | words[6] >> 12 << 16
        c.fpu_ds = 0
    fpu_summary(c)
    if everything:
        tag = c.fpu_tag
        for index in range(8):
            fpu_put(c, index, image >> 7 * bits + 80 * index & (1 << 80) - 1)
        c.fpu_tag = tag
    return 0


@calls_python
def fpu_register(c: Core, p: i64, which: u32, modrm: u32) -> i64:
    """The forms without memory."""
    reg: u32 = (modrm >> 3) & 7
    index: i64 = modrm & 7
    if which == 3 and reg == 4:
        return fpu_control_operation(c, modrm)
    if which == 7 and modrm == 0xE0:
        put16(c, EAX, c.fpu_status)
        return 0
    known: i64 = 1
    if which == 0 or which == 4 or which == 6:
        known = fpu_arithmetic_register(c, which, reg, index)
    elif which == 1:
        known = fpu_single(c, modrm, reg, index)
    elif which == 2:
        if modrm == 0xE9:
            fpu_order(c, None if fpu_is_empty(c, 1) else fpu_raw(c, 1), 2, True)
        elif reg < 4:
            fpu_conditional_move(c, index, fpu_take_flag(c, reg))
        else:
            known = 0
    elif which == 3:
        if reg < 4:
            fpu_conditional_move(c, index, 1 - fpu_take_flag(c, reg))
        elif reg == 5 or reg == 6:
            fpu_order_flags(c, index, 0, 1 if reg == 5 else 0)
        else:
            known = 0
    elif which == 5:
        known = fpu_free_and_store(c, reg, index)
    elif reg == 5 or reg == 6:
        fpu_order_flags(c, index, 1, 1 if reg == 5 else 0)
    else:
        known = 0
    if known == 0:
        return ud(c)
    fpu_note(c, p, which, modrm, 0, -1)
    return 0


def fpu_control_operation(c: Core, modrm: u32) -> i64:
    """FNCLEX, FNINIT, and FENI, FDISI, FSETPM, which do nothing since the 387."""
    if modrm == 0xE2:
        c.fpu_status &= 0x7F00
    elif modrm == 0xE3:
        fpu_reset_registers(c)
    elif modrm > 0xE4:
        return ud(c)
    return 0


def fpu_take_flag(c: Core, which: u32) -> i64:
    """The condition of FCMOVB, FCMOVE, FCMOVBE and FCMOVU."""
    if which == 0:
        return c.aux >> 31
    if which == 1:
        return 1 if mask32(c.res) == 0 else 0
    if which == 2:
        return 1 if mask32(c.res) == 0 or c.aux >> 31 else 0
    byte: i64 = (c.res ^ (c.res >> 32)) & 0xFF
    return (0x9669 >> ((byte ^ (byte >> 4)) & 15)) & 1


def fpu_conditional_move(c: Core, index: int, taken: int) -> None:
    """FCMOVcc."""
    if fpu_is_empty(c, 0) or fpu_is_empty(c, index):
        if fpu_stack_underflow(c):
            fpu_put(c, 0, float80.INDEFINITE)
    elif taken:
        c.fpu_status &= ~SW_C1
        fpu_put(c, 0, fpu_raw(c, index))


def fpu_arithmetic_register(c: Core, which: int, reg: int, index: int) -> int:
    """FADD..FDIVR between two registers, with and without a pop, and FCOM; 0 if undefined."""
    if reg in (2, 3):
        if which == 6:
            if reg == 2:
                fpu_order(c, None if fpu_is_empty(c, index) else fpu_raw(c, index), 1, False)
                return 1
            if index != 1:
                return 0
            fpu_order(c, None if fpu_is_empty(c, 1) else fpu_raw(c, 1), 2, False)
            return 1
        fpu_order(c, None if fpu_is_empty(c, index) else fpu_raw(c, index), reg - 2, False)
        return 1
    to = 0 if which == 0 else index
    if fpu_is_empty(c, 0) or fpu_is_empty(c, index):
        stored = fpu_stack_underflow(c)
        if stored:
            fpu_put(c, to, float80.INDEFINITE)
    elif which == 0:
        stored = fpu_arithmetic(c, reg, 0, fpu_raw(c, 0), fpu_raw(c, index))
    else:
        # DC and DE: ST(i) is the destination; E0 is FSUBR there, E8 FSUB, F0 FDIVR, F8 FDIV.
        stored = fpu_arithmetic(c, reg ^ 1 if reg >= 4 else reg, index, fpu_raw(c, index), fpu_raw(c, 0))
    if which == 6 and stored:
        fpu_pop(c)
    return 1


def fpu_free_and_store(c: Core, reg: int, index: int) -> int:
    """DD: FFREE, FST, FSTP, FUCOM, FUCOMP; 0 if undefined."""
    if reg == 0:
        fpu_set_tag(c, (c.fpu_status >> 11) + index & 7, 3)
    elif reg in (2, 3):
        if fpu_is_empty(c, 0):
            if not fpu_stack_underflow(c):
                return 1
            fpu_put(c, index, float80.INDEFINITE)
        else:
            c.fpu_status &= ~SW_C1
            fpu_put(c, index, fpu_raw(c, 0))
        if reg == 3:
            fpu_pop(c)
    elif reg in (4, 5):
        fpu_order(c, None if fpu_is_empty(c, index) else fpu_raw(c, index), reg - 4, True)
    else:
        return 0
    return 1


CONSTANTS = (
    (0x3FFF << 64 | 0x8000000000000000,) * 4,
    (0x4000 << 64 | 0xD49A784BCD1B8AFE, 0x4000 << 64 | 0xD49A784BCD1B8AFF,
     0x4000 << 64 | 0xD49A784BCD1B8AFE, 0x4000 << 64 | 0xD49A784BCD1B8AFE),
    (0x3FFF << 64 | 0xB8AA3B295C17F0BC, 0x3FFF << 64 | 0xB8AA3B295C17F0BC,
     0x3FFF << 64 | 0xB8AA3B295C17F0BC, 0x3FFF << 64 | 0xB8AA3B295C17F0BB),
    (0x4000 << 64 | 0xC90FDAA22168C235, 0x4000 << 64 | 0xC90FDAA22168C234,
     0x4000 << 64 | 0xC90FDAA22168C235, 0x4000 << 64 | 0xC90FDAA22168C234),
    (0x3FFD << 64 | 0x9A209A84FBCFF799, 0x3FFD << 64 | 0x9A209A84FBCFF798,
     0x3FFD << 64 | 0x9A209A84FBCFF799, 0x3FFD << 64 | 0x9A209A84FBCFF798),
    (0x3FFE << 64 | 0xB17217F7D1CF79AC, 0x3FFE << 64 | 0xB17217F7D1CF79AB,
     0x3FFE << 64 | 0xB17217F7D1CF79AC, 0x3FFE << 64 | 0xB17217F7D1CF79AB),
    (0,) * 4,
)  # fmt: skip


def fpu_constant(which: int, rounding: int) -> int:
    """FLD1, FLDL2T, FLDL2E, FLDPI, FLDLG2, FLDLN2, FLDZ, in the rounding of the control word."""
    value: int = CONSTANTS[which][rounding]
    return value


def fpu_single(c: Core, modrm: int, reg: int, index: int) -> int:
    """D9: FLD ST, FXCH, constants, and the instructions on ST(0) and ST(1); 0 if undefined."""
    if reg == 0:
        if fpu_is_empty(c, index):
            if fpu_stack_underflow(c):
                fpu_push(c, float80.INDEFINITE)
        else:
            fpu_push(c, fpu_raw(c, index))
        return 1
    if reg == 1:
        fpu_exchange(c, index)
        return 1
    if modrm == 0xD0:
        return 1
    if reg == 5 and modrm != 0xEF:
        fpu_push(c, fpu_constant(index, c.fpu_control >> 10 & 3))
        return 1
    if modrm == 0xE5:
        fpu_examine(c)
        return 1
    if modrm in (0xF6, 0xF7):
        fpu_set_top(c, (c.fpu_status >> 11) + (1 if modrm == 0xF7 else -1))
        c.fpu_status &= ~SW_C1
        return 1
    if modrm in (0xE0, 0xE1):
        if fpu_is_empty(c, 0):
            if fpu_stack_underflow(c):
                fpu_put(c, 0, float80.INDEFINITE)
        else:
            c.fpu_status &= ~SW_C1
            value = fpu_raw(c, 0)
            fpu_put(c, 0, value ^ float80.SIGN if modrm == 0xE0 else value & ~float80.SIGN)
        return 1
    if modrm == 0xE4:
        fpu_order(c, 0, 0, False)
        return 1
    if modrm < 0xF0:
        return 0
    return fpu_function(c, modrm)


def fpu_exchange(c: Core, index: int) -> None:
    """FXCH."""
    if fpu_is_empty(c, 0) or fpu_is_empty(c, index):
        if not fpu_stack_underflow(c):
            return
        for at in (0, index):
            if fpu_is_empty(c, at):
                fpu_put(c, at, float80.INDEFINITE)
    else:
        c.fpu_status &= ~SW_C1
    first, second = fpu_raw(c, 0), fpu_raw(c, index)
    fpu_put(c, 0, second)
    fpu_put(c, index, first)


@calls_python
def fpu_examine(c: Core) -> None:
    """FXAM."""
    value = fpu_raw(c, 0)
    bits = SW_C1 if value >> 79 else 0
    if fpu_is_empty(c, 0):
        bits |= SW_C3 | SW_C0
    elif float80.is_unsupported(value):
        bits |= 0
    elif float80.is_nan(value):
        bits |= SW_C0
    elif float80.is_infinite(value):
        bits |= SW_C2 | SW_C0
    elif float80.is_zero(value):
        bits |= SW_C3
    elif float80.is_denormal(value):
        bits |= SW_C3 | SW_C2
    else:
        bits |= SW_C2
    c.fpu_status = c.fpu_status & ~(SW_C0 | SW_C1 | SW_C2 | SW_C3) | bits


ONE_OPERAND = {
    0xF0: "exp2_minus_1",
    0xFA: "square_root",
    0xFC: "round_to_integer",
    0xFE: "sine",
    0xFF: "cosine",
}
TWO_OPERANDS = {0xF1: "y_log2_x", 0xF3: "arctangent", 0xF9: "y_log2_x_plus_1"}


def fpu_function(c: Core, modrm: int) -> int:
    """D9 F0..FF."""
    control = fpu_settings(c)
    # These round to 64 bits whatever the precision control says, but for FSQRT.
    wide = float80.Control(64, control.rounding, control.masks)
    two = modrm in TWO_OPERANDS or modrm in (0xF5, 0xF8, 0xFD)
    if fpu_is_empty(c, 0) or (two and fpu_is_empty(c, 1)):
        if fpu_stack_underflow(c):
            at = 1 if modrm in TWO_OPERANDS else 0
            fpu_put(c, at, float80.INDEFINITE)
            if modrm in TWO_OPERANDS:
                fpu_pop(c)
            elif modrm in (0xF2, 0xF4, 0xFB):
                fpu_push(c, float80.INDEFINITE)
        return 1
    a = fpu_raw(c, 0)
    if modrm in (0xF2, 0xFB, 0xFE, 0xFF):
        if transcendental.out_of_range(a):
            c.fpu_status |= SW_C2
            return 1
        c.fpu_status &= ~SW_C2
    if modrm in ONE_OPERAND:
        home = float80 if modrm in (0xFA, 0xFC) else transcendental
        result, flags = getattr(home, ONE_OPERAND[modrm])(a, control if modrm == 0xFA else wide)
        if fpu_raise(c, flags):
            fpu_put(c, 0, result)
    elif modrm in TWO_OPERANDS:
        b = fpu_raw(c, 1)
        operation = getattr(transcendental, TWO_OPERANDS[modrm])
        result, flags = operation(b, a, wide) if modrm == 0xF3 else operation(a, b, wide)
        if fpu_raise(c, flags):
            fpu_put(c, 1, result)
            fpu_pop(c)
    elif modrm == 0xFD:
        result, flags = float80.scale(a, fpu_raw(c, 1), control)
        if fpu_raise(c, flags):
            fpu_put(c, 0, result)
    elif modrm in (0xF5, 0xF8):
        fpu_remainder(c, a, fpu_raw(c, 1), control, modrm == 0xF5)
    elif modrm == 0xF4:
        exponent, significand, flags = float80.extract(a)
        fpu_two_results(c, exponent, significand, flags)
    elif modrm == 0xF2:
        result, flags = transcendental.tangent(a, wide)
        one = result if float80.is_nan(result) else float80.ONE
        fpu_two_results(c, result, one, flags)
    else:
        result, flags = transcendental.sine(a, wide)
        other, more = transcendental.cosine(a, wide)
        fpu_two_results(c, result, other, flags | more)
    return 1


def fpu_two_results(c: Core, first: int, second: int, flags: int) -> None:
    """Replace ST(0) by the first result and push the second."""
    if not fpu_is_empty(c, 7):
        stored = fpu_raise(c, float80.INVALID | float80.STACK)
        c.fpu_status |= SW_C1
        if not stored:
            return
        first = second = float80.INDEFINITE
    elif not fpu_raise(c, flags):
        return
    fpu_put(c, 0, first)
    fpu_set_top(c, (c.fpu_status >> 11) - 1)
    fpu_put(c, 0, second)


def fpu_remainder(c: Core, a: int, b: int, control: Any, nearest: bool) -> None:
    """FPREM and FPREM1, with the quotient's low bits in C0, C3 and C1."""
    result, flags, quotient, partial = float80.remainder(a, b, control, nearest=nearest)
    if not fpu_raise(c, flags):
        return
    fpu_put(c, 0, result)
    bits = SW_C2 if partial else 0
    if not partial:
        bits |= (SW_C0 if quotient & 4 else 0) | (SW_C3 if quotient & 2 else 0) | (SW_C1 if quotient & 1 else 0)
    c.fpu_status = c.fpu_status & ~(SW_C0 | SW_C1 | SW_C2 | SW_C3) | bits


def fx_ready(c: Core, p: i64, ea: u32, seg: i64) -> i64:
    """The checks of FXSAVE and FXRSTOR: #NM, and #GP(0) where not on 16 bytes."""
    if c.cr[0] & (CR0_EM | CR0_TS):
        return fault(c, NM, 0)
    if mask32(ea + c.base[seg]) & 15:
        return fault(c, 13, 0)
    return 0


@calls_python
def op_fxsave(c: Core, p: i64) -> i64:
    """FXSAVE: 512 bytes of which the first 160 are written, and the rest left."""
    ea: u32 = mask32(effective(c, p))
    seg: i64 = segment_of(c, p)
    if fx_ready(c, p, ea, seg) < 0:
        return -1
    tags: u32 = 0
    index: i64
    for index in range(8):
        if c.fpu_tag >> (2 * index) & 3 != 3:
            tags |= 1 << index
    fields = (
        (c.fpu_control, 0), (c.fpu_status, 16), (tags, 32), (c.fpu_opcode & 0x7FF, 48), (c.fpu_ip, 64),
        (c.fpu_cs, 96), (c.fpu_dp, 128), (c.fpu_ds, 160), (c.mxcsr, 192),
    )  # fmt: skip
    image = 0
    for value, shift in fields:
        image |= value << shift
    for number in range(8):
        image |= fpu_raw(c, number) << 256 + 128 * number
    return fpu_deposit(c, p, ea, seg, 160, image)


@calls_python
def op_fxrstor(c: Core, p: i64) -> i64:
    """FXRSTOR."""
    ea: u32 = mask32(effective(c, p))
    seg: i64 = segment_of(c, p)
    if fx_ready(c, p, ea, seg) < 0:
        return -1
    image = fpu_fetch(c, p, ea, seg, 160)
    if image is None:
        return -1
    c.fpu_control = image & 0xF7F | 0x40
    c.fpu_status = image >> 16 & 0xFFFF
    c.fpu_opcode = image >> 48 & 0x7FF
    c.fpu_ip = image >> 64 & 0xFFFFFFFF
    c.fpu_cs = image >> 96 & 0xFFFF
    c.fpu_dp = image >> 128 & 0xFFFFFFFF
    c.fpu_ds = image >> 160 & 0xFFFF
    for index in range(8):
        fpu_put(c, index, image >> 256 + 128 * index & (1 << 80) - 1)
    c.fpu_tag = 0
    for index in range(8):
        if not image >> 32 + index & 1:
            fpu_set_tag(c, index, 3)
    fpu_summary(c)
    return 0

