"""Regression tests of a kernel image, as anybody can keep them: no import but pytest and vmipatch.

pytest --vmi-image /boot/vmlinuz-6.1.0-50-686               # or vmi_image in pytest.ini
pytest --vmi-update                                         # once, and whenever a change is meant
"""

import vmipatch


def test_every_alternative_is_there(vmi_image, assert_sites):
    """A new compiler or a changed macro must not lose sites."""
    assert_sites(vmi_image, "altinstructions", at_least=1)
    assert_sites(vmi_image, "smp_locks", at_least=1, ops={"lock"})


def test_the_site_table_is_the_one_that_was_reviewed(vmi_image, vmi_snapshot):
    vmi_snapshot(vmi_image, vmipatch.scan(vmi_image))


def test_what_boot_will_write_on_one_cpu(vmi_image, vmi_snapshot):
    found = vmipatch.scan(vmi_image)
    machine = vmipatch.Native(vmipatch.from_spec("pentium3", vmi_image.version, bits=vmi_image.bits), cpus=1)
    vmi_snapshot(vmi_image, vmipatch.plan(vmi_image, found, machine), "pentium3")


def test_our_patched_image_is_what_its_kernel_would_make_of_it(vmi_image, vmi_open, assert_patched_like, tmp_path):
    found = vmipatch.scan(vmi_image)
    machine = vmipatch.Native(vmipatch.from_spec("pentium3", vmi_image.version, bits=vmi_image.bits), cpus=1)
    patched = tmp_path / "patched"
    vmipatch.apply(vmi_image, vmipatch.plan(vmi_image, found, machine), patched)
    assert_patched_like(vmi_image, vmi_open(patched), cpu="pentium3", cpus=1)
