"""Memory dumps of real kernels under QEMU, and where things are in them.

What is read out of a core here is read without the package under test.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .initramfs import REACHED
from .qemu import BootFailure, Guest, Machine, boot
from .vmlinux import Vmlinux

if TYPE_CHECKING:
    from .conftest import Cli, RealKernel


@dataclass(frozen=True)
class Run:
    """A boot: kernel, CPU model, number of CPUs, and whether KASLR may move the kernel."""

    kernel: str
    cpu: str
    cpus: int
    kaslr: bool = False
    append: str = ""

    def __str__(self) -> str:
        return f"{self.kernel}-{self.cpu}-{self.cpus}{'-kaslr' if self.kaslr else ''}{'-more' if self.append else ''}"


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
    bits = kernel.kernel.bits
    memory = 128 if bits == 32 else 256
    machine = Machine(kernel.image, initrd(bits), bits, run.cpu, run.cpus, run.append, memory=memory, kaslr=run.kaslr)
    with boot(machine) as guest:
        guest.wait_for(REACHED)
        settle(kernel, guest, memory)
        for target, options in targets.items():
            guest.dump(target, **options)


def settle(kernel: RealKernel, guest: Guest, memory: int) -> None:
    """Stop the guest once its text does not change any more, wherever in its ``memory`` (MiB) it is."""
    guest.settled(place_of(kernel.vmlinux, guest.physical(0, memory << 20)), kernel.vmlinux.text.size)


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
