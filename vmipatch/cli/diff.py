"""``vmipatch diff``: original, patched and expected bytes of every site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmipatch.cli.common import (
    CpuName,
    Cpus,
    Features,
    ImagePath,
    Kernel,
    SystemMap,
    choose_target,
    native,
    open_and_scan,
    parse,
    say_if_newer,
)


def diff(
    image: ImagePath,
    patched: Annotated[Path, typer.Argument(metavar="PATCHED", help="The patched image.", show_default=False)],
    cpu: CpuName = None,
    features: Features = None,
    cpus: Cpus = None,
    kernel: Kernel = None,
    system_map: SystemMap = None,
    all_sites: Annotated[bool, typer.Option("--all", help="Sites that are as on disk, too.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="F", help="Write one page to look at.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON (schema vmipatch.diff/1).")] = False,
) -> None:
    """Show what each site holds: original, patched, expected.

    What is expected comes from the CPU and the number of CPUs that PATCHED's
    journal names, unless --cpu or --features say otherwise.  Exit status 1 if a
    site holds something else.
    """
    from vmipatch.errors import ImageError
    from vmipatch.image import open_image
    from vmipatch.patch.compare import compare
    from vmipatch.patch.journal import path_of, read
    from vmipatch.patch.planner import plan
    from vmipatch.patch.target import from_description
    from vmipatch.report import diff as report

    opened, found = open_and_scan(image, None, system_map, None, None)
    say_if_newer(opened, kernel)
    record = read(patched) if path_of(patched).exists() else None
    if cpu is None and features is None and record is not None:
        wanted = from_description(record.target, opened, found, patched)
    else:
        wanted = choose_target(native(cpu, features, cpus, opened, kernel), None, None, None, opened, found)
    seal = record is not None and record.sealed
    planned = plan(opened, found, wanted, kernel=parse(kernel), seal=seal, skip_unknown=True)
    try:
        written = open_image(patched)
    except ImageError:
        # Of a kernel that is bare memory the patched one is that too, unless it was packed again.
        if opened.bare_base is None:
            raise
        written = open_image(patched, base=opened.bare_base)
    rows = compare(opened, written, found, planned)
    if html is not None:
        from vmipatch.report.html import render
        from vmipatch.report.pages import diff_page
        from vmipatch.report.writing import write_text

        write_text(html, render(diff_page(opened, str(patched), rows)))
    wrong = (report.as_json if json else report.as_table)(opened, rows, everything=all_sites)
    if wrong:
        raise typer.Exit(1)
