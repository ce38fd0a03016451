"""The command line: one module per command, thin.  What is heavy is imported inside the commands."""

from __future__ import annotations

import sys
from io import TextIOWrapper

import typer

from vmipatch.cli.audit import audit
from vmipatch.cli.demo import demo
from vmipatch.cli.diff import diff
from vmipatch.cli.explain import explain
from vmipatch.cli.patch import patch
from vmipatch.cli.restore import restore
from vmipatch.cli.rom import app as rom
from vmipatch.cli.run import run
from vmipatch.cli.scan import scan
from vmipatch.cli.schema import schema
from vmipatch.cli.validate import validate

_OBJECTS = 200_000
"""New objects after which cycles of them are looked for."""

app = typer.Typer(
    name="vmipatch",
    help="Work on kernels that patch their own code: find every annotated paravirtual call site, rewrite it in "
    "place, build VMI option ROMs, run kernels.  (VMI is VMware's Virtual Machine Interface, 2005 to 2010.)",
    epilog="Exit status: 0 clean, 1 findings, 2 wrong use or unusable input.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (scan, patch, diff, restore, explain, audit, run, validate, demo, schema):
    app.command()(command)
app.add_typer(rom, name="rom")


def _version(wanted: bool) -> None:
    if wanted:
        from vmipatch import __version__

        typer.echo(f"vmipatch {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; every error of ours becomes one line on standard error and its exit status."""
    import gc

    from vmipatch.errors import VmipatchError

    # A kernel has a hundred thousand sites, none of which is garbage while a command runs.
    gc.set_threshold(_OBJECTS)
    # Names in files need not be text in the terminal's encoding: they are shown all the same.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except VmipatchError as error:
        if "--json" in sys.argv:
            from vmipatch.report.failure import document

            sys.stdout.write(document(error))
        sys.stdout.flush()
        print(f"vmipatch: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader of our output has gone; nothing is wrong, and nobody is left to tell.
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
