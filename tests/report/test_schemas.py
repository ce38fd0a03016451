"""What the commands print and write, against the published schemas, odd inputs included."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "emu" / "firmware"))

from commands import CALL_AT, HOSTILE_FILE, Commands, hostile_kernel, running_kernel
from guests import code, multiboot

from tests.explain import running as made
from tests.kernelmaker import HIGH, TEXT
from vmipatch import facts
from vmipatch.report import schemas


@pytest.fixture
def vmipatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    return Commands(capsys, monkeypatch)


def closed(schema: Any) -> Any:
    """The schema with every described object shut: a key that the schema does not name is then an error."""
    if isinstance(schema, dict):
        schema = {k: closed(v) for k, v in schema.items()}
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    elif isinstance(schema, list):
        schema = [closed(v) for v in schema]
    return schema


def nodes(document: Any) -> Iterator[Any]:
    yield document
    for value in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from nodes(value)


def check(document: dict[str, Any], name: str) -> None:
    """Against the schema as published, and with nothing said that it does not describe."""
    assert document["schema"] == f"vmipatch.{name}/1"
    schema = json.loads(schemas.schema(name))
    for each in (schema, closed(schema)):
        jsonschema.Draft202012Validator(each).validate(document)
    for node in nodes(document):
        if isinstance(node, str):
            node.encode("utf-8")  # no half surrogate pairs
        if isinstance(node, dict):
            for key, value in node.items():
                if key.endswith("_hex") and value is not None:
                    assert int(value, 16) == node[key.removesuffix("_hex")]
                if key == "address" or key.endswith("_address"):
                    assert f"{key}_hex" in node, key


def test_the_schemas_themselves(vmipatch: Commands) -> None:
    listed = vmipatch("schema").out.split()
    assert {f"{name}.json" for name in listed} == {f.name for f in (facts.root() / "schemas").iterdir()}
    for name in listed:
        done = vmipatch("schema", name)
        schema = done.json()
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["properties"]["schema"]["const"] == f"vmipatch.{name}/1"
        assert set(schema["required"]) <= set(schema["properties"])
    refused = vmipatch("schema", "nothing")
    assert (refused.status, refused.out) == (2, "")
    assert "scan" in refused.err


@pytest.mark.parametrize("bits", [32, 64])
def test_scan_patch_journal_and_diff(vmipatch: Commands, tmp_path: Path, bits: int) -> None:
    kernel = hostile_kernel(tmp_path, bits)
    scan = vmipatch("scan", kernel, "--json").json()
    check(scan, "scan")
    assert len(scan["sites"]) == 3
    assert HOSTILE_FILE[:5] in scan["image"]["path"]
    assert scan["image"]["path"].endswith("\\xff\\xed\\xa0\\x80.elf")
    assert any("<script>" in (s["symbol"] or "") for s in scan["sites"])
    check(vmipatch("scan", kernel, "--json", "--summary").json(), "scan")
    check(vmipatch("scan", kernel, "--json", "--family", "mcount").json(), "scan")
    out = tmp_path / "out"
    machine = ("--cpu", "pentium3" if bits == 32 else "qemu64")
    check(vmipatch("patch", kernel, "--dry-run", *machine, "--json").json(), "patch")
    done = vmipatch("patch", kernel, "-o", out, *machine, "--json")
    assert done.status == 0, done.err
    patched = done.json()
    check(patched, "patch")
    assert patched["bytes_changed"] > 0
    check(json.loads((tmp_path / "out.journal.json").read_text("ascii")), "journal")
    diff = vmipatch("diff", kernel, out, "--json", "--all").json()
    check(diff, "diff")
    assert (len(diff["sites"]), diff["wrong"]) == (3, 0)
    data = bytearray(out.read_bytes())
    data[patched["changes"][0]["offset"]] ^= 0xFF
    out.write_bytes(data)
    wrong = vmipatch("diff", kernel, out, "--json")
    assert wrong.status == 1
    check(wrong.json(), "diff")
    assert wrong.json()["wrong"] == 1


def test_sealed_patches_for_a_rom(vmipatch: Commands, tmp_path: Path) -> None:
    kernel = hostile_kernel(tmp_path, 32, "2.6.32")
    rom = tmp_path / "xen.rom"
    assert vmipatch("rom", "build", "xen", "-o", rom).status == 0
    done = vmipatch("patch", kernel, "-o", tmp_path / "out", "--rom", rom, "--cpu", "pentium3", "--seal", "--json")
    assert done.status == 0, done.err
    check(done.json(), "patch")
    check(json.loads((tmp_path / "out.journal.json").read_text("ascii")), "journal")


def test_a_damaged_table_and_huge_addresses(vmipatch: Commands, tmp_path: Path) -> None:
    kernel = hostile_kernel(tmp_path, 64)
    found = vmipatch("scan", kernel, "--layout", "parainstructions=nonsense", "--json")
    assert found.status == 2
    check(found.json(), "error")
    assert found.err.count("\n") == 1
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(range(256)) * 16)
    done = vmipatch("scan", raw, "--base", "0xfffffffffffff000", "--json")
    check(done.json(), "scan")
    # A paravirt entry that names an address without bytes: what the scanner says of it must be JSON too.
    data = kernel.read_bytes()
    entry = struct.pack("<QBBH4x", HIGH + TEXT + CALL_AT, 0, 6, 0)
    assert data.count(entry) == 1
    kernel.write_bytes(data.replace(entry, struct.pack("<QBBH4x", 2**64 - 1, 0, 6, 0)))
    done = vmipatch("scan", kernel, "--json")
    assert done.status == 1
    check(done.json(), "scan")
    assert done.json()["findings"]


@pytest.mark.parametrize("machine", [{}, {"one_cpu": False}, {"slide": 0x400000}])
def test_explain_and_legal(vmipatch: Commands, tmp_path: Path, machine: dict[str, Any]) -> None:
    kernel, dump = running_kernel(tmp_path, **machine)
    base = made.PHYSICAL + machine.get("slide", 0)
    done = vmipatch("explain", kernel, "--memory", dump, "--base", hex(base), "--json")
    assert done.status == 1, done.err
    answer = done.json()
    check(answer, "explain")
    sizes = answer["bytes"]
    assert sizes["pristine"] + sizes["explained"] + sizes["unexplained"] == sizes["total"]
    assert sum(u["length"] for u in answer["unexplained"]) == sizes["unexplained"] > 0
    legal = tmp_path / "legal.json"
    assert vmipatch("explain", kernel, "--legal", legal).status == 0
    check(json.loads(legal.read_text("utf-8")), "legal")


@pytest.mark.parametrize("bits", [32, 64])
def test_audit(vmipatch: Commands, tmp_path: Path, bits: int) -> None:
    kernel = hostile_kernel(tmp_path, bits)
    files = (tmp_path / "out.sarif", tmp_path / "out.html")
    done = vmipatch("audit", kernel, "--json", "--fail-on", "never", "--sarif", files[0], "--html", files[1])
    assert done.status == 0, done.err
    check(done.json(), "audit")
    log = json.loads(files[0].read_text("utf-8"))
    assert len(log["runs"][0]["results"]) == len(done.json()["findings"])
    assert files[1].read_text("utf-8").startswith("<!doctype html>")


def test_roms(vmipatch: Commands, tmp_path: Path) -> None:
    rom = tmp_path / HOSTILE_FILE
    vmipatch("rom", "build", "native", "--abi", "vmi-3.0", "--abi", "vmi-13.0", "-o", rom)
    done = vmipatch("rom", "inspect", rom, "--json")
    assert done.status == 0, done.err
    check(done.json(), "rom")
    assert [i["vmi"]["abi"] for i in done.json()["images"]] == ["vmi-3.0", "vmi-13.0"]
    check(vmipatch("rom", "check", rom, "--json").json(), "rom-check")
    check(vmipatch("rom", "list", "--json").json(), "rom-list")
    data = bytearray(rom.read_bytes())
    for at in range(0x1C, len(data), 97):  # all sorts of damage: headers, table, stubs
        damaged = bytearray(data)
        damaged[at : at + 7] = b'\xff\xfe\x80"\\\x01\xc3'[: len(damaged[at : at + 7])]
        rom.write_bytes(damaged)
        if at % 5:
            continue
        done = vmipatch("rom", "inspect", rom, "--json")
        check(done.json(), "rom")
        checked = vmipatch("rom", "check", rom, "--json")
        check(checked.json(), "rom-check")
        assert checked.json()["findings"]


@pytest.mark.parametrize("program", ["mov edx, 0x604; mov eax, 0x2000; out dx, ax", "mov ecx, 0x1234; ud2"])
def test_the_last_line_of_a_run(vmipatch: Commands, tmp_path: Path, program: str) -> None:
    guest = tmp_path / "guest"
    guest.write_bytes(multiboot(code(program)))
    words = [sys.executable, "-m", "vmipatch", "run", str(guest), "--memory", "4", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    last = json.loads(done.stdout.splitlines()[-1])
    check(last, "run")
    assert ("registers" in last) == (done.returncode == 1)


def test_every_document_type_has_its_schema() -> None:
    source = Path(schemas.__file__).parent.parent
    said = {m for f in source.rglob("*.py") for m in re.findall(r'"vmipatch\.([a-z-]+)/[0-9]+"', f.read_text("utf-8"))}
    assert len(said) > 10
    assert said <= set(schemas.names())


def test_completion_is_offered(vmipatch: Commands) -> None:
    words = re.split(r"\s+", vmipatch("--help").out)
    assert "--install-completion" in words
    assert "--show-completion" in words
