"""FineIBT and kCFI explained: a kernel that is built for it here, booted in every form that it gives its calls.

No distribution's kernel on these CPUs has them. QEMU's TCG has no IBT, which the forms do not need: the kernel takes
the one that it is told (cfi=, arch/x86/kernel/alternative.c), and an ENDBR is a nop.

The oracles are the kernel's own words, which name form and seed (cfi=debug), its text in memory against the ELF, and
where .cfi_sites says that preambles are.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import dumps, initramfs
from .built import BuiltKernel
from .conftest import Cli, RealKernel, _need
from .dumps import explained, place_in, text_in, unexplained_bytes
from .initramfs import REACHED
from .packages import RegistryAway
from .qemu import BootFailure, Machine, boot

pytestmark = pytest.mark.long

KERNEL = BuiltKernel(
    "7.3-fineibt",
    64,
    source=r"linux-source-7\.3",
    suite="experimental",
    options=(
        *("64BIT", "EXPERT", "KERNEL_GZIP", "PRINTK", "BUG", "KALLSYMS", "JUMP_LABEL"),
        *("TTY", "SERIAL_8250", "SERIAL_8250_CONSOLE", "BLK_DEV_INITRD", "BINFMT_ELF"),
        *("CPU_MITIGATIONS", "MITIGATION_RETPOLINE", "MITIGATION_RETHUNK"),
        *("CFI", "X86_KERNEL_IBT", "FINEIBT", "FINEIBT_BHI"),
    ),
)
MEMORY = 128  # MiB
BOOTS = 6  # before a kernel that stops is taken at its word
BEFORE = 16  # bytes in front of a function that a preamble and its padding take


@dataclass(frozen=True)
class Form:
    """What the kernel is told, what it then says of itself, and what is to be found in its text."""

    told: str
    says: str
    found: str
    append: str = ""

    def __str__(self) -> str:
        return "-".join((self.told, *self.append.split()))


FINEIBT = Form("fineibt", "Using FineIBT CFI", "fineibt")
FORMS = (
    FINEIBT,
    Form("fineibt,norand", "Using FineIBT CFI", "fineibt"),
    Form("fineibt,warn", "Using FineIBT CFI", "fineibt"),
    Form("fineibt,paranoid", "Using paranoid FineIBT CFI", "paranoid fineibt"),
    Form("fineibt,bhi", "Using FineIBT+BHI CFI", "fineibt with BHI"),
    Form("fineibt,bhi,warn", "Using FineIBT+BHI CFI", "fineibt with BHI permissive"),
    Form("fineibt,paranoid,bhi", "Using paranoid FineIBT+BHI CFI", "paranoid fineibt with BHI"),
    Form("fineibt,paranoid,bhi", "Using paranoid FineIBT+BHI CFI", "paranoid fineibt with BHI", "mitigations=off"),
    Form("kcfi", "CFI: Using rehashed retpoline kCFI", "kcfi"),
    Form("kcfi,norand", "CFI: Using retpoline kCFI", "kcfi"),
    Form("off", "CFI: disabled", "off"),
)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> RealKernel:
    _need("readelf", KERNEL.qemu)
    try:
        return RealKernel(KERNEL, KERNEL.fetch(), tmp_path_factory.mktemp("fineibt"))
    except RegistryAway as away:
        pytest.skip(f"kernel {KERNEL.name}: {away}")


def booted(kernel: RealKernel, form: Form, folder: Path) -> tuple[Path, str]:
    """The memory of a boot as an ELF core, and its console.

    7.3-rc7 writes a caller with a hash of the template's in it, allows interrupts, and then writes the right hash
    (cfi_rewrite_callers): a clock's interrupt in between takes that caller, and the kernel stops. It is booted again.
    """
    words = f"cfi={form.told},debug {form.append}".strip()
    initrd = initramfs.write(folder, 64)
    machine = Machine(kernel.image, initrd, 64, "max", append=words, memory=MEMORY)
    failures: list[BootFailure] = []
    while len(failures) < BOOTS:
        try:
            with boot(machine) as guest:
                guest.wait_for(REACHED)
                dumps.settle(kernel, guest, MEMORY)
                guest.dump(folder / "core")
                return folder / "core", guest.console
        except BootFailure as failure:
            print(f"{form}: booted again, for {failure}")
            failures.append(failure)
    raise failures[-1]


def preambles(kernel: RealKernel) -> list[int]:
    """The virtual address of every preamble, as .cfi_sites lists them: distances from the entries themselves."""
    section = kernel.vmlinux.sections[".cfi_sites"]
    entries = struct.iter_unpack("<i", kernel.vmlinux.bytes_of(".cfi_sites"))
    return [section.address + 4 * n + distance for n, (distance,) in enumerate(entries)]


def changed(kernel: RealKernel, core: Path) -> set[int]:
    """The virtual address of every byte of the text that is not as in the ELF."""
    disk, now = kernel.vmlinux.bytes_of(".text"), text_in(kernel, core)
    return {kernel.vmlinux.text.address + n for n, (a, b) in enumerate(zip(disk, now, strict=True)) if a != b}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_byte_is_unexplained_and_form_and_seed_are_the_kernels(
    form: Form, kernel: RealKernel, cli: Cli, tmp_path: Path
) -> None:
    core, console = booted(kernel, form, tmp_path)
    assert form.says in console
    answer = explained(cli, kernel, core)
    assert answer["unexplained"] == []
    bytes_ = answer["bytes"]
    assert bytes_["total"] == kernel.vmlinux.text.size
    rewritten = changed(kernel, core)
    assert bytes_["explained"] == len(rewritten) > 10_000
    # What the kernel printed of its seed; without one hashes stay as they were compiled.
    _, said, seed = console.partition("CFI: cfi_seed: ")
    hashes = f"seed {seed.split()[0]}" if said else "hashes as on disk"
    assert bool(said) == ("norand" not in form.told and form.told != "off")
    assert f"checks of indirect calls: {form.found}, {hashes}, as the text says" in answer["evidence"]
    # What became of the preambles: nothing, hashes alone, or another form.
    places = preambles(kernel)
    assert len(places) > 1000
    touched = {a + n for a in places for n in range(BEFORE)} & rewritten
    print(f"{form}: {len(touched)} bytes of {len(places)} preambles, {answer['by_cause']}")
    if form.told == "off":
        assert touched == set()
    elif "kcfi" in form.told:
        # __cfi_NAME: mov REGISTER, hash; and nops up to the function.
        assert touched <= {a + n for a in places for n in range(1, 5)}
        now, start = text_in(kernel, core), kernel.vmlinux.text.address
        # Of a sealed function the hash is gone, whatever the seed.
        assert said or {now[a - start] for a in touched} == {0}
        assert not said or len(touched) > 3 * len(places)
    else:
        assert len(touched) > 8 * len(places)
    # Callers are of this family in every form, as the first two bytes of each are when nothing is checked.
    assert answer["by_cause"]["cfi_sites"] > 2 * 200


def test_a_flipped_byte_of_a_preamble_is_the_only_one(kernel: RealKernel, cli: Cli, tmp_path: Path) -> None:
    core, _ = booted(kernel, FINEIBT, tmp_path)
    at, text = place_in(kernel, core), kernel.vmlinux.text
    rewritten = sorted({a + n for a in preambles(kernel) for n in range(BEFORE)} & changed(kernel, core))
    memory = bytearray(core.read_bytes())
    damaged = tmp_path / "flipped.core"
    for place in random.Random(62).sample(rewritten, 6):
        memory[at + place - text.address] ^= 0x10
        damaged.write_bytes(memory)
        assert unexplained_bytes(explained(cli, kernel, damaged, status=1)) == {place}
        memory[at + place - text.address] ^= 0x10
