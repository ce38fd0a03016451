"""Runs the command line in this process, and kernels with names that do harm to careless reports."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.explain import running as made
from tests.kernelmaker import KernelMaker
from vmipatch.cli import main

HOSTILE_FILE = os.fsdecode(b"a \"b'\\<script>\x01\n\xff\xed\xa0\x80.elf")
HOSTILE_SYMBOL = b"<script>alert(1)</script>\"'&\\\x07\xff\xfe\xc3\x28"


CALL_AT = 30
"""Where the paravirt call of the hostile kernel stands, from its text's start."""


class Done(NamedTuple):
    """How a command ended, and what it wrote."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out, parse_constant=_refuse)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


class Commands:
    """``vmipatch`` as a function."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *words: object) -> Done:
        self._monkeypatch.setattr(sys, "argv", ["vmipatch", *map(str, words)])
        self._capsys.readouterr()
        status: object = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        assert isinstance(status, int) or status is None
        out, err = self._capsys.readouterr()
        return Done(status or 0, out, err)


def hostile_kernel(folder: Path, bits: int, release: str = "6.1.0") -> Path:
    """A kernel with a lock, an alternative and a paravirt site, and with names nobody should trust."""
    maker = KernelMaker(bits=bits, release=release)
    maker.code(b"\x90" * 16)
    slot = maker.pv_ops()["flush_tlb_user"] if not release.startswith("2.") else maker.word(maker.high + 0xC1000000)
    lock = maker.code(b"\xf0\xff\x00" + b"\xc3", "HOSTILE_HOSTILE_HOSTILE_HOSTILE_HOS")
    site = maker.code(b"\x90" * 5 + b"\xc3", 'f"quoted"')
    if bits == 32:
        call = maker.code(b"\xff\x15" + slot.to_bytes(4, "little") + b"\xc3", "caller")
    else:
        # call *disp32(%rip)
        call = maker.code(b"", None)
        maker.code(b"\xff\x15" + ((slot - call - 6) & 0xFFFFFFFF).to_bytes(4, "little") + b"\xc3", "caller")
    replacement = maker.replacement(b"\x0f\xae\xf0")
    old = release.startswith("2.")
    maker.locks("abs32" if old else "rel32", [lock])
    maker.alternatives("abs32-u8" if old else "rel12", [(site, replacement, 26, 5, 3, {})])
    maker.paravirt([(call, 0, 6, 0)])
    data = maker.build()
    name = b"HOSTILE_HOSTILE_HOSTILE_HOSTILE_HOS"
    assert len(HOSTILE_SYMBOL) <= len(name)
    assert name in data
    path = folder / HOSTILE_FILE
    path.write_bytes(data.replace(name, HOSTILE_SYMBOL.ljust(len(name), b"\x7f")))
    return path


def running_kernel(folder: Path, **machine: Any) -> tuple[Path, Path]:
    """The made-up kernel of the tests of explain under a bad name, and a dump with unexplained bytes in it."""
    kernel = made.build(folder)
    renamed = folder / HOSTILE_FILE
    kernel.rename(renamed)
    memory = made.Machine(**machine)
    memory.put(made.function(9) + made.OFF_LOCK, b"\xf0" if memory.one_cpu else b"\x3e")
    memory.put(made.function(12), b"\xe8\x01\x02\x03\x04")
    memory.put(made.function(20) + made.OFF_TARGET, b"\xcc")
    dump = folder / ("dump " + HOSTILE_FILE)
    dump.write_bytes(memory.bytes)
    return renamed, dump
