"""A hypervisor of ``specs/hypervisors/`` (or a user's own file) as objects.  Imports facts, errors and abi.

A spec inherits another one table by table; a call's entry is ``native``, ``gate``, ``nop``, ``none`` or
assembly text, and keeps the file and the line where it stands, for errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmipatch import facts
from vmipatch.errors import SpecError, UsageError
from vmipatch.rombuild import abi as abis
from vmipatch.rombuild.abi import line_of

WORDS = ("native", "gate", "nop", "none")
_TABLES = ("identity", "detect", "state", "constants", "macros", "init", "routines", "calls", "abi")
_KEYS = frozenset(
    ["name", "inherits", "abstract", "title", "version", "license", "virtual_top", "default", "only", *_TABLES]
)
_PAGE = 4096
_NAME = re.compile(r"[A-Za-z_]\w{0,47}")
_BUILT_IN = frozenset(["VMI_Init", "GetRelocationInfo", "nothing"])


@dataclass(frozen=True)
class Text:
    """A piece of a spec: assembly text or one of :data:`WORDS`, and where it stands."""

    text: str
    file: str
    line: int


@dataclass(frozen=True)
class State:
    """One field in the page at ``virtual_top``: offset and size in bytes."""

    offset: int
    size: int
    meaning: str


@dataclass(frozen=True)
class Hypervisor:
    """One hypervisor's ROM. ``virtual_top`` is a linear address, 0 without a state page."""

    name: str
    title: str
    file: str
    version: tuple[int, int]
    license: str
    virtual_top: int
    default: str
    only: tuple[str, ...]
    identity: Mapping[str, Any]
    detect: Mapping[str, Any]
    state: Mapping[str, State]
    constants: Mapping[str, int]
    macros: Mapping[str, str]
    init: Text
    routines: Mapping[str, Text]
    calls: Mapping[str, Text]
    abi_calls: Mapping[str, Mapping[str, Text]]

    def entry(self, abi: abis.Abi, call: str) -> Text | None:
        """What the spec says for a call of this ABI; None where it says nothing."""
        for name in abi.lineage:
            if call in self.abi_calls.get(name, {}):
                return self.abi_calls[name][call]
        return self.calls.get(call)

    def supports(self, abi: abis.Abi) -> str | None:
        """None if there is a ROM of this hypervisor for the ABI, else why not."""
        if abi.only and self.name not in abi.only and self.name in names():
            return f"{abi.name} ({abi.title}) was only ever spoken by {' and '.join(abi.only)}"
        if self.only and abi.name not in self.only:
            return f"{self.name} speaks {', '.join(self.only)}"
        return None


def names() -> tuple[str, ...]:
    """The hypervisors that ROMs can be built for."""
    return tuple(n for n in facts.names("hypervisors") if not facts.load("hypervisors", n).get("abstract"))


def load(spec: str) -> Hypervisor:
    """A hypervisor by name, or from a file by path (anything with a ``/`` or ending in ``.toml``).

    Raises :class:`UsageError` if there is no such spec, :class:`SpecError` if it is wrong.
    """
    if "/" in spec or spec.endswith(".toml"):
        merged = _read_path(Path(spec))
        file = spec
    elif spec in names():
        merged, file = _read_name(spec), f"specs/hypervisors/{spec}.toml"
    else:
        raise UsageError(f"no hypervisor spec named {spec!r}; there are: {', '.join(names())}")
    return _hypervisor(merged, file)


def _read_path(path: Path) -> dict[str, Any]:
    spec = facts.load_path(path)
    return _merge(spec, path.read_text("utf-8"), str(path))


def _read_name(name: str) -> dict[str, Any]:
    text = (facts.root() / "hypervisors" / f"{name}.toml").read_text("utf-8")
    return _merge(facts.load("hypervisors", name), text, f"specs/hypervisors/{name}.toml")


