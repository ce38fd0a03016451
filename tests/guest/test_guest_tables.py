"""The guest's tables as GNU readelf and objdump see them, against what `vmipatch scan` says.

Names come from the guest's own headers: call numbers from calls.h, slots from paravirt.h.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from functools import cache
from typing import NamedTuple

import pytest
from guestmachine import FOLDER, FORMS, elf

import vmipatch
from vmipatch.annotate.site import Paravirt, Vmi

pytestmark = pytest.mark.skipif(
    shutil.which("readelf") is None or shutil.which("objdump") is None,
    reason="THE GUEST'S TABLES WERE NOT CHECKED: readelf and objdump (binutils) are not installed",
)

ANNOTATED = ("rfc-v1", "v2")
# Calls that no kernel of this kind makes: caches dropped without being written back.
UNUSED = {"INVD"}
# Of kernels with PAE; the annotated ones have none, but 13.0's calls can be made anyway.
ONLY_PAE = {"SetPxELong", "UpdatePxELong"}
PADDING = re.compile(rb"(?:(?:\x66{0,11}\x90))*\Z")


class Annotation(NamedTuple):
    call: int
    site: int
    translation: int
    length: int
    translation_length: int
    growth: int
    call_offset: int


def output(*command: str) -> str:
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


@cache
def sections(form: str) -> dict[str, tuple[int, bytes]]:
    """Address and bytes by name, found by readelf."""
    data = elf(form).read_bytes()
    row = re.compile(r"\]\s+(\S+)\s+PROGBITS\s+([0-9a-f]+)\s+([0-9a-f]+)\s+([0-9a-f]+)")
    found = {}
    for name, address, offset, size in row.findall(output("readelf", "-SW", str(elf(form)))):
        at = int(offset, 16)
        found[name] = (int(address, 16), data[at : at + int(size, 16)])
    return found


@cache
def symbols(form: str) -> dict[str, int]:
    rows = (line.split() for line in output("readelf", "-sW", str(elf(form))).splitlines())
    return {row[7]: int(row[1], 16) for row in rows if len(row) == 8 and row[0].rstrip(":").isdigit()}


@cache
def instructions(form: str, section: str) -> dict[int, str]:
    """Address to text of each instruction, by objdump."""
    row = re.compile(r"^ *([0-9a-f]+):\t[0-9a-f ]+\t(.*)$", re.MULTILINE)
    text = output("objdump", "-d", "-w", "-j", section, str(elf(form)))
    return {int(address, 16): words.strip() for address, words in row.findall(text)}


def read(form: str, address: int, length: int) -> bytes:
    for start, data in sections(form).values():
        if start <= address < start + len(data):
            return data[address - start : address - start + length]
    raise AssertionError(hex(address))


def call_names(form: str) -> dict[int, str]:
    """From calls.h: the first list is the RFC's, the second that of 3.0."""
    text = (FOLDER / "include" / "calls.h").read_text().split("#ifdef FORM_RFC_V1")[1].split("#endif")[0]
    text = text.split("#else")[form != "rfc-v1"]
    found = {int(number): name for name, number in re.findall(r"#define VMI_(\w+) (\d+)$", text, re.MULTILINE)}
    assert found.pop(max(found)) == "CALLS"
    return found


def annotations(form: str) -> list[Annotation]:
    _, data = sections(form)[".vmi.annotation"]
    assert len(data) % 16 == 0
    return [Annotation(*entry) for entry in struct.iter_unpack("<IIIBBbB", data)]


@pytest.mark.parametrize("form", ANNOTATED)
def test_annotations_are_what_scan_says(form: str) -> None:
    names = call_names(form)
    wanted = [(e.site, e.length, names[e.call], e.translation, e.translation_length) for e in annotations(form)]
    found = vmipatch.scan(vmipatch.open_image(elf(form)))
    details = [(s, s.detail) for s in found.sites if isinstance(s.detail, Vmi)]
    assert not found.findings
    assert {d.version for _, d in details} == {"v1" if form == "rfc-v1" else "v2"}
    said = [(s.address, s.length, s.op, d.translation, d.translation_length) for s, d in details]
    assert sorted(said) == sorted(wanted)
    assert len(wanted) > 400


@pytest.mark.parametrize("form", ANNOTATED)
def test_every_call_has_a_site(form: str) -> None:
    unused = UNUSED if form == "rfc-v1" else UNUSED | ONLY_PAE
    assert {e.call for e in annotations(form)} == {n for n, name in call_names(form).items() if name not in unused}


