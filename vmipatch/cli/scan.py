"""``vmipatch scan``: every annotated site of an image."""

from __future__ import annotations

from typing import Annotated

import typer

from vmipatch.cli.common import Base, ImagePath, Layouts, SystemMap, open_and_scan, say_if_newer


def scan(
    image: ImagePath,
    family: Annotated[
        list[str] | None, typer.Option(help="Only this family; may be given more than once. [default: all]")
    ] = None,
    layout: Layouts = None,
    base: Base = None,
    system_map: SystemMap = None,
    summary: Annotated[bool, typer.Option("--summary", help="Tables and findings only, no sites.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON (schema vmipatch.scan/1).")] = False,
) -> None:
    """List every annotated paravirtual call site of a kernel image.

    Exit status 1 if a table or one of its entries makes no sense.
    """
    from vmipatch.report import scan as report

    opened, found = open_and_scan(image, base, system_map, family, layout)
    say_if_newer(opened)
    (report.as_json if json else report.as_table)(opened, found, sites=not summary)
    if found.findings:
        raise typer.Exit(1)
