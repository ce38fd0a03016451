"""The CPU that a kernel is patched for: who made it, and its x86_capability words.

The words come from a file that a running kernel gave, or from a model of
``specs/cpus/``.  Imports facts, annotate.features and errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmipatch import facts
from vmipatch.annotate.features import numbers
from vmipatch.errors import SpecError, UsageError

Version = tuple[int, ...]

MOST_WORDS = 64
"""More than any kernel has had; a longer file is not of feature words."""

MOST_BYTES = 1 << 16
"""More than any features file needs."""
ALWAYS = "9999"
"""A release after every other."""

_WORD = re.compile(r"(?:0x)?([0-9a-f]{1,8})", re.IGNORECASE)
_DECIMAL = re.compile(r"[0-9]{1,5}")
_IDENTITY = re.compile(r"(vendor|family|model|stepping)=(\S+)")
# A release is numbers, then what a distribution counts (-50, +deb13), then the flavour.
_COUNTED = r"(?:-rc\d+)?(?:[-~]\d[\w.~]*|\+[\w.~]+)*?"
_RELEASE = re.compile(rf"Linux version \d+(?:\.\d+)+{_COUNTED}-([A-Za-z]\S*|[3-6]86\S*)")


@dataclass(frozen=True, slots=True)
class Cpu:
    """A CPU as one kernel sees it.

    ``words`` are the kernel's x86_capability, 32 bits each, synthetic words
    included.  ``vendor`` is CPUID's (``GenuineIntel``, …); it and the rest of the
    identity are None where nothing tells.  ``complete`` says whether the words
    were measured on the very kernel; ``file`` is the features file they are from.
    """

    name: str
    vendor: str | None
    family: int | None
    model: int | None
    stepping: int | None
    words: tuple[int, ...]
    complete: bool = True
    file: str | None = None

    def has(self, feature: int) -> bool:
        """Whether a feature bit (word * 32 + bit) is set."""
        word = feature >> 5
        return word < len(self.words) and bool(self.words[word] >> (feature & 31) & 1)

    def require_words(self, least: int, most: int | None = None) -> None:
        """Raise :class:`UsageError`, with both counts, unless there are ``least`` (to ``most``) words."""
        if not least <= len(self.words) <= (least if most is None else most):
            wanted = str(least) if most in (None, least) else f"{least} to {most}"
            text = f"{len(self.words)} feature words, but this kernel has {wanted}"
            raise UsageError(text if self.file else f"{self.name}: {text}", file=self.file)


def from_features(path: Path) -> Cpu:
    """The CPU of a features file: hexadecimal words separated by white space.

    ``#`` begins a comment; one with ``vendor=GenuineIntel family=6 model=26 stepping=3``
    (any of them) gives the identity, on which nop tables before 5.13 depend.
    Raises :class:`UsageError` with file and line for anything else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"cannot read the feature words: {reason}", file=path) from error
    if len(data) > MOST_BYTES:
        raise UsageError(f"more than {MOST_BYTES} bytes: this is no features file", file=path)
    words: list[int] = []
    identity: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        body, _, comment = line.partition("#")
        for item in body.split():
            match = _WORD.fullmatch(item)
            if match is None:
                raise UsageError(f"{item[:40]!r} is no 32-bit hexadecimal word", file=path, line=number)
            words.append(int(match[1], 16))
        if len(words) > MOST_WORDS:
            raise UsageError(f"more than {MOST_WORDS} words: no kernel has so many", file=path, line=number)
        for key, value in _IDENTITY.findall(comment):
            if key != "vendor" and not _DECIMAL.fullmatch(value):
                raise UsageError(f"{key}={value}: a decimal number was expected", file=path, line=number)
            if identity.setdefault(key, value) != value:
                raise UsageError(f"{key}={value}, but {identity[key]} above", file=path, line=number)
    if not words:
        raise UsageError("no feature words in it", file=path)

    def field(key: str) -> int | None:
        return int(identity[key]) if key in identity else None

    return Cpu(
        str(path), identity.get("vendor"), field("family"), field("model"), field("stepping"),
        tuple(words), file=str(path),
    )  # fmt: skip


