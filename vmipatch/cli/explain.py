"""``vmipatch explain``: the cause of every byte of a running kernel's text, or the set of all that it may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmipatch.cli.common import Features, ImagePath, Kernel, SystemMap, number, parse, say_if_newer
from vmipatch.cli.common import opened as open_it


def explain(
    image: ImagePath,
    memory: Annotated[
        Path | None, typer.Option(metavar="DUMP", help="The machine's memory: an ELF core, or raw (with --base).")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="ADDR", help="DUMP is raw and begins at this virtual or physical address.")
    ] = None,
    features: Features = None,
    modules: Annotated[
        Path | None,
        typer.Option(
            "--modules",
            metavar="DIR",
            help="Files of the kernel's modules; with --memory by default what lies beside the image.",
        ),
    ] = None,
    legal: Annotated[
        Path | None,
        typer.Option("--legal", metavar="OUT", help="Write every byte string that each site may ever hold, as JSON."),
    ] = None,
    sarif: Annotated[
        Path | None, typer.Option("--sarif", metavar="F", help="Write the unexplained bytes as SARIF 2.1.0.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="F", help="Write one page to look at: map, places, bytes.")
    ] = None,
    kernel: Kernel = None,
    system_map: SystemMap = None,
    json: Annotated[bool, typer.Option("--json", help="JSON (schema vmipatch.explain/1).")] = False,
) -> None:
    """Say of every byte of a running kernel's text whether it is pristine, a legal self-patch, or unexplained.

    The same of the modules that it has loaded, and of all other memory that it can execute.  Exit status 1 if there
    are unexplained bytes, or memory that belongs to nothing known.  Memory of another kernel is refused.
    """
    from vmipatch.ahead import Ahead
    from vmipatch.errors import UsageError

    if memory is None and legal is None:
        raise UsageError("what is to be explained? Give --memory DUMP (or --legal OUT)")
    if memory is None and any(x is not None for x in (base, features, sarif, html)):
        raise UsageError("--base, --features, --sarif and --html go with --memory")
    opening = Ahead(lambda: open_it(image, None, system_map))
    from vmipatch.explain import Memory
    from vmipatch.explain import explain as run
    from vmipatch.explain.modules import beside
    from vmipatch.patch import from_features
    from vmipatch.report import explain as report

    opened = opening.result()
    if memory is None:
        say_if_newer(opened, kernel)
    if legal is not None:
        from vmipatch.explain import legal as legal_set
        from vmipatch.explain.modules import legal_modules
        from vmipatch.report.writing import write_text

        # With a dump the folder says what is loaded in it.
        files = modules if memory is None else None
        of_modules = legal_modules(opened, files, kernel=parse(kernel)) if files is not None else ()
        write_text(legal, report.legal_text(opened, legal_set(opened, kernel=parse(kernel)), of_modules))
    if memory is not None:
        cpu = None if features is None else from_features(features)
        dump = Memory(memory, None if base is None else number(base))
        found = run(opened, dump, cpu=cpu, kernel=parse(kernel))
        if sarif is not None:
            from vmipatch.report.sarif import explain_document
            from vmipatch.report.writing import write_text

            write_text(sarif, explain_document(opened, str(memory), found))
        if html is not None:
            from vmipatch.report.html import render
            from vmipatch.report.pages import explain_page
            from vmipatch.report.writing import write_text

            write_text(html, render(explain_page(opened, str(memory), found)))
        folder = modules if modules is not None else beside(opened.path)
        loaded = None
        if folder is not None and found.kernel is not None:
            from vmipatch.explain.modules import explain_modules

            loaded = explain_modules(found.kernel, folder)
        (report.as_json if json else report.as_table)(opened, str(memory), found, loaded)
        if found.unexplained_bytes or (loaded is not None and not loaded.clean):
            raise typer.Exit(1)
