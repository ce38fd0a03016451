"""Call depth tracking over a small kernel: what ``patch_call`` and ``patch_dest`` do with each call of it."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernelmaker import DATA, KernelMaker
from vmipatch.annotate import scan
from vmipatch.annotate.site import Alternative, Site
from vmipatch.image import Image, open_image
from vmipatch.patch.passes import callthunks
from vmipatch.patch.slots import direct_target
from vmipatch.patch.text import Text

SPEC = {
    "most": 64, "templates": ["6548C13D........05", "6548C13C25........05"],
    "skip": ["error_entry", "absent"], "skip_ranges": [["relocate_kernel", 0x20], ["nowhere", "nor_here"]],
}  # fmt: skip
NOPS = b"\x90" * 16


class Small:
    """A kernel with a template, callees of every kind and a call of each."""

    def __init__(self, folder: Path, template: bytes, *, symbols: bool = True, copies: int = 1) -> None:
        kernel = KernelMaker(64)
        kernel.code(b"\xcc" * 16)
        self.template = 0
        self.callee: dict[str, int] = {}
        for name in ("plain", "error_entry", "relocate_kernel", "other"):
            kernel.code(NOPS)
            self.callee[name] = kernel.code(b"\xc3" + b"\xcc" * 15, name)
        kernel.code(b"\x90" * 15 + b"\xcc")
        self.callee["unpadded"] = kernel.code(b"\xc3" + b"\xcc" * 15, "unpadded")
        self.calls = {}
        for name, target in [*self.callee.items(), ("plain again", self.callee["plain"]), ("far", DATA + kernel.high)]:
            at = kernel.code(b"")
            self.calls[name] = kernel.code(b"\xe8" + struct.pack("<i", target - at - 5))
        at = kernel.next_table()
        rows = [struct.pack("<i", c - at - 4 * i) for i, c in enumerate(self.calls.values())]
        kernel.table(".call_sites", b"".join(rows))
        self.template = kernel.code(b"")
        kernel.code(template)
        if symbols:
            kernel.symbols += [
                ("skl_call_thunk_template", self.template, ".text"),
                ("skl_call_thunk_tail", self.template + len(template), ".text"),
            ]
        else:
            kernel.rodata = b"\0" * 7 + template * copies
        path = folder / "vmlinux"
        path.write_bytes(kernel.build())
        self.image: Image = open_image(path)

    def planned(self) -> tuple[Text, callthunks.Thunks]:
        how = callthunks.thunks(self.image, SPEC)
        assert how is not None
        text = Text(self.image)
        for patch in callthunks.plan(text, scan(self.image, ["call_sites"]).sites, how):
            assert text.read(patch.address, len(patch.new)) == patch.new
        return text, how


def target_of(text: Text, call: int) -> int:
    code = text.read(call, 5)
    assert code[0] == 0xE8
    return call + 5 + int(struct.unpack("<i", code[1:])[0])


def test_calls_enter_the_padding(tmp_path: Path) -> None:
    # sar qword ptr gs:[rip + 0x1000], 5: the operand lies 0x1000 behind the template's end.
    kernel = Small(tmp_path, bytes.fromhex("6548C13D0010000005"))
    text, _ = kernel.planned()
    operand = kernel.template + 9 + 0x1000
    for name in ("plain", "plain again", "other"):
        pad = target_of(text, kernel.calls[name])
        assert pad == kernel.callee[name.split()[0]] - 9
        code = text.read(pad - 7, 16)
        assert code[:7] == b"\x90" * 7
        assert code[7:11] == bytes.fromhex("6548C13D")
        assert code[15] == 5
        assert pad + 9 + struct.unpack("<i", code[11:15])[0] == operand


@pytest.mark.parametrize("name", ["error_entry", "relocate_kernel", "unpadded", "far"])
def test_some_functions_are_called_as_before(tmp_path: Path, name: str) -> None:
    kernel = Small(tmp_path, bytes.fromhex("6548C13D0010000005"))
    text, _ = kernel.planned()
    call = kernel.calls[name]
    assert text.read(call, 5) == kernel.image.read(call, 5)
    if name in kernel.callee:
        assert text.read(kernel.callee[name] - 16, 16) == kernel.image.read(kernel.callee[name] - 16, 16)


def test_an_absolute_operand_is_copied(tmp_path: Path) -> None:
    template = bytes.fromhex("6548C13C254032010005")
    kernel = Small(tmp_path, template)
    text, _ = kernel.planned()
    assert text.read(kernel.callee["plain"] - 10, 10) == template
    assert text.read(kernel.callee["other"] - 10, 10) == template


def test_a_template_without_symbols_is_found_by_its_form(tmp_path: Path) -> None:
    code = bytes.fromhex("6548C13D0010000005")
    found = callthunks.template(Small(tmp_path, code, symbols=False).image, SPEC)
    assert found is not None
    assert found.code == code
    # Behind the banner, which ends in NUL, and seven bytes more.
    banner = b"Linux version 6.1.0 (root@build) (gcc version 9) #1 SMP 2020\n\0"
    assert found.address == DATA + 0xFFFFFFFF00000000 - 0x1000 + len(banner) + 7


def test_two_places_of_that_form_are_none(tmp_path: Path) -> None:
    image = Small(tmp_path, bytes.fromhex("6548C13D0010000005"), symbols=False, copies=2).image
    assert callthunks.template(image, SPEC) is None


def test_a_call_that_an_alternative_has_taken_away_stays_away(tmp_path: Path) -> None:
    kernel = Small(tmp_path, bytes.fromhex("6548C13D0010000005"))
    how = callthunks.thunks(kernel.image, SPEC)
    assert how is not None
    text = Text(kernel.image)
    text.write(kernel.calls["plain"], bytes.fromhex("F3480FB8C7"))
    patched = {p.address for p in callthunks.plan(text, scan(kernel.image, ["call_sites"]).sites, how)}
    assert kernel.calls["plain"] not in patched
    assert kernel.calls["other"] in patched


def test_what_a_call_calls() -> None:
    assert callthunks.called(bytes.fromhex("E8FBFFFFFF"), 0x1000) == 0x1000
    assert callthunks.called(bytes.fromhex("2EE8FBFFFFFF"), 0x1000) == 0x1001
    assert callthunks.called(bytes.fromhex("E9FBFFFFFF"), 0x1000) is None
    assert callthunks.called(b"\xe8\0", 0x1000) is None


def test_calls_of_a_module_enter_what_runs_around_it(tmp_path: Path) -> None:
    """Functions of the kernel count as well, and their padding is not the module's to write."""
    kernel = Small(tmp_path, bytes.fromhex("6548C13D0010000005"))
    whole = callthunks.thunks(kernel.image, SPEC)
    assert whole is not None
    start = min(kernel.calls.values())
    around = range(kernel.callee["plain"] - 16, kernel.callee["other"])
    how = replace(whole, core=range(start, start + 0x100), others=(around,), around=kernel.image)
    text = Text(kernel.image)
    patched = {p.address for p in callthunks.plan(text, scan(kernel.image, ["call_sites"]).sites, how)}
    assert patched == {kernel.calls["plain"], kernel.calls["plain again"]}
    assert target_of(text, kernel.calls["plain"]) == kernel.callee["plain"] - 9
    assert text.read(kernel.callee["plain"] - 16, 16) == NOPS