def _merge(spec: dict[str, Any], text: str, file: str) -> dict[str, Any]:
    """The spec with its texts placed, over what it inherits."""
    unknown = sorted(set(spec) - _KEYS)
    if unknown:
        raise SpecError(f"unknown key {unknown[0]!r}", file=file)
    own = dict(spec)
    for table in _TABLES:
        if not isinstance(own.setdefault(table, {}), dict):
            raise SpecError(f"[{table}] is not a table", file=file)
    own["routines"] = _placed(own["routines"], text, file)
    own["calls"] = _placed(own["calls"], text, file)
    own["init"] = _placed({"asm": own["init"].get("asm")}, text, file, "[init]")
    for name, table in own["abi"].items():
        if not isinstance(table, dict) or not isinstance(table.get("calls", {}), dict):
            raise SpecError(f'[abi."{name}".calls] is not a table', file=file)
    _check_types(own, file)
    own["abi"] = {
        name: _placed(table.get("calls", {}), text, file, f'[abi."{name}".calls]') for name, table in own["abi"].items()
    }
    _known_calls(own, file)
    parent = own.get("inherits")
    if parent is None:
        return own
    if parent not in facts.names("hypervisors"):
        raise SpecError(f"inherits {parent!r}, which does not exist", file=file)
    base = _read_name(parent)
    merged = {**base, **own, "abstract": own.get("abstract", False)}
    for key, value in own.items():
        if isinstance(value, dict):
            merged[key] = {**base.get(key, {}), **value}
    for name, table in base["abi"].items():
        merged["abi"][name] = {**table, **own["abi"].get(name, {})}
    return merged


