"""The paravirt pass of a kernel on a VMI ROM (``vmi_patch`` of arch/x86/kernel/vmi_32.c, 2.6.21 to 2.6.36)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmipatch.annotate import Site
from vmipatch.errors import PatchError
from vmipatch.isa import branch
from vmipatch.patch.passes.contract import Boot, Pass
from vmipatch.patch.patch import Cause, Patch
from vmipatch.patch.rom import OPCODE, Rom, paravirt_calls, refusal
from vmipatch.patch.text import Text
from vmipatch.rombuild.relocations import RelocationType


class ParavirtOnRom(Pass):
    """Mainline's ``vmi_patch``: six ops go to the ROM by relocation type, every other op keeps its indirect call."""

    family = "parainstructions"
    needs_cpu = False

    def __init__(self, rom: Rom) -> None:
        self._rom = rom

    def patches(self, text: Text, sites: Sequence[Site], boot: Boot) -> Iterator[Patch]:
        """See :class:`Pass`."""
        rom = self._rom
        if not rom.speaks("vmi-3.0"):
            raise PatchError(
                f"a mainline kernel speaks vmi-3.0, {rom.name} speaks {rom.relocations.abi}", file=text.image.path
            )
        for site in sites:
            old = text.read(site.address, site.length)
            names = paravirt_calls().get(site.op.rpartition(".")[2])
            if names is None:
                continue
            new, reason = old, "the ROM answers NONE: the indirect call stays"
            body = b""
            for name in names:
                number = rom.number(name)
                kind = RelocationType.NONE if number is None else rom.relocations.of(number).type
                if number is None or kind is RelocationType.NONE:
                    break
                if kind in OPCODE:
                    body += branch.near(OPCODE[kind], site.address + len(body), rom.target(number), 32)
            else:
                if len(body) > site.length:
                    raise refusal(text, site, f"{len(body)} bytes of calls do not fit into {site.length}")
                new = body + boot.nops.fill(site.length - len(body))
                reason = f"{' and '.join(names)} of {rom.name}"
            text.write(site.address, new)
            yield Patch(site.address, old, new, Cause(self.family, site.op, reason), site)
