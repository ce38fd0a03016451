"""The published numbers, offsets and sizes that ROMs and personalities use, against the public headers themselves.

Xen's and KVM's headers come from Debian's packages and are compiled here for i386: each fact is an expression whose
value is read from the compiler's assembly output, so no 32-bit C library is needed.  lguest has no public header
any more: its values are written here from the kernel's sources, cited by version.  No expected value comes from
specs/hypervisors/.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from vmipatch.emu.hypervisors import kvm, lguest, xen
from vmipatch.rombuild.hypervisor import load

from .packages import RegistryAway, fetch

OURS = {"VMI_SIGNATURE", "INIT_PORT", "GATE", "DELIVER"}  # docs/abis.md: no public header has them
OUR_STATE = {"cr0", "cr3", "cr4", "gdt", "idt", "ldt", "tr", "maps", "cycle_frequency"}

XEN_HEADERS = ("xen.h", "sched.h", "physdev.h", "version.h", "arch-x86/cpuid.h", "errno.h")
# 3.0.2, the interface with sched_op 29 and physdev_op 33 (before: 6 and 19, which are the _compat calls now).
XEN_PROLOGUE = "#define __XEN_INTERFACE_VERSION__ 0x00030202\n" + "".join(f"#include <xen/{h}>\n" for h in XEN_HEADERS)
# Key in specs/hypervisors/xen.toml: C expression over xen/include/public.
XEN = {
    "set_trap_table": "__HYPERVISOR_set_trap_table",
    "mmu_update": "__HYPERVISOR_mmu_update",
    "set_gdt": "__HYPERVISOR_set_gdt",
    "stack_switch": "__HYPERVISOR_stack_switch",
    "fpu_taskswitch": "__HYPERVISOR_fpu_taskswitch",
    "set_debugreg": "__HYPERVISOR_set_debugreg",
    "get_debugreg": "__HYPERVISOR_get_debugreg",
    "update_descriptor": "__HYPERVISOR_update_descriptor",
    "xen_version": "__HYPERVISOR_xen_version",
    "iret": "__HYPERVISOR_iret",
    "mmuext_op": "__HYPERVISOR_mmuext_op",
    "sched_op": "__HYPERVISOR_sched_op",
    "physdev_op": "__HYPERVISOR_physdev_op",
    "MMUEXT_PIN_L1_TABLE": "MMUEXT_PIN_L1_TABLE",
    "MMUEXT_PIN_L2_TABLE": "MMUEXT_PIN_L2_TABLE",
    "MMUEXT_PIN_L3_TABLE": "MMUEXT_PIN_L3_TABLE",
    "MMUEXT_UNPIN_TABLE": "MMUEXT_UNPIN_TABLE",
    "MMUEXT_NEW_BASEPTR": "MMUEXT_NEW_BASEPTR",
    "MMUEXT_TLB_FLUSH_LOCAL": "MMUEXT_TLB_FLUSH_LOCAL",
    "MMUEXT_INVLPG_LOCAL": "MMUEXT_INVLPG_LOCAL",
    "MMUEXT_FLUSH_CACHE": "MMUEXT_FLUSH_CACHE",
    "MMUEXT_SET_LDT": "MMUEXT_SET_LDT",
    "DOMID_SELF": "DOMID_SELF",
    "SCHEDOP_yield": "SCHEDOP_yield",
    "SCHEDOP_block": "SCHEDOP_block",
    "SCHEDOP_shutdown": "SCHEDOP_shutdown",
    "SHUTDOWN_poweroff": "SHUTDOWN_poweroff",
    "SHUTDOWN_reboot": "SHUTDOWN_reboot",
    "PHYSDEVOP_SET_IOPL": "PHYSDEVOP_set_iopl",
    "MAX_GDT_FRAMES": "FIRST_RESERVED_GDT_PAGE",
}
VCPU = (
    "offsetof(struct shared_info, vcpu_info) + offsetof(struct vcpu_info, {0})",
    "sizeof(((struct vcpu_info *)0)->{0})",
)
SHARED = "offsetof(struct shared_info, {0})", "sizeof(((struct shared_info *)0)->{0})"
XEN_STATE = {
    "pending": (VCPU, "evtchn_upcall_pending"),
    "vif": (VCPU, "evtchn_upcall_mask"),
    "pending_selector": (VCPU, "evtchn_pending_sel"),
    "cr2": (VCPU, "arch.cr2"),
    "vcpu_time": (VCPU, "time"),
    "evtchn_pending": (SHARED, "evtchn_pending"),
    "evtchn_mask": (SHARED, "evtchn_mask"),
}
# What xen.py unpacks: structure, its members in order.
XEN_STRUCTURES = {
    "TRAP_INFO": ("struct trap_info", ("vector", "flags", "cs", "address")),
    "MMU_UPDATE": ("struct mmu_update", ("ptr", "val")),
    "MMUEXT_OP": ("struct mmuext_op", ("cmd", "arg1", "arg2")),
    "SET_IOPL": ("struct physdev_set_iopl", ("iopl",)),
    "SHUTDOWN": ("struct sched_shutdown", ("reason",)),
}
XEN_ERRORS = {name: f"XEN_{name}" for name in ("EPERM", "EFAULT", "EINVAL", "ENOSYS")}

KVM_HEADERS = ("linux/kvm_para.h",)
KVM = {
    "KVM_HC_VAPIC_POLL_IRQ": "KVM_HC_VAPIC_POLL_IRQ",
    "KVM_HC_MMU_OP": "KVM_HC_MMU_OP",
    "KVM_MMU_OP_WRITE_PTE": "KVM_MMU_OP_WRITE_PTE",
    "KVM_MMU_OP_FLUSH_TLB": "KVM_MMU_OP_FLUSH_TLB",
    "KVM_MMU_OP_RELEASE_PT": "KVM_MMU_OP_RELEASE_PT",
}

# Linux 2.6.32 arch/x86/include/asm/lguest_hcall.h; the same in every version from 2.6.31 to 2.6.36.
LGUEST = {
    "FLUSH_ASYNC": 0,
    "SHUTDOWN": 2,
    "NEW_PGTABLE": 4,
    "FLUSH_TLB": 5,
    "LOAD_IDT_ENTRY": 6,
    "SET_STACK": 7,
    "TS": 8,
    "SET_CLOCKEVENT": 9,
    "HALT": 10,
    "SET_PMD": 13,
    "SET_PTE": 14,
    "SET_PGD": 15,
    "LOAD_TLS": 16,
    "LOAD_GDT_ENTRY": 18,
    "SEND_INTERRUPTS": 19,
    "POWEROFF": 1,
    "RESTART": 2,
}
# Linux 2.6.32 include/linux/lguest.h and lguest_hcall.h, in C: LGUEST_IRQS is 32, LHCALL_RING_SIZE 64.
LGUEST_DATA = """
struct hcall_args { unsigned long arg0, arg1, arg2, arg3, arg4; };
struct lguest_data {
    unsigned int irq_enabled;
    unsigned long blocked_interrupts[1];
    unsigned long cr2;
    struct { long tv_sec, tv_nsec; } time;
    int irq_pending;
    unsigned char hcall_status[64];
    struct hcall_args hcalls[64];
    unsigned long reserve_mem;
    unsigned int tsc_khz;
    unsigned long noirq_start, noirq_end;
    unsigned long kernel_address;
    unsigned int syscall_vec;
};
"""
LGUEST_STATE = {"vif": "irq_enabled", "pending": "irq_pending"}  # the others have the structure's own names


def evaluate(prologue: str, expressions: dict[str, str], folder: Path, *includes: Path) -> dict[str, int]:
    """The values of C constant expressions on i386, as the compiler sees them."""
    lines = [f'__asm__("\\n@{i} %c0" : : "i"((long long)({text})));' for i, text in enumerate(expressions.values())]
    assembly = compile_for_i386(prologue, "\n".join(lines), folder, *includes)
    found = {int(i): int(value) for i, value in re.findall(r"^\s*@(\d+) \$?(-?\d+)$", assembly, re.MULTILINE)}
    assert len(found) == len(expressions), "the compiler answered every question"
    return {name: found[i] for i, name in enumerate(expressions)}


def compile_for_i386(prologue: str, body: str, folder: Path, *includes: Path) -> str:
    """The assembly of a function with this body."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    source = f"#include <stddef.h>\n#include <stdint.h>\n{prologue}\nvoid f(void) {{\n{body}\n}}\n"
    (folder / "facts.c").write_text(source)
    command = ["gcc", "-m32", "-O2", "-ffreestanding", "-nostdinc", "-S", "-o", "-", "facts.c"]
    command += ["-isystem", str(compiler_headers())]
    for include in includes:
        command += ["-isystem", str(include)]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def compiler_headers() -> Path:
    """gcc's own freestanding headers (stddef.h, stdint.h)."""
    done = subprocess.run(["gcc", "-print-file-name=include"], text=True, capture_output=True, check=True)
    return Path(done.stdout.strip())


