"""SARIF 2.1.0 (OASIS standard, errata 01): findings as other tools take them.

An artifact is the file as it was given; a packed kernel's ELF is an artifact inside it, and offsets count in that
(3.24.8).  Addresses are in ``address`` objects (3.32), and as hexadecimal text in ``properties``: readers whose
numbers end at 2^53 lose the last digits of 64-bit ones.  Imports explain, annotate, image, errors and report.jsontext.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from vmipatch.errors import AddressError
from vmipatch.explain import Explanation, Unexplained
from vmipatch.image import Image
from vmipatch.report.jsontext import dumps, whole

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
FINGERPRINT = "vmipatchPlace/v1"


class Rule(NamedTuple):
    """What a finding can be of; ``level`` is ``error``, ``warning`` or ``note``."""

    id: str
    title: str
    level: str
    description: str
    help: str


class Result(NamedTuple):
    """One finding: ``address`` is virtual, ``offset`` in :attr:`Image.data`; both None where the image has no place.

    ``identity`` is what the fingerprint is made from besides rule and symbol, the same in every run over the
    same kernel.  ``properties`` are free.
    """

    rule: str
    level: str
    message: str
    address: int | None
    offset: int | None
    length: int | None
    symbol: str | None
    symbol_offset: int | None
    section: str | None
    identity: str
    properties: Mapping[str, Any]


def document(image: Image, rules: Sequence[Rule], results: Iterable[Result], others: Sequence[str] = ()) -> str:
    """The SARIF log as JSON text; ``others`` are paths of further files that were looked at."""
    from vmipatch import __version__

    number = {rule.id: i for i, rule in enumerate(rules)}
    artifacts = _artifacts(image)
    inner = len(artifacts) - 1
    artifacts += [{"location": {"uri": _uri(path)}, **_size(path)} for path in others]
    run = {
        "tool": {
            "driver": {
                "name": "vmipatch",
                "version": __version__,
                "semanticVersion": __version__,
                "rules": [_rule(rule) for rule in rules],
            }
        },
        "invocations": [{"executionSuccessful": True}],
        "artifacts": artifacts,
        "results": [_result(r, number[r.rule], inner, artifacts[inner]["location"]["uri"]) for r in results],
        "columnKind": "utf16CodeUnits",
    }
    return dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _artifacts(image: Image) -> list[dict[str, Any]]:
    given: dict[str, Any] = {
        "location": {"uri": _uri(image.path)},
        **_size(image.path),
        "roles": ["analysisTarget"],
        "mimeType": "application/x-elf" if image.compression is None else "application/octet-stream",
        "hashes": {"sha-256": image.sha256()},
    }
    if image.compression is None:
        return [given]
    with memoryview(image.data) as data:
        digest = hashlib.sha256(data).hexdigest()
    packed = {
        "location": {"uri": "vmlinux"},
        "parentIndex": 0,
        "length": len(image.data),
        "roles": ["analysisTarget"],
        "mimeType": "application/x-elf",
        "hashes": {"sha-256": digest},
        "description": {"text": f"the kernel's ELF file, unpacked ({image.compression})"},
    }
    return [given, packed]


def _size(path: str) -> dict[str, int]:
    try:
        return {"length": os.stat(path).st_size}
    except OSError:
        return {}


def _uri(path: str) -> str:
    """A path as a URI reference: relative ones stay so, and any byte that a file name may have is kept."""
    if os.path.isabs(path):
        return "file://" + quote(os.fsencode(path))
    return quote(os.fsencode(Path(path)))


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.id.split("-")),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.description},
        "help": {"text": rule.help},
        "defaultConfiguration": {"level": rule.level},
    }


def _result(result: Result, index: int, artifact: int, uri: str) -> dict[str, Any]:
    properties = {k: v for k, v in result.properties.items() if v is not None}
    record: dict[str, Any] = {
        "ruleId": result.rule,
        "ruleIndex": index,
        "level": result.level,
        "message": {"text": whole(result.message) or result.rule},
        "partialFingerprints": {FINGERPRINT: _fingerprint(result)},
    }
    place: dict[str, Any] = {"artifactLocation": {"uri": uri, "index": artifact}}
    if result.offset is not None:
        place["region"] = {"byteOffset": result.offset, "byteLength": result.length or 0}
    if result.address is not None:
        properties["address"] = f"{result.address:#x}"
        place["address"] = _address(result)
    location: dict[str, Any] = {"physicalLocation": place}
    if result.symbol is not None:
        location["logicalLocations"] = [{"name": result.symbol, "kind": "function"}]
    record["locations"] = [location]
    if properties:
        record["properties"] = properties
    return record


def _address(result: Result) -> dict[str, Any]:
    record: dict[str, Any] = {"absoluteAddress": result.address, "kind": "instruction"}
    if result.length:
        record["length"] = result.length
    if result.symbol is not None:
        offset = result.symbol_offset or 0
        record["name"] = result.symbol
        record["fullyQualifiedName"] = f"{result.symbol}+{offset:#x}"
    elif result.section:
        record["fullyQualifiedName"] = result.section
    return record


def _fingerprint(result: Result) -> str:
    where = (
        f"{result.symbol}+{result.symbol_offset or 0:#x}"
        if result.symbol is not None
        else f"{result.section}:{result.address if result.address is not None else '-'}"
    )
    text = "\0".join((result.rule, where, result.identity))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


# Explanations

UNEXPLAINED = Rule(
    "unexplained-bytes",
    "Bytes of the running kernel's text without a cause",
    "error",
    "The memory holds something else than this kernel would have written here, now, on this machine, and nothing in "
    "the dump accounts for it.",
    "Compare the instructions found with those expected. The hint says what the bytes look like, without evidence. "
    "A dump of text alone proves less: give the whole memory where there is one.",
)


def explain_document(image: Image, memory: str, found: Explanation) -> str:
    """The unexplained bytes of an explanation."""
    return document(image, [UNEXPLAINED], (_unexplained(image, u) for u in found.unexplained), [memory])


def _unexplained(image: Image, run: Unexplained) -> Result:
    count = len(run.found)
    where = f"{run.symbol}+{run.offset:#x}" if run.symbol else f"{run.address:#x}"
    size = "1 byte" if count == 1 else f"{count} bytes"
    message = f"{size} at {where}: found {_some(run.found)}, expected {_some(run.expected)}"
    return Result(
        rule=UNEXPLAINED.id,
        level=UNEXPLAINED.level,
        message=message + (f". {run.hint[:1].upper()}{run.hint[1:]}." if run.hint else ""),
        address=run.address,
        offset=_offset(image, run.address),
        length=count,
        symbol=run.symbol,
        symbol_offset=run.offset,
        section=".text",
        identity=run.found.hex(),
        properties={
            "found": run.found.hex(),
            "expected": run.expected.hex(),
            "site": run.site,
            "hint": run.hint,
            "instructionsFound": list(run.instructions_found),
            "instructionsExpected": list(run.instructions_expected),
        },
    )


def _some(code: bytes) -> str:
    return code[:16].hex(" ") + (" …" if len(code) > 16 else "")


def _offset(image: Image, address: int) -> int | None:
    try:
        return image.offset_of(address)
    except AddressError:
        return None
