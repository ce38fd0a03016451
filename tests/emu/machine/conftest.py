"""Fixtures of the device tests."""

from __future__ import annotations

import pytest
from machineparts import Line, PlainMemory, Time

from vmipatch.emu.machine.bus import Bus


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def bus() -> Bus:
    return Bus()


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def memory() -> PlainMemory:
    return PlainMemory()
