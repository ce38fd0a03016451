"""``vmipatch validate`` on the example guest: what passes, what a failure looks like, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker
from tests.report.commands import Commands
from vmipatch.rombuild import inspect
from vmipatch.rombuild.build import build
from vmipatch.validate import Request, validate
from vmipatch.validate.boots import Boot, judge
from vmipatch.validate.console import known
from vmipatch.validate.demonstration import FORMS, guest
from vmipatch.validate.validation import open_all, stand_for

MEMORY = ["--memory", "16"]


@pytest.fixture(scope="session")
def roms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROMs, named hypervisor-abi."""
    folder = tmp_path_factory.mktemp("roms")
    for hypervisor, abi in (("vmware", "vmi-3.0"), ("kvm", "vmi-3.0"), ("lguest", "vmi-13.0"), ("native", "vmi-3.0")):
        (folder / f"{hypervisor}-{abi}").write_bytes(build(hypervisor, abi).data)
    return folder


@pytest.fixture
def vmipatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    return Commands(capsys, monkeypatch)


def broken(rom: Path, call: str, code: bytes, to: Path) -> Path:
    """A copy of a ROM with a stub's first bytes replaced, and its checksum right."""
    data = bytearray(rom.read_bytes())
    vmi = inspect.images(bytes(data))[0].vmi
    assert vmi is not None
    (offset,) = (c.offset for c in vmi.calls if c.name == call)
    data[offset : offset + len(code)] = code
    data[-1] = (data[-1] - sum(data)) & 0xFF
    to.write_bytes(data)
    return to


@pytest.mark.parametrize(
    ("hypervisor", "form"), [("kvm", "mainline"), ("lguest", "rfc-v1"), ("native", "v2")], ids=lambda v: str(v)
)
def test_the_guest_passes(hypervisor: str, form: str, roms: Path) -> None:
    request = Request(guest(form), roms / f"{hypervisor}-{FORMS[form]}", memory_mib=16, states=3, moments=3)
    found = validate(request)
    assert found.verdict == "pass"
    assert [b.kind for b in found.boots] == ["native", "self", "static"]
    assert [b.problems for b in found.boots] == [[], [], []]
    assert found.sites is not None
    assert [v.subject.name for v in found.sites.verdicts if v.failure] == []
    assert found.sites.states > 300
    assert found.patched_sites > 0
    if hypervisor != "native":
        for boot in found.boots[1:]:
            assert sum(boot.calls.values()) > 1000
        # Patched statically, the interrupt mask is asked for through the ROM before VMI_Init already.
        assert sum(found.boots[2].early.values()) > 0


def test_json(roms: Path, vmipatch: Commands) -> None:
    words = [guest("mainline"), "--rom", roms / "kvm-vmi-3.0", *MEMORY, "--json", "--sites-only", "--states", 1]
    result = vmipatch("validate", *words)
    assert result.status == 0
    document = json.loads(result.out)
    assert document["schema"] == "vmipatch.validate/1"
    assert (document["hypervisor"], document["verdict"], document["boots"]) == ("kvm", "pass", [])
    sites = document["sites"]
    assert sites["fail"] == 0
    assert sites["pass"] + sites["not_shown"] == len(sites["verdicts"])
    calls = {v["op"] for v in sites["verdicts"] if v["kind"] == "call"}
    assert {"EnableInterrupts", "IRET", "SetPxE", "WriteGDTEntry"} <= calls
    for verdict in sites["verdicts"]:
        assert int(verdict["address_hex"], 16) == verdict["address"]


