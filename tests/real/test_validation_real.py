"""Validation at full length: the demo, ten runs without a false alarm, and every mutant of every ROM.

Nothing here is fetched; it takes minutes, which is why it is not among the offline tests.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests import stubmutants
from vmipatch.rombuild.build import build
from vmipatch.validate import Request, validate
from vmipatch.validate.demonstration import FORMS, demonstrate, guest
from vmipatch.validate.sites import validate_sites
from vmipatch.validate.validation import open_all, stand_for


def test_the_demo_passes_everywhere() -> None:
    begun, used = time.monotonic(), os.times()
    rows = list(demonstrate(None, None, 2))
    now = os.times()
    user = now.user + now.children_user - used.user - used.children_user
    print(f"18 rows in {time.monotonic() - begun:.1f} s, {user:.1f} s of processor time")
    assert len(rows) == 18
    assert [(r.hypervisor, r.form, r.problems) for r in rows if r.verdict != "pass"] == []
    assert all(r.sites and r.calls and r.states for r in rows)


@pytest.mark.parametrize("form", FORMS)
def test_ten_runs_without_a_false_alarm(form: str, tmp_path: Path) -> None:
    """Ten whole runs, each with random states of its own, on a hypervisor after the other."""
    names = stubmutants.names()
    for turn in range(10):
        hypervisor = names[turn % len(names)]
        rom = tmp_path / f"{hypervisor}.rom"
        rom.write_bytes(build(hypervisor, FORMS[form]).data)
        found = validate(Request(guest(form), rom, memory_mib=16, states=4, first=100 * turn, moments=3))
        assert found.sites is not None
        alarms = [(v.subject.name, str(v.failure.difference)) for v in found.sites.verdicts if v.failure]
        assert (turn, hypervisor, alarms, found.verdict) == (turn, hypervisor, [], "pass")


def test_states_a_second(tmp_path: Path) -> None:
    """The figure, of processor time: at least 2,000 are wanted on a quiet machine."""
    rom = tmp_path / "rom"
    rom.write_bytes(build("vmware", "vmi-3.0").data)
    stand, subjects = stand_for(open_all(Request(guest("mainline"), rom, memory_mib=32)))
    begun = time.process_time()
    run = validate_sites(stand, subjects, 8)
    seconds = time.process_time() - begun
    print(f"{run.states} site-states in {seconds:.2f} s of processor time: {run.states / seconds:.0f} a second")
    assert run.states > 5000


@pytest.mark.parametrize("form", ["v2", "rfc-v1"])
@pytest.mark.parametrize("hypervisor", stubmutants.names())
def test_every_mutant(hypervisor: str, form: str, tmp_path: Path) -> None:
    abi, verdicts = stubmutants.examine(tmp_path, hypervisor, form)
    print(stubmutants.table(hypervisor, abi, verdicts))
    assert [f"{v.mutant.op}, {v.mutant.kind}: {v.mutant.what}" for v in verdicts if not (v.seen or v.reason)] == []
