"""``vmipatch restore``: the original back from a patched image and its journal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def restore(
    patched: Annotated[Path, typer.Argument(metavar="PATCHED", help="A file that `vmipatch patch` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="Write there. [default: over PATCHED]"),
    ] = None,
) -> None:
    """Give the original back, byte for byte, from the journal beside PATCHED.

    What went in comes out: for a bzImage the bzImage.
    """
    from vmipatch.patch import restore as give_back

    print(f"restored {give_back(patched, output)}")
