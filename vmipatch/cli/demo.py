"""``vmipatch demo``: the whole chain on the bundled example guest, over all hypervisors."""

from __future__ import annotations

from typing import Annotated

import typer

from vmipatch.cli.common import progress


def demo(
    hypervisor: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this hypervisor; may be given several times.")
    ] = None,
    form: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this form of the guest: rfc-v1, v2 or mainline.")
    ] = None,
    states: Annotated[
        int, typer.Option(metavar="N", min=1, help="States that each site is tried from, at each moment.")
    ] = 2,
) -> None:
    """Build every ROM, patch the example guest for it, boot it three ways, and try every site.

    The guest is a small i386 kernel in three forms: with the annotations of the RFC of 2006 (rfc-v1), with
    those of API 3.0 (v2), and as mainline Linux did it.  It ends in one table.
    """
    import sys

    from vmipatch.report.validate import demo_table
    from vmipatch.validate.demonstration import demonstrate

    rows = []
    for row in demonstrate(hypervisor, form, states):
        progress(f"{row.hypervisor}, {row.form}: {row.verdict}")
        rows.append(row)
    sys.stdout.write(demo_table(rows) + "\n")
    for row in rows:
        for problem in row.problems:
            sys.stdout.write(f"{row.hypervisor}, {row.form}: {problem}\n")
    if any(row.verdict != "pass" for row in rows):
        raise typer.Exit(1)
