"""bzImages: the payload found and unpacked in every format, the relocation table kept, damage refused."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from bzimage_writer import bzimage, compress, lz4_legacy
from elfwriter import ElfWriter
from kallsyms_writer import build, symbols

from vmipatch.errors import ImageError
from vmipatch.image import Image, decompress, open_image

FORMATS = ["gzip", "bzip2", "xz", "lzma", "lz4", "zstd"]
TEXT = b"\x90\xe8\0\1\2\3\xfa\xfb" * 9000


def kernel(bits: int = 32) -> bytes:
    top = 0xC1000000 if bits == 32 else 0xFFFFFFFF81000000
    elf = ElfWriter(bits=bits)
    elf.section(".text", TEXT, address=top, flags="ax")
    elf.section(".rodata", b"Linux version 6.1.0-test (us) #1\n\0", address=top + 0x20000, flags="a")
    return elf.build()


def opened(tmp_path: Path, data: bytes) -> Image:
    path = tmp_path / "bzImage"
    path.write_bytes(data)
    return open_image(path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [32, 64])
def test_every_format_unpacks(tmp_path: Path, format: str, bits: int) -> None:
    elf = kernel(bits)
    packed = compress(elf, format)
    image = opened(tmp_path, bzimage(packed))
    assert image.container == "bzimage"
    assert image.compression == format
    assert image.bits == bits
    assert image.data == elf
    assert image.elf_size == len(elf)
    assert image.relocations is None
    assert image.payload is not None
    assert image.payload.length == len(packed)
    assert (tmp_path / "bzImage").read_bytes()[image.payload.offset :].startswith(packed)
    assert image.read(image.sections[0].address, 16) == TEXT[:16]
    assert image.version == (6, 1, 0)


@pytest.mark.parametrize(
    ("format", "command"),
    [
        ("gzip", ["gzip", "-n", "-9"]),
        ("bzip2", ["bzip2", "-9"]),
        ("xz", ["xz", "--check=crc32", "--x86", "--lzma2=,dict=128MiB"]),
        ("lzma", ["xz", "--format=lzma", "-9"]),
        ("lz4", ["lz4", "-l", "-9", "-c"]),
        ("zstd", ["zstd", "-22", "--ultra"]),
    ],
)
def test_what_the_kernels_own_build_calls(tmp_path: Path, format: str, command: list[str]) -> None:
    """The very commands of the kernel's scripts/Makefile.lib."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on this machine: its {format} output is not tried")
    elf = kernel()
    packed = subprocess.run(command, input=elf, capture_output=True, check=True).stdout
    if format != "gzip":
        packed += struct.pack("<I", len(elf))
    assert opened(tmp_path, bzimage(packed)).data == elf


def test_without_payload_fields_the_payload_is_searched(tmp_path: Path) -> None:
    elf = kernel()
    decoys = b"\x1f\x8b\x08" + bytes(40) + b"BZh9" + bytes(40)
    image = opened(tmp_path, bzimage(decoys + compress(elf, "gzip"), protocol=0x206, declared=False))
    assert image.data == elf
    assert image.payload is not None
    assert image.payload.length is None


def test_setup_sectors_of_0_are_4(tmp_path: Path) -> None:
    whole = bytearray(bzimage(compress(kernel(), "gzip")))
    assert whole[0x1F1] == 4
    whole[0x1F1] = 0
    assert opened(tmp_path, bytes(whole)).data == kernel()


def test_an_old_payload_is_bare_memory_placed_by_its_own_symbols(tmp_path: Path) -> None:
    tables = build(symbols(600, 0xC0100000), bits=32, addresses="absolute", era="2.6")
    memory = TEXT + bytes(-len(TEXT) % 8) + tables + b"Linux version 2.6.21 (us) #1\n\0" + bytes(40000)
    image = opened(tmp_path, bzimage(compress(memory, "gzip"), protocol=0x206, declared=False))
    assert image.container == "bzimage"
    assert image.read(0xC0100000, 8) == TEXT[:8]
    assert image.page_offset == 0xC0000000
    assert image.physical_of(0xC0100000) == 0x100000
    assert image.version == (2, 6, 21)
    assert image.symbols.sources == ("kallsyms",)
    with pytest.raises(ImageError, match="no symbols that tell its address"):
        opened(tmp_path, bzimage(compress(TEXT * 3, "gzip"), protocol=0x206, declared=False))


