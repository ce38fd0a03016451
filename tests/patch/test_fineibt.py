"""kCFI's and FineIBT's sequences over a small kernel, assembled by hand from ``apply_fineibt`` of three kernels."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.kernelmaker import KernelMaker
from vmipatch.annotate import scan
from vmipatch.annotate.cfi import offset_of
from vmipatch.annotate.site import Hash, HashCheck
from vmipatch.image import Image, open_image
from vmipatch.isa import nops
from vmipatch.patch.passes import Boot, fineibt, its
from vmipatch.patch.passes import Checks as State
from vmipatch.patch.patch import Patch
from vmipatch.patch.rules import Rules
from vmipatch.patch.text import Text

ENDBR, NOPL, OSP = bytes.fromhex("F30F1EFA"), bytes.fromhex("0F1F40D6"), bytes.fromhex("660F1F00")
HASH, SEED = 0x11223344, 0xA5A5A5A5
SEEDED = HASH ^ SEED
R11 = 11
VERSIONS = {"r10 and ud2": (6, 12, 118), "r10 and ea": (6, 16, 1), "eax and udb": (7, 3, 0)}


def le(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


class Small:
    """Functions of each kind, and callers of each kind."""

    def __init__(self, folder: Path, version: tuple[int, ...], *, rodata: bytes = b"") -> None:
        kernel = KernelMaker(64, release=".".join(map(str, version)), rodata=rodata)
        kernel.code(b"\xcc" * 32)
        self.functions: dict[str, int] = {}
        preambles = []
        for name, register, endbr in (
            ("none", 0, True), ("one", 1, True), ("three", 3, True), ("direct", 2, False), ("sealed", 0, True),
        ):  # fmt: skip
            preambles.append(kernel.code(bytes((0xB8 + register,)) + le(HASH) + b"\x90" * 11))
            self.functions[name] = kernel.code((ENDBR if endbr else b"") + b"\xc3" + b"\xcc" * 15)
            kernel.code(b"\xcc" * (-len(kernel.text) % 64))
        # An ENDBR that is sealed though no preamble stands in front of it.
        kernel.code(bytes.fromhex("4889F8C3") * 4)
        self.functions["bare"] = kernel.code(ENDBR + b"\xc3" + b"\xcc" * 59)
        self.bhi = kernel.code(b"\xcc" * 512, "__bhi_args")
        array = kernel.code(b"\xcc" * 512, "__x86_indirect_thunk_array")
        self.branches: dict[str, int] = {}
        for name, opcode, check in (
            ("call", b"\x2e\xe8", True), ("jump", b"\x2e\xe9", True), ("free", b"\x2e\xe8", False),
            ("low", b"\x2e\xe8", True),
        ):  # fmt: skip
            # The branch of "low" ends in the lower half of a cache line, those of the others in the upper half.
            kernel.code(b"\x90" * (-len(kernel.text) % 64 + (0 if name == "low" else 32)))
            start = b"\x41\xba" + le(-HASH) + bytes.fromhex("450353F1") + bytes.fromhex("74020F0B")
            at = kernel.code(start if check else b"\x90" * 14) + 14
            self.branches[name] = at
            kernel.code(opcode + struct.pack("<i", array + 32 * R11 - at - 6))
        kernel.code(b"\xcc" * 64)
        self.table(kernel, ".cfi_sites", preambles)
        self.table(kernel, ".retpoline_sites", list(self.branches.values()))
        path = folder / "vmlinux"
        path.write_bytes(kernel.build())
        self.image: Image = open_image(path)
        found = scan(self.image, ["cfi_sites"])
        assert not found.findings
        self.sites = found.sites
        assert [s.op for s in self.sites] == ["preamble"] * 5 + ["caller"] * 3
        poison = (NOPL if version >= (6, 18) else OSP).hex()
        rules = Rules("test", version, {"endbr": {"poison": poison}})
        how = fineibt.kernel(Boot(self.image, rules, nops.table("p6-11")))
        assert how is not None
        self.how = how

    @staticmethod
    def table(kernel: KernelMaker, name: str, sites: list[int]) -> None:
        at = kernel.next_table()
        kernel.table(name, b"".join(struct.pack("<i", s - at - 4 * i) for i, s in enumerate(sites)))

    def after(self, state: State, thunks: its.Thunks | None = None) -> tuple[Text, list[Patch]]:
        text = Text(self.image)
        return text, list(fineibt.plan(text, self.sites, self.how, state, thunks))


def caller(text: Text, at: int, length: int = 14) -> bytes:
    return text.read(at - 14, length)


PREAMBLE = {
    "r10 and ud2": "F30F1EFA 4181EA {} 7402 0F0B 90",
    "r10 and ea": "F30F1EFA 4181EA {} 75F9 0F1F00",
    "eax and udb": "F30F1EFA 2D {} 2E0F8503000000",
}
CALLER = {
    "r10 and ud2": "41BA {} 4983EB10 0F1F4000",
    "r10 and ea": "41BA {} 4D8D5BF0 0F1F4000",
    "eax and udb": "B8 {} 4D8D5BF0 0F1F440000",
}
PARANOID = {"r10 and ea": "41BA {} 453B53F7 4D8D5BF0 75FD", "eax and udb": "B8 {} 413B43F5 2E4D8D5BF0 75FD"}
INDIRECT = {"r10 and ea": ("41FFD390", "41FFE390"), "eax and udb": ("2E41FFD3", "41FFE3CC")}


def filled(form: str, value: int) -> bytes:
    return bytes.fromhex(form.format(le(value).hex()))


@pytest.mark.parametrize("form", PREAMBLE)
def test_fineibt(tmp_path: Path, form: str) -> None:
    kernel = Small(tmp_path, VERSIONS[form])
    assert kernel.how.form.name == form
    assert kernel.how.offset == 16
    text, _ = kernel.after(State("fineibt", SEED))
    poison = NOPL if form == "eax and udb" else OSP
    for name in ("none", "one", "three"):
        at = kernel.functions[name]
        assert text.read(at - 16, 16) == filled(PREAMBLE[form], SEEDED)
        assert text.read(at, 5) == poison + b"\xc3"
    direct = text.read(kernel.functions["direct"] - 16, 17)
    if form == "r10 and ud2":
        assert direct == filled(PREAMBLE[form], SEEDED) + b"\xc3"
    else:
        # From 6.15 on a function without ENDBR keeps kCFI's preamble, seeded like all.
        assert direct == b"\xba" + le(SEEDED) + b"\x90" * 11 + b"\xc3"
    for name in ("call", "jump", "low"):
        assert caller(text, kernel.branches[name]) == filled(CALLER[form], SEEDED)
    assert caller(text, kernel.branches["free"]) == b"\x90" * 14


@pytest.mark.parametrize(
    ("form", "jump"), [("r10 and ud2", "7402 0F0B"), ("r10 and ea", "7402 0F0B"), ("eax and udb", "7501 A8D6")]
)
def test_kcfi_seeded_anew(tmp_path: Path, form: str, jump: str) -> None:
    kernel = Small(tmp_path, VERSIONS[form])
    text, _ = kernel.after(State("kcfi", SEED))
    assert caller(text, kernel.branches["call"]) == b"\x41\xba" + le(-SEEDED) + bytes.fromhex("450353F1" + jump)
    assert text.read(kernel.functions["three"] - 16, 16) == b"\xbb" + le(SEEDED) + b"\x90" * 11
    assert text.read(kernel.functions["three"], 4) == ENDBR


def test_7_2_leaves_the_trap_of_kcfi(tmp_path: Path) -> None:
    kernel = Small(tmp_path, (7, 2, 13))
    text, _ = kernel.after(State("kcfi", None))
    assert caller(text, kernel.branches["call"]) == kernel.image.read(kernel.branches["call"] - 14, 14)


def test_switched_off(tmp_path: Path) -> None:
    kernel = Small(tmp_path, VERSIONS["eax and udb"])
    text, _ = kernel.after(State("off", None))
    assert caller(text, kernel.branches["call"]) == b"\xeb\x0c" + le(-HASH) + bytes.fromhex("450353F1 7402 0F0B")
    assert text.read(kernel.functions["one"] - 16, 16) == kernel.image.read(kernel.functions["one"] - 16, 16)


@pytest.mark.parametrize("form", PARANOID)
def test_paranoid(tmp_path: Path, form: str) -> None:
    kernel = Small(tmp_path, VERSIONS[form])
    text, _ = kernel.after(State("fineibt", SEED, paranoid=True))
    call, jump = INDIRECT[form]
    for name, branch in (("call", call), ("jump", jump), ("low", call)):
        assert caller(text, kernel.branches[name], 20) == filled(PARANOID[form], SEEDED) + bytes.fromhex(branch)


@pytest.mark.parametrize(("form", "trap"), [("r10 and ea", "EA"), ("eax and udb", "D6")])
def test_paranoid_with_thunks(tmp_path: Path, form: str, trap: str) -> None:
    """fineibt_paranoid_ind lies 16 bytes behind the caller's start: "low" needs a thunk, the others do not."""
    kernel = Small(tmp_path, VERSIONS[form])
    page = 0xFFFFFFFFC1400000
    thunks = its.Thunks(None, bytes.fromhex(trap + "75FD"), lambda site, begins, entered: page)
    text, _ = kernel.after(State("fineibt", SEED, paranoid=True), thunks)
    low = kernel.branches["low"]
    code = caller(text, low, 20)
    assert code[:14] == filled(PARANOID[form], SEEDED)[:14]
    assert code[14:16] == b"\x2e\xe8"
    assert low + 6 + struct.unpack("<i", code[16:])[0] == page + 32 + 1
    assert bytes(thunks.pages[0][32:39]) == bytes.fromhex(trap + "75FD 41FFE3CC")
    assert caller(text, kernel.branches["call"], 20)[16:] == bytes.fromhex(INDIRECT[form][0])


