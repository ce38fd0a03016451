"""Sealed amd64 kernels: they boot, and their text is what an ordinary boot on that CPU leaves.

Expected values are the memory of ordinary boots of the untouched kernel, on the same CPU model. Kernels are entered
at their PVH note, which takes no decompression, or as bzImages, which takes the decompressor's own randomisation.
"""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmipatch.annotate import jumplabels, staticcalls
from vmipatch.image import open_image

from .conftest import Cli, RealKernel
from .dumps import QUICK, place_of
from .initramfs import REACHED
from .qemu import Capture, Machine, boot, capture
from .tables import entries
from .test_running_text import self_relative
from .vmlinux import Vmlinux

Get = Callable[[str], RealKernel]
Subjects = Callable[..., "Subject"]
Initrd = Callable[[int], Path]

KERNELS = ("6.12-amd64", "6.18-alpine", "7.2-amd64", "7.3-amd64")
CPUS = ("EPYC-Milan", "Skylake-Client", "Icelake-Server")
QUICKLY = (("6.12-amd64", "EPYC-Milan"), ("7.3-amd64", "EPYC-Milan"))
SLIDES, ATTEMPTS = 4, 8


@dataclass(frozen=True)
class Subject:
    """A kernel, a CPU model, and what an ordinary boot of the one on the other left: entered as an ELF or a bzImage."""

    kernel: RealKernel
    cpu: str
    ordinary: Capture
    features: Path
    boot_time: frozenset[int]  # addresses of the bytes of all sites that the boot writes
    run_time: frozenset[int]  # and of all that a running kernel rewrites
    append: str

    def machine(self, kernel: Path, initrd: Initrd, *, kaslr: bool = False) -> Machine:
        return Machine(kernel, initrd(64), 64, self.cpu, append=self.append, kaslr=kaslr)


