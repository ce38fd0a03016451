"""Makes the builders in this folder (``elfwriter`` and the like) importable from every test below it, and pytester
available, with which the plugin's tests run tests.
"""

pytest_plugins = ["pytester"]
