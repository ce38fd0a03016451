"""What a kernel is patched for: bare hardware, or a VMI ROM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from vmipatch.annotate import Scan
from vmipatch.annotate.site import Vmi
from vmipatch.errors import PatchError, RomError
from vmipatch.image import Image
from vmipatch.patch.cpu import Cpu
from vmipatch.patch.rom import Rom, place


@dataclass(frozen=True, slots=True)
class Native:
    """Bare hardware: a CPU model, and how many of them (one CPU lets go of LOCK prefixes)."""

    cpu: Cpu
    cpus: int = 1

    def describe(self) -> dict[str, Any]:
        """The target as a journal records it; the feature words are hexadecimal."""
        cpu = self.cpu
        return {
            "target": "native",
            "cpu": cpu.name,
            "vendor": cpu.vendor,
            "family": cpu.family,
            "model": cpu.model,
            "stepping": cpu.stepping,
            "features": [f"{word:08x}" for word in cpu.words],
            "cpus": self.cpus,
        }


@dataclass(frozen=True, slots=True)
class OnRom:
    """A VMI ROM; ``native`` says what CPU runs below it, where alternatives and locks are to be patched too."""

    rom: Rom
    native: Native | None = None

    def describe(self) -> dict[str, Any]:
        """The target as a journal records it."""
        below = None if self.native is None else self.native.describe()
        return {"target": "rom", "rom": self.rom.name, "rom_base": self.rom.physical, "native": below}


Target = Native | OnRom


def rom_at(image: Image, scan: Scan, file: Path, physical: int) -> Rom:
    """A ROM file at a physical base, as this kernel will see it.

    Of a ROM with several images, the one of the interface that the kernel's sites speak.

    Raises :class:`RomError` for a base where no guest looks, and for a ROM that is
    not ours: only its own GetRelocationInfo could answer for it, and running that
    takes the emulator.
    """
    from vmipatch.rombuild.inspect import relocations
    from vmipatch.rombuild.relocations import check_base

    try:
        data = file.read_bytes()
    except OSError as error:
        raise RomError(f"cannot read: {error.strerror}", file=file) from error
    try:
        answers = relocations(data, _generation(scan))
    except RomError as error:
        raise error.at(file=file) from None
    check_base(physical, len(data), file=str(file))
    return place(image, str(file), answers, physical)


def _generation(scan: Scan) -> int | None:
    """3 or 13 where the sites tell, else None: any ROM may do."""
    for site in scan.sites:
        if isinstance(site.detail, Vmi):
            return 3 if site.detail.version == "v2" else 13
        if site.family == "parainstructions":
            return 3
    return None


def from_description(record: Mapping[str, Any], image: Image, scan: Scan, file: str | PathLike[str]) -> Target:
    """The target that a journal records; :class:`PatchError` if it records none that we know."""
    try:
        if record["target"] == "rom":
            below = record["native"]
            inner = None if below is None else from_description(below, image, scan, file)
            if isinstance(inner, OnRom):
                raise ValueError
            return OnRom(rom_at(image, scan, Path(record["rom"]), int(record["rom_base"])), inner)
        if record["target"] != "native":
            raise ValueError
        words = tuple(int(word, 16) for word in record["features"])
        identity = (record["vendor"], record["family"], record["model"], record["stepping"])
        return Native(Cpu(str(record["cpu"]), *identity, words), int(record["cpus"]))
    except (KeyError, ValueError, TypeError):
        text = "its journal does not say what it was patched for: name the target"
        raise PatchError(text, file=file) from None