def flavour(banner: str | None) -> str | None:
    """What a distribution calls the kernel's configuration: ``686-pae`` of ``Linux version 6.1.0-50-686-pae …``."""
    match = _RELEASE.match(banner) if banner is not None else None
    return match[1] if match else None


def from_spec(name: str, release: Version | None, *, bits: int = 32, flavour: str | None = None, cpus: int = 1) -> Cpu:
    """The model of ``specs/cpus/<name>.toml`` as the kernel of a release, with so many CPUs, sees it.

    ``complete`` where its words were measured on that very release and
    ``flavour``.  On another release of the series the same words serve; where
    none were measured there are the architectural ones, and those of Linux's own
    that follow from the identity.  Raises :class:`UsageError` for an unknown name.
    """
    spec = facts.load("cpus", name)
    known = release or ()
    series = ".".join(map(str, known[: 3 if known[:1] == (2,) else 2]))
    measured = spec.get("measured", {}).get(f"{series}-{flavour}")
    if measured is not None:
        words = tuple(int(word, 16) for word in measured["words"].split())
        complete = known[:3] == _version(measured["release"])
    else:
        words, complete = _computed(name, spec, known, bits), False
    cpu = Cpu(name, spec["vendor"], spec["family"], spec["model"], spec["stepping"], words, complete)
    return _with_cpus(cpu, known, cpus)


def _with_cpus(cpu: Cpu, release: Version, cpus: int) -> Cpu:
    """The words for a number of CPUs; those of a spec are for one."""
    words = list(cpu.words)
    for rule in facts.load("isa", "features")["cpus"]:
        if (
            rule.get("least", 1) <= cpus <= rule.get("most", cpus)
            and rule.get("vendor", cpu.vendor) == cpu.vendor
            and release < _version(rule.get("until", ALWAYS))
        ):
            number = numbers()[rule["feature"]]
            words[number >> 5] |= 1 << (number & 31)
    return replace(cpu, words=tuple(words))


def _computed(name: str, spec: dict[str, Any], release: Version, bits: int) -> tuple[int, ...]:
    words = [0] * _count(release)
    known = numbers()

    def add(feature: str) -> None:
        number = known.get(feature)
        if number is None:
            raise SpecError(f"no feature is named {feature!r}", file=f"specs/cpus/{name}.toml")
        if number >> 5 < len(words):
            words[number >> 5] |= 1 << (number & 31)

    for feature in spec["features"]:
        add(feature)
    for rule in facts.load("isa", "features")["synthetic"]:
        if _follows(rule, spec, release, bits):
            bit = rule["bit"]
            words[bit[0]] |= 1 << bit[1]
    return tuple(words)


def _follows(rule: dict[str, Any], spec: dict[str, Any], release: Version, bits: int) -> bool:
    """Whether a synthetic bit follows from identity, release and bits by a rule of specs/isa/features.toml."""
    least, most = rule.get("family", (0, 0xFFFF))
    return (
        _version(rule.get("since", "0")) <= release < _version(rule.get("until", ALWAYS))
        and rule.get("bits", bits) == bits
        and rule.get("vendor", spec["vendor"]) == spec["vendor"]
        and least <= spec["family"] <= most
        and ("needs" not in rule or rule["needs"] in spec["features"])
    )


def _count(release: Version) -> int:
    """The fewest feature words that a kernel of the release has (specs/kernels/)."""
    specs = [facts.whole("kernels", name) for name in facts.names("kernels")]
    eras = sorted((_version(spec["since"]), spec["feature_words"][0]) for spec in specs)
    counts = [words for since, words in eras if since <= release] if release else [words for _, words in eras]
    return int(counts[-1] if counts else eras[0][1])


def _version(text: str) -> Version:
    return tuple(int(part) for part in text.split("."))
