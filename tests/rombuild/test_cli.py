"""`vmipatch rom` as a user runs it: bytes, streams, exit statuses, time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from romguest import PAIRS, rom

ROOT = Path(__file__).parents[2]


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmipatch", "rom", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, text=True, capture_output=True, check=False, timeout=60, cwd=cwd, env=environment)


def test_build_inspect_check(tmp_path: Path) -> None:
    out = tmp_path / "xen.rom"
    done = run("build", "xen", "--abi", "vmi-13.0", "-o", out, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert out.read_bytes() == rom("xen", "vmi-13.0").data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["xen.rom", "xen.rom.elf", "xen.rom.map"]
    done = run("check", out)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run("inspect", out, "--stubs")
    assert done.returncode == 0
    assert "VMI 13.0 (vmi-13.0), xen" in done.stdout
    assert "HYPERVISOR" not in done.stdout
    assert "int 0x82" in done.stdout
    record = json.loads(run("inspect", out, "--json").stdout)
    assert record["schema"] == "vmipatch.rom/1"
    (image,) = record["images"]
    assert image["vmi"]["hypervisor"] == "xen"
    iret = next(c for c in image["vmi"]["calls"] if c["name"] == "IRET")
    assert (iret["number"], iret["offset"]) == (39, 39 * 32)
    assert iret["code"][0]["text"] == "lea esp, [esp + 4]"
    enable = next(c for c in image["vmi"]["calls"] if c["name"] == "EnableInterrupts")
    assert enable["code"][0]["text"].startswith("jmp ")
    assert "sti" in [i["text"] for i in enable["code"]]


def test_three_images_in_one(tmp_path: Path) -> None:
    out = tmp_path / "l4ka.rom"
    done = run("build", "l4ka", "--abi", "vmi-3.0", "--abi", "vmi-13.0", "--no-symbols", "-o", out)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["l4ka.rom"]
    record = json.loads(run("inspect", "--json", out).stdout)
    assert [i["vmi"]["abi"] for i in record["images"]] == ["vmi-3.0", "vmi-13.0"]


def test_list() -> None:
    record = json.loads(run("list", "--json").stdout)
    assert {(s["name"], a) for s in record["specs"] for a in s["abis"]} == set(PAIRS)
    text = run("list").stdout
    assert text.count("\n") == 7
    assert "deprivileged" not in text


def test_findings_are_exit_status_1(tmp_path: Path) -> None:
    broken = bytearray(rom("native", "vmi-3.0").data)
    broken[-1] ^= 1
    path = tmp_path / "broken.rom"
    path.write_bytes(broken)
    for command in ("check", "inspect"):
        done = run(command, path)
        assert done.returncode == 1
        assert "error: checksum at 0x5ff: the bytes sum to 0x" in done.stdout
        assert done.stderr == ""
    record = json.loads(run("check", "--json", path).stdout)
    assert [(f["rule"], f["offset"], f["offset_hex"]) for f in record["findings"]] == [("checksum", 0x5FF, "0x5ff")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["build", "hyperv", "-o", "x"], "no hypervisor spec named 'hyperv'"),
        (["build", "xen", "--abi", "vmi-9", "-o", "x"], "no ABI named 'vmi-9'"),
        (["build", "xen", "--abi", "vmi-6.1", "-o", "x"], "only ever spoken by native and l4ka"),
        (["build", "xen", "--base", "0xC0400", "-o", "x"], "multiple of 2048"),
        (["build", "xen", "--base", "banana", "-o", "x"], "banana"),
        (["build", "xen", "-o", "/nonexistent/x"], "cannot write"),
        (["build", "./absent.toml", "-o", "x"], "absent.toml"),
        (["inspect", "absent.rom"], "cannot read"),
        (["check", "empty"], "the file is empty"),
        (["inspect", "noise"], "not an option ROM"),
        (["inspect", "."], "cannot read"),
    ],
)
def test_one_line_and_exit_status_2(tmp_path: Path, words: list[str], says: str) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 8)
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "x").exists()


def test_an_error_in_a_spec_names_file_call_and_line(tmp_path: Path) -> None:
    spec = tmp_path / "mine.toml"
    spec.write_text('name = "mine"\ninherits = "native"\ntitle = "x"\n[calls]\nCLTS = """\n  clts\n  mov ebx, 5"""\n')
    done = run("build", spec, "-o", tmp_path / "x.rom")
    assert done.returncode == 2
    assert f"{spec}:" in done.stderr
    assert "CLTS" in done.stderr
    assert "ebx changed" in done.stderr
    assert not (tmp_path / "x.rom").exists()
