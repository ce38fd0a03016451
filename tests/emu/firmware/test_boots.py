"""Boot protocols, the BIOS services and option ROMs, with guests that run on the engine."""

from __future__ import annotations

import struct

import pytest
from guests import ENTRY, LOAD, bios, code, multiboot, option_rom, say
from hypothesis import given, settings
from hypothesis import strategies as st
from test_images import make_bzimage, make_elf

from vmipatch.emu.firmware import boot
from vmipatch.emu.firmware.boot import PROTOCOLS, BootOptions
from vmipatch.emu.machine.board import BoardOptions
from vmipatch.emu.machine.machine import Machine
from vmipatch.errors import EmulatorError, RomError, UsageError, VmipatchError

MIB = 1 << 20
STOP = "cli; hlt"


def machine_with(image: bytes, ram: int = 8 * MIB, **options: object) -> Machine:
    machine = Machine(BoardOptions(ram_bytes=ram))
    boot.boot(machine, image, BootOptions(**options), "guest")  # type: ignore[arg-type]
    return machine


def word(machine: Machine, physical: int) -> int:
    return int.from_bytes(machine.memory.read(physical, 4), "little")


def test_multiboot_state_and_information() -> None:
    """Multiboot specification 0.6.96, sections 3.2 and 3.3."""
    machine = machine_with(multiboot(code(f"mov ecx, cr0; {STOP}")), ram=16 * MIB, append="a b", initrd=b"module!")
    assert machine.run(limit=1000).reason == "halt"
    get = machine.cpu.get
    assert get("eax") == 0x2BADB002
    assert get("ecx") & 0x80000001 == 1
    assert not get("eflags") & 0x20200
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        assert (get(f"{name}_base"), get(f"{name}_limit")) == (0, 0xFFFFFFFF)
    info = get("ebx")
    flags = word(machine, info)
    assert flags & 0x4D == 0x4D
    assert word(machine, info + 4) == 639
    assert word(machine, info + 8) == 15 * 1024
    line = machine.memory.read(word(machine, info + 16), 16)
    assert line.split(b"\0")[0] == b"guest a b"
    module = word(machine, info + 24)
    start, end = word(machine, module), word(machine, module + 4)
    assert machine.memory.read(start, end - start) == b"module!"
    table, length = word(machine, info + 48), word(machine, info + 44)
    sizes = []
    at = table
    while at < table + length:
        entry_size, base, size, kind = struct.unpack("<IQQI", machine.memory.read(at, 24))
        if kind == 1:
            sizes.append((base, size))
        at += entry_size + 4
    assert sizes == [(0, 0x9FC00), (MIB, 15 * MIB)]


def test_multiboot_elf() -> None:
    program = code(f"{say('elf')}; {STOP}", 0xC0000040)
    header = struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF)
    image = make_elf([(0xC0000000, LOAD, header.ljust(0x40, b"\0") + program, 0x2000)], 0xC0000040)
    machine = machine_with(image)
    assert machine.run(limit=1000).reason == "halt"
    assert bytes(machine.board.consoles.serial) == b"elf"


def test_linux_elf_state_and_boot_params() -> None:
    """boot.rst, "32-bit Boot Protocol"; offsets of zero-page.rst."""
    image = make_elf([(0xC1000000, 0x400000, code(STOP), 0x1000)], 0x400000)
    machine = machine_with(image, append="console=ttyS0", initrd=bytes(5000))
    assert machine.run(limit=10).reason == "halt"
    get = machine.cpu.get
    assert (get("cs"), get("ds"), get("es"), get("ss")) == (0x10, 0x18, 0x18, 0x18)
    assert get("ebp") == get("edi") == get("ebx") == 0
    assert not get("cr0") & 0x80000000
    params = machine.memory.read(get("esi"), 4096)
    assert params[0x1FE:0x200] == b"\x55\xaa"
    assert params[0x202:0x206] == b"HdrS"
    assert params[0x210] == 0xFF
    line = struct.unpack_from("<I", params, 0x228)[0]
    assert machine.memory.read(line, 14) == b"console=ttyS0\0"
    initrd, size = struct.unpack_from("<II", params, 0x218)
    assert (initrd % 4096, size) == (0, 5000)
    assert initrd + size <= 8 * MIB
    count = params[0x1E8]
    entries = [struct.unpack_from("<QQI", params, 0x2D0 + 20 * index) for index in range(count)]
    assert (MIB, 7 * MIB, 1) in entries
    assert params[0x0F] == 1
    assert struct.unpack_from("<I", params, 0x1E0)[0] == 7 * 1024


