"""An ABI of ``specs/abi/`` as objects: header fields, calls, contracts, limits.

Used by the builder and by the inspector: it reads facts and writes nothing.  Imports facts and errors only.
A spec may ``inherits`` another (all of it, table by table) or ``extends`` one (the bodies of the calls that it
numbers itself); ``rename`` gives inherited calls another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from vmipatch import facts
from vmipatch.errors import SpecError, UsageError

REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_KEY_NAMES = "n in out clobbers asm bytes empty jump noreturn keep relocations like init get_relocation"
_CALL_KEYS = frozenset(_KEY_NAMES.split())


@dataclass(frozen=True)
class Call:
    """One call. ``args`` are register names, or the offset of a stack argument from ESP at entry (as text).

    ``may_change`` are the registers that need not come back as they went in, results included. ``asm`` is
    what the call does on the bare machine, None where that is nothing. ``file`` and ``line`` say where the
    assembly text stands.
    """

    name: str
    number: int
    args: tuple[str, ...]
    results: tuple[str, ...]
    may_change: frozenset[str]
    asm: str | None
    native: bytes
    jump: bool
    noreturn: bool
    keep_all: bool
    init: bool
    get_relocation: bool
    relocations: tuple[str, ...]
    file: str
    line: int


@dataclass(frozen=True)
class Abi:
    """One ABI; ``lineage`` is its own name and those that it inherits from."""

    name: str
    title: str
    generation: int
    lineage: tuple[str, ...]
    major: int
    minor: int
    dispatch: Mapping[str, Any]
    header: Mapping[str, tuple[int, int]]
    limits: Mapping[str, int]
    guest: Mapping[str, Any]
    relocation_types: Mapping[str, int]
    needs: Mapping[str, tuple[str, ...]]
    together: tuple[Mapping[str, Any], ...]
    only: tuple[str, ...]
    calls: Mapping[str, Call]

    @property
    def count(self) -> int:
        """One more than the highest call number."""
        return int(self.dispatch["count"])

    @property
    def slot_size(self) -> int | None:
        """Bytes of one slot, None where GetRelocationInfo decides."""
        return int(self.dispatch["slot_size"]) if self.dispatch["kind"] == "slots" else None

    @property
    def numbers(self) -> Mapping[int, str]:
        """Call number -> name."""
        return {call.number: call.name for call in self.calls.values()}


@cache
def load(name: str) -> Abi:
    """The ABI of that name; raises :class:`UsageError` if there is none, :class:`SpecError` if it is wrong."""
    spec, lineage = _merged(name)
    clobbers = spec["clobbers"]
    calls: dict[str, Call] = {}
    seen: dict[int, str] = {}
    for call, body in spec["calls"].items():
        where, line = body["@place"]
        asm_file, asm_line = body.get("@asm", (where, line))
        unknown = set(body) - _CALL_KEYS - {"@place", "@asm"}
        if unknown:
            raise SpecError(f"unknown key {sorted(unknown)[0]!r}", file=where, section=call, line=line)
        number = body["n"]
        if number in seen:
            raise SpecError(f"number {number} is also {seen[number]}", file=where, section=call, line=line)
        if not 0 <= number < spec["dispatch"]["count"]:
            raise SpecError(f"number {number} is outside the table", file=where, section=call, line=line)
        seen[number] = call
        changes = clobbers.get(body.get("clobbers", "std"), body.get("clobbers", ""))
        results = tuple(body.get("out", "").split())
        calls[call] = Call(
            name=call,
            number=number,
            args=tuple(body.get("in", "").split()),
            results=results,
            may_change=frozenset([*changes.split(), *results]),
            asm=None if body.get("empty") else body.get("asm"),
            native=bytes.fromhex(body.get("bytes", "")),
            jump=body.get("jump", False),
            noreturn=body.get("noreturn", False),
            keep_all=body.get("keep") == "all",
            init=body.get("init", False),
            get_relocation=body.get("get_relocation", False),
            relocations=tuple(body.get("relocations", spec["defaults"]["relocations"])),
            file=asm_file,
            line=asm_line,
        )
    return Abi(
        name=name,
        title=spec["title"],
        generation=spec["generation"],
        lineage=lineage,
        major=spec["version"]["major"],
        minor=spec["version"]["minor"],
        dispatch=spec["dispatch"],
        header={key: (value[0], value[1]) for key, value in spec["header"].items()},
        limits=spec["limits"],
        guest=spec["guest"],
        relocation_types=spec["relocation_types"],
        needs={key: tuple(value) for key, value in spec.get("needs", {}).items()},
        together=tuple(spec.get("together", [])),
        only=tuple(spec.get("only", [])),
        calls=calls,
    )


def names() -> tuple[str, ...]:
    """All ABIs, newest interface first as a reader wants them: 3.0, then 13.x, then 6.1."""
    return tuple(sorted(facts.names("abi"), key=lambda n: ({3: 0, 13: 1, 6: 2}[load(n).generation], n)))


def by_version(major: int, minor: int) -> tuple[str, ...]:
    """The names of the ABIs that a header with this version may mean."""
    found = [n for n in names() if load(n).major == major]
    exact = [n for n in found if load(n).minor == minor]
    return tuple(exact or found)


def line_of(text: str, call: str) -> int:
    """The line (from 1) on which a call is defined in the text of a spec; 1 if it is not found."""
    lines = text.split("\n")
    inside = False
    for number, line in enumerate(lines, 1):
        bare = line.strip()
        if bare.startswith("["):
            inside = bare.startswith(("[calls", "[routines")) or ".calls" in bare
        elif inside and bare.replace('"', "").split("=")[0].strip() == call and "=" in bare:
            return number
    return 1


@cache
def _merged(name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    own = facts.load("abi", name)
    file = f"specs/abi/{name}.toml"
    text = (facts.root() / "abi" / f"{name}.toml").read_text("utf-8")
    calls = {}
    for call, body in own["calls"].items():
        place = (file, line_of(text, call))
        calls[call] = {**body, "@place": place}
        if "asm" in body:
            # TOML drops the newline behind an opening triple quote.
            below = text.split("\n")[place[1] - 1].rstrip().endswith('"""')
            calls[call]["@asm"] = (file, place[1] + below)
    parent = own.get("inherits") or own.get("extends")
    if parent is None:
        return {**own, "calls": calls}, (name,)
    base, lineage = _merged(parent)
    if "inherits" in own:
        renamed = {own.get("rename", {}).get(call, call): body for call, body in base["calls"].items()}
        merged = {
            key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in own.items()
        }
        return {**base, **merged, "calls": {**renamed, **calls}}, (name, *lineage)
    bodies = {}
    for call, body in calls.items():
        source = base["calls"].get(body.get("like", call), {})
        if "like" in body and not source:
            raise SpecError(f"no call {body['like']!r} in {parent}", file=file, section=call)
        kept = {key: value for key, value in source.items() if key != "relocations"}
        if "asm" in body or "empty" in body:
            kept = {key: value for key, value in kept.items() if key not in ("asm", "@asm", "empty", "bytes")}
        bodies[call] = {**kept, **body}
    return {**own, "calls": bodies}, (name,)


def require(name: str) -> Abi:
    """Like :func:`load`, with the list of names in the error."""
    if name not in facts.names("abi"):
        raise UsageError(f"no ABI named {name!r}; there are: {', '.join(names())}")
    return load(name)
