"""``vmipatch schema``: the published JSON schemas."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def schema(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A document type. [default: list them]", show_default=False)
    ] = None,
) -> None:
    """Print the JSON schema (draft 2020-12) of a kind of document that the commands print or write."""
    from vmipatch.report import schemas

    sys.stdout.write(schemas.schema(name) if name is not None else "".join(f"{n}\n" for n in schemas.names()))