def test_bzimage_keeps_its_header_and_is_entered_at_code32_start() -> None:
    image = bytearray(make_bzimage())
    image[0x400 : 0x400 + 2] = code(STOP)
    struct.pack_into("<Q", image, 0x258, 0x200000)
    machine = machine_with(bytes(image), append="quiet")
    assert machine.run(limit=10).reason == "halt"
    assert machine.cpu.get("eip") == 0x100002
    params = machine.memory.read(machine.cpu.get("esi"), 4096)
    assert params[0x1F1:0x200] == bytes(image[0x1F1:0x200])
    assert struct.unpack_from("<I", params, 0x260)[0] == 0x10000
    assert params[0x268:0x2D0] == bytes(0x2D0 - 0x268)


def test_an_old_unpacker_may_have_all_below_the_boot_parameters() -> None:
    """Linux up to 2.6.19, arch/i386/boot/compressed: misc.c unpacks to 0x2000 and on, up to the real-mode data
    (LOW_BUFFER_START, LOW_BUFFER_MAX), and head.S goes to the kernel by a far jump, through the loader's GDT."""
    image = bytearray(make_bzimage(version=0x204))
    far = b"\xea" + struct.pack("<IH", 0x100000 + 0x30, 0x10)
    fill = code("cld; mov edi, 0x2000; mov ecx, 0x23800; mov eax, 0xf4f4f4f4") + b"\xf3\xab"
    program = fill + code("mov eax, 0x18; mov ds, eax; mov ss, eax") + far
    image[0x400:] = program.ljust(0x30, b"\x90") + code(f"mov ebx, dword ptr [esi + 0x202]; {STOP}")
    machine = machine_with(bytes(image), append="quiet")
    assert machine.run(limit=200_000).reason == "halt"
    assert machine.cpu.get("edi") == machine.cpu.get("esi") == 0x90000
    assert machine.cpu.get("ebx") == int.from_bytes(b"HdrS", "little")
    line = machine.memory.read(machine.cpu.get("esi") + 0x228, 4)
    assert machine.memory.read(int.from_bytes(line, "little"), 6) == b"quiet\0"


def test_pvh_start_info() -> None:
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x200000)
    image = make_elf([(0x200000, 0x200000, code(STOP), 0x1000)], 0x200000, note)
    machine = machine_with(image, append="x=1", initrd=b"ramdisk", protocol="pvh")
    assert machine.run(limit=10).reason == "halt"
    info = machine.cpu.get("ebx")
    magic, version, _, modules, module, line, _, table, entries, _ = struct.unpack(
        "<IIIIQQQQII", machine.memory.read(info, 56)
    )
    assert (magic, version, modules) == (0x336EC578, 1, 1)
    assert machine.memory.read(line, 4) == b"x=1\0"
    start, size = struct.unpack("<QQ", machine.memory.read(module, 16))
    assert machine.memory.read(start, size) == b"ramdisk"
    kinds = [struct.unpack("<QQII", machine.memory.read(table + 24 * i, 24)) for i in range(entries)]
    assert (MIB, 7 * MIB, 1, 0) in kinds


def test_pvh_without_a_note() -> None:
    with pytest.raises(EmulatorError, match="PHYS32_ENTRY"):
        machine_with(make_elf([(0x200000, 0x200000, b"\xf4", 1)], 0x200000), protocol="pvh")


def test_raw_bios_runs_from_the_reset_vector() -> None:
    program = code("mov al, 0x42; out 0xe9, al; mov eax, 3; mov dx, 0xf4; out dx, eax; hlt", 0, 16)
    machine = machine_with(bios(program))
    outcome = machine.run(limit=100)
    assert (outcome.reason, outcome.exit_code) == ("debug exit", 7)
    assert bytes(machine.board.consoles.debug) == b"B"
    assert machine.cpu.get("cs") == 0xF000


