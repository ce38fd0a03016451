"""Debian kernel packages, by name, from the archive that this machine already uses.

Asks apt through folders of its own: the machine's dpkg architectures, its package lists and its installed
packages stay as they are, so an i386 kernel can be fetched on an amd64 machine. Signatures are checked by apt
as always. Needs apt-get, apt-cache and dpkg-deb, and nothing of the package under test.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INDEX_LIFETIME = 24 * 3600  # seconds that a fetched package list serves before it is asked for again
ATTEMPTS = 4
CANDIDATES = 16  # versions tried, newest first, before the archive counts as away
ATTEMPT_TIMEOUT = 600  # seconds for one apt-get call: a slow registry is not an absent one
LASTING = ("does not have a Release file", "File has unexpected size", "Hash Sum mismatch")
SUITE_SUFFIXES = ("", "-updates", "-security", "-backports")
WITHOUT_SUFFIXES = ("sid", "experimental")  # suites that have no -updates and no -security


class RegistryAway(Exception):
    """No usable answer from the package archive, and nothing in the cache that would do."""


@dataclass(frozen=True)
class Package:
    """One version of one package, as the archive's list names it."""

    name: str
    version: str


def cache_folder() -> Path:
    """Where fetched packages live: $VMIPATCH_CACHE, else ~/.cache/vmipatch."""
    folder = Path(os.environ.get("VMIPATCH_CACHE") or Path.home() / ".cache" / "vmipatch")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(package_pattern: str, arch: str, suite: str = "bookworm", version: str | None = None) -> Path:
    """The extracted tree of the newest package whose whole name matches the regular expression.

    `arch` is Debian's name of the architecture (i386, amd64); `version`, where given, the only one that will do.
    Raises RegistryAway with the reason when the archive does not answer or has no such package and the cache holds
    none either.
    """
    cache = cache_folder()
    with locked(cache / "lock"):
        try:
            apt = _PrivateApt(cache / "apt" / f"{suite}-{arch}", arch, suite)
            return _first_obtainable(apt, package_pattern, arch, cache / "trees", version)
        except RegistryAway as away:
            kept = _newest_in_cache(cache, package_pattern, arch, version)
            if kept is None:
                raise
            print(f"package archive away ({away}); using {kept.name} from the cache", file=sys.stderr)
            return kept


def _first_obtainable(apt: _PrivateApt, pattern: str, arch: str, trees: Path, version: str | None) -> Path:
    # A mirror's list may name a file that its pool no longer or not yet holds: the next older one will do.
    complaint: RegistryAway | None = None
    candidates = [package for package in apt.newest_first(pattern) if version in (None, package.version)]
    for package in candidates[:CANDIDATES]:
        tree = trees / _tree_name(package, arch)
        try:
            if not tree.is_dir():
                _extract(apt.download(package), tree)
        except RegistryAway as away:
            complaint = away
            continue
        return tree
    raise complaint or RegistryAway(f"the archive has no {arch} package {pattern}")


def kernel_image(tree: Path) -> Path:
    """The vmlinuz of an extracted kernel package: in boot/, from 7.x on beside the modules."""
    found = sorted([*(tree / "boot").glob("vmlinuz-*"), *tree.glob("usr/lib/modules/*/vmlinuz")])
    if len(found) != 1:
        raise RegistryAway(f"{tree.name} holds {len(found)} kernel images, expected one")
    return found[0]


def modules_folder(tree: Path) -> Path:
    """lib/modules/VERSION of an extracted package that has a kernel's modules."""
    found = [folder for folder in sorted(tree.glob("**/lib/modules/*")) if (folder / "kernel").is_dir()]
    if len(found) != 1:
        raise RegistryAway(f"{tree.name} holds the modules of {len(found)} kernels, expected one")
    return found[0]


def version_of(tree: Path) -> str:
    """The package's version, from the name that the cache gave its tree."""
    return tree.name.split("_")[1].replace("%3a", ":")


