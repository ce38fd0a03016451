"""Memory of real machines that cannot be used for an image: one line that says how it was noticed, exit status 2.

With ``--json`` the error is a document of its own, which its published schema validates.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.corewriter import core

from .conftest import Cli, RealKernel
from .dumps import Dumped, Run, explained, offset_of_zero, place_in

Get = Callable[[str], RealKernel]

RUN = Run("686", "qemu32", 1)
MIB = 1 << 20


def valid(cli: Cli, document: dict[str, Any]) -> None:
    """Against the schema that the command line itself publishes."""
    name = document["schema"].removeprefix("vmipatch.").removesuffix("/1")
    schema = json.loads(cli.run("schema", name).stdout)
    jsonschema.Draft202012Validator(schema).validate(document)


def refused(cli: Cli, kernel: RealKernel, dump: Path, *options: object) -> str:
    done = cli.run("explain", kernel.image, "--memory", dump, "--json", *options)
    assert done.returncode == 2, done.stdout[:2000] + done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"vmipatch: {dump}")
    document = json.loads(done.stdout)
    valid(cli, document)
    assert document["schema"] == "vmipatch.error/1"
    assert document["error"]["message"] in done.stderr
    print(done.stderr.strip())
    table = cli.run("explain", kernel.image, "--memory", dump, *options)
    assert (table.returncode, table.stdout, table.stderr) == (2, "", done.stderr)
    return done.stderr


def test_memory_of_another_kernel(real_kernel: Get, dumped: Dumped, cli: Cli) -> None:
    for name in ("686-pae", "5.10-686", "amd64"):
        said = refused(cli, real_kernel(name), dumped(RUN))
        assert "memory of another kernel: its banner is 'Linux version 6.1.0-" in said


def test_memory_of_another_build_of_the_same_version(
    real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path
) -> None:
    """Debian rebuilds a version under the same release: the banner's end and the build id differ."""
    kernel = real_kernel(RUN.kernel)
    ours = dumped(RUN).read_bytes()
    dump = tmp_path / "rebuilt.core"
    notes = kernel.vmlinux.bytes_of(".notes")
    at = notes.find(b"\x14\0\0\0\x03\0\0\0GNU\0") + 12
    identity = notes[at : at + 20]
    assert at > 12
    dump.write_bytes(ours.replace(identity, bytes(reversed(identity))))
    assert f"another build: its build id is {bytes(reversed(identity)).hex()}" in refused(cli, kernel, dump)
    # The same with another text as well, and the banner of the rebuild.
    rebuilt = bytearray(ours.replace(b" Debian 6.1.", b" Debian 6.9."))
    assert rebuilt != ours
    start, size = place_in(kernel, dumped(RUN)), kernel.vmlinux.text.size
    rebuilt[start : start + size] = rebuilt[start + 0x40 : start + size] + bytes(0x40)
    dump.write_bytes(rebuilt)
    said = refused(cli, kernel, dump)
    assert "memory of another build of 6.1.0-" in said
    assert "its banner says '6.9." in said
    assert "where the image's says '6.1." in said


def test_memory_with_another_text(real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path) -> None:
    """Banner and build id are right and the text is not: the share of its bytes says so."""
    kernel = real_kernel(RUN.kernel)
    data = bytearray(dumped(RUN).read_bytes())
    start, size = place_in(kernel, dumped(RUN)), kernel.vmlinux.text.size
    data[start : start + size] = bytes(reversed(data[start : start + size]))
    dump = tmp_path / "other.core"
    dump.write_bytes(data)
    assert "not the memory of this kernel: only " in refused(cli, kernel, dump)


