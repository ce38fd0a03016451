"""``vmipatch run``, its exit status, its JSON, its traces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "firmware"))

from guests import code, multiboot, option_rom, say

COMMAND = [
    sys.executable,
    "-c",
    "import typer, sys; from vmipatch.cli.run import run; from vmipatch.errors import VmipatchError\n"
    "app = typer.Typer(pretty_exceptions_enable=False); app.command()(run)\n"
    "try: app()\n"
    "except VmipatchError as error: print(error, file=sys.stderr); sys.exit(error.exit_status)",
]


def vmipatch_run(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [*COMMAND, *[str(argument) for argument in arguments], "--memory", "4"]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest.bin"
    path.write_bytes(multiboot(code(f"{say('ready')}; mov edx, 0x604; mov eax, 0x2000; out dx, ax")))
    return path


def test_serial_on_stdout_and_summary(guest: Path) -> None:
    done = vmipatch_run(guest, "--json")
    assert done.returncode == 0, done.stderr
    text, last = done.stdout.splitlines()
    assert text == "ready"
    summary = json.loads(last)
    assert summary["reason"] == "poweroff"
    assert summary["instructions"] == 14
    assert summary["exits"]["port"] >= 6
    assert summary["vmi_calls"] == {}
    assert summary["seconds"] >= 0
    assert "engine: " in done.stderr


def test_until(guest: Path) -> None:
    assert vmipatch_run(guest, "--until", "ead").returncode == 0
    missed = vmipatch_run(guest, "--until", "never")
    assert missed.returncode == 1
    assert "poweroff" in missed.stderr


def test_a_guest_that_dies(tmp_path: Path) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(multiboot(code("mov ecx, 0x1234; nop; ud2")))
    done = vmipatch_run(path, "--json")
    assert done.returncode == 1
    assert "triple fault" in done.stderr
    assert "ecx 00001234" in done.stderr
    assert "ud2" in done.stderr
    summary = json.loads(done.stdout)
    assert [line.split("  ")[-1] for line in summary["last_instructions"]] == ["mov ecx, 0x1234", "nop", "ud2"]
    assert summary["registers"]["ecx"] == 0x1234


def test_limit_without_until_is_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "loop.bin"
    path.write_bytes(multiboot(code("jmp 0x100020")))
    assert vmipatch_run(path, "--max-instructions", 10_000).returncode == 0
    assert vmipatch_run(path, "--max-instructions", 10_000, "--until", "x").returncode == 1


def test_two_runs_are_the_same(guest: Path) -> None:
    def stable(text: str) -> str:
        summary = json.loads(text[text.index("{") :])
        del summary["seconds"]
        return json.dumps(summary)

    assert stable(vmipatch_run(guest, "--json").stdout) == stable(vmipatch_run(guest, "--json").stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--memory", "0"],
        ["--memory", "5000"],
        ["--boot", "grub"],
        ["--rom-base", "here"],
        ["--date", "yesterday"],
        ["--rom", "/nonexistent"],
        ["--initrd", "/nonexistent"],
        ["--trace", "/nonexistent/file"],
        ["--trace", "/dev/null", "--trace-events", "dreams"],
        ["--trace", "/dev/null", "--trace-ports", "x-y"],
        ["--gdb", "99999"],
    ],
)
def test_wrong_use_is_status_2(guest: Path, arguments: list[str]) -> None:
    words = [*COMMAND, str(guest), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    path.write_bytes(b"nothing")
    done = vmipatch_run(path)
    assert done.returncode == 2
    assert str(path) in done.stderr


def test_trace(guest: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    vmipatch_run(guest, "--trace", trace, "--trace-events", "all")
    lines = trace.read_text().splitlines()
    kinds = {line.split()[1] for line in lines}
    assert {"i", "p"} <= kinds
    outs = [line.split()[2:] for line in lines if line.split()[1] == "p"]
    assert ["out", "03f8", "1", "72"] in outs
    assert ["out", "0604", "2", "2000"] in outs
    first = next(line for line in lines if line.split()[1] == "i")
    assert first.split()[2:] == ["0010:00100020", "baf8030000", "mov", "edx,", "0x3f8"]


def test_trace_filters(tmp_path: Path) -> None:
    path = tmp_path / "guest.bin"
    program = code(
        "mov esi, 0x5000; mov dword ptr [esi + 4], 0x1122; mov eax, dword ptr [esi + 4]; out 0x80, al; cli; hlt"
    )
    path.write_bytes(multiboot(program))
    trace = tmp_path / "trace"
    vmipatch_run(path, "--trace", trace, "--trace-events", "memory,ports", "--trace-ports", "0x80")
    lines = [line.split()[1:] for line in trace.read_text().splitlines()]
    assert ["m", "w", "00005004", "4", "00000000"] in lines
    assert ["m", "r", "00005004", "4", "00001122"] in lines
    assert [line for line in lines if line[0] == "p"] == [["p", "out", "0080", "1", "22"]]
    vmipatch_run(path, "--trace", trace, "--trace-events", "instructions", "--trace-addresses", "0x100025-0x10002b")
    assert [line.split()[3] for line in trace.read_text().splitlines()] == ["c7460422110000"]


def test_trace_of_rom_calls(tmp_path: Path) -> None:
    rom = tmp_path / "rom"
    image = bytearray(option_rom(b"\xcb"))
    image[0x40] = 0xC3
    image[-1] = 0
    image[-1] = -sum(image) & 0xFF
    rom.write_bytes(image)
    path = tmp_path / "guest.bin"
    path.write_bytes(multiboot(code("mov eax, 0xc0040; call eax; cli; hlt")))
    trace = tmp_path / "trace"
    vmipatch_run(path, "--rom", rom, "--trace", trace, "--trace-events", "calls")
    assert [line.split()[1:] for line in trace.read_text().splitlines()] == [["c", "+0040", "return", "00100027"]]
