"""Fixtures for people's own regression tests on kernel images (docs/reports.md); loaded by pytest by itself.

Everything but pytest is imported when a fixture is used: who does not use them pays for one small module.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vmipatch.annotate import Scan
    from vmipatch.image import Image
    from vmipatch.patch import Plan

MARKER = "vmi_image(path): the kernel image of this test, from the test file's folder or the root folder"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmipatch", "kernel images that patch themselves")
    group.addoption("--vmi-image", metavar="PATH", default=None, help="The kernel image of the vmi_image fixture.")
    group.addoption("--vmi-update", action="store_true", help="Write the snapshots of vmi_snapshot anew.")
    parser.addini("vmi_image", "The kernel image of the vmi_image fixture, from the root folder.", default="")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


@pytest.fixture(scope="session")
def vmi_open() -> Callable[..., Image]:
    """Opens images by path, each once a session: ``vmi_open("vmlinux")``, ``vmi_open(path, base=0xC1000000)``."""
    from vmipatch.image import open_image

    had: dict[tuple[Any, ...], Image] = {}

    def opening(path: str | Path, **options: Any) -> Image:
        real = Path(path).resolve()
        # A test may write the file anew between two uses.
        written = real.stat().st_mtime_ns if real.exists() else 0
        key = (real, written, *sorted(options.items()))
        if key not in had:
            had[key] = open_image(real, **options)
        return had[key]

    return opening


@pytest.fixture
def vmi_image(request: pytest.FixtureRequest, vmi_open: Callable[..., Image]) -> Image:
    """The kernel image that ``@pytest.mark.vmi_image(path)``, ``--vmi-image`` or the ini option ``vmi_image`` names."""
    mark = request.node.get_closest_marker("vmi_image")
    if mark is not None:
        if len(mark.args) != 1 or mark.kwargs:
            pytest.fail(f"the marker takes one path: {MARKER}", pytrace=False)
        folders = [request.path.parent, request.config.rootpath]
        candidates = list(dict.fromkeys(folder / mark.args[0] for folder in folders))
    elif request.config.getoption("--vmi-image"):
        candidates = [request.config.invocation_params.dir / request.config.getoption("--vmi-image")]
    elif request.config.getini("vmi_image"):
        candidates = [request.config.rootpath / request.config.getini("vmi_image")]
    else:
        pytest.fail(
            "no kernel image is named: mark the test with @pytest.mark.vmi_image(PATH), give --vmi-image PATH, "
            "or set vmi_image in the ini file",
            pytrace=False,
        )
    path = next((c for c in candidates if c.exists()), None)
    if path is None:
        pytest.fail(f"no kernel image at {' or '.join(map(str, candidates))}", pytrace=False)
    return vmi_open(path)


@pytest.fixture
def assert_sites() -> Callable[..., Any]:
    """:func:`vmipatch.testing.assert_sites`."""
    from vmipatch import testing

    return testing.assert_sites


@pytest.fixture
def assert_patched_like() -> Callable[..., None]:
    """:func:`vmipatch.testing.assert_patched_like`."""
    from vmipatch import testing

    return testing.assert_patched_like


class Snapshots:
    """Site tables and plans against what was kept of them; see :func:`vmi_snapshot`."""

    def __init__(self, folder: Path, stem: str, update: bool) -> None:
        self._folder = folder
        self._stem = stem
        self._update = update

    def path(self, name: str = "") -> Path:
        """Where a snapshot of this test is kept."""
        return self._folder / f"{self._stem}{f'-{name}' if name else ''}.json"

    def __call__(self, image: Image, subject: Scan | Plan, name: str = "") -> None:
        """Fail where a site table (a ``Scan``) or a ``Plan`` is not as kept; with ``--vmi-update`` keep it."""
        __tracebackhide__ = True
        import json

        from vmipatch.testing import first_difference, snapshot_lines

        now = snapshot_lines(image, subject)
        path = self.path(name)
        if self._update:
            from vmipatch.report.writing import write_text

            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "[\n" + ",\n".join(json.dumps(row) for row in now) + "\n]\n")
            return
        try:
            kept = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise AssertionError(f"no snapshot at {path}: run pytest once with --vmi-update") from None
        except ValueError as error:
            raise AssertionError(f"{path}: not a snapshot: {error}") from None
        if kept != now:
            said = first_difference(image, kept, now)
            raise AssertionError(f"{path}: {said}\nIf that is right, run pytest with --vmi-update.")


@pytest.fixture
def vmi_snapshot(request: pytest.FixtureRequest) -> Snapshots:
    """Compares with what was kept: ``vmi_snapshot(image, scan(image))``, ``vmi_snapshot(image, plan, "pentium3")``."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in request.node.name)
    folder = request.path.parent / "snapshots" / request.path.stem
    return Snapshots(folder, name, bool(request.config.getoption("--vmi-update")))