def _check_types(own: dict[str, Any], file: str) -> None:
    """Raise :class:`SpecError` for a key whose value is of another kind than it must be."""

    def need(fine: bool, key: str, kind: str) -> None:
        if not fine:
            raise SpecError(f"{key} must be {kind}", file=file)

    def number(value: object, bits: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << bits

    for key in ("name", "inherits", "title", "version", "license", "default"):
        need(isinstance(own.get(key, ""), str), key, "a text")
    need(isinstance(own.get("abstract", False), bool), "abstract", "true or false")
    need(number(own.get("virtual_top", 0), 32), "virtual_top", "a 32-bit address")
    only = own.get("only", [])
    need(isinstance(only, list) and all(isinstance(name, str) for name in only), "only", "a list of ABI names")
    for table in ("state", "constants", "macros", "routines"):
        for name in own[table]:
            need(bool(_NAME.fullmatch(name)) and name.isascii(), f"{table}: {name!r}", "a plain name")
    for name, value in own["constants"].items():
        need(number(value, 32), f"constants: {name}", "a 32-bit number")
    for name, value in own["macros"].items():
        need(isinstance(value, str) and "\n" not in value, f"macros: {name}", "a text of one line")
    for name, value in own["state"].items():
        sizes = isinstance(value, list) and len(value) == 3 and isinstance(value[2], str)
        need(sizes and number(value[0], 16) and number(value[1], 16), f"state: {name}", "[offset, bytes, meaning]")
    identity, detect = own["identity"], own["detect"]
    for name in ("vendor", "device"):
        need(number(identity.get(name, 0), 16), f"identity: {name}", "a 16-bit number")
    for name in ("manufacturer", "product"):
        need(isinstance(identity.get(name, ""), str), f"identity: {name}", "a text")
    class_code = identity.get("class", [0, 0, 0])
    need(
        isinstance(class_code, list) and len(class_code) == 3 and all(number(part, 8) for part in class_code),
        "identity: class",
        "three bytes",
    )
    need(number(detect.get("leaf", 0), 32), "detect: leaf", "a 32-bit number")
    need(isinstance(detect.get("signature", ""), str), "detect: signature", "a text")
    taken = sorted({call for abi in abis.names() for call in abis.load(abi).calls} & set(own["routines"]))
    need(not taken, f"routines: {taken[0] if taken else ''}", "no call's name")
    built_in = sorted(_BUILT_IN & set(own["routines"]))
    need(not built_in, f"routines: {built_in[0] if built_in else ''}", "none that the builder makes itself")


def _placed(table: dict[str, Any], text: str, file: str, header: str | None = None) -> dict[str, Text]:
    """Texts with the line on which each begins."""
    out: dict[str, Text] = {}
    for key, value in table.items():
        if value is None:
            continue
        line = _line_below(text, header, key) if header else line_of(text, key)
        if not isinstance(value, str):
            raise SpecError("not a text", file=file, section=key, line=line)
        # TOML drops the newline that follows an opening triple quote.
        lines = text.split("\n")
        opened = line <= len(lines) and lines[line - 1].rstrip().endswith(('"""', "'''"))
        out[key] = Text(value, file, line + 1 if opened and "\n" in value else line)
    return out


def _line_below(text: str, header: str, key: str) -> int:
    found = False
    for number, line in enumerate(text.split("\n"), 1):
        bare = line.strip()
        if bare.startswith("["):
            found = bare.split("#")[0].strip() == header
        elif found and "=" in bare and bare.split("=")[0].strip().replace('"', "") == key:
            return number
    return 1


def _known_calls(own: dict[str, Any], file: str) -> None:
    every = {call for name in abis.names() for call in abis.load(name).calls}
    for call, text in own["calls"].items():
        if call not in every:
            raise SpecError("no ABI has a call of this name", file=file, section=call, line=text.line)
    for name, table in own["abi"].items():
        known = abis.load(name).calls if name in abis.names() else None
        if known is None:
            raise SpecError(f"there is no ABI named {name!r}", file=file)
        for call, text in table.items():
            if call not in known:
                raise SpecError(f"{name} has no call of this name", file=file, section=call, line=text.line)


def _hypervisor(spec: dict[str, Any], file: str) -> Hypervisor:
    if spec.get("abstract"):
        raise SpecError("only a base for others: no ROM can be built from it", file=file)
    for key in ("name", "title", "version", "license", "virtual_top", "default"):
        if key not in spec:
            raise SpecError(f"{key!r} is missing (inherit base or deprivileged)", file=file)
    if "asm" not in spec["init"]:
        raise SpecError("[init] has no asm", file=file)
    if spec["default"] not in WORDS:
        raise SpecError(f"default {spec['default']!r} is none of {', '.join(WORDS)}", file=file)
    try:
        major, minor = (int(n) for n in spec["version"].split("."))
        state = {key: State(*value) for key, value in spec["state"].items()}
        name, license_, top = str(spec["name"]), str(spec["license"]), int(spec["virtual_top"])
        texts = [name, license_, *(str(v) for v in spec["identity"].values() if isinstance(v, str))]
    except (ValueError, TypeError, AttributeError) as error:
        raise SpecError(f"version or state is malformed: {error}", file=file) from error
    if not all(t.isascii() and t.isprintable() and len(t) < 64 for t in texts):
        raise SpecError("name, licence and identity are up to 63 printable ASCII characters", file=file)
    if not (0 <= major < 256 and 0 <= minor < 256):
        raise SpecError(f"version {major}.{minor}: each part is one byte", file=file)
    if top % _PAGE or not 0 <= top < 1 << 32:
        raise SpecError(f"virtual_top {top:#x} is not a page's address", file=file)
    _check_state(state, top, file)
    return Hypervisor(
        name=name,
        title=spec["title"],
        file=file,
        version=(major, minor),
        license=license_,
        virtual_top=top,
        default=spec["default"],
        only=tuple(spec.get("only", [])),
        identity=spec["identity"],
        detect=spec["detect"],
        state=state,
        constants=spec["constants"],
        macros=spec["macros"],
        init=spec["init"]["asm"],
        routines=spec["routines"],
        calls=spec["calls"],
        abi_calls=spec["abi"],
    )


def _check_state(state: dict[str, State], top: int, file: str) -> None:
    if state and not top:
        raise SpecError("state without a virtual_top has no page to live in", file=file)
    taken: list[tuple[int, int, str]] = []
    for key, field in state.items():
        end = field.offset + field.size
        if field.offset < 0 or field.size < 1 or end > _PAGE:
            raise SpecError(f"state {key!r} lies outside its page", file=file)
        for start, stop, other in taken:
            if field.offset < stop and start < end:
                raise SpecError(f"state {key!r} overlaps {other!r}", file=file)
        taken.append((field.offset, end, key))