@pytest.fixture(scope="module")
def subject(real_kernel: Get, initrd: Initrd, tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    had: dict[tuple[str, str, bool, str], Subject] = {}
    found: dict[str, tuple[frozenset[int], frozenset[int]]] = {}

    def get(name: str, cpu: str, *, packed: bool = False, append: str = QUICK) -> Subject:
        """``packed``: entered by its decompressor, which goes over to five levels of paging where the CPU has them."""
        asked = name, cpu, packed, append
        if asked not in had:
            kernel = real_kernel(name)
            entered = kernel.image if packed else kernel.elf
            ordinary = capture(Machine(entered, initrd(64), 64, cpu, append=append), kernel.vmlinux)
            words = ordinary.write_features(tmp_path_factory.mktemp("features") / "features.txt")
            if name not in found:
                found[name] = sites(kernel)
            had[asked] = Subject(kernel, cpu, ordinary, words, *found[name], append)
        return had[asked]

    return get


def chosen() -> list[object]:
    """Every kernel on every CPU model; `./dev real` takes the pairs of QUICKLY."""
    pairs = itertools.product(KERNELS, CPUS)
    return [
        pytest.param(kernel, cpu, id=f"{kernel}-{cpu}", marks=[] if (kernel, cpu) in QUICKLY else [pytest.mark.long])
        for kernel, cpu in pairs
    ]


def patched(cli: Cli, subject: Subject, source: Path, out: Path, *options: str, status: int = 0) -> str:
    """`vmipatch patch` for the words of the ordinary boot; what it said on standard error."""
    words = ("patch", source, "-o", out, "--features", subject.features, "--cpus", 1)
    done = cli.run(*words, *options)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr
    return done.stderr


def sites(kernel: RealKernel) -> tuple[frozenset[int], frozenset[int]]:
    """Addresses of the bytes of all boot-time sites, and of all that differ from boot to boot; no byte is both.

    The boot's are read from the ELF's sections here. A running kernel's tables have no section of their own: where
    their sites are, the package says; a place that is wrong could hide itself alone.
    """
    vmlinux = kernel.vmlinux
    starts = [(entry.address, entry.length) for entry in entries(vmlinux, "altinstructions", kernel.name)]
    starts += [(entry.address, entry.length) for entry in entries(vmlinux, "smp_locks", kernel.name)]
    for section, length in ((".return_sites", 5), (".retpoline_sites", 5), (".ibt_endbr_seal", 4)):
        starts += [(address, length) for address in self_relative(vmlinux, section)]
    boot_time = {at for start, length in starts for at in range(start, start + length)}
    image = open_image(kernel.elf)
    found = [*staticcalls.scan(image)[1], *jumplabels.scan(image)[1]]
    run_time = {at for site in found for at in range(site.address, site.address + site.length)}
    # Addresses and sizes of tables that each boot allocates anew (arch/x86/include/asm/runtime-const.h).
    for name in vmlinux.sections:
        if name.startswith(("runtime_ptr_", "runtime_shift_", "runtime_mask_")):
            length = {"ptr": 8, "shift": 1, "mask": 4}[name.split("_")[1]]
            run_time.update(at + i for at in self_relative(vmlinux, name) for i in range(length))
    return frozenset(boot_time - run_time), frozenset(run_time)


@pytest.mark.parametrize(("name", "cpu"), chosen())
def test_a_sealed_kernel_has_the_text_of_an_ordinary_boot(
    name: str, cpu: str, subject: Subjects, initrd: Initrd, cli: Cli, tmp_path: Path
) -> None:
    """At every boot-time site the file has what the running kernel has; booted, it still has, everywhere."""
    equal_when_sealed(subject(name, cpu), initrd, cli, tmp_path)


COUNTED = f"retbleed=stuff spectre_v2=retpoline {QUICK}"


@pytest.mark.parametrize("name", ["7.3-amd64"])
def test_a_kernel_that_counts_calls_is_sealed_so(
    name: str, subject: Subjects, initrd: Initrd, cli: Cli, tmp_path: Path
) -> None:
    """Call depth tracking: calls go to the padding before functions, and the kernel finds them there."""
    given = subject(name, "Skylake-Server", append=COUNTED)
    with_padding = sum(a != b for a, b in zip(given.kernel.vmlinux.bytes_of(".text"), given.ordinary.text, strict=True))
    assert with_padding > 500_000
    equal_when_sealed(given, initrd, cli, tmp_path)


def test_counting_that_starts_too_early_is_refused(subject: Subjects, cli: Cli, tmp_path: Path) -> None:
    """6.12's first calls run at physical addresses, from where its per-CPU data cannot be reached."""
    given, out = subject("6.12-amd64", "Skylake-Server", append=COUNTED), tmp_path / "vmlinux"
    said = patched(cli, given, given.kernel.elf, out, "--seal", status=2)
    assert "cannot be sealed: calls that count would run before" in said
    assert not out.exists()


def equal_when_sealed(given: Subject, initrd: Initrd, cli: Cli, tmp_path: Path) -> None:
    kernel, ordinary = given.kernel, given.ordinary
    out = tmp_path / "vmlinux"
    patched(cli, given, kernel.elf, out, "--seal")
    base, disk = ordinary.base, kernel.vmlinux.bytes_of(".text")
    places = [address - base for address in sorted(given.boot_time) if 0 <= address - base < len(ordinary.text)]
    # This is no comparison of two untouched texts.
    assert sum(disk[at] != ordinary.text[at] for at in places) > 100_000
    written = Vmlinux(out).bytes_of(".text")
    assert [hex(base + at) for at in places if written[at] != ordinary.text[at]][:20] == []
    sealed = capture(given.machine(out, initrd), kernel.vmlinux)
    assert sealed.features == ordinary.features
    differing = [at for at in range(len(sealed.text)) if sealed.text[at] != ordinary.text[at]]
    assert [hex(base + at) for at in differing if base + at not in given.run_time][:20] == []


@pytest.mark.parametrize(("name", "cpu"), chosen())
def test_an_unsealed_kernel_boots_or_is_refused(
    name: str, cpu: str, subject: Subjects, initrd: Initrd, cli: Cli, tmp_path: Path
) -> None:
    given = subject(name, cpu)
    out = tmp_path / "vmlinux"
    done = cli.run("patch", given.kernel.elf, "-o", out, "--features", given.features, "--cpus", 1)
    if done.returncode == 2:
        assert not out.exists()
        assert done.stderr.strip()
        return
    assert done.returncode == 0, done.stderr
    again = capture(given.machine(out, initrd), given.kernel.vmlinux)
    base = again.base
    differing = [at for at in range(len(again.text)) if again.text[at] != given.ordinary.text[at]]
    assert [hex(base + at) for at in differing if base + at not in given.run_time][:20] == []


@pytest.mark.parametrize(("name", "cpu"), chosen())
def test_a_repacked_kernel_boots_wherever_it_is_put(
    name: str, cpu: str, subject: Subjects, initrd: Initrd, cli: Cli, tmp_path: Path
) -> None:
    """Four places in memory, each with the text of the ordinary boot, moved."""
    given = subject(name, cpu, packed=True)
    out, elf = tmp_path / "bzImage", tmp_path / "vmlinux"
    words = ("patch", given.kernel.image, "-o", out, "--features", given.features, "--cpus", 1, "--seal", "--repack")
    done = cli.run(*words)
    assert done.returncode == 0, done.stderr
    patched(cli, given, given.kernel.elf, elf, "--seal")
    expected = Vmlinux(elf)
    base = expected.text.address
    places: set[int] = set()
    for _ in range(ATTEMPTS):
        if len(places) == SLIDES:
            break
        machine = given.machine(out, initrd, kaslr=True)
        with boot(machine) as guest:
            guest.wait_for(REACHED)
            guest.stop()
            place = place_of(expected, guest.physical(0, machine.memory << 20))
            if place in places:
                continue
            places.add(place)
            text = guest.physical(place, expected.text.size)
        left = apart(given.ordinary.text, text)
        assert [hex(base + at) for at in sorted(left) if base + at not in given.run_time][:20] == [], hex(place)
    print(f"{name} on {cpu}: {sorted(map(hex, places))}")
    assert len(places) == SLIDES, "the decompressor did not move the kernel: this test has shown too little"


def apart(expected: bytes, found: bytes) -> set[int]:
    """Offsets of bytes that differ, and are in no 32-bit field that is the slide apart, in either direction.

    The slide is what most fields are apart. Fields relative to the text that name per-CPU data, which is not moved,
    lose what others gain (arch/x86/tools/relocs.c, `inverse` relocations).
    """
    differ = [at for at, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    difference: Counter[int] = Counter()
    spans: list[tuple[int, int]] = []
    for at in differ:
        for start in range(max(0, at - 3), at + 1):
            (old,), (new,) = struct.unpack_from("<I", expected, start), struct.unpack_from("<I", found, start)
            change = (new - old) & 0xFFFFFFFF
            difference[change] += 1
            spans.append((start, change))
    if not difference:
        return set()
    ((slide, _),) = difference.most_common(1)
    either = {slide, -slide & 0xFFFFFFFF}
    moved = {at for start, change in spans if change in either for at in range(start, start + 4)}
    return set(differ) - moved
