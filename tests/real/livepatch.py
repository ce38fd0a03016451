"""A live patch for one function of a Debian kernel, compiled here against the kernel's own headers packages.

Without kbuild: its tools are built for the C library of the kernel's suite, which this machine need not have. The
compiler may be older than the kernel's, so what the kernel's configuration knows of the newer one is undefined.
Imports kernels and packages (this folder) only. Needs gcc.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import packages
from .kernels import DebianKernel, Kernel
from .packages import RegistryAway

NAME = "vmipatch_livepatch"

# What samples in the kernel's documentation (livepatch/livepatch.rst) do, and what modpost adds to a module.
SOURCE = """
#include <linux/module.h>
#include <linux/livepatch.h>
#include <linux/vermagic.h>
#include <linux/export-internal.h>

static int silent(void)
{
	return 0;
}

static struct klp_func functions[] = { { .old_name = FUNCTION, .new_func = silent }, {} };
static struct klp_object objects[] = { { .funcs = functions }, {} };
static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objects };

static int __init enable(void)
{
	return klp_enable_patch(&patch);
}

module_init(enable);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
MODULE_INFO(vermagic, VERMAGIC_STRING);
MODULE_INFO(name, KBUILD_MODNAME);
MODULE_INFO(depends, "");

__visible struct module __this_module __section(".gnu.linkonce.this_module") = {
	.name = KBUILD_MODNAME,
	.init = init_module,
	.arch = MODULE_ARCH_INIT,
};
"""
NEWER_COMPILER = ("TYPEOF_UNQUAL", "COUNTED_BY", "COUNTED_BY_PTR", "MULTIDIMENSIONAL_NONSTRING", "ASSUME")
FLAGS = (
    *("-std=gnu11", "-fms-extensions", "-O2", "-w", "-mcmodel=kernel", "-mno-red-zone", "-mno-sse", "-mno-mmx"),
    *("-fno-pic", "-fno-PIE", "-fno-strict-aliasing", "-fno-asynchronous-unwind-tables", "-fno-stack-protector"),
    *("-fcf-protection=branch", "-pg", "-mfentry", "-mrecord-mcount", "-DCC_USING_FENTRY"),
    *("-D__KERNEL__", "-DMODULE", "-DINCLUDE_VERMAGIC"),
)


def build(kernel: Kernel, function: str, folder: Path) -> bytes:
    """The module that makes ``function`` of a 64-bit kernel return 0 at once. Raises packages.RegistryAway."""
    if shutil.which("gcc") is None:
        raise RegistryAway("no gcc to compile a live patch with")
    common, own = _headers(kernel)
    trees = [common / "arch/x86/include", own / "arch/x86/include/generated", common / "include", own / "include"]
    trees += [common / "arch/x86/include/uapi", own / "arch/x86/include/generated/uapi"]
    trees += [common / "include/uapi", own / "include/generated/uapi"]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        (work / "patch.c").write_text(SOURCE)
        (work / "older.h").write_text("".join(f"#undef CONFIG_CC_HAS_{word}\n" for word in NEWER_COMPILER))
        headers = [common / "include/linux/compiler-version.h", common / "include/linux/kconfig.h", work / "older.h"]
        headers.append(common / "include/linux/compiler_types.h")
        command = [
            *("gcc", "-nostdinc", *(f"-I{tree}" for tree in trees), *FLAGS),
            *(word for header in headers for word in ("-include", str(header))),
            *('-DKBUILD_BASENAME="patch"', f'-DKBUILD_MODNAME="{NAME}"', f"-D__KBUILD_MODNAME=kmod_{NAME}"),
            *(f'-DFUNCTION="{function}"', "-c", str(work / "patch.c"), "-o", str(work / "patch.ko")),
        ]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"the live patch was not compiled:\n{done.stderr[-2000:]}"
        return (work / "patch.ko").read_bytes()


def _headers(kernel: Kernel) -> tuple[Path, Path]:
    """The kernel's common headers and those of its flavour, of the build that the image is of."""
    if not isinstance(kernel, DebianKernel) or kernel.bits != 64:
        raise RegistryAway(f"kernel {kernel.name} has no headers packages that this can use")
    tree = kernel.tree()
    version = packages.version_of(tree)
    release = re.sub("^linux-(image|binary)-(unsigned-)?", "", tree.name.split("_")[0]).removesuffix("-unsigned")
    series = release.removesuffix("-amd64").removesuffix("-cloud")
    found = []
    for name in (f"{series}-common", release):
        package = packages.fetch(re.escape(f"linux-headers-{name}"), kernel.arch, kernel.suite, version)
        found.append(package / "usr" / "src" / f"linux-headers-{name}")
    return found[0], found[1]
