"""Executable memory by owner, in a made-up kernel with page tables."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.explain.modules import made
from tests.explain.modules.test_mapped import LARGE, NX, P, Tables
from vmipatch.explain.modules.areas import _ITS_PAGE, areas
from vmipatch.explain.modules.btf import Btf, Types
from vmipatch.explain.modules.loaded import Walk
from vmipatch.explain.modules.placement import Kernel
from vmipatch.explain.modules.result import Area, Note
from vmipatch.explain.paging import MODES

MODULES = 0xC0000000
"""Physical address of nothing; only virtual ones are read."""


class Mapped:
    """A machine whose page tables make some pages executable."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, data: bool = False) -> None:
        self.machine = made.Machine()
        self.image, self.types = made.opened(folder)
        self.tables = Tables()
        self.tables.set(0x1000, 511, 0x2000 | P)
        self.tables.set(0x2000, 510, 0x3000 | P)  # from 0xffffffff80000000
        self.tables.set(0x2000, 511, 0x4000 | P)  # from 0xffffffffc0000000
        self.tables.set(0x3000, 8, 0x1000000 | P | LARGE)  # the text's large page
        self.tables.set(0x3000, 16, 0x2000000 | P | LARGE | (0 if data else NX))
        self.tables.set(0x4000, 0, 0x5000 | P)
        running = made.MadeRunning(self.image, self.machine)
        read = self.tables.read
        monkeypatch.setattr(running, "memory", SimpleNamespace(read_physical=read))
        monkeypatch.setattr(made.MadeRunning, "tables", (0x1000, MODES[64][0]))
        self.view = made.View(running)

    def execute(self, address: int, pages: int = 1) -> None:
        for i in range(pages):
            self.tables.set(0x5000, (address - made.AREA) // 4096 + i, 0x100000 | P)

    def areas(self) -> tuple[list[Area], list[Note]]:
        walk = Walk(self.view, self.types)
        return areas(Kernel(self.view), self.types, walk.modules, {})


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapped:
    return Mapped(tmp_path, monkeypatch)


def test_kernel_modules_and_what_nobody_owns(mapped: Mapped) -> None:
    mapped.machine.load("one")
    mapped.machine.load("two")
    mapped.execute(mapped.machine.base("one"))
    mapped.execute(mapped.machine.base("two"))
    stranger = made.AREA + 0x30000
    mapped.machine.put(stranger, b"\x90\xc3" * 4096)
    mapped.execute(stranger, 2)
    found, notes = mapped.areas()
    assert [(a.address, a.size, a.kind, a.what) for a in found if a.kind != "kernel"] == [
        (made.AREA, 0x1000, "module", "one"),
        (made.AREA + made.PITCH, 0x1000, "module", "two"),
        (stranger, 0x2000, "unknown", "belongs to nothing known"),
    ]
    assert [(n.id, n.address, n.finding) for n in notes] == [("region-unknown", stranger, True)]
    kernel = [a for a in found if a.kind == "kernel"]
    assert [(a.address, a.size) for a in kernel] == [(made.TEXT, 0x1000), (made.TEXT + 0x1000, 0x1FF000)]


def test_code_between_modules_in_one_run(mapped: Mapped) -> None:
    mapped.machine.load("one")
    mapped.execute(made.AREA, 3)
    mapped.machine.put(made.AREA + 0x1000, b"\xcc" * 0x1000)
    mapped.machine.put(made.AREA + 0x2000, b"\xcc" * 0xFFF + b"\x90")
    found, _ = mapped.areas()
    assert [(a.address, a.size, a.kind) for a in found if a.kind != "kernel"] == [
        (made.AREA, 0x1000, "module"), (made.AREA + 0x1000, 0x1000, "free"), (made.AREA + 0x2000, 0x1000, "unknown"),
    ]  # fmt: skip


def test_a_module_off_the_list_is_nobodys(mapped: Mapped) -> None:
    mapped.machine.load("one")
    mapped.machine.load("hidden")
    for name in ("one", "hidden"):
        mapped.execute(mapped.machine.base(name))
    mapped.machine.names.remove("hidden")
    mapped.machine.link()
    found, notes = mapped.areas()
    assert [a.address for a in found if not a.known] == [made.AREA + made.PITCH]
    assert [n.finding for n in notes] == [True]


def test_without_nx_nothing_is_told_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, notes = Mapped(tmp_path, monkeypatch, data=True).areas()
    assert found == []
    assert [(n.id, n.finding) for n in notes] == [("areas", False)]
    assert "may execute every page" in notes[0].message


def test_packs_programs_trampolines_and_slots(mapped: Mapped, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel's lists: kernel/bpf/core.c, kernel/kprobes.c, include/linux/ftrace.h."""
    types = made.BtfWriter()
    pointer, char, size = types.pointer(0), types.integer("char", 1), types.integer("unsigned long", 8)
    node = types.structure("list_head", 16, [("next", pointer, 0), ("prev", pointer, 8)])
    name = types.array(char, size, 512)
    types.structure("bpf_ksym", 544, [("start", size, 0), ("end", size, 8), ("name", name, 16), ("lnode", node, 528)])
    types.structure(
        "ftrace_ops",
        64,
        [("next", pointer, 8), ("trampoline", size, 24), ("trampoline_size", size, 32), ("list", node, 40)],
    )
    types.structure("kprobe_insn_page", 32, [("list", node, 0), ("insns", pointer, 16)])
    types.structure("kprobe_insn_cache", 64, [("pages", node, 32)])
    kept = Types(mapped.image)
    kept.__dict__["known"] = Btf(types.build())
    mapped.types = kept
    heads = {n: made.DATA + 0x200 + 0x40 * i for i, n in enumerate(
        ("bpf_kallsyms", "pack_list", "ftrace_ops_trampoline_list", "kprobe_insn_slots")
    )}  # fmt: skip
    lookup = mapped.image.symbols.lookup
    monkeypatch.setattr(mapped.image.symbols, "lookup", lambda n: heads.get(n) or lookup(n))
    m, base = mapped.machine, made.AREA

    def hang(head: int, at: int) -> None:
        m.put(head, struct.pack("<QQ", at, at))
        m.put(at, struct.pack("<QQ", head, head))

    program = m.take(
        struct.pack("<QQ", base + 0x10040 + 0x14, base + 0x10100) + b"bpf_prog_x\0".ljust(512, b"\0") + bytes(16)
    )
    hang(heads["bpf_kallsyms"], program + 528)
    pack = m.take(bytes(16) + struct.pack("<Q", base + 0x20000))
    hang(heads["pack_list"], pack)
    ops = m.take(bytes(24) + struct.pack("<QQ", base + 0x30000, 0x120) + bytes(16))
    hang(heads["ftrace_ops_trampoline_list"], ops + 40)
    page = m.take(bytes(16) + struct.pack("<Q", base + 0x40000))
    hang(heads["kprobe_insn_slots"] + 32, page)
    # A program outside all packs: INT3 around it, its header in its first chunk.
    m.put(base + 0x10000, b"\xcc" * 0x1000)
    m.put(base + 0x10040, struct.pack("<I", 0xC0) + b"\xcc" * 16 + b"\x90" * 0xAC)
    for at, pages in ((0x10000, 1), (0x20000, 4), (0x30000, 1), (0x40000, 1)):
        if at != 0x10000:
            m.put(base + at, b"\x90" * 0x1000 * pages)
        mapped.execute(base + at, pages)
    found, notes = mapped.areas()
    assert [(a.address - base, a.size, a.kind) for a in found if a.kind not in ("kernel", "free")] == [
        (0x10040, 0xC0, "bpf"), (0x20000, 0x4000, "bpf"), (0x30000, 0x1000, "ftrace"), (0x40000, 0x1000, "kprobe"),
    ]  # fmt: skip
    assert notes == []


def test_pages_of_thunks_are_known_by_their_form() -> None:
    """jmp rax and jmp r11 in the upper halves of cache lines, INT3 around them (its_init_thunk of 6.15 to 7.3)."""
    page = bytearray(b"\xcc" * 4096)
    page[0x3E:0x40], page[0x7D:0x80] = b"\xff\xe0", b"\x41\xff\xe3"
    assert _ITS_PAGE.fullmatch(page)
    # A call, a jump through memory, any other instruction: whose that is nobody knows.
    for other in (b"\xff\xd0", b"\xff\x25", b"\x90\xcc"):
        page[0x3E:0x40] = other
        assert not _ITS_PAGE.fullmatch(page)