def words(*values: int) -> bytes:
    return b"".join(struct.pack("<I", v & 0xFFFFFFFF) for v in values)


def test_the_relocation_table_of_a_32_bit_kernel(tmp_path: Path) -> None:
    elf = kernel()
    tail = words(0, 0xC1000004, 0xC1000010)
    image = opened(tmp_path, bzimage(compress(elf + tail, "xz")))
    assert image.data == elf + tail
    assert image.elf_size == len(elf)
    assert image.relocations is not None
    assert image.relocations.absolute32 == (0xC1000004, 0xC1000010)
    assert len(image.relocations) == 2
    # The same when the payload was unpacked to a file of its own.
    (tmp_path / "vmlinux").write_bytes(elf + tail)
    assert open_image(tmp_path / "vmlinux").relocations == image.relocations


def test_the_relocation_tables_of_a_64_bit_kernel(tmp_path: Path) -> None:
    elf = kernel(64)
    tail = words(0, 0x81000008, 0x81000020, 0, 0x81000100, 0, 0x81000200, 0x81000300)
    image = opened(tmp_path, bzimage(compress(elf + tail, "zstd")))
    assert image.relocations is not None
    assert image.relocations.absolute64 == (0xFFFFFFFF81000008, 0xFFFFFFFF81000020)
    assert image.relocations.inverse32 == (0xFFFFFFFF81000100,)
    assert image.relocations.absolute32 == (0xFFFFFFFF81000200, 0xFFFFFFFF81000300)
    # From 6.15 on there are no inverse ones.
    image = opened(tmp_path, bzimage(compress(elf + words(0, 0x81000008, 0, 0x81000200), "zstd")))
    assert image.relocations is not None
    assert image.relocations.absolute64 == (0xFFFFFFFF81000008,)
    assert image.relocations.inverse32 == ()
    assert image.relocations.absolute32 == (0xFFFFFFFF81000200,)