@pytest.fixture(scope="module")
def raw(dumped: Dumped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The machine's memory from physical 0 on, without a header."""
    data = dumped(RUN).read_bytes()
    zero = offset_of_zero(data[:4096])
    path = tmp_path_factory.mktemp("raw") / "memory"
    path.write_bytes(data[zero : zero + 64 * MIB])
    return path


def test_memory_that_is_cut_short(real_kernel: Get, dumped: Dumped, raw: Path, cli: Cli, tmp_path: Path) -> None:
    kernel = real_kernel(RUN.kernel)
    cut = tmp_path / "cut"
    whole = dumped(RUN).read_bytes()
    cut.write_bytes(whole[: 20 * MIB])
    named = re.search(r"cut short: its headers name (\d+) bytes more than it has", refused(cli, kernel, cut))
    # Behind its segments QEMU writes a few bytes more.
    assert named is not None
    assert 0 <= len(whole) - 20 * MIB - int(named[1]) < 4096
    cut.write_bytes(raw.read_bytes()[: 20 * MIB])
    text = kernel.vmlinux.text
    had = 20 * MIB - kernel.vmlinux.physical(text.address)
    assert f"cut short: it has {had} of the {text.size} bytes" in refused(cli, kernel, cut, "--base", "0")
    cut.write_bytes(whole[:40])
    refused(cli, kernel, cut)
    cut.write_bytes(b"")
    assert "the dump is empty" in refused(cli, kernel, cut, "--base", "0")


def test_memory_filled_with_zeros(real_kernel: Get, dumped: Dumped, raw: Path, cli: Cli, tmp_path: Path) -> None:
    kernel = real_kernel(RUN.kernel)
    zeros = tmp_path / "zeros"
    zeros.write_bytes(bytes(32 * MIB))
    assert "text is all zeros" in refused(cli, kernel, zeros, "--base", "0")
    data = bytearray(dumped(RUN).read_bytes())
    start, size = place_in(kernel, dumped(RUN)), kernel.vmlinux.text.size
    data[start : start + size] = bytes(size)
    zeros.write_bytes(data)
    assert "text is all zeros" in refused(cli, kernel, zeros)
    # One page of zeros is no reason to refuse the rest: its bytes have no cause, and the hint says why.
    text = kernel.vmlinux.text
    page = kernel.vmlinux.physical(text.address) + 0x200000
    data = bytearray(raw.read_bytes())
    data[page : page + 4096] = bytes(4096)
    zeros.write_bytes(data)
    answer = explained(cli, kernel, zeros, "--base", "0", status=1)
    valid(cli, answer)
    assert {u["address"] // 4096 for u in answer["unexplained"]} == {(text.address + 0x200000) // 4096}
    assert any("zeros" in (u["hint"] or "") for u in answer["unexplained"])


def test_memory_that_is_not_page_aligned(real_kernel: Get, raw: Path, cli: Cli, tmp_path: Path) -> None:
    kernel = real_kernel(RUN.kernel)
    shifted = tmp_path / "shifted"
    for lost in (1, 100, 2048):
        shifted.write_bytes(raw.read_bytes()[lost:])
        said = refused(cli, kernel, shifted, "--base", "0")
        assert f"not page-aligned: the kernel's text stands in it {4096 - lost:#x} bytes past a page boundary" in said
    assert "not page-aligned" in refused(cli, kernel, raw, "--base", "0x64")


def test_a_core_without_the_text(real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path) -> None:
    kernel = real_kernel(RUN.kernel)
    data = dumped(RUN).read_bytes()
    zero, text = offset_of_zero(data[:4096]), kernel.vmlinux.text
    first = kernel.vmlinux.physical(text.address)
    behind = first + text.size + 4095 & ~4095
    dump = tmp_path / "core"
    dump.write_bytes(core([(0, 0, data[zero : zero + first]), (0, behind, data[zero + behind : zero + 64 * MIB])]))
    assert "the kernel's text is not in it (its banner is" in refused(cli, kernel, dump)
    dump.write_bytes(core([(0, 0, data[zero : zero + 640 * 1024])]))
    assert "the kernel's text is not in it" in refused(cli, kernel, dump)


def test_what_is_no_dump(real_kernel: Get, cli: Cli, tmp_path: Path) -> None:
    kernel = real_kernel(RUN.kernel)
    assert "no core" in refused(cli, kernel, kernel.elf)
    assert "cannot read the memory" in refused(cli, kernel, tmp_path / "nothing")
    assert "not a regular file" in refused(cli, kernel, tmp_path)
    dump = tmp_path / "noise"
    dump.write_bytes(struct.pack("<256I", *range(256)))
    assert "give --base" in refused(cli, kernel, dump)


def test_json_is_json_whatever_comes_out(real_kernel: Get, dumped: Dumped, cli: Cli, tmp_path: Path) -> None:
    """Exit status 0 and 1 against the published schema, and the legal-patch set against its own."""
    kernel = real_kernel(RUN.kernel)
    out = tmp_path / "legal.json"
    valid(cli, explained(cli, kernel, dumped(RUN), "--legal", out))
    valid(cli, json.loads(out.read_text()))
    data = bytearray(dumped(RUN).read_bytes())
    start = place_in(kernel, dumped(RUN))
    for i in range(0, kernel.vmlinux.text.size, 40):
        data[start + i] ^= 0xFF
    dump = tmp_path / "many.core"
    dump.write_bytes(data)
    answer = explained(cli, kernel, dump, status=1)
    valid(cli, answer)
    assert len(answer["unexplained"]) == 10_000
    assert answer["unexplained_runs"] > 200_000
    assert answer["bytes"]["unexplained"] > 200_000
