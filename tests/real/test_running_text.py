"""The patcher against the kernel itself: its text in QEMU, byte for byte; and patched kernels that boot.

Expected values are the memory of running, untouched kernels; the sites are decoded from their tables by
tables.py, not by the package under test.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import Cli, RealKernel
from .initramfs import REACHED
from .qemu import Capture, Machine, boot, capture, reaches
from .tables import FAMILIES, Entry, entries
from .test_sites import disassembled
from .vmlinux import Vmlinux

Get = Callable[[str], RealKernel]
Captured = Callable[[str, str, int], Capture]
Initrd = Callable[[int], Path]

CONFIGURATIONS = (
    ("686", "qemu32", 1),
    ("686", "Nehalem", 1),
    ("686-pae", "qemu32", 1),
    ("686-pae", "qemu32", 2),
)
FURTHER = (
    ("686", "pentium3", 1),
    ("686", "athlon", 1),
    ("686-pae", "Nehalem", 2),
    ("5.10-686", "qemu32", 1),
    ("5.10-686", "Nehalem", 1),
    ("5.10-686-pae", "qemu32", 2),
)
SIXTY_FOUR = (
    ("amd64", "qemu64", 1),
    ("amd64", "Nehalem", 2),
    ("5.10-amd64", "qemu64", 1),
    ("6.12-amd64", "qemu64", 1),
    ("6.12-amd64", "Nehalem", 2),
)


def patched_for(
    kernel: RealKernel, running: Capture, cpus: int, folder: Path, cli: Cli, *options: str, source: Path | None = None
) -> Path:
    """The kernel as `vmipatch patch` writes it for the features and number of CPUs of a capture."""
    out = folder / f"{kernel.name}-patched"
    features = running.write_features(folder / "features.txt")
    words = ("patch", source or kernel.image, "-o", out, "--target", "native", "--features", features)
    done = cli.run(*words, "--cpus", cpus, *options)
    assert done.returncode == 0, done.stderr
    return out


def wrong_sites(kernel: RealKernel, patched: Vmlinux, running: Capture) -> tuple[dict[str, int], list[str]]:
    """Sites of each family inside the running text, and those whose patched bytes are not the running ones."""
    text = patched.bytes_of(".text")
    assert len(text) == len(running.text)
    counts, wrong = dict.fromkeys(FAMILIES, 0), []
    for family in FAMILIES:
        for entry in entries(kernel.vmlinux, family, kernel.name):
            start = entry.address - running.base
            end = start + entry.length
            if not 0 <= start < end <= len(text):
                continue  # in .init.text, which a running kernel has freed
            counts[family] += 1
            if text[start:end] != running.text[start:end]:
                ours, theirs = text[start:end].hex(), running.text[start:end].hex()
                wrong.append(f"{family} {entry.address:#x}: patched {ours}, running {theirs}")
    return counts, wrong


@pytest.mark.parametrize(("name", "cpu", "cpus"), [*CONFIGURATIONS, *FURTHER])
def test_patched_text_is_the_running_text(
    name: str, cpu: str, cpus: int, real_kernel: Get, captured: Captured, cli: Cli, tmp_path: Path
) -> None:
    kernel, running = real_kernel(name), captured(name, cpu, cpus)
    patched = Vmlinux(patched_for(kernel, running, cpus, tmp_path, cli))
    counts, wrong = wrong_sites(kernel, patched, running)
    assert all(counts.values()), counts
    assert wrong == []
    # The comparison is not of two untouched files: the kernel rewrote thousands of bytes at its sites.
    before = kernel.vmlinux.bytes_of(".text")
    rewritten = sum(a != b for a, b in zip(before, patched.bytes_of(".text"), strict=True))
    assert rewritten > 2000


@pytest.mark.parametrize(("name", "cpu", "cpus"), SIXTY_FOUR)
def test_patched_text_is_the_running_text_in_64_bits(
    name: str, cpu: str, cpus: int, real_kernel: Get, captured: Captured, cli: Cli, tmp_path: Path
) -> None:
    """The same; a site that holds a return or an indirect jump of the retpoline families is theirs to rewrite.

    Sealed: without a seal the calls through a pointer that the kernel's own patcher insists on finding are left.
    """
    kernel, running = real_kernel(name), captured(name, cpu, cpus)
    patched = Vmlinux(patched_for(kernel, running, cpus, tmp_path, cli, "--seal"))
    others = sorted(self_relative(kernel.vmlinux, ".return_sites") | self_relative(kernel.vmlinux, ".retpoline_sites"))
    _counts, wrong = wrong_sites(kernel, patched, running)
    mine = []
    for text in wrong:
        match = re.match(r"\w+ (0x\w+): patched (\w+),", text)
        assert match is not None
        start, length = int(match[1], 16), len(match[2]) // 2
        if not any(start <= other < start + length for other in others):
            mine.append(text)
    assert mine == []
    assert len(wrong) <= 64


def self_relative(vmlinux: Vmlinux, name: str) -> set[int]:
    if name not in vmlinux.sections:
        return set()
    section = vmlinux.sections[name]
    data = vmlinux.bytes_of(name)
    starts = range(0, len(data), 4)
    offsets = (int.from_bytes(data[at : at + 4], "little", signed=True) for at in starts)
    return {section.address + at + offset for at, offset in zip(starts, offsets, strict=True)}


def test_two_captures_of_one_configuration_are_equal(real_kernel: Get, captured: Captured, initrd: Initrd) -> None:
    """The oracle is steady, so that a difference is the patcher's fault."""
    kernel, first = real_kernel("686-pae"), captured("686-pae", "qemu32", 2)
    again = capture(Machine(kernel.image, initrd(32), 32, "qemu32", 2), kernel.vmlinux)
    assert again.features == first.features
    sites = [entry for family in FAMILIES for entry in entries(kernel.vmlinux, family, kernel.name)]
    for entry in sites:
        start = entry.address - first.base
        assert first.text[start : start + entry.length] == again.text[start : start + entry.length]


