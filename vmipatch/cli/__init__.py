"""The command line: one module per command, thin.  What is heavy is imported inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

import typer

_OBJECTS = 200_000
"""New objects after which cycles of them are looked for."""

# In the order of the help page.  A command is its module's function of the same name.
_COMMANDS = ("scan", "patch", "diff", "restore", "explain", "audit", "run", "validate", "demo", "schema")
_GROUPS = ("rom",)


def _version(wanted: bool) -> None:
    if wanted:
        from vmipatch import __version__

        typer.echo(f"vmipatch {__version__}")
        raise typer.Exit


def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""


def application(words: Sequence[str] = ()) -> typer.Typer:
    """The command line for these arguments: one whole command, or all where the first word names none.

    Typer reads the signature of every command that it is given, which is a good part of a small scan's time.
    """
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
    wanted = words[:1] if words and words[0] in (*_COMMANDS, *_GROUPS) else (*_COMMANDS, *_GROUPS)
    for name in wanted:
        module = import_module(f"vmipatch.cli.{name}")
        if name in _GROUPS:
            app.add_typer(module.app, name=name)
        else:
            app.command()(getattr(module, name))
    app.callback()(options)
    return app


def __getattr__(name: str) -> typer.Typer:
    """``app``: the command line with all its commands, made when it is asked for."""
    if name == "app":
        return application()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    # A shell that completes a command has no arguments to go by.
    completing = any(name.startswith("_VMIPATCH_COMPLETE") for name in os.environ)
    try:
        application(() if completing else sys.argv[1:])()
    except VmipatchError as error:
        if "--json" in sys.argv:
            from vmipatch.report.failure import document

            sys.stdout.write(document(error))
        sys.stdout.flush()
        print(f"vmipatch: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader of our output has gone; nothing is wrong, and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def program() -> NoReturn:
    """:func:`main`, and then out of the process at once: to free a hundred thousand sites one by one takes time."""
    try:
        main()
        status = 0
    except SystemExit as left:
        if left.code is not None and not isinstance(left.code, int):
            raise
        status = left.code or 0
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        # The interpreter has its own way of leaving where an output fails.
        sys.exit(status)
    os._exit(status & 0xFF)
