"""What a command prints on standard output instead of its document when its input cannot be used.

Imports errors.
"""

from __future__ import annotations

from typing import Any

from vmipatch.errors import VmipatchError
from vmipatch.report.jsontext import dumps


def document(error: VmipatchError) -> str:
    """The error as one JSON document (schema ``vmipatch.error/1``); addresses and offsets have their ``…_hex``."""
    place: dict[str, Any] = {"file": error.file, "section": error.section, "line": error.line}
    for key, value in (("offset", error.offset), ("address", error.address)):
        place |= {key: value, f"{key}_hex": None if value is None else f"{value:#x}"}
    record = {"schema": "vmipatch.error/1", "error": {"message": " ".join(error.message.split()), **place}}
    return dumps(record | {"exit_status": error.exit_status}) + "\n"
