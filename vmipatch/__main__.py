"""``python -m vmipatch``."""

from vmipatch.cli import program

program()
