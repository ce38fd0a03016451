"""The engine uncompiled does exactly what it does compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
TRACE = """
import hashlib, random, sys
sys.path.insert(0, {here!r})
import fuzzing as f
from vmipatch.emu.cpu import COMPILED, Cpu, Memory
rng = random.Random(23)
memory = Memory(f.RAM, 1 << 20)
memory.map(0, f.RAM, 0)
cpu = Cpu(memory, f.CountingBus())
names = ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp", "eip", "eflags", "cs", "cr0", "cr2", "cpl", "fstat")
print("compiled" if COMPILED else "uncompiled")
for index in range({count}):
    mode = f.MODES[index % len(f.MODES)]
    f.prepare(cpu, mode, rng)
    memory.write(0x10000, rng.randbytes(rng.randrange(1, 64)) + b"\\xf4")
    reason = cpu.run(cpu.instructions + 24)
    digest = hashlib.sha1(memory.read(0, f.RAM)).hexdigest()
    registers = [cpu.get(n) for n in names] + [cpu.get(f"st{{i}}") for i in range(8)]
    print(mode, reason, cpu.instructions, digest, *registers)
"""


def trace(uncompiled: bool, count: int) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("VMIPATCH_UNCOMPILED", None)
    if uncompiled:
        environment["VMIPATCH_UNCOMPILED"] = "1"
    program = TRACE.format(here=str(HERE), count=count)
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_the_two_engines_agree() -> None:
    slow = trace(True, 900)
    fast = trace(False, 900)
    assert slow[0] == "uncompiled"
    if fast[0] == "uncompiled":
        pytest.skip("THE ENGINE IS NOT COMPILED HERE: nothing to compare (python setup.py build_ext --inplace)")
    assert slow[1:] == fast[1:]


def test_the_uncompiled_engine_agrees_with_unicorn() -> None:
    pytest.importorskip("unicorn")
    program = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from test_unicorn import is_unicorns, compare\n"
        "print([str(d) for d in compare(700, 3)[0] if not is_unicorns(d)])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VMIPATCH_UNCOMPILED": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
