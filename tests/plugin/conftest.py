"""pytester: tests of tests."""

pytest_plugins = ["pytester"]
