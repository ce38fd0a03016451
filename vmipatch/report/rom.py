"""What ``vmipatch rom`` prints: an image's headers and call table, findings, the list of what can be built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from vmipatch.report.jsontext import dumps
from vmipatch.rombuild.check import Finding
from vmipatch.rombuild.inspect import CODE_TYPES, CallEntry, Image, Instruction

Disassemble = Callable[[Image, int], Sequence[Instruction]]
_TYPES = {0: "NONE", 1: "CALL_REL", 2: "JUMP_REL", 3: "NOP"}


def as_json(path: str, size: int, images: Iterable[Image], findings: Iterable[Finding], code: Disassemble) -> str:
    """An inspection, schema vmipatch.rom/1."""
    record = {
        "schema": "vmipatch.rom/1",
        "path": path,
        "size": size,
        "images": [_image_record(image, code) for image in images],
        "findings": [_finding_record(f) for f in findings],
    }
    return dumps(record, indent=1) + "\n"


def findings_as_json(path: str, findings: Iterable[Finding]) -> str:
    """A check, schema vmipatch.rom-check/1."""
    record = {"schema": "vmipatch.rom-check/1", "path": path, "findings": [_finding_record(f) for f in findings]}
    return dumps(record, indent=1) + "\n"


def as_text(images: Sequence[Image], findings: Sequence[Finding], code: Disassemble, *, stubs: bool) -> str:
    """An inspection to read; with ``stubs`` each stub's instructions."""
    out: list[str] = []
    for number, image in enumerate(images):
        out += _image_text(number, image)
        if image.vmi is not None:
            out += _vmi_text(image, code, stubs)
    out += [finding_line(f) for f in findings]
    return "".join(f"{line}\n" for line in out)


def finding_line(finding: Finding) -> str:
    """One finding on one line."""
    return f"{finding.severity}: {finding.rule} at {finding.offset:#x}: {finding.message}"


def pairs_as_text(rows: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """``rom list``: hypervisor, title, ABIs."""
    lines = [f"{name:<10}{', '.join(abis):<62}{title}" for name, title, abis in rows]
    return "".join(f"{line.rstrip()}\n" for line in [f"{'SPEC':<10}{'ABI':<62}WHAT", *lines])


def pairs_as_json(rows: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """``rom list --json``, schema vmipatch.rom-list/1."""
    specs = [{"name": name, "title": title, "abis": list(abis)} for name, title, abis in rows]
    return dumps({"schema": "vmipatch.rom-list/1", "specs": specs}, indent=1) + "\n"


def _finding_record(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "offset_hex": f"{finding.offset:#x}"}


def _image_record(image: Image, code: Disassemble) -> dict[str, Any]:
    pci, vmi = image.pci, image.vmi
    return {
        "offset": image.offset,
        "size": len(image.data),
        "units": image.units,
        "kind": _kind(image),
        "entry": image.entry.hex(),
        "byte_sum": image.byte_sum,
        "pci": asdict(pci) if pci else None,
        "pnp": [asdict(p) for p in image.pnp],
        "vmi": None
        if vmi is None
        else {
            "api": f"{vmi.major}.{vmi.minor}",
            "abi": vmi.abi,
            "header": vmi.fields,
            "license": vmi.license,
            "virtual_top": vmi.virtual_top,
            "virtual_top_hex": f"{vmi.virtual_top:#x}",
            "hypervisor": vmi.block.hypervisor if vmi.block else None,
            "block": asdict(vmi.block) if vmi.block else None,
            "state": [asdict(f) for f in vmi.state],
            "calls": [_call_record(image, call, code) for call in vmi.calls],
        },
    }


def _call_record(image: Image, call: CallEntry, code: Disassemble) -> dict[str, Any]:
    return {
        "number": call.number,
        "name": call.name,
        "type": _TYPES.get(call.type, str(call.type)),
        "offset": call.offset,
        "code": [{"offset": i.offset, "bytes": i.code.hex(), "text": i.text} for i in code(image, call.offset)]
        if _has_code(image, call)
        else [],
    }


def _has_code(image: Image, call: CallEntry) -> bool:
    return call.type in (1, 2, 3) and 0 < call.offset < len(image.data)


def _kind(image: Image) -> str:
    if image.efi:
        return "EFI"
    if image.vmi is not None:
        return "VMI"
    return CODE_TYPES.get(image.pci.code_type, "unknown") if image.pci else "x86 PC-AT"


def _image_text(number: int, image: Image) -> list[str]:
    sums = "not asked for" if image.efi else "ok" if image.byte_sum == 0 else f"wrong, {image.byte_sum:#04x}"
    out = [
        f"image {number} at {image.offset:#x}: {_kind(image)}, {image.units} units, {len(image.data)} bytes, "
        f"checksum {sums}"
    ]
    if image.pci is not None:
        pci = image.pci
        base, sub, interface = pci.class_code
        out.append(
            f"  PCIR at {pci.offset:#x}: {pci.vendor:04x}:{pci.device:04x} class {base:02x}{sub:02x}{interface:02x}, "
            f"{pci.image_units} units, ROM version {pci.rom_version[0]}.{pci.rom_version[1]}, "
            f"{CODE_TYPES.get(pci.code_type, pci.code_type)}{', last' if pci.last else ''}"
        )
    out += [
        f"  $PnP at {p.offset:#x}: {p.manufacturer or '-'}, {p.product or '-'}, device {p.device_id:08x}"
        for p in image.pnp
    ]
    return out


def _vmi_text(image: Image, code: Disassemble, stubs: bool) -> list[str]:
    vmi = image.vmi
    assert vmi is not None
    owner = vmi.block.hypervisor if vmi.block else "not ours"
    out = [
        f"  VMI {vmi.major}.{vmi.minor} ({vmi.abi or 'unknown'}), {owner}, licence {vmi.license or '-'}, "
        f"virtual_top {vmi.virtual_top:#x}"
    ]
    out += [f"  state +{f.offset:#05x} {f.size:3d} {f.name}" for f in vmi.state]
    for call in vmi.calls:
        kind = _TYPES.get(call.type, str(call.type))
        place = f" {call.offset:#06x}" if call.type else ""
        out.append(f"  {call.number:3d} {call.name:<24}{kind}{place}")
        if stubs and _has_code(image, call):
            out += [f"        {i.offset:05x}  {i.code.hex():<22}{i.text}" for i in code(image, call.offset)]
    return out
