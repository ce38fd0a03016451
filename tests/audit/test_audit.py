"""Audits of made-up kernels: every identifier found where it was put, and nothing where it was not."""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.audit.oracle import SILENT, TRAPS, disassemble
from tests.kernelmaker import TEXT, KernelMaker, wrapped
from vmipatch import facts
from vmipatch.audit import KINDS, Audit, audit
from vmipatch.cli import app
from vmipatch.image import open_image
from vmipatch.isa import sensitive


def audited(tmp_path: Path, maker: KernelMaker | bytes) -> Audit:
    file = tmp_path / "vmlinux"
    file.write_bytes(maker if isinstance(maker, bytes) else maker.build())
    return audit(open_image(file))


def places(found: Audit, id: str) -> list[int | None]:
    return [f.address for f in found.findings if f.id == id]


def spelled(text: str, prefix: str | None) -> bytes:
    """An instruction of a pattern of specs/isa/sensitive.toml; what ModRM addresses is [ebx] or a register."""
    head, _, whole = text.partition("=")
    words = head.split()
    reg, mod = 0, ""
    if words[-1] in ("mem", "reg"):
        mod = words.pop()
    if words[-1].startswith("/"):
        reg = int(words.pop()[1:])
    body = bytes.fromhex("".join(words))
    if whole:
        body += bytes.fromhex(whole.split()[0])
    elif mod or "/" in head or body[0] in (0x8C, 0x8E) or body in (b"\x0f\x02", b"\x0f\x03", b"\x0f\x78", b"\x0f\x79"):
        body += bytes([(0xC0 if mod == "reg" else 0) | reg << 3 | 3])
    elif body[:1] == b"\x0f" and body[1] in range(0x20, 0x24):
        body += b"\xc0"
    elif body in (b"\xcd", b"\xe4", b"\xe5", b"\xe6", b"\xe7"):
        body += b"\x21"
    elif body == b"\xca":
        body += b"\x04\x00"
    elif body in (b"\x9a", b"\xea"):
        body += bytes(4) + b"\x08\x00"
    return (bytes([int(prefix, 16)]) if prefix not in (None, "none") else b"") + body


# What objdump 2.40 lacks, by trial; 2.47 has it. (ERETS and ERETU are CLAC to 2.40, which traps as they do.)
UNKNOWN_TO_OBJDUMP, LACKING, COMPLETE = {"lkgs", "rmpread"}, (2, 40), (2, 47)


