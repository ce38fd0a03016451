"""Each call's stub broken three ways: the validation of sites alone names it, or there is a reason why nothing shows.

``VMIPATCH_MUTANTS=all`` tries every hypervisor and both interfaces here; tests/real does so always.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import stubmutants

QUICK = (("vmware", "v2"), ("xen", "rfc-v1"), ("native", "v2"))
ALL = tuple((name, form) for name in stubmutants.names() for form in ("v2", "rfc-v1"))
CHOSEN = ALL if os.environ.get("VMIPATCH_MUTANTS") == "all" else QUICK


@pytest.mark.parametrize(("hypervisor", "form"), CHOSEN)
def test_a_broken_stub_is_named(hypervisor: str, form: str, tmp_path: Path) -> None:
    abi, verdicts = stubmutants.examine(tmp_path, hypervisor, form)
    print(stubmutants.table(hypervisor, abi, verdicts))
    alive = [v for v in verdicts if not v.seen]
    unexplained = [f"{v.mutant.op}, {v.mutant.kind}: {v.mutant.what}" for v in alive if not v.reason]
    assert not unexplained
    # A reason may excuse a wrong or a skipped effect, but of what comes back a lost register always shows.
    corrupted = [v.mutant.op for v in alive if v.mutant.kind == stubmutants.KINDS[1]]
    assert set(corrupted) <= {"Reboot", "Shutdown"}
    assert len(verdicts) > 150


def test_a_sound_rom_has_no_mutant(tmp_path: Path) -> None:
    """The same survey with every stub as it is: nothing is named."""
    stand, subjects = stubmutants.stand(tmp_path, "vmware", "v2", "vmi-3.0")
    whole = [stubmutants.Mutant(s.op, "none", s.address, (), "") for s in subjects if s.is_call]
    verdicts = stubmutants.survey(stand, subjects, 6, lambda _, subject: [m for m in whole if m.op == subject.op])
    assert len(verdicts) == len(whole) == 70
    assert [(v.mutant.op, v.difference) for v in verdicts if v.seen] == []
    assert all(v.states for v in verdicts)