@pytest.mark.parametrize(
    ("form", "at", "one", "call", "behind"),
    [
        ("r10 and ea", 11, "490F45FA 75F5", "E8", OSP), ("eax and udb", 9, "480F45F8 2E7503", "2E2EE8", NOPL),
    ],
)  # fmt: skip
def test_bhi(tmp_path: Path, form: str, at: int, one: str, call: str, behind: bytes) -> None:
    kernel = Small(tmp_path, VERSIONS[form])
    text, _ = kernel.after(State("fineibt", SEED, bhi=True))
    preamble = filled(PREAMBLE[form], SEEDED)
    assert text.read(kernel.functions["none"] - 16, 16) == preamble
    # 6.15: nine bytes from the eleventh on, the last of the six and a nop reach into the function.
    assert text.read(kernel.functions["one"] - 16, 16) == (preamble[:at] + bytes.fromhex(one))[:16]
    tail = text.read(kernel.functions["one"], 4)
    assert tail == (bytes.fromhex("F50F1F00") if form == "r10 and ea" else NOPL)
    three = kernel.functions["three"]
    code = text.read(three - 16, 16)
    assert code[: at + len(bytes.fromhex(call))] == preamble[:at] + bytes.fromhex(call)
    assert three + struct.unpack("<i", code[12:])[0] == kernel.bhi + 3 * 32
    assert text.read(three, 4) == behind


