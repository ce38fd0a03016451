"""The legal-patch set of a made-up kernel: every state by name, and nothing else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.explain import running as made
from tests.explain.running import NOP5, Machine, call, function
from tests.kernelmaker import KernelMaker
from vmipatch.cli.explain import explain as command
from vmipatch.explain import Legal, legal
from vmipatch.explain.late import Move
from vmipatch.explain.legal import matches
from vmipatch.image import open_image


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.build(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def entries(kernel: Path) -> dict[int, Legal]:
    return {x.address: x for x in legal(open_image(kernel))}


def states(entry: Legal) -> set[bytes]:
    return {s.code for s in entry.states}


def test_every_site_has_its_states_and_no_other(entries: dict[int, Legal]) -> None:
    at = function(4)
    assert states(entries[at]) == {call(0xE8, at, made.FENTRY), NOP5}
    assert entries[at].patterns == ("ftrace-call",)
    assert states(entries[at + made.OFF_LOCK]) == {b"\xf0", b"\x3e"}
    site = at + made.OFF_LABEL
    assert states(entries[site]) == {NOP5, call(0xE9, site, at + made.OFF_TARGET)}
    # On disk, and the replacement with the nop that joins what is left (5.13 on: x86_nops[2]).
    assert states(entries[at + made.OFF_ALTERNATIVE]) == {bytes.fromhex("F083042400"), bytes.fromhex("0FAEF089F6")}
    # Padding that no replacement covers becomes one nop.
    padded = entries[function(made.PADDED) + made.OFF_ALTERNATIVE]
    assert states(padded) == {b"\x90" * 5, NOP5, bytes.fromhex("0FAEF089F6")}
    tramp = entries[made.TRAMPOLINE]
    assert states(tramp) == {call(0xE9, made.TRAMPOLINE, function(0)), b"\xc3\xcc\xcc\xcc\xcc"}
    assert tramp.patterns == ("static-call",)
    callback = entries[made.CALLER + 1]
    assert (states(callback), callback.patterns) == ({call(0xE8, made.CALLER + 1, made.STUB)}, ("ftrace-callback",))
    assert len(entries) == 4 * made.FUNCTIONS + 2
    covered = [a for x in entries.values() for a in range(x.address, x.address + x.length)]
    assert len(covered) == len(set(covered))


@pytest.mark.parametrize("machine", [Machine(), Machine(one_cpu=False), Machine(features=())])
def test_every_running_state_is_legal(entries: dict[int, Legal], machine: Machine) -> None:
    text, disk = machine.text(), bytes(made.text())
    legal_bytes = set()
    for entry in entries.values():
        at = entry.address - made.TEXT
        assert matches(entry, text[at : at + entry.length]) is not None
        legal_bytes |= set(range(at, at + entry.length))
    assert all(text[i] == disk[i] for i in range(len(disk)) if i not in legal_bytes)


def test_patterns_match_their_form_and_nothing_else(entries: dict[int, Legal]) -> None:
    trampoline, traced = entries[made.TRAMPOLINE], entries[function(4)]
    assert matches(trampoline, call(0xE9, made.TRAMPOLINE, function(9))) == "static-call"
    assert matches(trampoline, call(0xE8, made.TRAMPOLINE, function(9))) == "static-call"
    assert matches(trampoline, b"\xeb" + bytes(4)) is None
    assert matches(traced, call(0xE8, traced.address, 0xF8000000)) == "ftrace-call"
    assert matches(traced, call(0xE9, traced.address, 0xF8000000)) is None
    lock = entries[function(4) + made.OFF_LOCK]
    assert [matches(lock, code) is not None for code in (b"\xf0", b"\x3e", b"\x90")] == [True, True, False]


RETURN0, WARN, OLD_POISON, NEW_POISON = (bytes.fromhex(x) for x in ("2E2E2E31C0", "67480FB93A", "660F1F00", "0F1F40D6"))


@pytest.mark.parametrize(
    ("release", "poison", "forms", "jump"),
    [("6.12.100", OLD_POISON, {RETURN0}, False), ("7.2.0", NEW_POISON, {RETURN0, WARN}, True)],
)
def test_states_of_newer_kernels(release: str, poison: bytes, forms: set[bytes], jump: bool, tmp_path: Path) -> None:
    """The set has the sealed ENDBR, the calls that are written out and ftrace's jumps of the kernel's own release."""
    maker = KernelMaker(bits=64, release=release)
    entry = maker.code(b"\xe8" + bytes(4), "__fentry__")
    maker.code(b"\xb9" + poison + b"\xc3")
    for name in ("__static_call_return0", "__WARN_trap"):
        maker.code(b"\xc3" * 4, name)
    maker.data += b"".join(forms).ljust(16, b"\0")
    sealed = maker.code(bytes.fromhex("f30f1efa") + b"\xc3" * 12)
    maker.text += b"\xc3" * (-len(maker.text) % 4)
    trampoline = maker.code(call(0xE9, 0, 0 - 11) + b"\x0f\xb9\xcc", "__SCT__it")
    site = maker.code(b"\xe8" + ((trampoline - 5 - (trampoline + 8)) & 0xFFFFFFFF).to_bytes(4, "little") + b"\xc3" * 3)
    key = maker.word(sealed, "__SCK__it")
    here = maker.next_table()
    maker.table(".ibt_endbr_seal", ((sealed - here) & 0xFFFFFFFF).to_bytes(4, "little"))
    here = maker.next_table()
    row = ((site - here) & 0xFFFFFFFF).to_bytes(4, "little") + ((key - here - 4) & 0xFFFFFFFF).to_bytes(4, "little")
    maker.table(".static_call_sites", row)
    maker.table("__mcount_loc", entry.to_bytes(8, "little"))
    path = tmp_path / "vmlinux"
    path.write_bytes(maker.build())
    entries = {x.address: x for x in legal(open_image(path))}
    assert states(entries[sealed]) == {bytes.fromhex("f30f1efa"), poison}
    assert forms <= states(entries[site])
    assert {RETURN0, WARN} - forms == {RETURN0, WARN} - states(entries[site])
    five = entries[entry]
    assert (matches(five, call(0xE9, entry, entry + 99)) == "ftrace-jump") is jump


def test_a_replacement_is_copied_as_earlier_passes_leave_it(tmp_path: Path) -> None:
    """5.13 to 6.7: paravirt first, in replacements too.  The copied call is not moved: it is six bytes, not five."""
    maker = KernelMaker(release="6.1.50")
    native = maker.code(b"\xc3", "native_flush_tlb_local")
    maker.code(b"\xc3", "_paravirt_nop")
    maker.code(b"\x0f\x0b", "paravirt_BUG")
    slot = maker.word(native, "pv_ops")
    site = maker.code(b"\x89\xc0" * 3)
    place = maker.replacement(b"\xff\x15" + slot.to_bytes(4, "little"))
    maker.paravirt([(place, 0, 6, 7)])
    maker.alternatives("rel12", [(site, place, 26, 6, 6, {})])
    path = tmp_path / "vmlinux"
    path.write_bytes(maker.build())
    (entry,) = [x for x in legal(open_image(path)) if x.address == site]
    assert states(entry) == {b"\x89\xc0" * 3, call(0xE8, place, native) + b"\x90"}


def test_states_say_which_of_their_fields_kaslr_moves(tmp_path: Path) -> None:
    """A field that a replacement writes over is gone, and one that it brings is there."""
    maker = KernelMaker(release="6.1.50")
    word = maker.word(0, "variable").to_bytes(4, "little")
    loads, clears, nops = b"\xa1" + word, b"\x31\xc0" + b"\x90" * 3, b"\x90" * 5
    loses, gains = maker.code(loads), maker.code(nops)
    cleared, brought = maker.replacement(clears), maker.replacement(loads)
    maker.alternatives("rel12", [(loses, cleared, 26, 5, 5, {}), (gains, brought, 26, 5, 5, {})])
    path = tmp_path / "vmlinux"
    path.write_bytes(maker.build() + struct.pack("<3I", 0, loses + 1, brought + 1))
    entries = {x.address: x for x in legal(open_image(path))}
    field = (Move(1, 4, ("kernel",), ()),)
    assert {s.code: s.moves for s in entries[loses].states} == {loads: field, clears[:2] + bytes.fromhex("8D7600"): ()}
    assert {s.code: s.moves for s in entries[gains].states} == {nops: (), NOP5: (), loads: field}
    slid = b"\xa1" + (int.from_bytes(word, "little") + 0x600000).to_bytes(4, "little")
    for site in loses, gains:
        assert matches(entries[site], slid, 0x600000) is not None
        assert matches(entries[site], loads, 0x600000) is None
        assert matches(entries[site], slid) is None


def run(*words: object) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(w) for w in words])
    error = str(done.exception) if done.exception and not isinstance(done.exception, SystemExit) else ""
    return done.exit_code, done.stdout, error


def test_the_command_writes_the_set_and_explains(kernel: Path, tmp_path: Path, entries: dict[int, Legal]) -> None:
    dump, out = tmp_path / "dump", tmp_path / "legal.json"
    machine = Machine()
    dump.write_bytes(machine.bytes)
    status, text, _ = run(kernel, "--memory", dump, "--base", "0x1000000", "--legal", out, "--json")
    assert status == 0
    answer = json.loads(text)
    assert answer["schema"] == "vmipatch.explain/1"
    assert answer["bytes"]["unexplained"] == 0
    assert answer["bytes"]["total"] == answer["bytes"]["pristine"] + answer["bytes"]["explained"]
    assert answer["unexplained"] == []
    assert answer["text"]["address_hex"] == hex(made.TEXT)
    written = json.loads(out.read_text())
    assert written["schema"] == "vmipatch.legal/1"
    assert {s["address"] for s in written["sites"]} == set(entries)
    named = {p for s in written["sites"] for p in s["patterns"]}
    assert named <= set(written["domains"])
    assert list(tmp_path.glob(".legal*")) == []


def test_unexplained_bytes_are_findings(kernel: Path, tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    machine = Machine()
    where = function(11) + made.OFF_TARGET
    machine.put(where, b"\xcc")
    dump.write_bytes(machine.bytes)
    status, text, _ = run(kernel, "--memory", dump, "--base", "0x1000000", "--json")
    assert status == 1
    (entry,) = json.loads(text)["unexplained"]
    assert (entry["address"], entry["address_hex"], entry["length"]) == (where, hex(where), 1)
    assert (entry["found"], entry["expected"], entry["symbol"]) == ("cc", "31", "f11")
    assert entry["instructions_expected"][0] == "xor eax, eax"
    status, text, _ = run(kernel, "--memory", dump, "--base", "0x1000000")
    assert status == 1
    assert hex(where) in text
    assert "int3" in text


def test_options_that_make_no_sense(kernel: Path, tmp_path: Path) -> None:
    for words in (
        [kernel],
        [kernel, "--base", "0", "--legal", tmp_path / "x"],
        [kernel, "--memory", tmp_path / "none"],
    ):
        status, _, error = run(*words)
        assert status != 0
        assert error