def test_diff_finds_nothing_wrong_and_restore_gives_the_original_back(
    real_kernel: Get, captured: Captured, cli: Cli, tmp_path: Path
) -> None:
    kernel, running = real_kernel("686"), captured("686", "qemu32", 1)
    before = hashlib.sha256(kernel.image.read_bytes()).hexdigest()
    patched = patched_for(kernel, running, 1, tmp_path, cli)
    assert hashlib.sha256(kernel.image.read_bytes()).hexdigest() == before
    compared = cli.run("diff", kernel.image, patched)
    assert compared.returncode == 0, compared.stdout[-2000:] + compared.stderr
    restored = cli.run("restore", patched)
    assert restored.returncode == 0, restored.stderr
    assert hashlib.sha256(patched.read_bytes()).hexdigest() == before


def test_restore_of_an_elf_patched_in_place(real_kernel: Get, captured: Captured, cli: Cli, tmp_path: Path) -> None:
    kernel, running = real_kernel("686-pae"), captured("686-pae", "qemu32", 1)
    target = tmp_path / "vmlinux"
    target.write_bytes(kernel.elf.read_bytes())
    features = running.write_features(tmp_path / "features.txt")
    done = cli.run("patch", target, "--in-place", "--target", "native", "--features", features, "--cpus", 1, "--seal")
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() != kernel.elf.read_bytes()
    assert cli.run("restore", target).returncode == 0
    assert target.read_bytes() == kernel.elf.read_bytes()


@dataclass(frozen=True)
class Zeroed:
    """An image with pv_ops slots set to zero."""

    path: Path
    slots: tuple[int, ...]


