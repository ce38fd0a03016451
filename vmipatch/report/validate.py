"""What ``vmipatch validate`` and ``vmipatch demo`` print."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vmipatch.report.jsontext import dumps
from vmipatch.validate import Request, Validation
from vmipatch.validate.boots import MOST_COUNTED, Boot
from vmipatch.validate.demonstration import Row
from vmipatch.validate.sites import FailedCall, Failure, SiteVerdict
from vmipatch.validate.subject import REGISTERS

SHOWN, SHOWN_OF_EACH = 20, 4


def as_json(found: Validation) -> None:
    """One JSON document on standard output (schema vmipatch.validate/1)."""
    sys.stdout.write(dumps(record(found)) + "\n")


def record(found: Validation) -> dict[str, Any]:
    """The document."""
    request = found.request
    return {
        "schema": "vmipatch.validate/1",
        "image": str(request.image),
        "rom": str(request.rom),
        "hypervisor": found.hypervisor,
        "abi": found.abi,
        "until": found.until,
        "verdict": found.verdict,
        "seconds": round(found.seconds, 3),
        "sites_patched": found.patched_sites,
        "failed_calls": [] if found.sites is None else [_failed_call(c) for c in found.sites.failed_calls()],
        "sites": None if found.sites is None else _sites(found),
        "boots": [_boot(b) for b in found.boots],
        "warnings": found.warnings,
    }


def _address(key: str, value: int) -> dict[str, Any]:
    return {key: value, f"{key}_hex": f"{value:#x}"}


def _sites(found: Validation) -> dict[str, Any]:
    run = found.sites
    assert run is not None
    counts = Counter(v.verdict for v in run.verdicts)
    return {
        "states": run.states,
        "bases": run.bases,
        "seconds": round(run.seconds, 3),
        "pass": counts["pass"],
        "fail": counts["fail"],
        "not_shown": counts["not shown"],
        "verdicts": [_verdict(v) for v in run.verdicts],
    }


def _failed_call(c: FailedCall) -> dict[str, Any]:
    failure = c.verdicts[0].failure
    assert failure is not None
    return {
        "call": c.call,
        "slots": list(c.slots),
        **_address("stub", c.stub),
        "alone": c.alone,
        "sites": c.sites,
        "what": failure.difference.what,
        "native": failure.difference.native,
        "patched": failure.difference.patched,
    }


def _verdict(v: SiteVerdict) -> dict[str, Any]:
    subject = v.subject
    return {
        **_address("address", subject.address),
        "kind": "call" if subject.is_call else "site",
        "op": subject.op,
        "calls": list(subject.call_names),
        "slots": list(subject.slots),
        "stubs": list(subject.stubs),
        "stubs_hex": [f"{stub:#x}" for stub in subject.stubs],
        "symbol": subject.symbol,
        "length": subject.length,
        "native": subject.native.hex(),
        "patched": subject.patched.hex(),
        "verdict": v.verdict,
        "states": v.states,
        "failures": v.failures,
        "rejected": dict(v.rejected),
        "instructions": {"native": v.instructions[0], "patched": v.instructions[1]},
        "failure": None if v.failure is None else _failure(v.failure),
    }


def _failure(f: Failure) -> dict[str, Any]:
    return {
        "base": f.base,
        "state": f.state,
        "origin": f.origin,
        "what": f.difference.what,
        "native": f.difference.native,
        "patched": f.difference.patched,
        "registers": {name: f"{f.start.registers[name]:#x}" for name in REGISTERS},
        "flags": f"{f.start.flags:#x}",
        "interrupt_pending": f.start.pending,
    }


def _boot(boot: Boot) -> dict[str, Any]:
    violation = boot.violation
    return {
        "kind": boot.kind,
        "verdict": boot.verdict,
        "reason": boot.reason,
        "reached": boot.reached,
        "instructions": boot.instructions,
        "calls": dict(boot.calls),
        "calls_before_init": dict(boot.early),
        "calls_counted_up_to": MOST_COUNTED,
        "hypercalls": dict(boot.hypercalls),
        "traps": dict(boot.traps),
        "violation": None if violation is None else violation.to_json(),
        "problems": boot.problems,
        "notes": boot.notes,
    }


KINDS = {"native": "native", "self": "patches itself on the ROM", "static": "patched statically, on the ROM"}


def as_table(found: Validation) -> None:
    """For a person: boots, sites, and each failure with what it takes to look at it."""
    out = sys.stdout
    out.write(f"{found.request.image} on {found.request.rom} ({found.hypervisor}, {found.abi})\n")
    failing = [] if found.sites is None else found.sites.failed_calls()
    for call in failing[:SHOWN]:
        out.write(f"  fails: {_summary(call)}\n")
    for boot in found.boots:
        calls, traps = sum(boot.calls.values()), sum(boot.traps.values())
        more = "+" if boot.more_calls else ""
        made = f", {calls}{more} calls, {traps} traps" if boot.kind != "native" else ""
        out.write(f"  {KINDS[boot.kind]:<32} {boot.verdict:<9} {boot.reason}, {boot.instructions} instructions{made}\n")
        for line in (*boot.problems, *boot.notes):
            out.write(f"      {line}\n")
    run = found.sites
    if run is not None:
        counts = Counter(v.verdict for v in run.verdicts)
        sites = sum(1 for v in run.verdicts if not v.subject.is_call)
        rate = run.states / run.seconds if run.seconds else 0.0
        out.write(
            f"  {sites} sites and {len(run.verdicts) - sites} calls, {run.states} states on {run.bases} moments of "
            f"the native run: {counts['pass']} pass, {counts['fail']} fail, {counts['not shown']} not shown "
            f"({rate:.0f} states/s)\n"
        )
        rejected: Counter[str] = sum((v.rejected for v in run.verdicts), Counter())
        if rejected:
            text = ", ".join(f"{n} with {fault}" for fault, n in rejected.most_common(4))
            out.write(f"      {sum(rejected.values())} states were no use, for the native code faults: {text}\n")
        for call in failing[:SHOWN]:
            for v in call.verdicts[:SHOWN_OF_EACH]:
                _show(found, v, out.write)
            if len(call.verdicts) > SHOWN_OF_EACH:
                out.write(f"\nand {len(call.verdicts) - SHOWN_OF_EACH} more sites of {call.call} that fail\n")
        if len(failing) > SHOWN:
            out.write(f"\nand {len(failing) - SHOWN} more calls that fail\n")
        unseen = [v for v in run.verdicts if v.verdict == "not shown"]
        for v in unseen[:SHOWN]:
            out.write(f"      not shown: {v.subject.title}\n")
    out.write(f"{found.verdict} in {found.seconds:.1f} s\n")
    out.flush()
    for warning in found.warnings:
        print(f"{found.request.image}: warning: {warning}", file=sys.stderr)


def _summary(call: FailedCall) -> str:
    where = ["by itself"] if call.alone else []
    if call.sites:
        where.append(f"at {call.sites} site{'s' if call.sites > 1 else ''}")
    failure = call.verdicts[0].failure
    assert failure is not None
    return f"{call.title}: {' and '.join(where)}; {failure.difference}"


def _show(found: Validation, v: SiteVerdict, write: Callable[[str], object]) -> None:
    f, subject = v.failure, v.subject
    assert f is not None
    write(f"\n{subject.title}: {f.difference}\n")
    if not subject.is_call:
        write(f"  native   {_code(subject.native, subject.address)}\n")
        write(f"  patched  {_code(subject.patched, subject.address)}\n")
    values = " ".join(f"{name}={f.start.registers[name]:#x}" for name in REGISTERS)
    waits = ", an interrupt waits" if f.start.pending else ""
    write(f"  from     {values} flags={f.start.flags:#x}{waits} ({f.origin})\n")
    write(f"  {v.failures} of {v.states} states fail\n")
    write(f"  again:   {_again(found.request, subject.address, f)}\n")


def _again(request: Request, address: int, f: Failure) -> str:
    """The command that runs this state alone; whatever decides what the moments are is in it."""
    words = ["vmipatch", "validate", str(request.image), "--rom", str(request.rom)]
    words += ["--site", f"{address:#x}", "--state", f"{f.base}:{f.state}"]
    usual = Request(request.image, request.rom)
    for option, value, default in (
        ("--rom-base", f"{request.rom_base:#x}", f"{usual.rom_base:#x}"),
        ("--initrd", request.initrd, usual.initrd),
        ("--append", request.append, usual.append),
        ("--memory", request.memory_mib, usual.memory_mib),
        ("--until", request.until, usual.until),
        ("--moments", request.moments, usual.moments),
    ):
        if value != default:
            words += [option, str(value)]
    return shlex.join(words)


def _code(code: bytes, address: int) -> str:
    from vmipatch.isa import decode

    text = "; ".join(i.text for i in decode.disassemble(code, 32, address))
    return f"{code.hex(' '):<30} {text}"


HEADINGS = (
    "hypervisor",
    "ABI",
    "guest",
    "sites patched",
    "calls made",
    "traps",
    "instructions",
    "site states",
    "verdict",
)


def demo_table(rows: Sequence[Row]) -> str:
    """One line for each hypervisor and form of the guest."""
    table: list[tuple[str, ...]] = [HEADINGS]
    for r in rows:
        numbers = (f"{r.calls}{'+' if r.more_calls else ''}", r.traps, r.instructions, r.states)
        table.append((r.hypervisor, r.abi, r.form, str(r.sites), *map(str, numbers), r.verdict))
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]
    numeric = range(3, 8)
    lines = []
    for row in table:
        cells = [c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
