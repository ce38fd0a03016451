"""Mutated types, lists of modules, page tables and module files: a result or an error of ours, in bounded time.

    python tests/explain/modules/fuzz.py [--cases N] [--seed S] [--only KIND]

Each case changes some bytes of the made-up kernel's memory, of its BTF, or of a module's file, and explains
its modules whole; or changes page tables and lists what can be executed.  --only keeps to one of these: btf (types
alone and, in one case of eight, modules by them), walk, files, tables.  Stops with status 1 at the first case
that raises anything else than VmipatchError or takes more than 2 s of the processor.  The same cases, fewer, run in
test_modules_fuzz.py.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3])]

from tests.explain.modules import made  # noqa: E402
from tests.explain.modules.test_mapped import LARGE, NX, P, Tables  # noqa: E402
from vmipatch.errors import VmipatchError  # noqa: E402
from vmipatch.explain.modules import explain_modules  # noqa: E402
from vmipatch.explain.modules.btf import Btf  # noqa: E402
from vmipatch.explain.modules.mapped import executable  # noqa: E402
from vmipatch.explain.paging import MODES  # noqa: E402
from vmipatch.image import Image, open_image  # noqa: E402

MAX_SECONDS = 2.0
NUMBERS = (
    0,
    1,
    8,
    0x7F,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    made.AREA,
    made.SLAB,
    made.HEAD,
    (1 << 64) - 8,
)
KINDS = ("btf", "walk", "files", "tables")
NAMES = ("name", "list.next", "mem[3].size", "mem[0].base", "sect_attrs", "percpu", "nothing")


class Fuzz:
    """The material of all cases; made once, since opening an image costs more than a case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "modules"
        self.folder.mkdir()
        self.image, _ = made.opened(folder)
        self.btf = made.btf()
        self.file = made.module_file("beta", srcversion="AB")
        (self.folder / "alpha.ko").write_bytes(made.module_file("alpha"))
        machine = made.Machine()
        for name in ("alpha", "beta"):
            machine.load(name, key=int(name == "beta"))
        self.memory = {start: bytes(region) for start, region in machine.regions.items()}
        # What lists, names and addresses are made of; the rest of memory is text, and a change there is a finding.
        self.telling = [
            made.HEAD,
            *(machine.structure(n) + i for n in machine.names for i in range(0, made.MODULE_SIZE, 8)),
        ]
        self.telling += range(made.SLAB, machine._heap, 8)

    def mutated(self, data: bytes, chance: random.Random) -> bytes:
        """Some bytes of it changed, cut, or moved."""
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            at = chance.randrange(len(changed))
            what = chance.randrange(5)
            if what == 0:
                changed[at] ^= 1 << chance.randrange(8)
            elif what == 1:
                width = chance.choice((1, 2, 4, 8))
                changed[at : at + width] = (chance.choice(NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            elif what == 2:
                size, other = chance.randrange(1, 64), chance.randrange(len(changed))
                changed[at : at + size] = changed[other : other + size]
            elif what == 3:
                del changed[at : at + chance.randrange(1, 32)]
            else:
                changed = changed[: chance.randrange(len(changed) // 2, len(changed))]
            if not changed:
                return b"\0"
        return bytes(changed)

    def case(self, chance: random.Random, only: str | None = None) -> str:
        """One case, of one of ``KINDS`` or any; what came of it."""
        kind = chance.randrange(4) if only is None else KINDS.index(only)
        try:
            return (self.types, self.list, self.module, self.tables)[kind](chance)
        except VmipatchError as error:
            lines = str(error).splitlines()
            return type(error).__name__ if len(lines) == 1 else f"{len(lines)} lines"

    def types(self, chance: random.Random) -> str:
        data = self.mutated(self.btf, chance)
        if not chance.randrange(8):
            # What can still be read may be wrong: whoever goes by it must not.
            folder = self.folder.parent
            return self._explained(self._machine(), self.file, chance, open_image(made.kernel(folder, data)))
        types = Btf(data)
        for name in NAMES:
            types.field("module", name)
        for number in range(1, min(len(types), 64) + 1):
            types._size(number, 0)
        list(types.members("module"))
        types.enumerator("module", "x")
        return "types"

    def list(self, chance: random.Random) -> str:
        machine = self._machine()
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.choice(self.telling)
            value = chance.choice((*NUMBERS, chance.choice(self.telling), chance.getrandbits(64)))
            machine.put(at, struct.pack("<Q", value & (1 << 64) - 1))
        return self._explained(machine, self.file, chance)

    def module(self, chance: random.Random) -> str:
        return self._explained(self._machine(), self.mutated(self.file, chance), chance)

    def tables(self, chance: random.Random) -> str:
        tables = Tables()
        for _ in range(chance.randrange(1, 40)):
            entry = chance.randrange(8) << 12 | chance.choice((P, P, P | LARGE, P | NX, chance.getrandbits(63)))
            tables.set(chance.randrange(8) << 12, chance.choice((0, 255, 256, 510, 511, chance.randrange(512))), entry)
        executable(tables.read, 0x1000, chance.choice((*MODES[64], MODES[32][1])), 1 << 63)
        return "tables"

    def _machine(self) -> made.Machine:
        machine = made.Machine()
        machine.regions = {start: bytearray(region) for start, region in self.memory.items()}
        return machine

    def _explained(self, machine: made.Machine, file: bytes, chance: random.Random, image: Image | None = None) -> str:
        (self.folder / "beta.ko").write_bytes(file)
        found = explain_modules(machine.engine_kernel(image or self.image), self.folder)
        for module in found.modules:
            assert module.pristine >= 0
            assert 0 <= module.unexplained_bytes <= max(module.total, 0)
        assert all("\n" not in note.message for note in found.notes)
        return "clean" if found.clean else "findings"


def run(count: int, seed: int, only: str | None = None) -> Counter[str]:
    """Some cases; raises for one that is wrong."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        for number in range(count):
            chance = random.Random(f"{seed}-{number}")
            began = time.process_time()
            try:
                counts[fuzz.case(chance, only)] += 1
            except Exception as error:
                error.add_note(f"case {number} of seed {seed}")
                raise
            took = time.process_time() - began
            assert took < MAX_SECONDS, f"case {number} of seed {seed}: {took:.1f} s"
    return counts


def main() -> int:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=KINDS, help="one reader alone")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    start = time.monotonic()
    counts = run(given.cases, given.seed, given.only)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{given.cases} cases in {time.monotonic() - start:.0f} s: {dict(counts)}; peak {peak:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
