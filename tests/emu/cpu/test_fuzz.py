"""Random bytes in every mode; ``VMIPATCH_FUZZ_CASES=1000000`` for the full count."""

from __future__ import annotations

import os
import random

import pytest
from fuzzing import MODES, RAM, CountingBus, prepare, run

from vmipatch.emu.cpu import Cpu, Memory
from vmipatch.emu.machine.snapshot import SavedMemory

CASES = int(os.environ.get("VMIPATCH_FUZZ_CASES", "9000"))
NAMES = ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp", "eip", "eflags", "cs", "ss", "cr0", "cr2", "cpl")


def test_random_bytes_neither_crash_nor_leave_memory() -> None:
    exits = run(CASES, seed=CASES)
    assert sum(exits.values()) == CASES


@pytest.mark.parametrize("mode", MODES)
def test_stopping_after_every_instruction_changes_nothing(mode: str) -> None:
    """One run of 24 instructions, and 24 runs of one: the same state, though decoded and counted otherwise."""
    rng = random.Random(MODES.index(mode))
    for _ in range(60):
        seed, code = rng.getrandbits(32), rng.randbytes(rng.randrange(4, 48)) + b"\xf4"
        states = []
        for step in (24, 1, 5):
            memory = Memory(RAM, 1 << 20)
            memory.map(0, RAM, 0)
            cpu = Cpu(memory, CountingBus())
            prepare(cpu, mode, random.Random(seed))
            memory.write(0x10000, code)
            until = cpu.instructions + 24
            while cpu.instructions < until and not cpu.halted and not cpu.shut_down:
                cpu.run(min(until, cpu.instructions + step))
            states.append((cpu.instructions, [cpu.get(n) for n in NAMES], memory.read(0, RAM)))
        assert states[0][:2] == states[1][:2] == states[2][:2], code.hex(" ")
        assert states[0][2] == states[1][2] == states[2][2], code.hex(" ")


def test_a_snapshot_in_the_middle_changes_nothing() -> None:
    rng = random.Random(17)
    for index in range(200):
        seed, code = rng.getrandbits(32), rng.randbytes(rng.randrange(4, 48)) + b"\xf4"
        memory = Memory(RAM, 1 << 20)
        memory.map(0, RAM, 0)
        cpu = Cpu(memory, CountingBus())
        prepare(cpu, MODES[index % len(MODES)], random.Random(seed))
        memory.write(0x10000, code)
        cpu.run(cpu.instructions + 6)
        saved, image = cpu.save(), memory.read_backing(0, RAM)
        pages = {page: image[page << 12 : (page + 1) << 12] for page in range(RAM >> 12)}
        memory.clear_dirty()
        ends = []
        for _ in range(2):
            cpu.run(cpu.instructions + 12)
            ends.append((cpu.instructions, [cpu.get(n) for n in NAMES], memory.read(0, RAM)))
            changed = memory.dirty_pages()
            memory.restore_pages(SavedMemory(RAM, pages), changed)
            assert memory.read_backing(0, RAM) == image, "a page was written that the log does not have"
            cpu.restore(saved)
            memory.clear_dirty()
        assert ends[0] == ends[1], code.hex(" ")