def test_a_failing_site_can_be_acted_on(roms: Path, tmp_path: Path, vmipatch: Commands) -> None:
    rom = broken(roms / "vmware-vmi-3.0", "DisableInterrupts", b"\xc3", tmp_path / "broken.rom")
    result = vmipatch("validate", guest("v2"), "--rom", rom, *MEMORY, "--sites-only", "--states", 4, "--moments", 3)
    assert result.status == 1
    text = result.out
    # Only sites that make this call, and the call itself, are named.
    named = re.findall(r"^(call \w+|0x[0-9a-f]+ \S+) \((\w+), stub 0x[0-9a-f]+\): (.+)$", text, re.M)
    assert {op for _, op, _ in named} == {"DisableInterrupts"}
    assert named[0][0] == "call DisableInterrupts"
    summary = r"  fails: DisableInterrupts, stub 0xc00c[0-9a-f]{4}: by itself and at \d+ sites; "
    assert re.match(summary, text.splitlines()[1])
    assert re.search(r"^and \d+ more sites of DisableInterrupts that fail$", text, re.M)
    assert any(place.startswith("0x") and "+0x" in place for place, _, _ in named)
    assert "the guest's if: 0x0 natively, 0x1 patched" in {difference for _, _, difference in named}
    assert re.search(r"native +fa +.*cli", text)
    assert re.search(r"patched +e8 .*call 0xc00c", text)
    again = re.search(r"again: +vmipatch (.+)$", text, re.M)
    assert again is not None
    words = again[1].split()
    assert words[-4:] == [*MEMORY, "--moments", "3"]
    alone = vmipatch(*words)
    assert alone.status == 1
    assert "1 of 1 states fail" in alone.out
    words[words.index("--rom") + 1] = str(roms / "vmware-vmi-3.0")
    assert vmipatch(*words).status == 0


def test_a_kernel_that_does_not_end_is_not_shown(roms: Path, vmipatch: Commands) -> None:
    words = [guest("mainline"), "--rom", roms / "kvm-vmi-3.0", *MEMORY, "--json"]
    for option in (["--max-instructions", 300_000], ["--until", "words that it never prints"]):
        result = vmipatch("validate", *words, *option)
        assert result.status == 1
        document = json.loads(result.out)
        assert document["verdict"] == "not shown"
        assert {b["verdict"] for b in document["boots"]} == {"not shown"}


def test_a_boot_that_prints_something_else_fails() -> None:
    boots = [Boot(kind, "poweroff", True, b"one\ntwo\n", 1) for kind in ("native", "self", "static")]
    boots[2].console = b"one\n2\n"
    judge(boots, known(None))
    assert [b.verdict for b in boots] == ["pass", "pass", "fail"]
    assert boots[2].problems == ["console line 2: 'two' natively, '2' here"]