@pytest.mark.parametrize("form", ANNOTATED)
def test_sites_and_translations(form: str) -> None:
    text, translations = instructions(form, ".text"), instructions(form, ".vmi.translation")
    for entry in annotations(form):
        assert entry.site in text
        assert entry.site + entry.length in text
        unpadded = entry.translation_length - entry.growth
        assert entry.length == max(unpadded, entry.translation_length)
        assert PADDING.match(read(form, entry.site + unpadded, entry.length - unpadded)), entry
        assert entry.growth <= 12
        calls = [a for a in range(entry.translation, entry.translation + entry.translation_length) if a in translations]
        calls = [a for a in calls if translations[a].startswith("call")]
        assert len(calls) == 1
        offset = calls[0] - entry.translation
        displacement = int.from_bytes(read(form, calls[0] + 1, 4), "little")
        if form == "rfc-v1":
            assert (displacement, entry.call_offset) == (entry.call, 0)
        else:
            assert (displacement, entry.call_offset) == (0, offset)


def test_native_sections_are_dropped() -> None:
    """`.vmi.native` measures and is gone; the annotated sections are in their forms only."""
    for form in FORMS:
        names = set(sections(form))
        assert ".vmi.native" not in names
        assert (".vmi.annotation" in names) is (form in ANNOTATED)
        assert (".parainstructions" in names) is (form not in ANNOTATED)


# Section 6.3 of the notes: the bytes of a site, its slot's address in the middle.
SHAPES = {
    "A": rb"\x51\x52\xff\x15(....)\x5a\x59",
    "B": rb"\x50\x51\x52\x2e\xff\x15(....)\x5a\x59\x58",
    "B'": rb"\x51\x52\x2e\xff\x15(....)\x5a\x59",
    "B without registers": rb"\x2e\xff\x15(....)",
    "C": rb"\x2e\xff\x25(....)",
    "D": rb"\xff\x15(....)",
}


def slots(pae: bool) -> list[tuple[str, int, str]]:
    """(object, offset in it, member) of each slot in the order of the patch template, from paravirt.h."""
    header = (FOLDER / "include" / "paravirt.h").read_text()
    if not pae:
        header = re.sub(r"#ifdef PAE\n.*?#endif\n", "", header, flags=re.DOTALL)
    template = re.findall(
        r"struct (pv_\w+) pv_\w+;", header.split("struct paravirt_patch_template {")[1].split("};")[0]
    )
    found: list[tuple[str, int, str]] = []
    for name in template:
        body = header.split(f"struct {name} {{")[1].split("\n};")[0]
        nested = re.sub(r"struct \{(.*?)\} (\w+);", lambda m: m[1].replace("(*", f"(*{m[2]}."), body, flags=re.DOTALL)
        members = re.findall(r"\(\*([\w.]+)\)\(|struct callee_save ([\w, ]+);", nested)
        words = [word.strip() for pointer, saved in members for word in (pointer or saved).split(",")]
        found += [(name, 4 * at, word) for at, word in enumerate(words)]
    return found


@pytest.mark.parametrize("form", ["mainline", "mainline-pae"])
def test_paravirt_sites_are_what_scan_says(form: str) -> None:
    _, data = sections(form)[".parainstructions"]
    text = instructions(form, ".text")
    layout = slots(form == "mainline-pae")
    assert (layout[3][2], layout[39][2], layout[46][2], layout[70][2]) == (
        "get_debugreg",
        "iret",
        "irq_enable",
        "set_pte",
    )
    bases = symbols(form)
    seen: dict[str, int] = {}
    wanted = []
    for address, kind, length, clobbers in struct.iter_unpack("<IBBH", data):
        owner, offset, member = layout[kind]
        body = read(form, address, length)
        shape, match = next((n, m) for n, p in SHAPES.items() if (m := re.fullmatch(p, body, re.DOTALL)))
        seen[shape] = seen.get(shape, 0) + 1
        assert int.from_bytes(match[1], "little") == bases[owner] + offset, hex(address)
        assert address in text
        assert address + length in text
        assert clobbers <= 15
        assert (shape == "C") is (member in ("iret", "irq_enable_sysexit"))
        wanted.append((address, length, f"{owner}.{member}", kind))
    assert set(seen) == set(SHAPES)
    found = vmipatch.scan(vmipatch.open_image(elf(form)))
    assert not found.findings
    said = [(s.address, s.length, s.op, s.detail.type) for s in found.sites if isinstance(s.detail, Paravirt)]
    assert sorted(said) == sorted(wanted)
    assert len(wanted) > 250
