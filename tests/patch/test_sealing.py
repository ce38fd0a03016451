"""What an image must keep for its own patcher, and how tables are emptied whose entries have no harmless form."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker, wrapped
from vmipatch.annotate import scan
from vmipatch.errors import PatchError
from vmipatch.image import open_image
from vmipatch.patch import Native, Plan, plan
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.passes import PASSES
from vmipatch.patch.rules import check, eras
from vmipatch.patch.sealing import plan as empty

ALWAYS, NEVER, RETHUNK = 3 * 32 + 21, 1 * 32 + 3, 11 * 32 + 14
DIRECT_CALL = 2
WORDS = 23


def cpu(*features: int) -> Cpu:
    words = [0] * WORDS
    for feature in features:
        words[feature >> 5] |= 1 << (feature & 31)
    return Cpu("made", None, None, None, None, tuple(words))


class Returning:
    """A kernel of 6.12: a thunk that is an alternative, a return through it, a direct call with a second entry."""

    def __init__(self, walker: bytes = b"", *, named: bool = True) -> None:
        self.maker = maker = KernelMaker(bits=64, release="6.12.1")
        self.thunk = maker.code(b"\xc3".ljust(16, b"\xcc"), "__x86_return_thunk")
        self.warn = maker.code(b"\x0f\x0b".ljust(16, b"\xcc"), "warn_thunk_thunk")
        at = maker.code(b"", None)
        self.site = maker.code(b"\xe9" + struct.pack("<i", self.thunk - at - 5) + b"\xcc" * 11, "f")
        slot = maker.word(self.warn, "pv_ops")
        at = maker.code(b"", None)
        self.call = maker.code(b"\xff\x15" + struct.pack("<i", slot - at - 6) + b"\xcc" * 10, "g")
        self.other = maker.code(b"\x90" * 3 + b"\xcc" * 13, "h")
        jump = maker.replacement(b"\xe9\0\0\0\0")
        maker.replacements[-4:] = struct.pack("<i", self.warn - jump - 5)
        placeholder = maker.replacement(b"\xe8\0\0\0\0")
        cli = maker.replacement(b"\xfa")
        rows = [
            (self.thunk, jump, ALWAYS, 5, 5, {}),
            (self.call, placeholder, ALWAYS, 6, 5, {"flags": DIRECT_CALL}),
            (self.call, cli, ALWAYS, 6, 1, {}),
            (self.other, cli, ALWAYS, 3, 1, {}),
        ]
        maker.alternatives("rel14", rows)
        self.table = maker.next_table()
        maker.table(".return_sites", struct.pack("<i", wrapped(self.site - self.table)))
        self.walker = maker.code(walker.ljust(64, b"\x90"), "alternative_instructions" if named else "other")
        maker.code(b"\xc3" * 16, "behind")

    def planned(self, folder: Path, *, seal: bool, features: tuple[int, ...] = (ALWAYS, RETHUNK)) -> Plan:
        path = folder / "vmlinux"
        path.write_bytes(self.maker.build())
        image = open_image(path)
        return plan(image, scan(image), Native(cpu(*features), 2), seal=seal)


def loads(start: int, end: int) -> bytes:
    """mov rsi, end; mov rdi, start; call: as compilers write apply_returns(start, end)."""
    low = [struct.pack("<I", value & 0xFFFFFFFF) for value in (end, start)]
    return b"\x48\xc7\xc6" + low[0] + b"\x48\xc7\xc7" + low[1] + b"\xe8\0\0\0\0"


def walker_of(kernel: Returning) -> bytes:
    return loads(kernel.table, kernel.table + 4)


def test_what_the_kernels_own_patcher_must_find_stays(tmp_path: Path) -> None:
    """The thunk would be run changed before the return is; the direct call must be an indirect one still."""
    kernel = Returning()
    planned = kernel.planned(tmp_path, seal=False)
    assert {p.address for p in planned.patches} == {kernel.other}
    assert planned.left == {"return_sites": 1, "altinstructions": 3}


def test_a_sealed_plan_is_what_the_boot_leaves(tmp_path: Path) -> None:
    kernel = Returning(walker_of(Returning()))
    changes = kernel.planned(tmp_path, seal=True).changes()

    def code(address: int, length: int) -> bytes:
        return bytes(changes[a][1] if (a := address + i) in changes else 0xEE for i in range(length))

    # lib/retpoline.S: a jump to warn_thunk_thunk over the return, 16 bytes on; INT3 stands behind it already.
    assert code(kernel.thunk, 5) == b"\xeb\x0e\xee\xee\xee"
    assert changes[kernel.call][1] == 0xFA
    # The end that the walker loads is the beginning: the lowest byte of the immediate changes.
    assert changes[kernel.walker + 3][1] == kernel.table & 0xFF
    assert planned_left(kernel, tmp_path) == {}


def planned_left(kernel: Returning, folder: Path) -> dict[str, int]:
    return dict(kernel.planned(folder, seal=True).left)


def test_the_end_of_a_table_becomes_its_beginning(tmp_path: Path) -> None:
    """By an immediate or relative to RIP, wherever else the same address is loaded."""
    probe = Returning()
    start, end, at = probe.table, probe.table + 4, probe.walker
    # Another table that begins where this one ends is not touched: RDI is the first argument.
    beside = b"\x48\xc7\xc7" + struct.pack("<I", end & 0xFFFFFFFF)
    relative = b"\x48\x8d\x35" + struct.pack("<i", end - at - 7) + b"\x48\x8d\x3d" + struct.pack("<i", start - at - 14)
    for body, place, value in (
        (loads(start, end) + beside, 3, start & 0xFFFFFFFF),
        (relative, 3, start - at - 7),
    ):
        kernel = Returning(body)
        path = tmp_path / "vmlinux"
        path.write_bytes(kernel.maker.build())
        image = open_image(path)
        rules = next(era for era in eras() if era.name == "linux-6.9")
        patches = [p for p in empty(image, scan(image), rules.boot) if p.cause.op == "return_sites"]
        assert [(p.address, p.new) for p in patches] == [(at + place, struct.pack("<i", wrapped(value)))]


def test_ends_that_are_members_of_a_structure(tmp_path: Path) -> None:
    """callthunks_patch_builtin_calls of 6.12: ``struct callthunk_sites`` with the ends of calls and of alternatives."""
    maker = KernelMaker(bits=64, release="6.12.1")
    call = maker.code(b"\xe8" + bytes(4) + b"\xcc" * 11, "f")
    site = maker.code(b"\x90" * 3 + b"\xcc" * 13, "g")
    alternatives = maker.next_table()
    maker.alternatives("rel14", [(site, maker.replacement(b"\xfa"), ALWAYS, 3, 1, {})])
    calls = maker.next_table()
    maker.table(".call_sites", struct.pack("<i", wrapped(call - calls)))
    stores = [b"\x48\xc7\x04\x24", *(b"\x48\xc7\x44\x24" + bytes((at,)) for at in (8, 16, 24))]
    values = (calls, calls + 4, alternatives, alternatives + 14)
    body = b"".join(store + struct.pack("<I", v & 0xFFFFFFFF) for store, v in zip(stores, values, strict=True))
    walker = maker.code(body.ljust(64, b"\x90"), "callthunks_patch_builtin_calls")
    maker.code(b"\xc3" * 16, "behind")
    path = tmp_path / "vmlinux"
    path.write_bytes(maker.build())
    image = open_image(path)
    patches = [p for p in empty(image, scan(image), ["call_sites"]) if walker <= p.address < walker + 64]
    assert [(p.address, p.new) for p in patches] == [(walker + 8 + 5, struct.pack("<I", calls & 0xFFFFFFFF))]


def test_hashes_that_a_boot_seeds_refuse_the_image(tmp_path: Path) -> None:
    """kCFI and FineIBT: no file can have what the next boot draws by lot."""
    kernel = Returning(walker_of(Returning()))
    at = kernel.maker.next_table()
    kernel.maker.table(".cfi_sites", struct.pack("<i", wrapped(kernel.site - at)))
    with pytest.raises(PatchError, match="each boot chooses by chance what it writes by this table"):
        kernel.planned(tmp_path, seal=True)


@pytest.mark.parametrize(
    ("body", "named", "said"),
    [
        (b"", True, "0 places"),
        (b"twice", True, "2 places"),
        (b"", False, "no symbol says where alternative_instructions is"),
    ],
)
def test_a_table_that_cannot_be_emptied_refuses_the_image(body: bytes, named: bool, said: str, tmp_path: Path) -> None:
    code = walker_of(Returning()) * 2 if body else b""
    with pytest.raises(PatchError, match=said):
        Returning(code, named=named).planned(tmp_path, seal=True)


def test_every_pass_of_every_era_is_there() -> None:
    for era in eras():
        assert set(era.passes) <= set(era.boot) <= set(PASSES), era.name
        assert [f for f in era.boot if f in era.passes] == list(era.passes), era.name


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"alternative": {}}, "alternative"),
        ({"alternatives": {"optimize": "runs"}}, "alternatives.optimize"),
        ({"nops": [{"bits": 32, "tabel": "k8"}]}, "nops.tabel"),
        ({"boot": ["altinstruction"]}, "altinstruction"),
    ],
)
def test_a_word_that_nobody_reads_is_refused(spec: dict[str, object], word: str) -> None:
    from vmipatch.errors import SpecError

    with pytest.raises(SpecError, match=word):
        check(spec, "specs/kernels/made.toml")
    check({"paravirt": {"inline32": {"pv_ops.anything": "FA"}}}, "specs/kernels/made.toml")