def package(name: str, arch: str) -> Path:
    try:
        return fetch(name, arch) / "usr" / "include"
    except RegistryAway as away:
        pytest.skip(f"{name}: {away}")


def xen_values(expressions: dict[str, str], folder: Path) -> dict[str, int]:
    include = package("libxen-dev", "amd64")  # the headers choose the 32-bit layout by the compiler's target
    return evaluate(XEN_PROLOGUE, expressions, folder, include)


def kvm_values(expressions: dict[str, str], folder: Path) -> dict[str, int]:
    include = package("linux-libc-dev", "i386")
    prologue = "".join(f"#include <{h}>\n" for h in KVM_HEADERS)
    return evaluate(prologue, expressions, folder, include / "i386-linux-gnu", include)


def layout(state: dict[str, tuple[tuple[str, str], str]]) -> dict[str, str]:
    """Two expressions for each field: its offset and its size."""
    out = {}
    for key, ((offset, size), member) in state.items():
        out[f"{key} offset"], out[f"{key} size"] = offset.format(member), size.format(member)
    return out


def test_xen_numbers(tmp_path: Path) -> None:
    wanted = xen_values(XEN, tmp_path)
    constants = load("xen").constants
    assert {name: constants[name] for name in wanted} == wanted
    assert set(constants) == {*wanted, *OURS}, "every number of the spec has its header"


