"""``vmipatch validate``: prove that a patched kernel does what the native one does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmipatch.cli.common import number, progress


def validate(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The kernel, unpatched.", show_default=False)],
    rom: Annotated[Path, typer.Option(metavar="ROM", help="The VMI ROM of `vmipatch rom build`.", show_default=False)],
    rom_base: Annotated[str, typer.Option(metavar="PHYS", help="Physical address of the ROM.")] = "0xC0000",
    hypervisor: Annotated[
        str | None, typer.Option(metavar="NAME", help="The hypervisor under it. [default: the one the ROM names]")
    ] = None,
    initrd: Annotated[Path | None, typer.Option(metavar="F", help="Initial RAM disk, or Multiboot module.")] = None,
    append: Annotated[str, typer.Option(metavar="S", help="Kernel command line.")] = "",
    memory: Annotated[int, typer.Option(metavar="MIB", help="Memory in MiB.")] = 64,
    until: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What the kernel prints when it is done. [default: a power-off]"),
    ] = None,
    max_instructions: Annotated[
        int, typer.Option(metavar="N", help="A boot that takes longer has failed.")
    ] = 20_000_000_000,
    states: Annotated[
        int, typer.Option(metavar="N", min=1, help="States that each site is tried from, at each moment.")
    ] = 8,
    moments: Annotated[
        int, typer.Option(metavar="N", min=1, help="Moments of the native run that states are taken from.")
    ] = 5,
    sites_only: Annotated[bool, typer.Option("--sites-only", help="No whole boots.")] = False,
    boots_only: Annotated[bool, typer.Option("--boots-only", help="Whole boots only.")] = False,
    site: Annotated[
        str | None, typer.Option(metavar="ADDR", help="Try this site (or call of the ROM) alone; with --state.")
    ] = None,
    state: Annotated[
        str | None, typer.Option(metavar="MOMENT:STATE", help="The state to try again, as a report names it.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON (schema vmipatch.validate/1).")] = False,
) -> None:
    """Prove that a kernel does on a ROM what it does natively: site by site, and boot by boot.

    Each site that the ROM's target rewrites, and each call of the ROM, is run from many states twice: the native
    bytes at CPL 0 on the bare machine, the patched ones under the ROM's hypervisor.  Then the kernel is booted
    natively, on the ROM patching itself, and on the ROM patched by `vmipatch patch`.

    Exit status 0 only if everything passed; 1 for a failure, and where the native kernel does not reach its end.
    """
    from vmipatch.errors import UsageError
    from vmipatch.report import validate as report
    from vmipatch.validate import Request
    from vmipatch.validate import validate as run

    if sites_only and boots_only:
        raise UsageError("--sites-only and --boots-only leave nothing")
    if (site is None) != (state is None):
        raise UsageError("--site and --state go together")
    request = Request(
        image=image,
        rom=rom,
        hypervisor=hypervisor,
        rom_base=number(rom_base),
        initrd=initrd,
        append=append,
        memory_mib=memory,
        until=until,
        limit=max_instructions,
        states=states,
        moments=moments,
    )
    only = None if site is None or state is None else _one(site, state)
    found = run(request, with_sites=not boots_only, with_boots=not sites_only, only=only, progress=progress)
    (report.as_json if json else report.as_table)(found)
    if found.verdict != "pass":
        raise typer.Exit(1)


def _one(site: str, state: str) -> tuple[int, int, int]:
    from vmipatch.errors import UsageError

    moment, colon, count = state.partition(":")
    if not colon:
        raise UsageError(f"--state {state}: write it as MOMENT:STATE")
    return number(site), number(moment), number(count)