@pytest.mark.parametrize("tail", [b"abc", b"abcdefgh", words(0, 1, 0, 2)])
def test_something_else_behind_the_elf_file_is_refused(tmp_path: Path, tail: bytes) -> None:
    with pytest.raises(ImageError, match="no relocation table"):
        opened(tmp_path, bzimage(compress(kernel() + tail, "gzip")))


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_or_truncated_payload_is_refused(tmp_path: Path, format: str) -> None:
    elf = kernel()
    packed = compress(elf, format)
    for cut in (8, len(packed) // 2, len(packed) - 9):
        # A true size behind a stream that ends early, in a file whose header is right.
        with pytest.raises(ImageError) as caught:
            opened(tmp_path, bzimage(packed[:cut] + struct.pack("<I", len(elf))))
        assert caught.value.offset == 5 * 512 + 0x300
    wrong = bytearray(packed)
    wrong[-4:] = struct.pack("<I", len(elf) + 1)
    # gzip checks its size itself.
    with pytest.raises(ImageError, match="size suffix" if format != "gzip" else "length check"):
        opened(tmp_path, bzimage(bytes(wrong)))
    whole = bzimage(packed)
    with pytest.raises(ImageError, match="past the end of the file"):
        opened(tmp_path, whole[: 5 * 512 + 0x300 + len(packed) - 1])


def test_headers_that_cannot_be(tmp_path: Path) -> None:
    whole = bzimage(compress(kernel(), "gzip"))
    for length in (0x206, 0x207, 0x300, 5 * 512 - 1, 5 * 512):
        with pytest.raises(ImageError, match=r"cut short|past the end"):
            opened(tmp_path, whole[:length])
    with pytest.raises(ImageError, match="unknown format"):
        opened(tmp_path, bzimage(b"\1\2\3\4" * 100))
    with pytest.raises(ImageError, match="no payload is found"):
        opened(tmp_path, bzimage(bytes(4000), protocol=0x206, declared=False))
    with pytest.raises(ImageError, match=r"LZO|lzop"):
        opened(tmp_path, bzimage(b"\x89LZO\0\r\n\x1a\n" + bytes(100)))
    module = ElfWriter(kind="rel").section(".text", TEXT, flags="ax").build()
    with pytest.raises(ImageError, match="neither a kernel nor a module"):
        opened(tmp_path, bzimage(compress(module, "gzip")))


def test_bombs_are_bounded(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(decompress.MAX_UNPACKED + (1 << 20)), 9)
    with pytest.raises(ImageError, match="more than any kernel"):
        opened(tmp_path, bzimage(bomb))
    # One whose declared size is small stops there.
    with pytest.raises(ImageError, match="more than 1000 bytes"):
        opened(tmp_path, bzimage(bomb[:-4] + struct.pack("<I", 1000)))
    (tmp_path / "vmlinux.gz").write_bytes(bomb)
    with pytest.raises(ImageError, match=f"more than {decompress.MAX_UNPACKED} bytes"):
        open_image(tmp_path / "vmlinux.gz")


@pytest.mark.parametrize("format", ["gzip", "bzip2", "xz", "lzma", "lz4", "zstd"])
def test_a_compressed_elf_file_opens_as_itself(tmp_path: Path, format: str) -> None:
    elf = kernel()
    packed = lz4_legacy(elf) if format == "lz4" else compress(elf, format)
    packed = packed if format in ("gzip", "lz4") else packed[:-4]
    image = opened(tmp_path, packed)
    assert image.container == "elf"
    assert image.compression == format
    assert image.data == elf
    assert image.payload is None


def pieces_of(format: str, data: bytes, sizes: list[int]) -> list[bytes]:
    """The data in as many streams as there are sizes, and one for the rest."""
    cuts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    parts = [data[a:b] for a, b in zip(cuts, [*cuts[1:], len(data)], strict=True)]
    if format == "lz4":
        return [lz4_legacy(p) for p in parts]
    return [compress(p, format) if format == "gzip" else compress(p, format)[:-4] for p in parts]


@pytest.mark.parametrize("format", ["gzip", "bzip2", "xz", "lz4", "zstd"])
@pytest.mark.parametrize("between", [b"", bytes(8)])
def test_all_streams_of_a_file_are_unpacked(tmp_path: Path, format: str, between: bytes) -> None:
    elf = kernel()
    if format == "lz4":
        # A full block ends only with the next one; zeros end the frame.
        elf += bytes((8 << 20) + 1)
        parts = pieces_of(format, elf, [8 << 20])
    else:
        parts = pieces_of(format, elf, [1000, 0, 1, 30000])
    image = opened(tmp_path, between.join(parts))
    assert image.data == elf
    # What is neither a stream nor zeros is left alone, as before.
    assert opened(tmp_path, between.join(parts) + (b"" if format == "lz4" else b"\1\2\3")).data == elf


def test_skippable_frames_of_parallel_zstd(tmp_path: Path) -> None:
    elf = kernel()
    skip = bytes.fromhex("502A4D18") + struct.pack("<II", 4, 12345)
    packed = b"".join(skip + p for p in pieces_of("zstd", elf, [5000, 6000]))
    assert opened(tmp_path, packed).data == elf


@pytest.mark.parametrize("format", ["gzip", "bzip2", "xz", "lz4", "zstd"])
def test_the_second_stream_is_checked_and_bounded_too(tmp_path: Path, format: str) -> None:
    parts = pieces_of(format, kernel(), [8 << 20] if format == "lz4" else [30000])
    with pytest.raises(ImageError, match="damaged"):
        opened(tmp_path, b"".join(parts)[:-20])
    zeros = parts[0] + (lz4_legacy if format == "lz4" else lambda d: pieces_of(format, d, [])[0])(bytes(16 << 20)) * 12
    with pytest.raises(ImageError, match=f"more than {decompress.MAX_UNPACKED} bytes"):
        opened(tmp_path, zeros)


def test_streams_without_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="more than 65536 streams"):
        opened(tmp_path, gzip.compress(b"", mtime=0) * 66_000)


@pytest.mark.parametrize("kind", ["exec", "rel"])
def test_a_separate_debug_file_is_refused(tmp_path: Path, kind: str) -> None:
    elf = ElfWriter(bits=64, kind=kind)
    top = 0xFFFFFFFF81000000 if kind == "exec" else 0
    elf.section(".text", address=top, flags="ax", type="nobits", size=4096)
    elf.section(".note", b"GNU\0" * 4, address=top and top + 0x2000, flags="a", type="note")
    elf.section(".debug_info", bytes(100))
    with pytest.raises(ImageError, match="a separate debug file"):
        opened(tmp_path, elf.build())
