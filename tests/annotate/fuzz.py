"""Mutated annotation tables through scan and plan: an error of ours or a result, in bounded time and memory.

    python tests/annotate/fuzz.py [--cases N] [--seed S] [KERNEL ...]

Starts from small kernels with every family in every layout, and from the tables of
real kernels given on the command line (cut down to some entries).  Stops with
status 1 at the first case that raises anything else than VmipatchError or takes
longer than 2 s, and leaves that case in ``fuzz-failure.bin``.  The same cases,
fewer, run in test_annotate_fuzz.py.
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
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from tests.elfwriter import ElfWriter  # noqa: E402
from tests.kernelmaker import ALTERNATIVE, TEXT, KernelMaker  # noqa: E402
from vmipatch.annotate import scan  # noqa: E402
from vmipatch.errors import VmipatchError  # noqa: E402
from vmipatch.image import open_image  # noqa: E402
from vmipatch.patch import Native, plan  # noqa: E402
from vmipatch.patch.cpu import Cpu  # noqa: E402

MAX_SECONDS = 2.0
MAX_BYTES = 500 << 20
CPU = Cpu("fuzz", "GenuineIntel", 6, 26, 1, (0x5A5A5A5A,) * 24)
NUMBERS = (0, 1, 5, 0x7F, 0x80, 0xFE, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, TEXT)
REAL_TABLES = (".parainstructions", ".altinstructions", ".smp_locks")


def seeds() -> list[bytes]:
    """Small kernels: every layout, both sizes, VMI annotations and afterburn tables."""
    found = []
    for layout in ALTERNATIVE:
        kernel = KernelMaker(64 if "64" in layout else 32, release="6.1.50" if "rel" in layout else "2.6.32.9")
        slot = kernel.word(kernel.code(b"\xc3", "native_irq_disable"), "pv_ops")
        operand = struct.pack("<I", slot & 0xFFFFFFFF)
        kernel.paravirt([(kernel.code(b"\xff\x15" + operand), i, 6, 7) for i in range(4)])
        bodies = [kernel.replacement(b) for b in (b"\xe8\x01\x02\x03\x04", b"\xe9\x01\x02\x03\x04", b"\x0f\xae\xf0")]
        rows: list[tuple[int, int, int, int, int, dict[str, int]]] = [
            (kernel.code(b"\x89\xc0" * 3), bodies[i % 3], i, 6, 3 if i % 3 == 2 else 5, {}) for i in range(6)
        ]
        kernel.alternatives(layout, rows)
        kernel.locks("rel32", [kernel.code(b"\xf0\xff\x00") for _ in range(6)])
        found.append(kernel.build())
    elf = ElfWriter(bits=32)
    code = b"\xfb\x66\x66\x66\x90" + b"\xfa" + b"\x90" * 7
    elf.section(".text", code, address=TEXT, flags="ax")
    elf.section(".vmi.translation", b"\xe8\x23\x00\x00\x00", address=TEXT + 0x1000, flags="ax")
    entry = struct.pack("<IIIBBbB", 35, TEXT, TEXT + 0x1000, 5, 5, 4, 0)
    elf.section(".vmi.annotation", entry * 3, address=TEXT + 0x2000, flags="a")
    elf.section(".afterburn", struct.pack("<II", TEXT + 5, TEXT + 13) * 3, address=TEXT + 0x3000, flags="a")
    found.append(elf.build())
    return found


def real_seed(path: Path, entries: int = 12) -> bytes:
    """A small image with the first entries of a real kernel's tables, and pieces of its text where they point."""
    image = open_image(path)
    elf = ElfWriter(bits=image.bits)
    for name in REAL_TABLES:
        section = image.section(name)
        if section is not None:
            elf.section(name, image.read(section.address, min(section.size, 16 * entries)), address=section.address)
    for name in (".text", ".altinstr_replacement", ".data"):
        section = image.section(name)
        if section is not None:
            size = min(section.size, 0x40000)
            elf.section(name, image.read(section.address, size), address=section.address, flags="ax")
    banner = (image.banner or "Linux version 6.1.0").encode() + b"\n\0"
    return elf.section(".rodata", banner, address=0x1000).build()


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """A seed with some of it changed, mostly where its tables are."""
    data = bytearray(seed)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(data))
        what = chance.randrange(6)
        if what == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            data[at] = chance.randrange(256)
        elif what == 2:
            width = chance.choice((1, 2, 4))
            value = chance.choice(NUMBERS) & ((1 << 8 * width) - 1)
            data[at : at + width] = value.to_bytes(width, "little")
        elif what == 3:
            size = chance.randrange(1, 32)
            other = chance.randrange(len(data))
            data[at : at + size] = data[other : other + size]
        elif what == 4:
            del data[at : at + chance.randrange(1, 16)]
        else:
            data = data[: chance.randrange(len(data) // 2, len(data))]
        if not data:
            break
    return bytes(data)


def outcome(path: Path, data: bytes) -> str:
    """Scan and plan one image; what came of it."""
    path.write_bytes(data)
    try:
        image = open_image(path)
        found = scan(image)
        made = plan(image, found, Native(CPU), kernel=(6, 1, 50), skip_unknown=True)
        made.changes()
        return "planned"
    except VmipatchError as error:
        line = str(error)
        assert "\n" not in line
        return type(error).__name__


def cases(count: int, seed: int, more: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered cases; the same for the same seed."""
    chance = random.Random(seed)
    material = [*seeds(), *more]
    for number in range(count):
        yield number, mutated(chance.choice(material), chance)


def main() -> int:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("kernels", nargs="*", type=Path)
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    slowest = 0.0
    start = time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        for number, data in cases(given.cases, given.seed, [real_seed(k) for k in given.kernels]):
            began = time.monotonic()
            try:
                counts[outcome(path, data)] += 1
            except Exception as error:
                Path("fuzz-failure.bin").write_bytes(data)
                print(f"case {number}: {type(error).__name__}: {error}")
                raise
            took = time.monotonic() - began
            if took > MAX_SECONDS:
                Path("fuzz-failure.bin").write_bytes(data)
                print(f"case {number}: {took:.1f} s")
                return 1
            slowest = max(slowest, took)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total = time.monotonic() - start
    print(f"{given.cases} cases in {total:.0f} s: {dict(counts)}; slowest {slowest * 1000:.0f} ms, peak {peak:.0f} MiB")
    return int(peak > MAX_BYTES >> 20)


if __name__ == "__main__":
    sys.exit(main())