def test_permissive_bhi_calls_for_one_argument_too(tmp_path: Path) -> None:
    kernel = Small(tmp_path, VERSIONS["eax and udb"])
    text, _ = kernel.after(State("fineibt", SEED, bhi=True, permissive=True))
    one = kernel.functions["one"]
    code = text.read(one - 16, 16)
    assert code[9:12] == bytes.fromhex("2E2EE8")
    assert one + struct.unpack("<i", code[12:])[0] == kernel.bhi + 32


def test_a_hash_is_never_an_endbr() -> None:
    """``cfi_rehash``: what comes out as ENDBR64 is shifted once more, and its low bit brings in the polynomial."""
    endbr = int.from_bytes(ENDBR, "little")
    assert fineibt.rehashed(endbr ^ SEED, SEED, OSP) == endbr >> 1 ^ 0x80200003
    assert fineibt.rehashed((-endbr & 0xFFFFFFFF) ^ SEED, SEED, OSP) == (-endbr & 0xFFFFFFFF) >> 1 ^ 0x80200003
    assert fineibt.rehashed(0x001F0F66 ^ SEED, SEED, OSP) == 0x001F0F66 >> 1
    assert fineibt.rehashed(HASH, SEED, OSP) == SEEDED
    assert fineibt.rehashed(HASH, None, OSP) == HASH