def test_raw_bios_is_read_only_and_seen_below_4_gib() -> None:
    program = code(
        "mov ax, 0xf000; mov ds, ax; mov byte ptr [0x100], 0x12; mov al, byte ptr [0x100]; out 0xe9, al; hlt", 0, 16
    )
    machine = machine_with(bios(program))
    assert machine.run(limit=100).reason in ("halt", "asleep")
    assert bytes(machine.board.consoles.debug) == b"\xf4"
    assert machine.memory.read(0xFFFF0000, 4) == machine.memory.read(0xF0000, 4) == program[:4]


def test_bios_takes_no_kernel_options() -> None:
    with pytest.raises(UsageError):
        machine_with(bios(b"\xf4"), append="x")


ROM_TELETYPE = "mov ah, 0x0e; mov al, 0x4f; int 0x10; mov al, 0x4b; int 0x10"


def run_rom(init: str, **options: object) -> Machine:
    rom = option_rom(code(init, 3, 16) + b"\xcb")
    return machine_with(multiboot(code(STOP)), rom=rom, **options)


def test_option_rom_init_prints_and_returns() -> None:
    machine = run_rom(ROM_TELETYPE)
    assert bytes(machine.board.consoles.debug) == b"OK"
    assert machine.board.vga is not None
    assert machine.board.vga.text()[0] == "OK"
    assert machine.memory.read(0xC0000, 3) == b"\x55\xaa\x04"
    assert machine.run(limit=machine.cpu.instructions + 100).reason == "halt"
    assert machine.cpu.get("eax") == 0x2BADB002


def test_option_rom_may_write_itself_during_init_only() -> None:
    machine = run_rom("mov byte ptr cs:[0x100], 0x77; mov byte ptr cs:[0x101], 0x89")
    assert machine.memory.read(0xC0100, 2) == b"\x77\x89"
    machine = machine_with(
        multiboot(code(f"mov byte ptr [0xc0100], 0x11; mov al, byte ptr [0xc0100]; {STOP}")),
        rom=option_rom(b"\xcb"),
    )
    assert machine.run(limit=machine.cpu.instructions + 100).reason == "halt"
    assert machine.cpu.get("eax") & 0xFF == 0


def test_option_rom_gets_its_pci_location() -> None:
    machine = run_rom("mov word ptr cs:[0x100], ax")
    assert machine.memory.read(0xC0100, 2) == b"\x18\x00"  # bus 0, device 3, function 0


def test_memory_services() -> None:
    machine = run_rom(
        "mov ax, 0xe801; int 0x15; mov word ptr cs:[0x100], ax; mov word ptr cs:[0x102], bx;"
        "mov ah, 0x88; int 0x15; mov word ptr cs:[0x104], ax; int 0x12; mov word ptr cs:[0x106], ax;"
        "push cs; pop es; mov di, 0x110; xor ebx, ebx; mov ecx, 20; mov edx, 0x534d4150; mov eax, 0xe820; int 0x15;"
        "mov word ptr cs:[0x108], bx; setb byte ptr cs:[0x10a];"
        "mov ah, 0x99; int 0x15; setb byte ptr cs:[0x10b]; mov ah, 2; int 0x13; setb byte ptr cs:[0x10c]",
        ram=32 * MIB,
    )
    e801, above, ext, base, index = struct.unpack("<HHHHH", machine.memory.read(0xC0100, 10))
    assert (e801, above, ext, base) == (15 * 1024, 16 * 16, 31 * 1024, 639)
    assert index == 1
    assert machine.memory.read(0xC010A, 3) == b"\0\1\1"
    assert struct.unpack("<QQI", machine.memory.read(0xC0110, 20)) == (0, 0x9FC00, 1)


def test_timer_interrupts_count_ticks() -> None:
    machine = run_rom("sti; xor ax, ax; mov ds, ax; hlt; hlt; mov ah, 0; int 0x1a; mov word ptr cs:[0x100], dx")
    assert machine.memory.read(0xC0100, 2) == b"\2\0"
    assert 0.1 < machine.clock.now / 1e9 < 0.2


def test_an_option_rom_that_does_not_come_back() -> None:
    with pytest.raises(RomError, match="did not return"):
        machine_with(multiboot(b"\xf4"), rom=option_rom(b"\xfa\xf4"))


