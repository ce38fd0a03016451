"""Memory dumps of real kernels under QEMU, and where things are in them.

What is read out of a core here is read without the package under test.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .initramfs import REACHED
from .qemu import Machine, boot
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


def take(kernel: RealKernel, initrd: Initrd, run: Run, target: Path, *, paging: bool = False) -> None:
    """Boot, wait for init and for the text to settle, and write the memory as an ELF core."""
    bits = kernel.kernel.bits
    memory = 128 if bits == 32 else 256
    machine = Machine(kernel.image, initrd(bits), bits, run.cpu, run.cpus, run.append, memory=memory, kaslr=run.kaslr)
    with boot(machine) as guest:
        guest.wait_for(REACHED)
        text = kernel.vmlinux.text
        if run.kaslr:
            # Where it is nobody here knows: two seconds are what settling takes elsewhere.
            time.sleep(2)
            guest.stop()
        else:
            guest.settled(kernel.vmlinux.physical(text.address), text.size)
        guest.dump(target, paging=paging)


def formats(kernel: RealKernel, initrd: Initrd, run: Run, folder: Path) -> dict[str, Path]:
    """One moment of a machine in several forms: an ELF core, one with virtual addresses, and a compressed kdump."""
    bits = kernel.kernel.bits
    memory = 128 if bits == 32 else 256
    machine = Machine(kernel.image, initrd(bits), bits, run.cpu, run.cpus, run.append, memory=memory, kaslr=run.kaslr)
    with boot(machine) as guest:
        guest.wait_for(REACHED)
        time.sleep(2)
        guest.stop()
        for name, options in (("core", {}), ("paged", {"paging": True}), ("kdump", {"form": "kdump-zlib"})):
            guest.dump(folder / name, **options)
    return {name: folder / name for name in ("core", "paged", "kdump")}


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