def zero_slots(kernel: RealKernel, image: Path, sites: list[Entry], target: Path) -> Zeroed:
    """Zero every slot that objdump sees one of `sites` call through, in the file's own pv_ops."""
    slots = set()
    for text in disassembled(kernel.vmlinux, sites, target.parent):
        operand = re.search(r"call\s+\*0x([0-9a-f]+)$", text.strip())
        assert operand is not None, text
        slots.add(int(operand[1], 16))
    base = kernel.vmlinux.exports["pv_ops"]
    assert all(base <= slot < base + 0x400 for slot in slots)
    data = bytearray(image.read_bytes())
    for slot in slots:
        start = kernel.vmlinux.offset(slot)
        data[start : start + 4] = bytes(4)
    target.write_bytes(data)
    return Zeroed(target, tuple(sorted(slots)))


def test_patched_and_sealed_boots_without_the_slots_that_its_sites_no_longer_read(
    real_kernel: Get, captured: Captured, initrd: Initrd, cli: Cli, tmp_path: Path
) -> None:
    kernel, running = real_kernel("686-pae"), captured("686-pae", "qemu32", 1)
    sites = entries(kernel.vmlinux, "parainstructions", kernel.name)
    sealed = patched_for(kernel, running, 1, tmp_path, cli, "--seal", source=kernel.elf)
    plain = Machine(sealed, initrd(32), 32, "qemu32")
    came, console = reaches(plain)
    assert came, f"patched and sealed, slots as they were: {console}"

    zeroed = zero_slots(kernel, sealed, sites, tmp_path / "sealed-zeroed")
    assert len(zeroed.slots) > 5
    came, console = reaches(Machine(zeroed.path, initrd(32), 32, "qemu32"))
    assert came, f"patched and sealed, {len(zeroed.slots)} slots zero: {console}"


def test_the_same_slots_zeroed_without_a_patch_do_not_boot(real_kernel: Get, initrd: Initrd, tmp_path: Path) -> None:
    kernel = real_kernel("686-pae")
    began = time.monotonic()
    came, console = reaches(Machine(kernel.elf, initrd(32), 32, "qemu32"))
    assert came, console
    # The crippled kernel hangs in silence: eight times what the whole one took is long enough to say so.
    patience = max(20.0, 8 * (time.monotonic() - began))
    sites = entries(kernel.vmlinux, "parainstructions", kernel.name)
    zeroed = zero_slots(kernel, kernel.elf, sites, tmp_path / "plain-zeroed")
    came, console = reaches(Machine(zeroed.path, initrd(32), 32, "qemu32", boot_timeout=patience))
    assert not came, console


@pytest.mark.parametrize(("name", "cpu", "cpus"), [("686-pae", "qemu32", 1), ("686-pae", "Nehalem", 2)])
def test_patched_and_not_sealed_boots_to_the_same_text(
    name: str, cpu: str, cpus: int, real_kernel: Get, captured: Captured, initrd: Initrd, cli: Cli, tmp_path: Path
) -> None:
    """The kernel patches again over what is patched already, and comes out where an unpatched boot does."""
    kernel, running = real_kernel(name), captured(name, cpu, cpus)
    patched = patched_for(kernel, running, cpus, tmp_path, cli, source=kernel.elf)
    # On a busy machine the clock watchdog may find the TSC of one boot unstable, and flip a static key for it.
    steady = "tsc=reliable"
    again = capture(Machine(patched, initrd(32), 32, cpu, cpus, append=steady), kernel.vmlinux)
    untouched = capture(Machine(kernel.elf, initrd(32), 32, cpu, cpus, append=steady), kernel.vmlinux)
    assert again.features == untouched.features
    differing = [at for at in range(len(again.text)) if again.text[at] != untouched.text[at]]
    assert [hex(at + again.base) for at in differing[:10]] == []


def test_the_init_of_ours_powers_the_machine_off(real_kernel: Get, initrd: Initrd) -> None:
    kernel = real_kernel("686-pae")
    with boot(Machine(kernel.image, initrd(32), 32, "qemu32")) as guest:
        guest.wait_for(REACHED)
        assert not guest.ended(2)
        guest.send_line()
        assert guest.ended(60)