def test_xen_state_page(tmp_path: Path) -> None:
    expressions = layout(XEN_STATE)
    expressions["wallclock offset"] = SHARED[0].format("wc_version")
    expressions["wallclock end"] = "offsetof(struct shared_info, wc_nsec) + 4"
    expressions["middle"] = "offsetof(struct shared_info, wc_sec) - offsetof(struct shared_info, wc_version)"
    expressions["all"] = "sizeof(struct shared_info)"
    expressions["vcpus"] = "sizeof(((struct shared_info *)0)->vcpu_info) / sizeof(struct vcpu_info)"
    values = xen_values(expressions, tmp_path)
    state = load("xen").state
    for name in XEN_STATE:
        assert (state[name].offset, state[name].size) == (values[f"{name} offset"], values[f"{name} size"]), name
    assert state["wallclock"].offset == values["wallclock offset"]
    assert state["wallclock"].offset + state["wallclock"].size == values["wallclock end"]
    assert values["middle"] == 4
    assert set(state) == {*XEN_STATE, "wallclock", *OUR_STATE}
    # Our own fields and the hypervisor's lie behind the structure; its slots are not the only vCPU's alone.
    assert values["all"] <= min(state[name].offset for name in OUR_STATE)
    assert values["vcpus"] == 32


def test_xen_structures(tmp_path: Path) -> None:
    expressions = {}
    for name, (structure, members) in XEN_STRUCTURES.items():
        expressions[name] = f"sizeof({structure})"
        for member in members:
            expressions[f"{name}.{member}"] = f"offsetof({structure}, {member})"
    values = xen_values(expressions, tmp_path)
    for name, (_, members) in XEN_STRUCTURES.items():
        unpacked = getattr(xen, name)
        assert unpacked.size == values[name], name
        # One byte of another value at each member's offset comes out as that member.
        for number, member in enumerate(members):
            image = bytearray(unpacked.size)
            image[values[f"{name}.{member}"]] = 0x5A
            assert unpacked.unpack(bytes(image))[number] == 0x5A, f"{name}.{member}"


def test_xen_errors_flags_and_signature(tmp_path: Path) -> None:
    expressions = {
        **XEN_ERRORS,
        "MMU_NORMAL_PT_UPDATE": "MMU_NORMAL_PT_UPDATE",
        "dpl": "TI_GET_DPL(&(struct trap_info){.flags = 0xFF})",
        "masks": "TI_GET_IF(&(struct trap_info){.flags = 0xFF})",
        "leaf": "XEN_CPUID_FIRST_LEAF",
        "ebx": "XEN_CPUID_SIGNATURE_EBX",
        "ecx": "XEN_CPUID_SIGNATURE_ECX",
        "edx": "XEN_CPUID_SIGNATURE_EDX",
        "hole": "__HYPERVISOR_VIRT_START_NONPAE",
    }
    values = xen_values(expressions, tmp_path)
    for name in XEN_ERRORS:
        assert getattr(xen, name) == values[name], name
    assert values["MMU_NORMAL_PT_UPDATE"] == xen.MMU_NORMAL
    assert (values["dpl"], values["masks"]) == (xen.TRAP_DPL, xen.TRAP_MASKS_EVENTS)
    detect = load("xen").detect
    assert detect["leaf"] == values["leaf"]
    signature = b"".join((values[name] & 0xFFFFFFFF).to_bytes(4, "little") for name in ("ebx", "ecx", "edx"))
    assert detect["signature"].encode() == signature
    assert load("xen").virtual_top == values["hole"] & 0xFFFFFFFF


