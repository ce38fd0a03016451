"""``vmipatch rom``: build, inspect, check and list VMI option ROMs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

app = typer.Typer(
    help="Build VMI option ROMs; read and check any option ROM.", no_args_is_help=True, rich_markup_mode=None
)
RomPath = Annotated[Path, typer.Argument(metavar="ROM", help="An option ROM file.", show_default=False)]
T = TypeVar("T")
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


@app.command()
def build(
    spec: Annotated[
        str,
        typer.Argument(metavar="SPEC", help="A name that `rom list` shows, or a path to a spec.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="ROM", help="The file to write.", show_default=False)
    ],
    abi: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="The ABI; more than one makes a ROM of as many images. [default: vmi-3.0]"),
    ] = None,
    base: Annotated[str, typer.Option(metavar="PHYS", help="Physical address that the symbols are for.")] = "0xC0000",
    symbols: Annotated[bool, typer.Option(help="Write ROM.map and ROM.elf beside the ROM.")] = True,
) -> None:
    """Build the VMI option ROM of a hypervisor. The same spec gives the same bytes every time."""
    from vmipatch.cli.common import number
    from vmipatch.rombuild.build import build_many
    from vmipatch.rombuild.relocations import check_base
    from vmipatch.rombuild.symbols import as_elf, as_map

    roms = build_many(spec, abi or ["vmi-3.0"])
    data = b"".join(rom.data for rom in roms)
    at = number(base)
    check_base(at, len(data))
    parts = []
    offset = 0
    for rom in roms:
        parts.append((offset, rom.abi, rom.symbols))
        offset += len(rom.data)
    _write(output, data)
    if symbols:
        _write(output.with_name(output.name + ".map"), as_map(parts, at).encode())
        _write(output.with_name(output.name + ".elf"), as_elf(data, parts, at))


@app.command()
def inspect(
    rom: RomPath,
    json: AsJson = False,
    stubs: Annotated[bool, typer.Option("--stubs", help="Disassemble every stub.")] = False,
) -> None:
    """Show every image of an option ROM: headers, checksum, VMI call table. (JSON always has the stubs.)

    Exit status 1 if anything is wrong with it.
    """
    from vmipatch.report import rom as report
    from vmipatch.rombuild.check import check as find
    from vmipatch.rombuild.inspect import disassemble, images

    data = _read(rom)
    found, findings = _named(rom, lambda: (images(data), find(data)))
    if json:
        typer.echo(report.as_json(str(rom), len(data), found, findings, disassemble), nl=False)
    else:
        typer.echo(report.as_text(found, findings, disassemble, stubs=stubs), nl=False)
    if any(f.severity == "error" for f in findings):
        raise typer.Exit(1)


@app.command()
def check(rom: RomPath, json: AsJson = False) -> None:
    """Say what is wrong with an option ROM; nothing and exit status 0 if nothing is."""
    from vmipatch.report import rom as report
    from vmipatch.rombuild.check import check as find

    data = _read(rom)
    findings = _named(rom, lambda: find(data))
    if json:
        typer.echo(report.findings_as_json(str(rom), findings), nl=False)
    else:
        typer.echo("".join(f"{rom}: {report.finding_line(f)}\n" for f in findings), nl=False)
    if any(f.severity == "error" for f in findings):
        raise typer.Exit(1)


@app.command("list")
def list_(json: AsJson = False) -> None:
    """List the specs and the ABIs that a ROM can be built for."""
    from vmipatch.report import rom as report
    from vmipatch.rombuild import abi, hypervisor

    rows = []
    for name in hypervisor.names():
        spec = hypervisor.load(name)
        rows.append((name, spec.title, [a for a in abi.names() if spec.supports(abi.load(a)) is None]))
    typer.echo((report.pairs_as_json if json else report.pairs_as_text)(rows), nl=False)


def _read(path: Path) -> bytes:
    from vmipatch.errors import RomError
    from vmipatch.rombuild.inspect import MAX_FILE

    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE + 1)
    except OSError as error:
        raise RomError(f"cannot read it: {error.strerror}", file=path) from error


def _write(path: Path, data: bytes) -> None:
    """All or nothing: into a temporary file beside it, then renamed."""
    import os
    import tempfile

    from vmipatch.errors import RomError

    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RomError(f"cannot write it: {error.strerror}", file=path) from error


def _named(path: Path, work: Callable[[], T]) -> T:
    """Run it; errors get the file's name."""
    from vmipatch.errors import VmipatchError

    try:
        return work()
    except VmipatchError as error:
        raise error.at(file=path) from None
