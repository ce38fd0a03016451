"""Bare Debian roots, made by debootstrap and entered with chroot as an ordinary user.

A root holds Debian's minimal set and the packages asked for, nothing else; the user in it may not install any.
Needs root and the package archive that this machine uses. Packages and the user's caches are kept between runs in
the folder of packages.cache_folder. Imports packages (this folder) only.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .packages import cache_folder, debian_mirror

USER = 1000
HOME = "/home/user"
PROGRAMS = {"debootstrap": "debootstrap", "unshare": "util-linux", "chroot": "coreutils", "git": "git"}
# How this machine reaches package registries: a bare root has to be told.
PASSED = (
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_CERT", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT"),
    *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
)
COPIED = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
APT = ("Acquire::Check-Valid-Until", "Acquire::Check-Date", "Acquire::http::Proxy", "Acquire::https::Proxy")
LIMIT = 1200  # seconds for one command


class NoRoots(Exception):
    """Why no root can be made on this machine."""


@dataclass(frozen=True)
class Root:
    """A Debian root in a folder."""

    path: Path

    def copy(self, path: Path) -> Root:
        """Another of the same, device files and owners included."""
        _checked(["cp", "-a", "--reflink=auto", str(self.path), str(path)])
        return Root(path)

    def install(self, *packages: str) -> None:
        """Install Debian packages without what they only recommend."""
        words = ["apt-get", "-q", "-y", "-o", "Acquire::Retries=5", "install", "--no-install-recommends", *packages]
        done = self._enter(["env", "DEBIAN_FRONTEND=noninteractive", *words], {}, "0:0")
        if done.returncode:
            raise NoRoots(f"apt-get install {' '.join(packages)} failed:\n{done.stdout[-2000:]}")

    def run(self, command: str, folder: str = HOME) -> subprocess.CompletedProcess[str]:
        """A shell command as the user, with standard output and standard error in one."""
        environment = {name: os.environ[name] for name in PASSED if name in os.environ}
        return self._enter(["sh", "-c", f"cd {shlex.quote(folder)} && {command}"], environment, f"{USER}:{USER}")

    def _enter(self, words: list[str], environment: Mapping[str, str], who: str) -> subprocess.CompletedProcess[str]:
        # The mounts are made in a namespace of the command's own, so they end with it whatever happens.
        mounts = [("/proc", "proc"), ("/dev", "dev"), (_kept("debs"), "var/cache/apt/archives")]
        mounts.append((_kept("user", USER), HOME.strip("/") + "/.cache"))
        lines = [f"mount --rbind {shlex.quote(str(a))} {shlex.quote(str(self.path / b))}" for a, b in mounts]
        values = {"HOME": HOME, "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
        if who == "0:0":
            values["HOME"] = "/root"
        variables = [f"{name}={value}" for name, value in {**values, **environment}.items()]
        enter = ["chroot", f"--userspec={who}", str(self.path), "env", "-i", *variables, *words]
        script = "\n".join([*lines, "exec " + shlex.join(enter)])
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script],
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=LIMIT,
        )


def need() -> None:
    """Raises NoRoots with the reason where no root can be made here."""
    if os.geteuid() != 0:
        raise NoRoots("making a Debian root with debootstrap needs to be root")
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        raise NoRoots(f"not installed here: apt-get install {' '.join(missing)}")
    probe = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "mount", "--bind", "/proc", "/proc"],
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode:
        raise NoRoots(f"a mount namespace may not be made here: {probe.stderr.strip()}")


def make(path: Path, suite: str, packages: tuple[str, ...]) -> Root:
    """Debian's minimal set and these packages in a new folder. Raises NoRoots with the end of the log."""
    need()
    mirror = debian_mirror(suite)
    if mirror is None:
        raise NoRoots("no Debian archive among this machine's apt sources")
    command = ["debootstrap", "--variant=minbase", f"--cache-dir={_kept('debs')}", f"--include={','.join(packages)}"]
    done = subprocess.run(
        [*command, suite, str(path), mirror],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=LIMIT,
    )
    if done.returncode:
        raise NoRoots(f"debootstrap from {mirror} failed:\n{done.stdout[-2000:]}")
    wanted = [*COPIED, *(os.environ[name] for name in PASSED if name in os.environ)]
    for name in wanted:
        if name.startswith("/") and Path(name).is_file():
            target = path / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, target)
    settings = "".join(f'{name} "{value}";\n' for name in APT if (value := _apt_setting(name)))
    (path / "etc/apt/apt.conf.d/90machine").write_text(settings)
    (path / HOME.strip("/") / ".cache").mkdir(parents=True)
    for folder in (path / HOME.strip("/"), path / HOME.strip("/") / ".cache"):
        os.chown(folder, USER, USER)
    with (path / "etc/passwd").open("a") as handle:
        handle.write(f"user:x:{USER}:{USER}::{HOME}:/bin/sh\n")
    root = Root(path)
    update = root._enter(["apt-get", "-q", "-o", "Acquire::Retries=5", "update"], {}, "0:0")
    if update.returncode:
        raise NoRoots(f"apt-get update failed in the root:\n{update.stdout[-2000:]}")
    return root


def clone(source: Path, root: Root, name: str) -> str:
    """A git clone of a work tree's last commit in the user's home; its path in the root."""
    target = root.path / HOME.strip("/") / name
    _checked(["git", "clone", "-q", "--depth", "1", source.resolve().as_uri(), str(target)])
    _checked(["chown", "-R", f"{USER}:{USER}", str(target)])
    return f"{HOME}/{name}"


def _apt_setting(name: str) -> str:
    done = subprocess.run(["apt-config", "shell", "V", name], text=True, capture_output=True, check=False)
    words = shlex.split(done.stdout)
    return words[0].partition("=")[2] if words else ""


def _kept(name: str, owner: int = 0) -> Path:
    """A folder that is kept between runs."""
    folder = cache_folder().resolve() / "roots" / name
    folder.mkdir(parents=True, exist_ok=True)
    os.chown(folder, owner, owner)
    return folder


def _checked(command: list[str]) -> None:
    done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=LIMIT)
    if done.returncode:
        raise NoRoots(f"{' '.join(command)}: {done.stderr.strip()[-1000:]}")
