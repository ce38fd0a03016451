"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vmipatch.annotate import Scan
    from vmipatch.image import Image
    from vmipatch.patch import Native
    from vmipatch.patch.target import Target

DEFAULT_ROM_BASE = 0xC0000

ImagePath = Annotated[
    Path,
    typer.Argument(metavar="IMAGE", help="vmlinux, bzImage, module, or raw memory (with --base).", show_default=False),
]
Base = Annotated[
    str | None, typer.Option(metavar="ADDR", help="IMAGE is raw memory that starts at this virtual address.")
]
SystemMap = Annotated[Path | None, typer.Option(metavar="FILE", help="System.map of the kernel, for its symbols.")]
Layouts = Annotated[
    list[str] | None,
    typer.Option(
        "--layout", metavar="FAMILY=NAME", help="Read a family's tables by this layout, against the evidence."
    ),
]
CpuName = Annotated[str | None, typer.Option("--cpu", metavar="NAME", help="CPU model, a name of specs/cpus.")]
Features = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The running kernel's x86_capability: hexadecimal words, white space between."),
]
Cpus = Annotated[int | None, typer.Option(metavar="N", help="Number of CPUs; on one, LOCK prefixes go. [default: 1]")]
RomPath = Annotated[
    Path | None,
    typer.Option("--rom", metavar="ROM", help="A VMI ROM that the sites shall call straight into."),
]
RomBase = Annotated[str | None, typer.Option(metavar="PHYS", help="Physical address of the ROM. [default: 0xC0000]")]
Kernel = Annotated[
    str | None,
    typer.Option(metavar="VERSION", help="Patch by the rules of this Linux version, not by the banner's."),
]


def open_and_scan(
    path: Path,
    base: str | None,
    system_map: Path | None,
    families: list[str] | None,
    layouts: list[str] | None,
) -> tuple[Image, Scan]:
    """The image and its sites."""
    from vmipatch.annotate import scan

    overrides = layout_options(layouts)
    image = opened(path, base, system_map)
    return image, scan(image, families or None, overrides)


def opened(path: Path, base: str | None, system_map: Path | None) -> Image:
    """The image of a command whose report names its SHA-256."""
    from vmipatch.image import open_image

    image = open_image(path, base=None if base is None else number(base), system_map=system_map)
    image.hash_ahead()
    return image


def say_if_newer(image: Image, kernel: str | None = None) -> None:
    """Say on standard error that the kernel is newer than any that was tried; for commands that plan nothing."""
    from vmipatch.annotate.tried import newer

    if text := newer(parse(kernel) or image.version):
        typer.echo(f"warning: {text}", err=True)


def layout_options(layouts: list[str] | None) -> dict[str, str]:
    """``--layout FAMILY=NAME`` as a mapping; raises :class:`UsageError` for another form."""
    from vmipatch.errors import UsageError

    overrides = {}
    for item in layouts or ():
        family, equals, name = item.partition("=")
        if not equals:
            raise UsageError(f"--layout {item}: write it as FAMILY=NAME")
        overrides[family] = name
    return overrides


def number(text: str) -> int:
    """A number in any of Python's notations; raises :class:`UsageError`."""
    from vmipatch.errors import UsageError

    try:
        return int(text, 0)
    except ValueError:
        raise UsageError(f"{text!r} is no number") from None


def native(cpu: str | None, features: Path | None, cpus: int | None, image: Image, kernel: str | None) -> Native | None:
    """The CPU that the options name, if they name one."""
    from vmipatch.errors import UsageError
    from vmipatch.patch import Native
    from vmipatch.patch.cpu import flavour, from_features, from_spec

    count = 1 if cpus is None else cpus
    if cpu is not None and features is not None:
        raise UsageError("--cpu and --features are two answers to one question: give one")
    if features is not None:
        return Native(from_features(features), count)
    if cpu is not None:
        release = parse(kernel) or image.version
        found = from_spec(cpu, release, bits=image.bits, flavour=flavour(image.banner), cpus=count)
        return Native(found, count)
    return None


def choose_target(
    cpu: Native | None, rom: Path | None, rom_base: str | None, wanted: str | None, image: Image, scan: Scan
) -> Target:
    """The target that the options name: a ROM, or bare hardware, which needs a CPU."""
    from vmipatch import facts
    from vmipatch.errors import UsageError
    from vmipatch.patch.target import OnRom, rom_at

    if wanted not in (None, "native"):
        raise UsageError(f"no target named {wanted!r}; there is: native (and --rom ROM)")
    if rom is not None:
        if wanted is not None:
            raise UsageError("--target native and --rom are two answers to one question: give one")
        return OnRom(rom_at(image, scan, rom, DEFAULT_ROM_BASE if rom_base is None else number(rom_base)), cpu)
    if rom_base is not None:
        raise UsageError("--rom-base goes with --rom")
    if cpu is None:
        names = ", ".join(facts.names("cpus"))
        raise UsageError(f"which CPU? Give --cpu NAME ({names}) or --features FILE")
    return cpu


def parse(kernel: str | None) -> tuple[int, ...] | None:
    """``--kernel`` as numbers."""
    if kernel is None:
        return None
    from vmipatch.patch.rules import parse_version

    return parse_version(kernel)


def progress(text: str) -> None:
    """What takes a while, on standard error, and only where a person watches."""
    import sys

    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
