"""Makes the builders in this folder (``elfwriter`` and the like) importable from every test below it."""
