"""``vmipatch validate``'s JSON and table on the bundled guest: a broken stub is named, and can be tried again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from vmipatch import facts
from vmipatch.rombuild.build import build

GUEST = Path(__file__).parents[2] / "examples" / "vmi-guest" / "vmi-guest-mainline.elf"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmipatch", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def spoilt(path: Path, call: str, code: bytes) -> Path:
    """A KVM ROM with this code at the beginning of a stub; its checksum is right."""
    rom = build("kvm", "vmi-3.0")
    data = bytearray(rom.data)
    at = next(s.offset for s in rom.symbols if s.name == call)
    data[-1] = (data[-1] + sum(data[at : at + len(code)]) - sum(code)) & 0xFF
    data[at : at + len(code)] = code
    path.write_bytes(data)
    assert sum(data) & 0xFF == 0
    return path


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ROM whose EnableInterrupts comes back at once."""
    return spoilt(tmp_path_factory.mktemp("rom") / "broken.rom", "EnableInterrupts", b"\xc3")


def test_the_document_keeps_to_its_schema_and_names_the_stub(broken: Path) -> None:
    done = run("validate", GUEST, "--rom", broken, "--memory", 32, "--sites-only", "--states", 3, "--json")
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    schema = json.loads((facts.root() / "schemas" / "validate.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(document)
    assert document["verdict"] == "fail"
    failed = {v["op"] for v in document["sites"]["verdicts"] if v["verdict"] == "fail"}
    # The call itself, and the sites that make it.
    assert failed == {"EnableInterrupts", "pv_irq_ops.irq_enable"}


def test_a_boot_that_the_hypervisor_stops_says_where(tmp_path: Path) -> None:
    rom = spoilt(tmp_path / "rom", "GetCR0", bytes.fromhex("a3 00 20 00 fc"))  # mov [0xFC002000], eax
    done = run("validate", GUEST, "--rom", rom, "--memory", 32, "--boots-only", "--json")
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    schema = json.loads((facts.root() / "schemas" / "validate.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(document)
    natively, *others = document["boots"]
    assert natively["violation"] is None
    for boot in others:
        assert boot["verdict"] == "fail"
        found = boot["violation"]
        assert (found["rule"], found["address"], found["address_hex"]) == ("hole-write", 0xFC002000, "0xfc002000")


def test_a_failure_can_be_tried_again_alone(broken: Path) -> None:
    done = run("validate", GUEST, "--rom", broken, "--memory", 32, "--sites-only", "--states", 3)
    assert done.returncode == 1
    again = re.search(r"again: +vmipatch (.+)", done.stdout)
    assert again, done.stdout
    alone = run(*again.group(1).split(), "--memory", 32, "--sites-only")
    assert alone.returncode == 1
    assert "1 fail, 0 not shown" in alone.stdout
    assert alone.stdout.count("the guest's if") == 2  # in the line on the call, and in that on the state


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rom", "{missing}"], "cannot be read|cannot read|No such file"),
        (["--rom", "{rom}", "--hypervisor", "xen"], "made for kvm, not for xen"),
        (["--rom", "{rom}", "--hypervisor", "vmare"], "no hypervisor named 'vmare'"),
        (["--rom", "{old}"], "no image of generation 3"),
        (["--rom", "{licence}"], "licence 'GPX'"),
        (["--rom", "{text}"], "not an option ROM"),
    ],
)
def test_what_cannot_be_tried_is_one_line(words: list[str], says: str, tmp_path: Path) -> None:
    data = build("kvm", "vmi-3.0").data
    (tmp_path / "rom").write_bytes(data)
    (tmp_path / "old").write_bytes(build("kvm", "vmi-13.0").data)
    (tmp_path / "text").write_text("no ROM at all\n" * 100)
    licence = int.from_bytes(data[0x16:0x18], "little")
    odd = bytearray(data)
    odd[licence : licence + 3] = b"GPX"
    (tmp_path / "licence").write_bytes(odd)
    places = {name: tmp_path / name for name in ("missing", "rom", "old", "text", "licence")}
    done = run("validate", GUEST, *[word.format(**places) for word in words])
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(says, done.stderr), done.stderr
    assert done.stdout == ""


def test_a_kernel_that_does_not_get_there_is_not_shown(tmp_path: Path) -> None:
    """The native boot decides: without its end nothing passes."""
    rom = tmp_path / "rom"
    rom.write_bytes(build("native", "vmi-3.0").data)
    limits = ("--memory", 32, "--max-instructions", 100_000)
    done = run("validate", GUEST, "--rom", rom, *limits, "--boots-only", "--json")
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] == "not shown"
    assert {b["verdict"] for b in document["boots"]} == {"not shown"}