def debian_mirror(suite: str) -> str | None:
    """The address of the archive that this machine gets its own Debian from, for another suite too."""
    for entry in _entries_for(suite):
        lines = dict(line.split(": ", 1) for line in entry.splitlines())
        if suite in lines["Suites"].split():
            return lines["URIs"].split()[0]
    return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """The lock of a cache: parallel test workers share it, and apt's own lists must not be written twice at once."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _tree_name(package: Package, arch: str) -> str:
    return f"{package.name}_{package.version.replace(':', '%3a')}_{arch}"


def _newest_in_cache(cache: Path, pattern: str, arch: str, version: str | None) -> Path | None:
    chosen = "[^_]+" if version is None else re.escape(version.replace(":", "%3a"))
    wanted = re.compile(rf"(?:{pattern})_{chosen}_{re.escape(arch)}")
    best: Path | None = None
    for tree in (cache / "trees").glob("*"):
        if wanted.fullmatch(tree.name) and tree.is_dir():
            version = tree.name.split("_")[1]
            if best is None or _newer(version, best.name.split("_")[1]):
                best = tree
    return best


def _newer_first(left: Package, right: Package) -> int:
    if left.version == right.version:
        return 0
    return -1 if _newer(left.version, right.version) else 1


def _newer(left: str, right: str) -> bool:
    return subprocess.run(["dpkg", "--compare-versions", left, "gt", right], check=False).returncode == 0


def _extract(archive: Path, tree: Path) -> None:
    tree.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=tree.parent))
    try:
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
        partial.chmod(0o755)
        partial.rename(tree)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    archive.unlink(missing_ok=True)


class _PrivateApt:
    """apt with its own lists and cache for one architecture and one suite of the machine's own archive."""

    def __init__(self, root: Path, arch: str, suite: str) -> None:
        self._root = root
        self._arch = arch
        for tool in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise RegistryAway(f"{tool} is not on this machine")
        for folder in ("state/lists/partial", "cache/archives/partial", "parts", "download"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "status").touch()
        entries = _entries_for(suite)
        if not entries:
            raise RegistryAway("no Debian archive among this machine's apt sources")
        text = "\n".join(entries)
        sources = root / "parts" / "private.sources"
        if not sources.exists() or sources.read_text() != text:
            sources.write_text(text)
            (root / "updated").unlink(missing_ok=True)

    def _options(self) -> list[str]:
        values = {
            "Dir::State": self._root / "state",
            "Dir::State::status": self._root / "status",
            "Dir::Cache": self._root / "cache",
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": self._root / "parts",
            "APT::Architecture": self._arch,
            "APT::Architectures": self._arch,
            "APT::Sandbox::User": "root",
            "APT::Update::Post-Invoke-Success": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Acquire::http::Timeout": "120",
            "Acquire::https::Timeout": "120",
        }
        options = [word for key, value in values.items() for word in ("-o", f"{key}={value}")]
        # Contents, DEP-11 and icon lists are big and of no use here, whatever the machine's own apt asks for.
        return [*options, "-o", "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false"]

    def _run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        words = [command[0], *self._options(), *command[1:]]
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            return subprocess.run(
                words,
                cwd=cwd,
                env=environment,
                text=True,
                capture_output=True,
                check=False,
                stdin=subprocess.DEVNULL,
                timeout=ATTEMPT_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 124, "", f"no answer in {ATTEMPT_TIMEOUT} s")

    def _update(self) -> str:
        """Bring the package lists; the last complaint, empty when there is none."""
        stamp = self._root / "updated"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < INDEX_LIFETIME:
            return ""
        complaint = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(5 * attempt)
            result = self._run("apt-get", "update")
            complaint = _complaint(result)
            # A suite that is not there and a mirror in the middle of its own update are lasting answers: the
            # lists that did come are what there is.
            if not complaint or any(words in result.stderr for words in LASTING):
                stamp.touch()
                break
        return complaint

    def newest_first(self, pattern: str) -> list[Package]:
        """Every listed version of every package whose whole name matches."""
        complaint = self._update()
        wanted = re.compile(pattern)
        found = {Package(name, version) for name, version in self._available() if wanted.fullmatch(name)}
        if not found and complaint:
            raise RegistryAway(complaint)
        # A signed and an unsigned package of one version hold the same kernel: the name decides which is first.
        return sorted(sorted(found, key=lambda p: p.name), key=functools.cmp_to_key(_newer_first))

    def _available(self) -> Iterator[tuple[str, str]]:
        name = ""
        for line in self._run("apt-cache", "dumpavail").stdout.splitlines():
            if line.startswith("Package: "):
                name = line[9:].strip()
            elif not line:
                name = ""
            elif name and line.startswith("Version: "):
                yield name, line[9:].strip()

    def download(self, package: Package) -> Path:
        """The package file, checked by apt against the signed list."""
        folder = self._root / "download"
        complaint = ""
        for attempt in range(ATTEMPTS):
            if "404  Not Found" in complaint:
                break
            if attempt:
                time.sleep(5 * attempt)
            result = self._run("apt-get", "download", f"{package.name}={package.version}", cwd=folder)
            found = sorted(folder.glob(f"{package.name}_*.deb"))
            if result.returncode == 0 and found:
                return found[-1]
            complaint = _complaint(result) or "apt-get download left no file"
        raise RegistryAway(complaint)