# What sealing leaves in front of a function with a preamble ("sealed") and of one without ("bare").
SEALED = [
    ((6, 12, 118), "kcfi", "B8 00000000", "4800000000", 16),
    ((6, 16, 1), "kcfi", "B8 00000000", None, 16),
    ((7, 3, 0), "kcfi", "B8 00000000", None, 16),
    ((6, 12, 118), "fineibt", "660F1F00 4181EA 00000000 7402", "4889F8C3 4889F8 00000000", 16),
    ((6, 4, 0), "fineibt", "660F1F00 4181EA 44332211 7402", None, 16),
    ((7, 3, 0), "fineibt", "0F1F40D6 2D 00000000 2E0F85", None, 16),
    ((7, 3, 0), "off", "B8 44332211", None, 16),
]


@pytest.mark.parametrize(("version", "mode", "sealed", "bare", "before"), SEALED)
def test_sealing_takes_the_hash_too(
    tmp_path: Path, version: tuple[int, ...], mode: str, sealed: str, bare: str | None, before: int
) -> None:
    kernel = Small(tmp_path, version)
    state = State(mode, None)
    text, _ = kernel.after(state)
    for name in ("sealed", "bare"):
        for at, code in fineibt.sealed(text, kernel.functions[name], kernel.how, state):
            text.write(at, code)
    wanted = bytes.fromhex(sealed)
    assert text.read(kernel.functions["sealed"] - before, len(wanted)) == wanted
    start = kernel.functions["bare"] - before
    expected = kernel.image.read(start, 16) if bare is None else bytes.fromhex(bare)
    assert text.read(start, len(expected)) == expected


STATES = [
    State("off", None), State("kcfi", None), State("kcfi", SEED), State("fineibt", None), State("fineibt", SEED),
    State("fineibt", SEED, paranoid=True), State("fineibt", SEED, bhi=True), State("fineibt", SEED, True, True, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "state"),
    # 6.12 knows neither paranoid callers nor BHI.
    [(f, s) for f in PREAMBLE for s in STATES if f != "r10 and ud2" or not (s.paranoid or s.bhi)],
    ids=str,
)
def test_what_a_boot_chose_is_read_from_its_text(tmp_path: Path, form: str, state: State) -> None:
    kernel = Small(tmp_path, VERSIONS[form])
    after, _ = kernel.after(state)
    found = fineibt.recover(kernel.image, kernel.sites, kernel.how, after.read)
    assert found == state


def test_the_images_own_sequences_go_before_its_version(tmp_path: Path) -> None:
    rodata = filled(PREAMBLE["r10 and ea"], 0x12345678) + b"\0" + filled(CALLER["r10 and ea"], 0x12345678)
    assert Small(tmp_path, (7, 3, 0), rodata=rodata).how.form.name == "r10 and ea"


def test_sites_reach_over_padding_and_branch(tmp_path: Path) -> None:
    kernel = Small(tmp_path, (7, 3, 0))
    assert offset_of(kernel.image) == 16
    preambles = {s.detail.function: (s.length, s.detail) for s in kernel.sites if isinstance(s.detail, Hash)}
    assert preambles[kernel.functions["three"]] == (20, Hash(HASH, 3, kernel.functions["three"]))
    assert preambles[kernel.functions["direct"]] == (16, Hash(HASH, 2, kernel.functions["direct"]))
    callers = [(s.address, s.length, s.detail) for s in kernel.sites if isinstance(s.detail, HashCheck)]
    kinds = {"call": "call", "jump": "jmp", "low": "call"}
    assert callers == [(kernel.branches[n] - 14, 20, HashCheck(HASH, kind)) for n, kind in kinds.items()]
