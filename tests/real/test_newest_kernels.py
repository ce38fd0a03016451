"""What the newest kernels changed in an image, read by us and by others: kallsyms, exports, tables.

The symbols are those that the running kernel prints in /proc/kallsyms; exports are names in that list; a table's
entries are as many as readelf's section size and the entry's size say.
"""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vmipatch.image import Image, open_image

from . import initramfs
from .conftest import Cli, _need
from .packages import RegistryAway, fetch
from .qemu import Machine, boot
from .vmlinux import Vmlinux, unpack

PACKAGES = {
    "7.2": (r"linux-binary-7\.2\.[0-9]+\+deb[0-9]+-cloud-amd64", "sid"),
    "7.3": (r"linux-binary-7\.3[0-9.]*(\+deb[0-9]+)?-cloud-amd64", "experimental"),
    "7.3-amd64": (r"linux-binary-7\.3[0-9.]*(\+deb[0-9]+)?-amd64", "experimental"),
}
# Each entry's size in bytes, read off the kernel's headers (linux-source-7.3): struct alt_instr, exception_table_entry,
# bug_entry; the others are lists of 32-bit distances.
ENTRY = {".altinstructions": 14, "__ex_table": 12, "__bug_table": 16}
EVERY_40TH = """#!/busybox sh
/busybox mount -t proc proc /proc
echo 0 > /proc/sys/kernel/kptr_restrict
echo "symbols: `/busybox wc -l < /proc/kallsyms`"
/busybox awk 'NR % 40 == 1' /proc/kallsyms
echo "symbols end"
/busybox poweroff -f
"""


@pytest.fixture(scope="module", params=PACKAGES)
def newest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vmlinux]:
    _need("readelf", "objdump")
    pattern, suite = PACKAGES[request.param]
    try:
        tree = fetch(pattern, "amd64", suite)
    except RegistryAway as away:
        pytest.skip(f"kernel {request.param}: {away}")
    (image,) = [*tree.glob("boot/vmlinuz-*"), *tree.glob("usr/lib/modules/*/vmlinuz")]
    return image, unpack(image, tmp_path_factory.mktemp("newest") / "vmlinux")


def _by_name(image: Image) -> dict[str, set[int]]:
    """Names to addresses by kallsyms alone: the image again without its exports."""
    data = bytearray(image.data[:])
    for section in image.sections:
        if section.name.startswith("__ksymtab"):
            data[section.offset : section.offset + section.size] = bytes(section.size)
    alone = Image(
        path=image.path, container=image.container, bits=image.bits, data=bytes(data), file=b"",
        sections=image.sections, segments=image.segments, elf_size=image.elf_size,
    )  # fmt: skip
    assert alone.symbols.sources == ("kallsyms",)
    found: dict[str, set[int]] = {}
    for address, kind, name in alone.symbols.all():
        assert kind.isalpha()
        found.setdefault(name, set()).add(address)
    return found


def test_symbols_are_those_that_the_running_kernel_prints(newest: tuple[Path, Vmlinux], tmp_path: Path) -> None:
    path, _ = newest
    _need("qemu-system-x86_64")
    try:
        busybox = next(fetch("busybox-static", "amd64").rglob("bin/busybox")).read_bytes()
    except RegistryAway as away:
        pytest.skip(f"busybox-static: {away}")
    initrd = tmp_path / "initrd"
    initrd.write_bytes(initramfs.archive({"busybox": busybox, "init": EVERY_40TH.encode()}))
    machine = Machine(path, initrd, 64, "Skylake-Client", append="quiet loglevel=1", memory=768)
    with boot(machine) as guest:
        guest.wait_for("symbols end")
        console = guest.console
    # The console's own lines may stand between. There are no modules here, whose lines have a fourth word.
    rows = re.findall(r"^([0-9a-f]{16}) ([A-Za-z]) (\S+)$", console, re.MULTILINE)
    count = re.search(r"symbols: (\d+)", console)
    assert count is not None
    assert len(rows) >= 2000
    assert len(rows) >= int(count[1]) // 40
    found = _by_name(open_image(path))
    wrong = [(name, address) for address, _, name in rows if int(address, 16) not in found.get(name, ())]
    assert wrong == []
    assert sum(map(len, found.values())) > 100_000


def test_every_export_is_the_symbol_of_its_name(newest: tuple[Path, Vmlinux]) -> None:
    path, vmlinux = newest
    listed = _by_name(open_image(path))
    table, strings = vmlinux.sections["__ksymtab"], vmlinux.sections["__ksymtab_strings"]
    assert "__ksymtab_gpl" not in vmlinux.sections
    # 7.1 on: one byte of flags for each.
    assert vmlinux.sections["__kflagstab"].size * 12 == table.size
    image = open_image(path)
    exports = 0
    for n, (value, name, _) in enumerate(struct.iter_unpack("<3i", vmlinux.bytes_of("__ksymtab"))):
        at = table.address + 12 * n
        start = at + 4 + name - strings.address + strings.offset
        symbol = vmlinux.data[start : vmlinux.data.index(b"\0", start)].decode()
        assert at + value in listed[symbol], symbol
        assert image.symbols.lookup(symbol) == at + value
        exports += 1
    assert exports > 10_000


def test_counts_are_section_sizes(newest: tuple[Path, Vmlinux], cli: Cli) -> None:
    path, vmlinux = newest
    answer: dict[str, Any] = cli.json("scan", path)
    assert answer["findings"] == []
    output = subprocess.run(["readelf", "-SW", vmlinux.path], capture_output=True, text=True, check=True).stdout
    sizes = {
        name: int(size, 16)
        for name, size in re.findall(r"^\s+\[\s*\d+\] (\S+)\s+\S+\s+\w+ \w+ (\w+) ", output, re.MULTILINE)
    }
    counts = {t["section"]: t["count"] + t["padding"] for t in answer["tables"] if t["section"] in sizes}
    expected = {
        name: sizes[name] // ENTRY.get(name, 4)
        for name in sizes
        if name in ENTRY
        or re.fullmatch(r"\.(retpoline_sites|return_sites|call_sites|ibt_endbr_seal|smp_locks|orc_unwind_ip)", name)
        or name.startswith("runtime_")
    }
    assert len(expected) > 12
    # Tables that the linker merged into others have their section's name too, and are no section's whole.
    assert {name: counts.get(name) for name in expected} == expected
