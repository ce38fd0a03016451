"""What is read from real images of their own patchers, against the headers that these kernels were built with."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from vmipatch.annotate import scan
from vmipatch.image import Image, open_image
from vmipatch.isa import nops
from vmipatch.patch import evidence

from .packages import RegistryAway, fetch

KERNELS = {
    # image package, headers package, suite
    "6.1": (r"linux-image-6\.1\.0-[0-9]+-amd64(-unsigned)?", r"linux-headers-6\.1\.0-[0-9]+-common", "bookworm"),
    "6.12": (
        r"linux-image-6\.12\.[0-9.]+\+deb13-cloud-amd64(-unsigned)?",
        r"linux-headers-6\.12\.[0-9.]+\+deb13-common",
        "trixie",
    ),
    "7.2": (
        r"linux-binary-7\.2\.[0-9.]+\+deb14-cloud-amd64(-unsigned)?",
        r"linux-headers-7\.2\.[0-9.]+\+deb14-common",
        "sid",
    ),
    "7.3": (r"linux-binary-7\.3-cloud-amd64(-unsigned)?", r"linux-headers-7\.3-common", "experimental"),
}


@pytest.fixture(scope="module", params=sorted(KERNELS))
def pair(request: pytest.FixtureRequest) -> tuple[Image, Path]:
    """A kernel's image and the folder of its headers, of one and the same version."""
    image, headers, suite = KERNELS[request.param]
    try:
        trees = fetch(image, "amd64", suite), fetch(headers, "amd64", suite)
    except RegistryAway as away:
        pytest.skip(f"{request.param}: {away}")
    versions = {tree.name.split("_")[1] for tree in trees}
    if len(versions) != 1:
        pytest.skip(f"image and headers are not of one version: {sorted(versions)}")
    found = next(p for p in sorted(trees[0].rglob("vmlinuz*")) if p.is_file())
    return open_image(found), next(trees[1].rglob("arch/x86/include/asm/ibt.h")).parent


def test_the_poison_is_what_the_header_generates(pair: tuple[Image, Path]) -> None:
    image, headers = pair
    text = (headers / "ibt.h").read_text("utf-8")
    body = text[text.index("gen_endbr_poison(void)\n") :]
    value = re.search(r"return (0x[0-9a-f]{8});", body)
    assert value is not None
    found = evidence.poison(image)
    if image.section(".ibt_endbr_seal") is None:  # built without CONFIG_X86_KERNEL_IBT: there is nothing to tell
        assert found is None
        return
    assert found is not None
    assert bytes.fromhex(found["poison"]) == struct.pack("<I", int(value[1], 16))


def test_the_nops_are_the_headers(pair: tuple[Image, Path]) -> None:
    image, headers = pair
    defines = dict(re.findall(r"#define (BYTES_NOP\d+)\s+(\S+)", (headers / "nops.h").read_text("utf-8")))

    def expanded(text: str) -> str:
        return ",".join(expanded(defines[part]) if part in defines else part for part in text.split(","))

    # The header's second set, behind the #else, is that of 64-bit kernels: the last definition of a name.
    wanted = [expanded(defines[f"BYTES_NOP{n}"]) for n in range(1, len(defines) + 1)]
    name = evidence.nop_table(image)
    assert name is not None
    assert list(nops.table(name).sequences) == [bytes(int(x, 16) for x in text.split(",")) for text in wanted]


def test_the_bits_are_the_headers(pair: tuple[Image, Path]) -> None:
    image, headers = pair
    text = (headers / "cpufeatures.h").read_text("utf-8")
    found = evidence.feature_bits(image, scan(image, ["altinstructions"]).sites)
    assert {"RETHUNK", "INDIRECT_THUNK_ITS"} <= set(found)
    for name, number in found.items():
        define = re.search(rf"X86_FEATURE_{name}\s+\(\s*(\d+)\s*\*\s*32\s*\+\s*(\d+)\s*\)", text)
        assert define is not None
        assert number == int(define[1]) * 32 + int(define[2])


def test_calls_are_written_out_as_the_release_does(pair: tuple[Image, Path], request: pytest.FixtureRequest) -> None:
    """arch/x86/kernel/static_call.c of the four releases: xor5rax in all, warninsn in two, unlockinsn in the last."""
    series = request.node.callspec.params["pair"]
    more = {"7.2": {"67480FB93A"}, "7.3": {"67480FB93A", "3E3EC60700"}}.get(series, set())
    assert {row["code"] for row in evidence.call_forms(pair[0])} == {"2E2E2E31C0"} | more
