"""Files that hold a kernel in another way, or another kernel: unified images, User-mode Linux, Xen, debug files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmipatch.image import open_image

from .conftest import Cli, RealKernel
from .packages import RegistryAway, fetch

Get = Callable[[str], RealKernel]


def tree(package: str) -> Path:
    try:
        return fetch(package, "amd64")
    except RegistryAway as away:
        pytest.skip(f"{package}: {away}")


def need(*programs: str) -> None:
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")


def test_a_unified_image_made_with_objcopy_is_its_kernel(real_kernel: Get, cli: Cli, tmp_path: Path) -> None:
    need("objcopy")
    (stub,) = tree("systemd-boot-efi").rglob("linuxx64.efi.stub")
    kernel = real_kernel("amd64").image
    (tmp_path / "osrel").write_text("ID=debian\n")
    unified = tmp_path / "linux.efi"
    command = ["objcopy", "--add-section", f".osrel={tmp_path / 'osrel'}", "--change-section-vma", ".osrel=0x100000"]
    command += ["--add-section", f".linux={kernel}", "--change-section-vma", ".linux=0x2000000", stub, unified]
    subprocess.run(command, check=True)
    ours, plain = cli.json("scan", unified), cli.json("scan", kernel)
    assert ours["image"]["container"] == "uki"
    assert ours["sites"] == plain["sites"]
    assert len(ours["sites"]) > 5000
    assert ours["tables"] == plain["tables"]
    assert open_image(unified).data == open_image(kernel).data
    answer = cli.run("scan", stub)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "without a Linux kernel in it" in answer.stderr


def test_user_mode_linux_is_named_and_not_patched(cli: Cli, tmp_path: Path) -> None:
    image = tree("user-mode-linux") / "usr/bin/linux.uml"
    assert open_image(image).kind == "user-mode-linux"
    answer = cli.run("scan", image, "--summary")
    assert answer.returncode == 1
    assert "User-mode Linux" in answer.stderr
    assert ".altinstructions" in answer.stdout
    refused = cli.run("patch", image, "-o", tmp_path / "out", "--cpu", "Skylake-Client")
    assert refused.returncode == 2
    assert "User-mode Linux" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_xen_is_named_and_not_patched(cli: Cli, tmp_path: Path) -> None:
    boot = tree(r"xen-hypervisor-4\.[0-9]+-amd64") / "boot"
    (packed,), (program,) = boot.glob("xen-*.gz"), boot.glob("xen-*.efi")
    assert open_image(packed).kind == "xen"
    answer = cli.run("scan", packed)
    assert answer.returncode == 1
    assert "Xen hypervisor" in answer.stderr
    for command in (["patch", packed, "-o", tmp_path / "out", "--cpu", "Skylake-Client"], ["scan", program]):
        refused = cli.run(*command)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "Xen hypervisor" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["686", "amd64"])
def test_a_linux_kernel_that_runs_on_xen_is_linux(real_kernel: Get, name: str) -> None:
    assert open_image(real_kernel(name).image).kind == "linux"


def test_a_separate_debug_file_is_refused_by_every_command(real_kernel: Get, cli: Cli, tmp_path: Path) -> None:
    need("objcopy")
    debug = tmp_path / "vmlinux.debug"
    subprocess.run(["objcopy", "--only-keep-debug", real_kernel("686").elf, debug], check=True)
    for command in (
        ["scan", debug],
        ["audit", debug],
        ["patch", debug, "-o", tmp_path / "out", "--cpu", "pentium3"],
        ["explain", debug, "--memory", debug],
    ):
        answer = cli.run(*command)
        assert (answer.returncode, answer.stdout) == (2, ""), command
        assert "a separate debug file" in answer.stderr
        assert len(answer.stderr.splitlines()) == 1