def _complaint(result: subprocess.CompletedProcess[str]) -> str:
    for line in result.stderr.splitlines():
        if line.startswith(("E:", "W: Failed")):
            return line
    return "" if result.returncode == 0 else f"apt ended with status {result.returncode}"


def _machine_codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.split("=", 1)[1].strip().strip('"')
    return ""


def _entries_for(suite: str) -> list[str]:
    """The machine's Debian entries as deb822 stanzas, with its own release replaced by `suite`."""
    etc = Path("/etc/apt")
    stanzas: list[dict[str, str]] = []
    for path in sorted(etc.glob("sources.list.d/*.sources")):
        stanzas += _read_deb822(path.read_text())
    for path in [etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))]:
        if path.is_file():
            stanzas += _read_one_line(path.read_text())
    own = _machine_codename()
    out = []
    for stanza in stanzas:
        suites = stanza.get("Suites", "").split()
        if not own or "main" not in stanza.get("Components", "").split():
            continue
        alone = suite in WITHOUT_SUFFIXES or suite.endswith(SUITE_SUFFIXES[1:])
        known = {own + suffix for suffix in SUITE_SUFFIXES[: 1 if alone else None]}
        mapped = [suite + word[len(own) :] for word in suites if word in known]
        if mapped:
            lines = ["Types: deb", f"URIs: {stanza['URIs']}", f"Suites: {' '.join(mapped)}", "Components: main"]
            if "Signed-By" in stanza:
                lines.append(f"Signed-By: {stanza['Signed-By']}")
            out.append("\n".join(lines) + "\n")
    return out


def _read_deb822(text: str) -> list[dict[str, str]]:
    stanzas: list[dict[str, str]] = []
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in " \t" and key:
                fields[key] += "\n" + line
            elif ":" in line:
                key, value = line.split(":", 1)
                fields[key] = value.strip()
        if fields.get("Enabled", "yes") != "no" and "deb" in fields.get("Types", "").split():
            stanzas.append(fields)
    return stanzas


def _read_one_line(text: str) -> list[dict[str, str]]:
    stanzas = []
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<parts>.+)", line)
        if match is None:
            continue
        fields = {"URIs": match["uri"], "Suites": match["suite"], "Components": match["parts"].split("#")[0]}
        key = re.search(r"signed-by=(\S+)", match["options"] or "")
        if key:
            fields["Signed-By"] = key[1]
        stanzas.append(fields)
    return stanzas