def test_a_panic_shows_nothing() -> None:
    boots = [Boot(k, "poweroff", True, b"Kernel panic - not syncing\n", 1) for k in ("native", "self", "static")]
    judge(boots, known(None))
    assert [b.verdict for b in boots] == ["not shown"] * 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{tmp}/none", "--rom", "{kvm}"], "none: cannot read the file"),
        (["{rfc}", "--rom", "{kvm}"], "no image of generation 13"),
        (["{bare}", "--rom", "{kvm}"], "nothing to validate: no annotated call sites"),
        (["{v2}", "--rom", "{kvm}", "--rom-base", "0x100000"], "lies outside 0xc0000 to 0xdffff"),
        (["{v2}", "--rom", "{kvm}", "--site", "0x1", "--state", "0:0", "--memory", "16"], "no site and no call at 0x1"),
        (["{v2}", "--rom", "{kvm}", "--site", "0x1"], "--site and --state go together"),
        (["{v2}", "--rom", "{kvm}", "--site", "0x1", "--state", "9"], "write it as MOMENT:STATE"),
        (["{v2}", "--rom", "{kvm}", "--sites-only", "--boots-only"], "leave nothing"),
        (["{v2}", "--rom", "{kvm}", "--initrd", "{tmp}/none"], "none: cannot be read"),
        (["{v2}", "--rom", "{kvm}", "--memory", "0"], "a machine has 1 to 3072 MiB"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_bad_input(words: list[str], line: str, roms: Path, tmp_path: Path, vmipatch: Commands) -> None:
    bare = KernelMaker(release="2.6.30")
    bare.code(b"\x90" * 16, "start_kernel")
    (tmp_path / "bare").write_bytes(bare.build())
    places = {
        "v2": guest("v2"),
        "rfc": guest("rfc-v1"),
        "kvm": roms / "kvm-vmi-3.0",
        "tmp": tmp_path,
        "bare": tmp_path / "bare",
    }
    done = vmipatch("validate", *[word.format(**places) for word in words])
    assert done.status == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert line in done.err


def test_a_rom_may_lie_anywhere(roms: Path) -> None:
    """Also where the native code for comparison lies otherwise."""
    words = Request(guest("v2"), roms / "kvm-vmi-3.0", rom_base=0xD8000, memory_mib=16, states=1, moments=2)
    found = validate(words, with_boots=False)
    assert (found.verdict, found.warnings) == ("pass", [])


BREAKS = {
    "returns at once": b"\xc3",
    "loses a register": b"\x31\xf6\x31\xff\x31\xdb\x31\xed\xc3",
    "faults": b"\x0f\x0b",
}
# What a stub that returns at once would be taken for is nothing to see: the entry's own write was caught and emulated.
BROKEN = {
    **dict.fromkeys(
        ("EnableInterrupts", "DisableInterrupts", "GetInterruptMask", "SetInterruptMask"), "returns at once"
    ),
    **dict.fromkeys(("SYSEXIT", "SetCR3"), "returns at once"),
    "IRET": "faults",
    "UpdatePxE": "loses a register",
}


@pytest.mark.parametrize("call", BROKEN)
def test_a_broken_call_is_named_first(call: str, roms: Path, tmp_path: Path, vmipatch: Commands) -> None:
    rom = broken(roms / "vmware-vmi-3.0", call, BREAKS[BROKEN[call]], tmp_path / "broken.rom")
    words = [guest("mainline"), "--rom", rom, *MEMORY, "--sites-only", "--states", 3, "--moments", 2]
    result = vmipatch("validate", *words)
    assert result.status == 1
    first = [line for line in result.out.splitlines()[:3] if re.match(rf"  fails: {call}, ", line)]
    assert len(first) == 1
    assert re.search(r"slots? \w+.*, stub 0xc00c[0-9a-f]{4}: by itself", first[0])
    # The slot's own name leads to the call too.
    for line in re.findall(r"^0x[0-9a-f]+ \S+ \(.+\): .+$", result.out, re.M):
        assert re.search(r"\([A-Za-z ]+, slot pv_\w+\.\w+, stubs? 0xc00c", line)
    document = json.loads(vmipatch("validate", *words, "--json").out)
    assert document["failed_calls"][0]["call"] == call
    assert document["failed_calls"][0]["alone"]
    verdicts = [v for v in document["sites"]["verdicts"] if v["verdict"] == "fail"]
    assert document["failed_calls"][0]["sites"] == sum(call in v["calls"] and v["kind"] == "site" for v in verdicts)
    for verdict in verdicts:
        assert len(verdict["stubs"]) == len(verdict["calls"])
        assert verdict["slots"]


def test_moments_share_their_memory(roms: Path) -> None:
    """Five moments in two forms hold not ten memories, but one and what differs."""
    request = Request(guest("mainline"), roms / "kvm-vmi-3.0", memory_mib=16, moments=5)
    stand, _ = stand_for(open_all(request))
    assert len(stand.bases) == 5
    pages = {id(s.memory.page(n)) for base in stand.bases for s in (base.native, base.lowered) for n in range(4096)}
    held = max(base.native.memory.held for base in stand.bases)
    assert held < len(pages) < 2 * held
    for base in stand.bases:
        assert 0 < len(list(base.lowered.memory.unlike(base.native.memory))) < 64
