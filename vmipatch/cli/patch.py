"""``vmipatch patch``: rewrite an image as its own kernel would on a given machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmipatch.cli.common import (
    Base,
    CpuName,
    Cpus,
    Features,
    ImagePath,
    Kernel,
    Layouts,
    RomBase,
    RomPath,
    SystemMap,
    choose_target,
    native,
    open_and_scan,
    parse,
    progress,
)


def patch(
    image: ImagePath,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", help="The patched image.")] = None,
    target: Annotated[str | None, typer.Option(metavar="native", help="Bare hardware. [default: native]")] = None,
    cpu: CpuName = None,
    features: Features = None,
    cpus: Cpus = None,
    rom: RomPath = None,
    rom_base: RomBase = None,
    kernel: Kernel = None,
    layout: Layouts = None,
    base: Base = None,
    system_map: SystemMap = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Rewrite IMAGE itself.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and report; write nothing.")] = False,
    seal: Annotated[bool, typer.Option("--seal", help="Empty the tables: the kernel will not patch again.")] = False,
    repack: Annotated[
        bool, typer.Option("--repack", help="Pack a bzImage again, which must fit; else OUT is the unpacked ELF.")
    ] = False,
    skip_unknown: Annotated[
        bool,
        typer.Option("--skip-unknown", help="Leave paravirt sites as they are of which nobody knows what they do."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON (schema vmipatch.patch/1).")] = False,
) -> None:
    """Rewrite every site of a kernel image as the running kernel would, on bare hardware or on a VMI ROM.

    Writes OUT and OUT.journal.json, from which `vmipatch restore` gives the
    original back.  A bzImage gives the unpacked, patched ELF, or a bzImage again
    with --repack.
    """
    from vmipatch.errors import UsageError
    from vmipatch.patch import apply
    from vmipatch.patch.planner import plan
    from vmipatch.patch.writer import changes_of
    from vmipatch.report import patch as report

    if in_place and output is not None:
        raise UsageError("--in-place and -o are two answers to one question: give one")
    if in_place:
        output = image
    if output is None and not dry_run:
        raise UsageError("where to? Give -o OUT, or --in-place, or --dry-run")
    opened, found = open_and_scan(image, base, system_map, None, layout)
    if in_place and opened.compression is not None and not repack:
        raise UsageError(f"{image} is packed: its patched ELF needs a file of its own, give -o OUT (or --repack)")
    wanted = choose_target(native(cpu, features, cpus, opened, kernel), rom, rom_base, target, opened, found)
    planned = plan(opened, found, wanted, kernel=parse(kernel), seal=seal, skip_unknown=skip_unknown)
    if repack and not dry_run:
        progress("packing the kernel again: this takes some seconds")
    if dry_run or output is None:
        changes = changes_of(opened, planned)
    else:
        changes = apply(opened, planned, output, target=wanted.describe(), sealed=seal, repack=repack).changes
    show = report.as_json if json else report.as_table
    show(opened, found, planned, changes, None if dry_run else output)
