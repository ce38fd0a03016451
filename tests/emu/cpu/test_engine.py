"""What the engine promises its host: exact stops, interrupts, hooks, breakpoints, memory, self-modifying code."""

from __future__ import annotations

import pytest

from vmipatch.emu.cpu import Cpu, Exit, Memory
from vmipatch.errors import EmulatorError, UsageError

CODE = 0x1000
FLAT = 0xFFFFFFFF


class Bus:
    """Records what the processor does; ``on_port`` is called in the middle of OUT."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []
        self.cpu: Cpu | None = None
        self.on_port = lambda: None
        self.counts: list[int] = []

    def port_read(self, port: int, size: int) -> int:
        return 0x12345678

    def port_write(self, port: int, size: int, value: int) -> None:
        self.log.append(("out", port, size, value))
        if self.cpu is not None:
            self.counts.append(self.cpu.instructions)
        self.on_port()

    def memory_read(self, physical: int, size: int) -> int:
        self.log.append(("read", physical, size, 0))
        return 0x11223344 & (1 << 8 * size) - 1

    def memory_write(self, physical: int, size: int, value: int) -> None:
        self.log.append(("write", physical, size, value))
        self.on_port()

    def acknowledge(self) -> int:
        assert self.cpu is not None
        self.cpu.interrupt_line = False
        return 0x30


def machine(code: str, *, ram: int = 1 << 20) -> tuple[Cpu, Memory, Bus]:
    """A flat 32-bit machine at CPL 0 with the code (hexadecimal) at 0x1000 and an IDT whose gates HLT."""
    memory = Memory(ram, 1 << 20)
    memory.map(0, ram, 0)
    bus = Bus()
    cpu = Cpu(memory, bus)
    bus.cpu = cpu
    memory.write(CODE, bytes.fromhex(code))
    memory.write(
        0x800, bytes(8) + (0x00CF9A000000FFFF).to_bytes(8, "little") + (0x00CF92000000FFFF).to_bytes(8, "little")
    )
    memory.write(0x2000, b"".join((0x00008E0000080000 | 0x3000 + 16 * v).to_bytes(8, "little") for v in range(64)))
    for vector in range(64):
        memory.write(0x3000 + 16 * vector, b"\xf4")
    cpu.set("gdtr_base", 0x800)
    cpu.set("gdtr_limit", 23)
    cpu.set("idtr_base", 0x2000)
    cpu.set("idtr_limit", 64 * 8 - 1)
    cpu.set("cr0", 0x11)
    cpu.set_segment("cs", 8, 0, FLAT, 0xC09B)
    for name in ("ds", "es", "ss"):
        cpu.set_segment(name, 16, 0, FLAT, 0xC093)
    cpu.set("esp", 0x8000)
    cpu.set("eip", CODE)
    return cpu, memory, bus


def handler_of(cpu: Cpu) -> int:
    """The vector in whose handler the processor halted."""
    return (cpu.get("eip") - 1 - 0x3000) // 16


def test_reset_state() -> None:
    cpu = Cpu(Memory(1 << 16), Bus())
    assert (cpu.get("cs"), cpu.get("cs_base"), cpu.get("eip")) == (0xF000, 0xFFFF0000, 0xFFF0)
    assert (cpu.get("eflags"), cpu.get("cr0"), cpu.get("edx")) == (2, 0x60000010, 0x686)
    assert (cpu.get("idtr_limit"), cpu.get("dr6"), cpu.get("dr7")) == (0xFFFF, 0xFFFF0FF0, 0x400)
    assert cpu.mode == "real"


@pytest.mark.parametrize("count", [1, 2, 3, 47, 48, 49, 100, 1001])
def test_run_stops_at_exactly_the_count(count: int) -> None:
    cpu, _, _ = machine("40 " * 60 + "eb c2")  # 60 INC EAX, JMP back
    assert cpu.run(count) == Exit.LIMIT
    assert cpu.instructions == count
    assert cpu.get("eax") == count - count // 61


def test_the_bus_sees_the_exact_count_in_the_middle_of_a_block() -> None:
    cpu, _, bus = machine("40 40 e6 80 40 e6 80 f4")
    assert cpu.run(100) == Exit.HALT
    assert bus.counts == [2, 4]
    assert cpu.instructions == 6


def test_an_interrupt_raised_by_out_comes_before_the_next_instruction() -> None:
    cpu, _, bus = machine("fb 90 e6 80 40 40 40 f4")
    bus.on_port = lambda: setattr(cpu, "interrupt_line", True)
    assert cpu.run(100) == Exit.HALT
    assert handler_of(cpu) == 0x30
    assert cpu.get("eax") == 0


def test_an_interrupt_raised_by_mmio_comes_before_the_next_instruction() -> None:
    cpu, _, bus = machine("fb 90 a3 00 00 00 f0 40 40 40 f4")
    bus.on_port = lambda: setattr(cpu, "interrupt_line", True)
    assert cpu.run(100) == Exit.HALT
    assert (handler_of(cpu), cpu.get("eax")) == (0x30, 0)
    assert bus.log == [("write", 0xF0000000, 4, 0)]


@pytest.mark.parametrize(("code", "eax"), [("fb 40 40 f4", 1), ("fb f4 40", 0)])
def test_sti_holds_interrupts_for_one_instruction(code: str, eax: int) -> None:
    cpu, _, _ = machine(code)
    cpu.interrupt_line = True
    assert cpu.run(100) == Exit.HALT
    assert (handler_of(cpu), cpu.get("eax")) == (0x30, eax)


def test_mov_ss_holds_interrupts_for_one_instruction() -> None:
    cpu, _, _ = machine("8e d0 40 40 f4")
    cpu.set("eax", 0x10)
    cpu.set("eflags", 0x202)
    cpu.run(1)
    cpu.interrupt_line = True
    assert cpu.run(100) == Exit.HALT
    assert (handler_of(cpu), cpu.get("eax")) == (0x30, 0x11)


def test_interrupts_wait_while_if_is_clear() -> None:
    cpu, _, _ = machine("40 40 fb 40 40 f4")
    cpu.interrupt_line = True
    assert cpu.run(100) == Exit.HALT
    assert (handler_of(cpu), cpu.get("eax")) == (0x30, 3)


def test_halt_returns_at_once_and_wakes_for_an_interrupt() -> None:
    cpu, _, _ = machine("fb f4 40 f4")
    assert cpu.run(100) == Exit.HALT
    before = cpu.instructions
    assert cpu.run(100) == Exit.HALT
    assert cpu.instructions == before
    cpu.interrupt_line = True
    assert cpu.run(100) == Exit.HALT
    assert handler_of(cpu) == 0x30


def test_nmi_is_taken_with_if_clear_and_once_until_iret() -> None:
    cpu, memory, _ = machine("40 40 40 f4")
    memory.write(0x3000 + 32, b"\x43\xcf")  # INC EBX, IRET
    cpu.run(1)
    cpu.nmi()
    assert cpu.run(100) == Exit.HALT
    assert (cpu.get("ebx"), cpu.get("eax"), cpu.get("eip")) == (1, 3, CODE + 4)


def test_request_exit_from_a_device_and_a_devices_error() -> None:
    cpu, _, bus = machine("e6 80 40 e6 80 40 f4")
    bus.on_port = cpu.request_exit
    assert cpu.run(100) == Exit.REQUESTED
    assert (cpu.instructions, cpu.get("eip")) == (1, CODE + 2)

    def fail() -> None:
        raise KeyError("a device's own trouble")

    bus.on_port = fail
    with pytest.raises(KeyError):
        cpu.run(100)
    assert cpu.get("eip") == CODE + 5


def test_triple_fault_shuts_down() -> None:
    cpu, _, _ = machine("0f 0b")
    cpu.set("idtr_limit", 0)
    assert cpu.run(100) == Exit.SHUTDOWN
    assert cpu.run(200) == Exit.SHUTDOWN


def test_a_guest_that_only_faults_still_ends() -> None:
    cpu, memory, _ = machine("0f 0b")
    memory.write(0x3060, b"\x0f\x0b")
    assert cpu.run(5000) == Exit.LIMIT
    assert cpu.instructions == 5000


# --- self-modifying code ---------------------------------------------------------


def test_an_instruction_that_changes_the_next_one_in_its_block() -> None:
    # MOV BYTE [rel next], 0x43 : the INC EAX behind it becomes INC EBX
    cpu, _, _ = machine("c6 05 07 10 00 00 43 40 f4")
    assert cpu.run(100) == Exit.HALT
    assert (cpu.get("eax"), cpu.get("ebx")) == (0, 1)
    assert cpu.instructions == 3


def test_a_loop_that_changes_itself_each_time() -> None:
    # L: INC BYTE [imm of ADD]; ADD EAX, imm8; LOOP L
    cpu, _, _ = machine("b9 05 00 00 00 fe 05 0d 10 00 00 83 c0 00 e2 f5 f4")
    assert cpu.run(100) == Exit.HALT
    assert cpu.get("eax") == 1 + 2 + 3 + 4 + 5


def test_code_changed_from_outside_and_through_an_alias() -> None:
    cpu, memory, _ = machine("40 eb fd")
    memory.map(0x80000, 0x1000, CODE)
    cpu.run(100)
    memory.write(CODE, b"\x43")
    cpu.set("eip", CODE)
    cpu.run(102)
    assert cpu.get("ebx") == 1
    cpu.memory.write(0x80000, b"\x42")
    cpu.set("eip", CODE)
    cpu.run(104)
    assert cpu.get("edx") == 0x686 + 1


def test_rep_stos_over_its_own_code() -> None:
    cpu, _, _ = machine("bf 10 10 00 00 b9 08 00 00 00 b0 40 f3 aa eb 00" + "43" * 8 + "f4")
    cpu.set("eax", 0)
    assert cpu.run(100) == Exit.HALT
    assert cpu.get("ebx") == 0


def test_more_code_than_the_cache_of_blocks_has_slots() -> None:
    # 400,000 blocks of one JMP to the next instruction each; a full table would be searched for ever
    count = 400_000
    cpu, memory, _ = machine("f4", ram=2 << 20)
    memory.write(0x10000, b"\xeb\x00" * count + b"\xf4")
    cpu.set("eip", 0x10000)
    assert cpu.run(2 * count) == Exit.HALT
    assert cpu.instructions == count + 1
    assert cpu.get("eip") == 0x10000 + 2 * count + 1


def test_code_that_is_written_over_again_and_again() -> None:
    # L: INC EAX; NOT BYTE [rel scratch in this page]; LOOP L : each turn drops both blocks
    count = 400_000
    cpu, memory, _ = machine(f"b9 {count.to_bytes(4, 'little').hex()} eb 00 40 f6 15 11 10 00 00 e2 f7 f4 00")
    cpu.set("eax", 0)
    assert cpu.run(4 * count) == Exit.HALT
    assert cpu.get("eax") == count
    memory.write(CODE + 7, b"\x43")
    cpu.halted = 0
    cpu.set("eip", CODE)
    cpu.set("ebx", 0)
    assert cpu.run(8 * count) == Exit.HALT
    assert cpu.get("ebx") == count


def test_an_instruction_across_two_pages_follows_the_second_pages_mapping() -> None:
    cpu, memory, _ = machine("f4", ram=1 << 20)
    memory.write(0x5FFE, bytes.fromhex("b8 11 11 11 11 f4"))  # MOV EAX, imm32 from 0x5FFE
    memory.write(0x7000, bytes.fromhex("22 22 22 f4"))
    cpu.set("eip", 0x5FFE)
    assert cpu.run(100) == Exit.HALT
    assert cpu.get("eax") == 0x11111111
    memory.map(0x6000, 0x1000, 0x7000)
    cpu.halted = 0
    cpu.set("eip", 0x5FFE)
    assert cpu.run(200) == Exit.HALT
    assert cpu.get("eax") == 0x22222211


# --- hooks ------------------------------------------------------------------------


def test_vector_hook_leaves_before_delivery() -> None:
    cpu, _, _ = machine("40 0f 0b")
    cpu.hook_vector(6)
    esp = cpu.get("esp")
    assert cpu.run(100) == Exit.VECTOR
    assert (cpu.exit_vector, cpu.exit_kind, cpu.get("eip"), cpu.get("esp")) == (6, 3, CODE + 1, esp)
    assert cpu.inject(6, 3) == 0
    assert cpu.run(100) == Exit.HALT
    assert handler_of(cpu) == 6


@pytest.mark.parametrize(("kind", "code"), [("int", "cd 21"), ("hardware", "fb 90 90")])
def test_vector_hook_sees_int_and_hardware(kind: str, code: str) -> None:
    cpu, _, _ = machine(code)
    cpu.hook_vector(0x21 if kind == "int" else 0x30)
    cpu.interrupt_line = kind == "hardware"
    assert cpu.run(100) == Exit.VECTOR
    assert cpu.exit_kind == (1 if kind == "int" else 2)


@pytest.mark.parametrize(
    ("name", "code"),
    [("cli", "fa"), ("sti", "fb"), ("hlt", "f4"), ("cr", "0f 20 c0"), ("cr", "0f 22 c0"), ("io", "e4 60"),
     ("table", "0f 01 15 00 08 00 00"), ("invlpg", "0f 01 38"), ("cpuid", "0f a2"), ("tsc", "0f 31"),
     ("msr", "0f 32"), ("iret", "cf"), ("flags", "9c"), ("flags", "9d"), ("dr", "0f 23 f8")],
)  # fmt: skip
def test_instruction_hook(name: str, code: str) -> None:
    cpu, _, _ = machine("43 " + code + " 43 f4")
    cpu.hook_instructions(name)
    assert cpu.run(100) == Exit.INSTRUCTION
    assert (cpu.instructions, cpu.get("eip"), cpu.exit_length) == (1, CODE + 1, len(bytes.fromhex(code)))
    cpu.advance(cpu.exit_length)
    assert cpu.run(3) == Exit.LIMIT
    assert (cpu.get("ebx"), cpu.instructions) == (2, 3)


def test_a_hooked_instruction_can_be_executed_after_all() -> None:
    cpu, _, _ = machine("fb 43 f4")
    cpu.hook_instructions("sti")
    assert cpu.run(100) == Exit.INSTRUCTION
    cpu.execute_hooked()
    assert cpu.run(100) == Exit.HALT
    assert cpu.eflags & 0x200
    with pytest.raises(UsageError):
        cpu.hook_instructions("nonsense")


def test_port_hook() -> None:
    cpu, _, bus = machine("b0 55 e6 42 e6 43 f4")
    cpu.hook_port(0x43)
    assert cpu.run(100) == Exit.PORT
    assert (cpu.exit_address, cpu.exit_size, cpu.exit_write, cpu.exit_value) == (0x43, 1, 1, 0x55)
    assert [entry[1] for entry in bus.log] == [0x42]
    assert cpu.get("eip") == CODE + 4


def test_page_write_hook_leaves_with_nothing_done() -> None:
    cpu, memory, _ = machine("c7 05 00 50 00 00 78 56 34 12 ff 05 04 60 00 00 f4")
    cpu.run(1)
    cpu.set("eip", CODE)
    memory.hook_page(5, True)
    assert cpu.run(100) == Exit.PAGE_WRITE
    assert (cpu.exit_address, cpu.exit_physical, cpu.exit_size, cpu.get("eip")) == (0x5000, 0x5000, 4, CODE)
    memory.hook_page(5, False)
    assert cpu.run(100) == Exit.HALT
    assert memory.read(0x5000, 4) == bytes.fromhex("78563412")


def test_vmcall_is_a_hypercall_at_any_level() -> None:
    cpu, _, _ = machine("40 0f 01 c1 40 f4")
    assert cpu.run(100) == Exit.HYPERCALL
    assert (cpu.get("eip"), cpu.exit_length) == (CODE + 1, 3)
    cpu.advance(3)
    assert cpu.run(100) == Exit.HALT
    assert cpu.get("eax") == 2


# --- breakpoints, watchpoints, single step ------------------------------------------


def test_breakpoint_stops_before_and_goes_on_from_there() -> None:
    cpu, _, _ = machine("40 40 40 eb fb")
    cpu.add_breakpoint(CODE + 2)
    for turn in range(1, 4):
        assert cpu.run(1000) == Exit.BREAKPOINT
        assert (cpu.get("eip"), cpu.get("eax")) == (CODE + 2, 3 * turn - 1)
    cpu.remove_breakpoint(CODE + 2)
    assert cpu.run(1000) == Exit.LIMIT


@pytest.mark.parametrize(("read", "write", "hits"), [(False, True, 1), (True, False, 1), (True, True, 2)])
def test_watchpoint_stops_behind_the_access(read: bool, write: bool, hits: int) -> None:
    cpu, _, _ = machine("a3 02 60 00 00 40 a1 fe 5f 00 00 40 8b 0d 04 60 00 00 f4")
    cpu.add_watchpoint(0x6001, 1, read=read, write=write)
    cpu.add_watchpoint(0x6003, 1, read=read, write=write)
    seen = 0
    while cpu.run(1000) == Exit.WATCHPOINT:
        seen += 1
        assert cpu.get("eip") in (CODE + 5, CODE + 11)
    assert seen == hits


def test_step_executes_one_instruction_even_on_a_breakpoint() -> None:
    cpu, _, _ = machine("40 40 f4")
    cpu.add_breakpoint(CODE)
    assert cpu.step() == Exit.LIMIT
    assert (cpu.get("eip"), cpu.instructions) == (CODE + 1, 1)


# --- memory ---------------------------------------------------------------------------


def test_read_only_pages_send_writes_to_the_bus_and_holes_read_from_it() -> None:
    cpu, memory, bus = machine("c6 05 00 50 00 00 77 a1 fe 6f 00 00 f4")
    memory.map(0x5000, 0x1000, 0x5000, writable=False)
    memory.unmap(0x7000, 0x1000)
    memory.write(0x6FFE, b"\xaa\xbb")
    assert cpu.run(100) == Exit.HALT
    assert memory.read(0x5000, 1) == b"\0"
    assert bus.log[0] == ("write", 0x5000, 1, 0x77)
    assert cpu.get("eax") == 0x4444BBAA
    assert memory.read(0x7000, 2) == b"\xff\xff"


def test_dirty_log_names_the_pages_written_since_it_was_cleared() -> None:
    cpu, memory, _ = machine("a3 00 50 00 00 a3 fe 5f 00 00 eb f4")
    cpu.run(2)
    assert set(memory.dirty_pages()) >= {5, 6}
    memory.clear_dirty()
    assert memory.dirty_pages() == []
    cpu.run(3)
    assert memory.dirty_pages() == []
    cpu.run(4)
    assert sorted(memory.dirty_pages()) == [5]


@pytest.mark.parametrize("size", [0, -4096, 100, 1 << 33])
def test_memory_of_an_impossible_size(size: int) -> None:
    with pytest.raises(EmulatorError):
        Memory(size)


def test_windows_outside_of_memory_are_refused() -> None:
    memory = Memory(1 << 16, 1 << 16)
    for physical, length, backing in ((1, 4096, 0), (0, 100, 0), (0, 1 << 20, 0), (0xFFFFF000, 8192, 0)):
        with pytest.raises(EmulatorError):
            memory.map(physical, length, backing)
    with pytest.raises(EmulatorError):
        memory.allocate(1 << 20)
    with pytest.raises(EmulatorError):
        memory.read_backing(0, 1 << 20)


def test_a20() -> None:
    cpu, memory, _ = machine("a1 00 00 10 00 f4", ram=2 << 20)
    memory.write(0, b"low!")
    memory.write(0x100000, b"high")
    cpu.set_a20(False)
    cpu.run(1)
    assert cpu.get("eax").to_bytes(4, "little") == b"low!"
    cpu.set_a20(True)
    cpu.set("eip", CODE)
    cpu.run(2)
    assert cpu.get("eax").to_bytes(4, "little") == b"high"


def test_time_stamp_counter_is_instructions_plus_offset() -> None:
    cpu, _, _ = machine("40 40 0f 31 f4")
    cpu.tsc_offset = 1 << 40
    assert cpu.run(100) == Exit.HALT
    assert cpu.get("edx") << 32 | cpu.get("eax") == (1 << 40) + 2


def test_unknown_names_are_refused() -> None:
    cpu, _, _ = machine("f4")
    for name in ("rax", "st8", "cs_color", ""):
        with pytest.raises(UsageError):
            cpu.get(name)
        with pytest.raises(UsageError):
            cpu.set(name, 1)


def test_stale_translations_live_until_invlpg() -> None:
    """A TLB entry outlives the page table that it came from, whatever the cache of decoded code does."""
    cpu, memory, _ = machine(
        "a1 00 50 00 00"  # MOV EAX, [5000]
        "c7 05 14 a0 00 00 03 60 00 00"  # the PTE of page 5 now points to page 6
        "8b 1d 00 50 00 00"  # MOV EBX, [5000]: still page 5
        "0f 01 3d 00 50 00 00"  # INVLPG [5000]
        "8b 0d 00 50 00 00 f4"  # MOV ECX, [5000]: page 6
    )
    memory.write(0x5000, b"five")
    memory.write(0x6000, b"six!")
    memory.write(0x9000, (0xA003).to_bytes(4, "little"))
    memory.write(0xA000, b"".join((page << 12 | 3).to_bytes(4, "little") for page in range(256)))
    cpu.set("cr3", 0x9000)
    cpu.set("cr0", 0x80000011)
    assert cpu.run(100) == Exit.HALT
    assert [cpu.get(n).to_bytes(4, "little") for n in ("eax", "ebx", "ecx")] == [b"five", b"five", b"six!"]


@pytest.mark.parametrize("cr0", [0x10, 0x11])
def test_fldenv_of_any_bytes_keeps_its_pointers_in_32_bits(cr0: int) -> None:
    """In the real-mode format the pointers' upper halves come from fields that hold more bits than belong to them."""
    cpu, memory, _ = machine("d9 20 d9 30 f4")  # FLDENV [EAX]; FNSTENV [EAX]
    memory.write(0x5000, b"\xff" * 28)
    cpu.set("cr0", cr0)
    cpu.set("eax", 0x5000)
    assert cpu.run(100) == Exit.HALT
    word = [int.from_bytes(memory.read(0x5000 + 4 * i, 4), "little") for i in range(7)]
    assert word[0] & 0x3F == 0x3F
    assert (word[3], word[5]) == (0xFFFFFFFF, 0xFFFFFFFF)
    assert word[4] >> 28 == 0 if not cr0 & 1 else word[4] & 0xFFFF == 0xFFFF


def test_the_bus_gets_no_more_bits_than_the_access_has() -> None:
    """A 16-bit interrupt gate on a stack of memory-mapped registers: each push is two bytes of a longer register."""
    cpu, memory, bus = machine("0f 0b")
    memory.write(0x2000 + 6 * 8, (0x0000860000083060).to_bytes(8, "little"))
    cpu.set("esp", 0xF0010000)
    cpu.set("eflags", 0x10202)
    assert cpu.run(100) == Exit.HALT
    pushed = [(size, value) for kind, _, size, value in bus.log if kind == "write"]
    assert pushed == [(2, 0x0202), (2, 0x0008), (2, 0x1000)]