def test_a_direct_call_whose_placeholder_is_counted_is_counted(tmp_path: Path) -> None:
    """``alt_replace_call`` adds the difference of two functions to the placeholder's displacement as it stands."""
    maker = KernelMaker(64)
    bug, native = maker.code(b"\xc3" + b"\xcc" * 15, "BUG_func"), maker.code(b"\xc3" + b"\xcc" * 15)
    at = maker.code(b"")
    slot, site = maker.code(struct.pack("<Q", native)), at + 8
    maker.code(b"\xff\x15" + struct.pack("<i", slot - site - 6))
    replacement = site + 6
    maker.code(b"\xe8" + struct.pack("<i", bug - replacement - 5))
    path = tmp_path / "vmlinux"
    path.write_bytes(maker.build())
    image = open_image(path)
    text = Text(image)
    detail = Alternative(replacement, 5, 0, inverted=False, direct_call=True, pad_length=None)
    one = Site("altinstructions", site, 6, "ALWAYS", ".text", "", site, detail)
    for led in (0, -9):
        body = b"\xe8" + struct.pack("<i", bug + led - replacement - 5)
        new = direct_target(text, one, body, detail, {"null": "BUG_func", "nop": []})
        assert replacement + 5 + struct.unpack("<i", new[1:])[0] == native + led
