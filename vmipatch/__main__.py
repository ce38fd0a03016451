"""``python -m vmipatch``."""

from vmipatch.cli import main

main()
