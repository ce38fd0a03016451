"""Memory dumps of real kernels under QEMU, and where things are in them.

What is read out of a core here is read without the package under test.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import initramfs, livepatch
from .initramfs import REACHED, REFUSED
from .modules import Modules
from .qemu import BootFailure, Guest, Machine, boot
from .vmlinux import Vmlinux

if TYPE_CHECKING:
    from .conftest import Cli, RealKernel


# Words that change nothing of the text and take seconds off a boot under TCG: no self-tests of ciphers, no wait for
# a random seed, no watch over the TSC, which a busy machine makes look unstable.
QUICK = "cryptomgr.notests random.trust_cpu=on tsc=reliable"


@dataclass(frozen=True)
class Run:
    """A boot: kernel, CPU model, number of CPUs, and whether KASLR may move the kernel.

    ``modules`` are loaded by init, with all that they need; ``livepatch`` is a function that a live patch replaces.
    ``long`` leaves the run to `./dev real --all`.
    """

    kernel: str
    cpu: str
    cpus: int
    kaslr: bool = False
    append: str = ""
    modules: tuple[str, ...] = ()
    livepatch: str = ""
    long: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        words = [word for word in self.append.split() if word not in QUICK.split()]
        return "-".join(
            (
                *(self.kernel, self.cpu, str(self.cpus)),
                *(("kaslr",) if self.kaslr else ()),
                *(re.sub(r"[^\w.,]+", "_", word)[:24] for word in words[:2]),
                *(("modules",) if self.modules else ()),
                *(("livepatch",) if self.livepatch else ()),
            )
        )


Dumped = Callable[[Run], Path]
Get = Callable[[str], "RealKernel"]
Initrd = Callable[[int], Path]

TRACING = (
    "trace_event=sched:sched_switch ftrace=function ftrace_filter=vfs_write,ksys_read "
    "kprobe_event=p:pa,vfs_read+0x24;p:pb,vfs_write;p:pc,vfs_read+"
)
# A conditional jump of vfs_read, which cannot be optimised: where it is, objdump says of each kernel.
TRACED_686 = Run("686", "qemu32", 1, append=TRACING + "0x2c")
TRACED_AMD64 = Run("amd64", "qemu64", 1, append=TRACING + "0x2b")
# The same of 7.2 and 7.3, whose vfs_read begins alike: `mov %rbx,0x68(%rsp)` at 0x10, a conditional jump at 0x2d.
TRACING_7 = TRACING.replace("0x24", "0x10") + "0x2d"


def take(kernel: RealKernel, initrd: Initrd, run: Run, target: Path) -> None:
    """Boot, wait for init and for the text to settle, and write the memory as an ELF core.

    A guest that dies is booted once more, and its last words are printed: QEMU's TCG on several threads now and then
    loses a race that the kernel takes for a fatal fault (6.12 in run_timer_softirq, on a busy machine).
    """
    try:
        _boot_and_dump(kernel, initrd, run, {target: {}})
    except BootFailure as failure:
        print(f"{run}: booted again, for {failure}")
        _boot_and_dump(kernel, initrd, run, {target: {}})


def _boot_and_dump(kernel: RealKernel, initrd: Initrd, run: Run, targets: dict[Path, dict[str, Any]]) -> None:
    """One boot; each target with its options of ``Guest.dump``."""
    bits, board = kernel.kernel.bits, kernel.kernel.board
    memory = (128 if bits == 32 else 256) + (256 if run.modules else 0)
    root = _root(kernel, initrd, run)
    words = (kernel.image, root, bits, run.cpu, run.cpus, run.append)
    machine = Machine(*words, memory=memory, kaslr=run.kaslr, board=board)
    with boot(machine) as guest:
        guest.wait_for(REACHED)
        refused = [line for line in guest.console.splitlines() if line.startswith(REFUSED)]
        assert refused == [], f"{run}: {refused}"
        settle(kernel, guest, memory)
        for target, options in targets.items():
            guest.dump(target, **options)


def _root(kernel: RealKernel, initrd: Initrd, run: Run) -> Path:
    """What init is in: the plain initramfs, one with modules, or a disk for a board that takes no initramfs."""
    bits = kernel.kernel.bits
    plain = initrd(bits)
    if kernel.kernel.board != "pc":
        return initramfs.write_disk(plain.parent)
    loaded = Modules(kernel.kernel.modules()).with_dependencies(run.modules) if run.modules else []
    if run.livepatch:
        loaded.append((livepatch.NAME, livepatch.build(kernel.kernel, run.livepatch, plain.parent)))
    return initramfs.write(plain.parent, bits, modules=loaded, name=str(run)) if loaded else plain


def settle(kernel: RealKernel, guest: Guest, memory: int) -> None:
    """Stop the guest once its text does not change any more, wherever in its ``memory`` (MiB) it is."""
    if kernel.vmlinux.sections:
        guest.settled(place_of(kernel.vmlinux, guest.physical(0, memory << 20)), kernel.vmlinux.text.size)
    else:
        guest.settled(*read_only(kernel.vmlinux, guest.console))


def read_only(vmlinux: Vmlinux, console: str) -> tuple[int, int]:
    """Physical address and size of text and constants of a kernel that was not moved and has no section headers.

    Evidence: the segment that is not per-CPU, and what mark_rodata_ro (arch/x86/mm/init_64.c) says that it protects.
    """
    said = re.search(r"Write protecting the kernel read-only data: (\d+)k", console)
    assert said is not None, "the kernel did not say what it protects"
    return min(physical for virtual, physical, _, _ in vmlinux.loads if virtual), int(said[1]) << 10


def place_of(vmlinux: Vmlinux, memory: bytes) -> int:
    """The physical address of the text: before the banner, on a page boundary, and much like the text on disk."""
    rodata, text = vmlinux.sections[".rodata"], vmlinux.text
    data, disk = vmlinux.bytes_of(".rodata"), vmlinux.bytes_of(".text")[: 1 << 16]
    at = data.index(b"Linux version ")
    banner = data[at : data.index(b"\n", at)]
    hit = memory.find(banner)
    while hit >= 0:
        start = hit - at - (rodata.address - text.address)
        if start >= 0 and not start % 4096:
            there = memory[start : start + len(disk)]
            if sum(a == b for a, b in zip(disk, there, strict=False)) > len(disk) * 3 // 4:
                return start
        hit = memory.find(banner, hit + 1)
    raise AssertionError("the kernel is not in the guest's memory")


def formats(kernel: RealKernel, initrd: Initrd, run: Run, folder: Path) -> dict[str, Path]:
    """One moment of a machine in several forms: an ELF core, one with virtual addresses, and a compressed kdump."""
    options: dict[str, dict[str, Any]] = {"core": {}, "paged": {"paging": True}, "kdump": {"form": "kdump-zlib"}}
    _boot_and_dump(kernel, initrd, run, {folder / name: chosen for name, chosen in options.items()})
    return {name: folder / name for name in options}


def explained(cli: Cli, kernel: RealKernel, dump: Path, *options: object, status: int = 0) -> dict[str, Any]:
    """What ``vmipatch explain --json`` says of a dump; its exit status must be the one given."""
    done = cli.run("explain", kernel.image, "--memory", dump, "--json", *options)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def unexplained_bytes(answer: dict[str, Any]) -> set[int]:
    """The virtual address of every byte without a cause."""
    return {u["address"] + i for u in answer["unexplained"] for i in range(u["length"])}


def offset_of_zero(core: bytes) -> int:
    """The offset in a core of QEMU's (64-bit ELF) of physical address 0: its first PT_LOAD begins there."""
    table, count = int.from_bytes(core[32:40], "little"), int.from_bytes(core[56:58], "little")
    for at in range(table, table + 56 * count, 56):
        kind, _, offset, _, physical = struct.unpack_from("<IIQQQ", core, at)
        if kind == 1 and physical == 0:
            return int(offset)
    raise AssertionError("the core has no segment at physical 0")


def place_in(kernel: RealKernel, core: Path) -> int:
    """The offset of the text in a core of a kernel that was not moved."""
    with core.open("rb") as file:
        head = file.read(4096)
    return offset_of_zero(head) + kernel.vmlinux.physical(kernel.vmlinux.text.address)


def text_in(kernel: RealKernel, core: Path) -> bytes:
    """The running text in a core of a kernel that was not moved."""
    with core.open("rb") as file:
        file.seek(place_in(kernel, core))
        return file.read(kernel.vmlinux.text.size)


def physical_of(vmlinux: Vmlinux, bits: int, virtual: int) -> int:
    """The physical address of a virtual one of a kernel that was not moved: the direct mapping, or the image's."""
    if bits == 32:
        return virtual - 0xC0000000
    # Documentation/arch/x86/x86_64/mm.rst: the direct mapping without KASLR, four levels.
    return virtual - (0xFFFFFFFF80000000 if virtual >= 0xFFFFFFFF80000000 else 0xFFFF888000000000)