def objdump_version() -> tuple[int, int]:
    out = subprocess.run(["objdump", "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"(\d+)\.(\d+)", out)
    assert match is not None
    return int(match[1]), int(match[2])


@pytest.mark.parametrize("bits", [32, 64])
def test_every_kind_is_what_objdump_calls_it(bits: int, tmp_path: Path) -> None:
    rows = [
        (row["name"], which, spelled(text, row.get("prefix")))
        for which in sensitive.SETS
        for row in facts.load("isa", "sensitive")[which]
        for text in row["code"]
        if row.get("bits", bits) == bits
    ]
    maker = KernelMaker(bits=bits)
    # Nops behind each: what objdump does not know must not swallow the next.
    at = {maker.code(code + b"\x90" * 16): (name, which, code) for name, which, code in rows}
    found = audited(tmp_path, maker)
    expected = disassemble(tmp_path / "vmlinux", bits, ())
    version = objdump_version()
    ids = {"silent": "sensitive-unannotated", "traps": "privileged-unannotated"}
    told = {f.address: (f.details["instruction"], f.id) for f in found.findings}
    for address, (name, which, code) in at.items():
        assert told.get(address) == (name, ids[which]), code.hex(" ")
        said = address in (expected.silent if which == "silent" else expected.traps)
        if name not in UNKNOWN_TO_OBJDUMP or version >= COMPLETE:
            assert said, (name, code.hex(" "))
        elif version <= LACKING:
            assert not said, f"objdump knows {name} now: take it off the list"
    assert len(told) == len(at)
    assert not SILENT & TRAPS


def test_what_a_site_covers_is_no_finding(tmp_path: Path) -> None:
    maker = KernelMaker()
    maker.code(b"\xc3")
    bare = maker.code(b"\x9c\x58\xfa", "bare")
    site = maker.code(b"\x9c\x58\xfa\x90\x90", "covered")
    replacement = maker.replacement(b"\x9c\xfa")
    maker.alternatives("rel12", [(site, replacement, 5, 5, 2, {})])
    found = audited(tmp_path, maker)
    assert places(found, "sensitive-unannotated") == [bare]
    assert places(found, "privileged-unannotated") == [bare + 2]
    assert found.covered == {"sensitive-unannotated": 1, "privileged-unannotated": 1, "pv-slot-unannotated": 0}
    one = next(f for f in found.findings if f.id == "sensitive-unannotated")
    assert (one.symbol, one.symbol_offset, one.section, one.length) == ("bare", 0, ".text", 1)
    assert one.offset is not None
    assert (tmp_path / "vmlinux").read_bytes()[one.offset :][:3] == b"\x9c\x58\xfa"


def test_counts_by_function(tmp_path: Path) -> None:
    maker = KernelMaker()
    maker.code(b"\xc3")
    maker.code(b"\x9c\x9d\x9c\xc3", "first")
    maker.code(b"\x9d\xc3", "second")
    found = audited(tmp_path, maker)
    by = {f.symbol: (f.count, dict(f.what)) for f in found.functions}
    assert by == {"first": (3, {"pushf": 2, "popf": 1}), "second": (1, {"popf": 1})}


def test_a_sweep_begins_anew_at_symbols(tmp_path: Path) -> None:
    maker = KernelMaker()
    maker.code(b"\xc3\xb8")  # data before a function: the MOV would swallow its PUSHF
    start = maker.code(b"\x9c\x90\x90\x90\x90\xc3", "function")
    found = audited(tmp_path, maker)
    assert places(found, "sensitive-unannotated") == [start]
    assert found.swept[0].undecoded == 1


def test_an_emulation_prefix_is_no_instruction(tmp_path: Path) -> None:
    maker = KernelMaker()
    start = maker.code(b"\x0f\x0bxen\x0f\xa2\xc3")
    found = audited(tmp_path, maker)
    assert places(found, "sensitive-unannotated") == [start + 5]
    assert places(found, "privileged-unannotated") == []  # 6E alone would be OUTS


def with_slots(maker: KernelMaker) -> dict[str, int]:
    """The irq slots of 2.6.32, each with its native function; by slot name."""
    fields = ("save_fl", "restore_fl", "irq_disable", "irq_enable", "safe_halt", "halt")
    functions = [maker.code(b"\xc3", f"native_{f}") for f in fields]
    slots = [maker.word(function) for function in functions]
    maker.symbols.append(("pv_irq_ops", slots[0], ".data"))
    return dict(zip(fields, slots, strict=True))


def test_paravirt_slots_without_annotation(tmp_path: Path) -> None:
    maker = KernelMaker(release="2.6.32")
    slots = with_slots(maker)
    m32 = {name: struct.pack("<I", slot) for name, slot in slots.items()}
    call = maker.code(b"\xff\x15" + m32["irq_disable"], "f")
    jump = maker.code(b"\x2e\xff\x25" + m32["irq_enable"])
    annotated = maker.code(b"\xff\x15" + m32["save_fl"])
    maker.code(b"\xff\x35" + m32["save_fl"])  # PUSH of the slot is neither
    maker.code(b"\xff\x15" + struct.pack("<I", slots["save_fl"] + 0x40))  # elsewhere
    maker.paravirt([(annotated, 43, 6, 7)])
    found = audited(tmp_path, maker)
    assert places(found, "pv-slot-unannotated") == [call, jump]
    details = [f.details for f in found.findings if f.id == "pv-slot-unannotated"]
    assert [d["how"] for d in details] == ["call", "jump"]
    assert [d["slot"] for d in details] == ["pv_irq_ops.irq_disable", "pv_irq_ops.irq_enable"]
    assert found.covered["pv-slot-unannotated"] == 1


@pytest.mark.parametrize("near", [False, True])
def test_branches_into_sites(near: bool, tmp_path: Path) -> None:
    maker = KernelMaker()
    site = maker.code(b"\xeb\x01\x90\x90\x90\x90", "f")  # its own jump to its inside is its own business
    replacement = maker.replacement(b"\x90")
    maker.alternatives("rel12", [(site, replacement, 5, 6, 1, {})])

    def branch(to: int) -> int:
        here = TEXT + len(maker.text)
        if near:
            return maker.code(b"\x0f\x85" + struct.pack("<i", to - here - 6))
        return maker.code(b"\x75" + struct.pack("<b", to - here - 2))

    branch(site)  # the first byte is no inside
    into = [branch(site + 1), branch(site + 5)]
    branch(site + 6)
    found = audited(tmp_path, maker)
    assert places(found, "branch-into-site") == into
    assert [f.details["target_address"] for f in found.findings if f.id == "branch-into-site"] == [site + 1, site + 5]


def test_branches_from_another_section(tmp_path: Path) -> None:
    maker = KernelMaker()
    site = maker.code(b"\x90" * 6)
    replacement = maker.replacement(b"\x90")
    maker.alternatives("rel12", [(site, replacement, 5, 6, 1, {})])
    first = replacement + 1
    for i, to in enumerate((site, site + 1, site + 6)):
        maker.replacement(b"\xe9" + struct.pack("<i", to - (first + 5 * i) - 5))
    assert places(audited(tmp_path, maker), "branch-into-site") == [first + 5]


def test_the_later_pass_wins(tmp_path: Path) -> None:
    maker = KernelMaker()
    maker.word(0, "pv_ops")
    site = maker.code(b"\xff\x15" + struct.pack("<I", 0xC1100000) + b"\x90")
    alone = maker.code(b"\x90" * 5)
    lock = maker.code(b"\xf0\x0f\xba\x28\x01")
    replacement = maker.replacement(b"\x9c\x58")
    maker.paravirt([(site, 0, 6, 7)])
    rows = [(site, replacement, 5, 6, 2, {}), (alone, replacement, 5, 5, 2, {}), (alone, replacement, 6, 5, 1, {})]
    table = maker.alternatives("rel12", [*rows, (lock, replacement, 5, 5, 2, {})])
    maker.locks("rel32", [lock])
    found = audited(tmp_path, maker)
    shared = {f.address: f.details for f in found.findings if f.id == "site-shared"}
    assert set(shared) == {site, alone, lock}
    assert shared[site]["winner"] == "altinstructions"
    assert shared[alone]["winner_entry_address"] == table + 24  # the last of the table
    assert shared[lock]["winner"] == "smp_locks"  # 6.1: after the alternatives


def test_the_pass_order_is_the_eras(tmp_path: Path) -> None:
    """2.6.32 patches paravirt calls last (vmi-abi, section 7): there they win over alternatives."""
    maker = KernelMaker(release="2.6.32")
    slots = with_slots(maker)
    site = maker.code(b"\xff\x15" + struct.pack("<I", slots["save_fl"]))
    maker.paravirt([(site, 43, 6, 7)])
    replacement = maker.replacement(b"\x9c\x58")
    maker.alternatives("abs32-u8", [(site, replacement, 5, 6, 2, {})])
    found = audited(tmp_path, maker)
    assert [f.details["winner"] for f in found.findings if f.id == "site-shared"] == ["parainstructions"]


def test_sites_that_overlap_in_part(tmp_path: Path) -> None:
    maker = KernelMaker()
    site = maker.code(b"\x90" * 8)
    replacement = maker.replacement(b"\x90")
    rows = [(site, replacement, 5, 4, 1, {}), (site + 2, replacement, 5, 6, 1, {})]
    maker.alternatives("rel12", rows)
    found = audited(tmp_path, maker)
    assert places(found, "site-overlap") == [site]
    assert found.findings[0].severity == "error"
    assert found.findings[0].length == 8


def test_exception_entries(tmp_path: Path) -> None:
    maker = KernelMaker()
    site = maker.code(b"\x90" * 6)
    free = maker.code(b"\x90\xc3")
    maker.alternatives("rel12", [(site, maker.replacement(b"\x90"), 5, 6, 1, {})])
    at, rows = maker.next_table(), b""
    for i, address in enumerate((free, site, site + 3)):
        here = at + 12 * i
        rows += struct.pack("<iii", wrapped(address - here), wrapped(free - here - 4), 0)
    maker.table("__ex_table", rows)
    found = audited(tmp_path, maker)
    assert places(found, "extable-at-site") == [site]
    assert places(found, "extable-inside-site") == [site + 3]


def test_odd_tables(tmp_path: Path) -> None:
    maker = KernelMaker(release="2.6.32")
    site = maker.code(b"\x90" * 6)
    row = struct.pack("<IIBBB", site, maker.replacement(b"\x90"), 5, 6, 1)
    maker.tables.append((".altinstructions", row + b"\0" + row, 0xC1200002))
    found = audited(tmp_path, maker)
    assert places(found, "table-tail") == [0xC1200002]
    assert places(found, "table-misaligned") == [0xC1200002]
    maker = KernelMaker()
    maker.code(b"\xc3")
    maker.table(".parainstructions", bytes(5))
    assert [f.id for f in audited(tmp_path, maker).findings] == ["table-size"]


def test_a_clean_kernel_has_no_findings(tmp_path: Path) -> None:
    maker = KernelMaker()
    maker.code(b"\x55\x89\xe5\x5d\xc3", "f")
    found = audited(tmp_path, maker)
    assert found.findings == ()
    assert found.worst() is None
    assert set(found.counts) == {id for id in KINDS if not id.startswith("rom-")}


def test_raw_memory_needs_symbols(tmp_path: Path) -> None:
    file = tmp_path / "dump"
    file.write_bytes(b"\x9c\x90\xc3" + bytes(61))
    assert "system-map" in audit(open_image(file, base=TEXT)).skipped[0]
    symbols = tmp_path / "System.map"
    symbols.write_text(f"{TEXT:08x} T _text\n{TEXT + 3:08x} T _etext\n")
    found = audit(open_image(file, base=TEXT, system_map=symbols))
    assert places(found, "sensitive-unannotated") == [TEXT]
    assert [(s.address, s.size) for s in found.swept] == [(TEXT, 3)]


@pytest.mark.parametrize(
    ("code", "level", "status"),
    [
        (b"\xc3", "note", 0),
        (b"\xfa", "note", 1),
        (b"\xfa", None, 0),
        (b"\x9c", None, 1),
        (b"\x9c", "error", 0),
        (b"\x9c", "never", 0),
        (b"\x9c", "nothing", 2),
    ],
)
def test_fail_on(code: bytes, level: str | None, status: int, tmp_path: Path) -> None:
    maker = KernelMaker()
    maker.code(code)
    file = tmp_path / "vmlinux"
    file.write_bytes(maker.build())
    words = ["audit", str(file), *(["--fail-on", level] if level else [])]
    done = CliRunner().invoke(app, words)
    assert (2 if done.exception and not isinstance(done.exception, SystemExit) else done.exit_code) == status


def test_the_document_keeps_to_its_schema(tmp_path: Path) -> None:
    import jsonschema

    maker = KernelMaker(release="2.6.32")
    slots = with_slots(maker)
    maker.code(b"\xff\x15" + struct.pack("<I", slots["halt"]) + b"\x9c\xfa")
    maker.alternatives("abs32-u8", [(TEXT, maker.replacement(b"\x90"), 5, 1, 1, {})] * 2)
    file = tmp_path / "vmlinux"
    file.write_bytes(maker.build())
    done = CliRunner().invoke(app, ["audit", str(file), "--json", "--rom", str(file), "--fail-on", "never"])
    document: dict[str, Any] = json.loads(done.stdout)
    schema = json.loads((facts.root() / "schemas" / "audit.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(document)
    assert {f["id"] for f in document["findings"]} >= {"pv-slot-unannotated", "site-shared", "rom-api"}
    assert re.fullmatch(r"0x[0-9a-f]+", document["findings"][0]["file_offset_hex"] or "0x0")


@pytest.mark.parametrize("bits", [32, 64])
def test_damaged_images(bits: int, tmp_path: Path) -> None:
    """Whatever is damaged: an audit, or one of our errors."""
    from vmipatch.errors import VmipatchError

    maker = KernelMaker(bits=bits)
    maker.word(0, "pv_ops")
    site = maker.code(b"\x90" * 6 + b"\x9c\xfa\xe8\0\0\0\0", "f")
    maker.alternatives("rel12", [(site, maker.replacement(b"\x90"), 5, 6, 1, {})] * 4)
    maker.paravirt([(site, 0, 6, 7)])
    maker.locks("rel32", [site])
    maker.table("__ex_table", struct.pack("<iii", 4, 4, 0) * 3)
    good = maker.build()
    rng = random.Random(bits)
    whole = 0
    file = tmp_path / "vmlinux"
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.choice((1, 4, 40))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        file.write_bytes(data)
        try:
            audit(open_image(file))
            whole += 1
        except VmipatchError:
            pass
    assert whole > 50


def test_the_manual_names_every_identifier() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "audit.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| (note|warning|error) \|", text, re.MULTILINE))
    assert rows == {kind.id: kind.severity for kind in KINDS.values()}


def test_every_identifier_of_a_scan_is_registered() -> None:
    folder = Path(__file__).resolve().parents[2] / "vmipatch" / "annotate"
    source = "".join(f.read_text("utf-8") for f in folder.glob("*.py"))
    said = set(re.findall(r'(?:Finding|Reason)\(\s*"([a-z]+(?:-[a-z]+)+)"', source))
    said |= set(re.findall(r'codesites\.scan\([^\n]*"([a-z]+(?:-[a-z]+)+)"', source))
    assert said
    assert said <= set(KINDS)