@pytest.mark.parametrize(
    ("rom", "base", "error"),
    [
        (b"hello", 0xC0000, "55 AA"),
        (b"\x55\xaa\x00" + bytes(509), 0xC0000, "0 bytes long"),
        (b"\x55\xaa\x08" + bytes(509), 0xC0000, "4096 bytes long"),
        (b"\x55\xaa\x01\x01" + bytes(508), 0xC0000, "add up"),
        (option_rom(b"\xcb"), 0xC0400, "cannot lie"),
        (option_rom(b"\xcb"), 0xDFC00, "cannot lie"),
        (option_rom(b"\xcb"), 0x100000, "cannot lie"),
    ],
)
def test_unusable_option_roms(rom: bytes, base: int, error: str) -> None:
    with pytest.raises(VmipatchError, match=error):
        machine_with(multiboot(b"\xf4"), rom=rom, rom_base=base)


def test_a_rom_over_a_rom() -> None:
    from vmipatch.emu.firmware import option_rom as roms

    machine = Machine(BoardOptions(ram_bytes=MIB))
    boot.install_bios(machine)
    roms.place(machine, option_rom(b"\xcb"), 0xC0000)
    roms.place(machine, option_rom(b"\xcb"), 0xC0800)
    with pytest.raises(EmulatorError, match="already"):
        roms.place(machine, option_rom(b"\xcb"), 0xC0800)


@pytest.mark.parametrize(
    ("image", "options", "error"),
    [
        (make_elf([(0, 0x700000, b"a", 2 * MIB)], 0x700000), {}, "does not fit"),
        (make_elf([(0, 0xA0000, b"a", 16)], 0xA0000), {}, "does not fit"),
        (multiboot(b"\xf4"), {"initrd": bytes(8 * MIB)}, "more memory"),
        (multiboot(b"\xf4"), {"append": "x" * 3000}, "command line"),
        (make_elf([(0, MIB, b"a", 16)], MIB), {"append": "x" * 3000}, "command line"),
        (multiboot(b"\xf4", flags=8), {}, "unknown"),
        (b"nothing", {}, "not a kernel"),
        (bytes(1000), {"protocol": "multiboot"}, "no Multiboot header"),
        (bytes(1000), {"protocol": "bios"}, "power of two"),
        (bytes(1000), {"protocol": "linux"}, "not a Linux"),
    ],
)
def test_what_does_not_load(image: bytes, options: dict[str, object], error: str) -> None:
    with pytest.raises(EmulatorError, match=error):
        machine_with(image, **options)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("cli; hlt", "halt"),
        ("ud2", "triple fault"),
        ("mov edx, 0x604; mov eax, 0x2000; out dx, ax", "poweroff"),
        ("mov al, 0xfe; out 0x64, al", "reset"),
        ("inc eax; dec eax; jmp 0x100020", "limit"),
    ],
)
def test_ends(program: str, reason: str) -> None:
    machine = machine_with(multiboot(code(program)))
    assert machine.run(limit=20_000).reason == reason


def test_entry_of_the_flat_image() -> None:
    assert ENTRY == LOAD + 32


SEEDS = (
    multiboot(code(STOP)),
    make_elf(
        [(0xC0200000, 0x200000, code(STOP), 0x1000)], 0x200000, struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x200000)
    ),
    make_bzimage(),
    bios(b"\xf4"),
    option_rom(b"\xcb"),
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 0x300), st.binary(min_size=1, max_size=6)), max_size=4),
    st.sampled_from(PROTOCOLS),
    st.booleans(),
)
def test_damaged_images_load_and_end_or_are_refused(
    seed: bytes, changes: list[tuple[int, bytes]], protocol: str, with_rom: bool
) -> None:
    data = bytearray(seed)
    for at, change in changes:
        at %= len(data)
        data[at : at + len(change)] = change[: len(data) - at]
    try:
        machine = machine_with(bytes(data), ram=4 * MIB, protocol=protocol, rom=SEEDS[4] if with_rom else None)
    except VmipatchError:
        return
    assert machine.run(limit=machine.cpu.instructions + 20_000).reason in (
        "halt", "limit", "triple fault", "reset", "poweroff", "debug exit", "asleep", "no boot device",
        "firmware call returned",
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=500))
def test_any_bytes_as_an_option_rom(init: bytes) -> None:
    from vmipatch.emu.firmware import option_rom as roms

    machine = Machine(BoardOptions(ram_bytes=MIB))
    services = boot.install_bios(machine)
    roms.place(machine, option_rom(init), 0xC0000)
    try:
        roms.initialise(machine, services, roms.Found(0xC0000, 2048), 0x18, limit=20_000)
    except RomError:
        return
