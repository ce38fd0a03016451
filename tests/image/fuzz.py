"""Mutated images through everything that ``image`` does with them: an error of ours or a result, in bounded time.

    python tests/image/fuzz.py [--cases N] [--seed S] [--seconds T] [--only KIND] [KERNEL ...]

Starts from small images of every container, or from real ones given on the
command line; --only damages nothing but what one reader reads, so that each
case reaches it.  Prints the slowest case and the peak memory; stops with status
1 at the first case that raises anything else than VmipatchError or takes longer
than 2 s of processor time, and leaves that case in ``fuzz-failure.bin``.  The
same cases, fewer, run in test_image_fuzz.py.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import random
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:3]]

from bzimage_writer import bzimage, compress  # noqa: E402
from elfwriter import ElfWriter  # noqa: E402
from kallsyms_writer import build, symbols  # noqa: E402
from pe_writer import program  # noqa: E402

from tests.barekernel import bare as bare_kernel  # noqa: E402
from vmipatch.annotate import scan  # noqa: E402
from vmipatch.errors import VmipatchError  # noqa: E402
from vmipatch.image import open_image  # noqa: E402

MAX_SECONDS = 2.0
MAX_BYTES = 500 << 20
# What parsers get wrong: nothing, one, the signs, the ends.
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF, 0xC1000000)


class Seed(NamedTuple):
    """An image to start from; the bytes from ``start`` up to ``end`` are what the reader of its ``kind`` reads."""

    kind: str
    data: bytes
    start: int = 0
    end: int | None = None


def seeds() -> list[Seed]:
    """One small image of each kind, with tables in it for every reader."""
    found = []
    for bits, era, addresses in (
        (32, "2.6", "absolute"), (32, "6.2", "relative"), (64, "6.4", "percpu"), (64, "7.0", "self"),
    ):  # fmt: skip
        top = 0xC1000000 if bits == 32 else 0xFFFFFFFF81000000
        rows = symbols(300, top, percpu=9 if addresses == "percpu" else 0)
        tables = build(rows, bits=bits, addresses=addresses, era=era, place=top + 0x10000)
        elf = ElfWriter(bits=bits)
        elf.section(".text", bytes(range(256)) * 4, address=top, flags="ax")
        elf.section(".rodata", tables + b"Linux version 6.1.0 (x)\n\0", address=top + 0x10000, flags="a", align=8)
        elf.section(
            "__ksymtab",
            struct.pack("<6i", -0x1FFFC, 0xFFD, 0xFF8, -0x1FFCC, 0xFF7, 0xFEC),
            address=top + 0x20000,
            flags="a",
        )
        elf.section("__ksymtab_strings", b"\0alpha\0beta\0", address=top + 0x21000, flags="ams")
        bug = struct.pack("<iiiHH", -0x30000, -0x20004, -0x20008, 7, 1) if bits == 64 else b""
        elf.section("__bug_table", bug * 3, address=top + 0x30000, flags="aw", align=4)
        elf.symbol("f", top + 4, ".text").symbol("g", top + 64, ".text", bind="local")
        data = elf.build()
        low = top & 0xFFFFFFFF
        tail = struct.pack("<3I", 0, low + 4, low + 8) + struct.pack("<2I", 0, low + 12) * (bits == 64)
        boot = bzimage(compress(data + tail, "gzip"))
        found += [Seed("elf", data), Seed("bzimage", boot), Seed("kallsyms", tables)]
        unified = program({".text": bytes(64), ".linux": boot, ".osrel": b"ID=x"})
        found.append(Seed("pe", unified, end=unified.find(boot)))
        bare = bytearray(data)
        at, width = (32, 4) if bits == 32 else (40, 8)
        bare[at : at + width] = bytes(width)
        at = bare.find(tables)
        found.append(Seed("kallsyms", bytes(bare), at, at + len(tables)))
        ko = ElfWriter(bits=bits, kind="rel")
        ko.section(".text", bytes(64), flags="ax").section(".data", bytes(64), flags="aw").symbol("x")
        ko.symbol("y", 8, ".data").relocation(".text", 8, 2, "x", -4).relocation(".data", 8, 1, "y")
        ko.section(".modinfo", b"vermagic=6.1.0 SMP\0", flags="a")
        found.append(Seed("module", ko.build()))
    old = bare_kernel("2.6.21", None, base=0xC1000000)
    found += [Seed("bzimage", old.bzimage()), Seed("bare", old.memory + old.tail)]
    first, long = found[0].data, found[3].data
    for format in ("bzip2", "xz", "lzma", "lz4", "zstd"):
        found.append(Seed("bzimage", bzimage(compress(first, format))))
        found.append(Seed("packed", compress(long, format)))
    found.append(Seed("packed", gzip.compress(first)))
    for format in ("gzip", "bzip2", "xz", "zstd"):
        parts = [compress(part, format) for part in (first[:3000], first[3000:])]
        found.append(Seed("packed", b"".join(parts if format == "gzip" else [part[:-4] for part in parts])))
    return found


def mutate(dice: random.Random, data: bytes) -> bytes:
    """A few of: other bytes, other words, a cut, a hole, a piece repeated or moved."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        if not out:
            break
        # Half of all damage goes where the headers are.
        at = dice.randrange(min(len(out), 512)) if dice.random() < 0.5 else dice.randrange(len(out))
        kind = dice.randrange(7)
        if kind == 0:
            out[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            out[at] = dice.randrange(256)
        elif kind in (2, 3):
            width = dice.choice((2, 4, 8))
            value = dice.choice(NUMBERS) + dice.randrange(-2, 3)
            at -= at % width
            out[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            del out[at : at + dice.randrange(1, 64)]
        else:
            piece = out[at : at + dice.randrange(1, 256)]
            there = dice.randrange(len(out))
            out[there : there + len(piece)] = piece
    return bytes(out)


def exercise(path: Path, base: int | None = None) -> bool:
    """Everything that the rest of the toolchain asks of an image; False if it was refused."""
    try:
        image = open_image(path, base=base)
        for section in image.sections:
            if section.alloc and section.file_size:
                image.read(section.address, section.size)
                image.section_at(section.end)
                image.symbols.at(section.address + 1)
        for segment in image.segments:
            image.physical_of(segment.address) if segment.memory_size else None
        image.symbols.lookup("f")
        for _ in itertools.islice(image.symbols.all(), 5000):
            pass
        _ = image.banner, image.version, image.relocations, image.symbols.sources, image.kind
        if image.sections:
            scan(image, ["bug_table", "smp_locks"])
        for relocation in image.module_relocations():
            image.relocation_at(relocation.address)
        if image.container != "module":
            _ = image.page_offset
    except VmipatchError as error:
        if "\n" in str(error):
            raise AssertionError("an error of more than one line") from error
        return False
    return True


def cases(seed: int, images: list[Seed], only: str | None = None) -> Iterator[tuple[bytes, int | None]]:
    """Mutated images without end, some of them to be opened as raw memory; with ``only`` a kind's part alone."""
    dice = random.Random(seed)
    images = [image for image in images if only in (None, image.kind)]
    while True:
        _, data, start, end = dice.choice(images)
        if only is None:
            data = mutate(dice, data)
        else:
            part = data[start:end]
            # What lies behind stays where it was.
            damaged = mutate(dice, part)
            data = data[:start] + (
                damaged if end is None else damaged[: len(part)].ljust(len(part), b"\0") + data[end:]
            )
        yield data, dice.choice((None, None, None, 0xC1000000, 0xFFFFFFFF81000000))


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted({image.kind for image in seeds()}), help="one reader alone")
    parser.add_argument("kernels", nargs="*", type=Path)
    options = parser.parse_args()
    if options.only and options.kernels:
        parser.error("--only starts from the images that are made here")
    images = [Seed("kernel", path.read_bytes()) for path in options.kernels] or seeds()
    began = time.monotonic()
    slowest, accepted, number = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case"
        for number, (data, base) in enumerate(
            itertools.islice(cases(options.seed, images, options.only), options.cases), 1
        ):
            path.write_bytes(data)
            start = time.process_time()
            try:
                accepted += exercise(path, base)
                spent = time.process_time() - start
                assert spent <= MAX_SECONDS, f"{spent:.2f} s"
            except BaseException:
                Path("fuzz-failure.bin").write_bytes(data)
                print(f"case {number}, base {base}: see fuzz-failure.bin", file=sys.stderr)
                raise
            slowest = max(slowest, spent)
            if time.monotonic() - began > options.seconds:
                break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(f"{number} cases, {accepted} accepted, slowest {slowest:.3f} s, peak {peak >> 20} MiB")
    return 0 if peak <= MAX_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