def test_xen_cpuid_prefix(tmp_path: Path) -> None:
    include = package("libxen-dev", "amd64")
    assembly = compile_for_i386(
        "#include <xen/xen.h>\n", '__asm__("\\n@prefix " XEN_EMULATE_PREFIX "\\n");', tmp_path, include
    )
    line = next(line for line in assembly.splitlines() if "@prefix" in line)
    prefix = bytes(int(word, 16) for word in re.findall(r"0x[0-9a-f]{2}", line))
    assert prefix == xen.CPUID_PREFIX
    asked = load("xen").calls["CPUID"].text
    assert bytes(int(word, 16) for word in re.findall(r"0x[0-9a-f]{2}", asked)) == prefix


def test_kvm_numbers(tmp_path: Path) -> None:
    wanted = kvm_values(KVM, tmp_path)
    constants = load("kvm").constants
    assert {name: constants[name] for name in wanted} == wanted
    assert set(constants) == {*wanted, *OURS}


def test_kvm_records_signature_and_errors(tmp_path: Path) -> None:
    """The records are those of Linux 2.6.32, asm/kvm_para.h: {u32 op, u32 pad}, then u64 words."""
    expressions = {
        "write": "sizeof(struct kvm_mmu_op_write_pte)",
        "pte_phys": "offsetof(struct kvm_mmu_op_write_pte, pte_phys)",
        "pte_val": "offsetof(struct kvm_mmu_op_write_pte, pte_val)",
        "flush": "sizeof(struct kvm_mmu_op_flush_tlb)",
        "release": "sizeof(struct kvm_mmu_op_release_pt)",
        "pt_phys": "offsetof(struct kvm_mmu_op_release_pt, pt_phys)",
        "op": "offsetof(struct kvm_mmu_op_header, op)",
        "leaf": "KVM_CPUID_SIGNATURE",
        "last": "KVM_SIGNATURE[11] + sizeof(KVM_SIGNATURE) + KVM_SIGNATURE[8]",
        "ENOSYS": "KVM_ENOSYS",
    }
    values = kvm_values(expressions, tmp_path)
    # What tests/rombuild/test_hypercalls.py sees the ROM's stubs put on the stack, word by word.
    assert (values["op"], values["pte_phys"], values["pte_val"], values["write"]) == (0, 8, 16, 24)
    assert values["flush"] == 8
    assert (values["pt_phys"], values["release"]) == (8, 16)
    assert load("kvm").detect["leaf"] == values["leaf"]
    signature = load("kvm").detect["signature"].encode()
    assert signature[11] + len(signature) + 1 + signature[8] == values["last"]
    assert values["ENOSYS"] == kvm.KVM_ENOSYS


def test_lguest_numbers() -> None:
    constants = load("lguest").constants
    assert dict(constants) == {**LGUEST, **{name: constants[name] for name in OURS}}
    assert lguest.TRAP_ENTRY == 0x1F  # LGUEST_TRAP_ENTRY, Linux 2.6.32 asm/lguest_hcall.h


def test_lguest_data(tmp_path: Path) -> None:
    state = {name: field for name, field in load("lguest").state.items() if name not in OUR_STATE}
    expressions = {}
    for name in state:
        member = LGUEST_STATE.get(name, name)
        expressions[f"{name} offset"] = f"offsetof(struct lguest_data, {member})"
        expressions[f"{name} size"] = f"sizeof(((struct lguest_data *)0)->{member})"
    expressions["all"] = "sizeof(struct lguest_data)"
    values = evaluate(LGUEST_DATA, expressions, tmp_path)
    for name, field in state.items():
        assert (field.offset, field.size) == (values[f"{name} offset"], values[f"{name} size"]), name
    assert max(field.offset + field.size for field in state.values()) == values["all"]
