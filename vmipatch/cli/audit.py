"""``vmipatch audit``: what a person should look at in a kernel image, and in a ROM for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmipatch.cli.common import (
    Base,
    ImagePath,
    Kernel,
    Layouts,
    SystemMap,
    layout_options,
    parse,
    progress,
    say_if_newer,
)
from vmipatch.cli.common import opened as open_it

DEFAULT_LEVEL = "warning"
NEVER = "never"


def audit(
    image: ImagePath,
    rom: Annotated[
        Path | None, typer.Option("--rom", metavar="ROM", help="Check this VMI ROM against the kernel, too.")
    ] = None,
    fail_on: Annotated[
        str, typer.Option(metavar="LEVEL", help="Exit status 1 from this severity on: note, warning, error, or never.")
    ] = DEFAULT_LEVEL,
    sarif: Annotated[
        Path | None, typer.Option("--sarif", metavar="F", help="Write the findings as SARIF 2.1.0.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="F", help="Write one page to look at: map, findings, instructions.")
    ] = None,
    kernel: Kernel = None,
    layout: Layouts = None,
    base: Base = None,
    system_map: SystemMap = None,
    json: Annotated[bool, typer.Option("--json", help="JSON (schema vmipatch.audit/1).")] = False,
) -> None:
    """Find what is sensitive and carries no annotation, sites that are unsafe to patch, and a ROM that does not fit.

    Exit status 1 if there is a finding of --fail-on or worse.
    """
    from vmipatch.ahead import Ahead

    opening = Ahead(lambda: open_it(image, base, system_map))
    from vmipatch.audit import SEVERITIES, reaches
    from vmipatch.audit import audit as run
    from vmipatch.errors import UsageError
    from vmipatch.report import audit as report

    if fail_on not in (*SEVERITIES, NEVER):
        raise UsageError(f"--fail-on {fail_on}: there are {', '.join(SEVERITIES)} and {NEVER}")
    overrides = layout_options(layout)
    release = parse(kernel)
    opened = opening.result()
    say_if_newer(opened, kernel)
    found = run(opened, rom=rom, kernel=release, layouts=overrides, progress=progress)
    if sarif is not None:
        from vmipatch.report.auditreports import sarif_document
        from vmipatch.report.writing import write_text

        write_text(sarif, sarif_document(opened, found))
    if html is not None:
        from vmipatch.report.auditreports import audit_page
        from vmipatch.report.html import render
        from vmipatch.report.writing import write_text

        write_text(html, render(audit_page(opened, found)))
    (report.as_json if json else report.as_table)(opened, found)
    worst = found.worst()
    if fail_on != NEVER and worst is not None and reaches(worst, fail_on):
        raise typer.Exit(1)
