"""Whole kernels of 2.6.22 to 2.6.38 in every configuration that moves a slot: each site named, and patched natively.

The native code is that of the DEF_NATIVE lines of arch/i386/kernel/paravirt.c (2.6.22, 2.6.23),
arch/x86/kernel/paravirt_32.c (2.6.24) and paravirt_patch_32.c (2.6.25 to 2.6.33), assembled by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.annotate.paravirt_words import Words, words
from tests.barekernel import bare
from vmipatch.annotate import scan
from vmipatch.image import open_image
from vmipatch.patch import Native, from_spec, plan

NATIVE = {
    "irq_disable": "FA", "irq_enable": "FB", "save_fl": "9C58", "restore_fl": "509D", "iret": "CF",
    "irq_enable_sysexit": "FB0F35", "irq_enable_syscall_ret": "FB0F35", "clts": "0F06", "read_cr2": "0F20D0",
    "read_cr3": "0F20D8", "write_cr3": "0F22D8", "read_tsc": "0F31",
}  # fmt: skip


@pytest.mark.parametrize("row", words(), ids=lambda row: f"{row.release} {row.configuration}".strip())
def test_every_layout_is_named_and_patched(row: Words, tmp_path: Path) -> None:
    made = bare(row.release, row)
    (tmp_path / "vmlinux").write_bytes(made.elf())
    image = open_image(tmp_path / "vmlinux")
    found = scan(image)
    assert found.findings == ()
    for family, sites in made.sites.items():
        assert [(s.address, s.length) for s in found.of(family)] == sites, family
    assert [s.op for s in found.of("parainstructions")] == made.ops
    changes = plan(image, found, Native(from_spec("pentium3", image.version), 2)).changes()
    inlined = set()
    for (address, length), op in zip(made.sites["parainstructions"], made.ops, strict=True):
        member = op.rpartition(".")[2]
        if member in NATIVE:
            code = bytes.fromhex(NATIVE[member])
            held = image.read(address, length)
            after = bytes(changes[a][1] if (a := address + n) in changes else held[n] for n in range(length))
            assert after[: len(code)] == code, op
            inlined.add(member)
    assert len(inlined) >= 6
