"""Small guests that only work and end: one ROM image each, which our emulator, QEMU and Bochs run unchanged.

A guest is 64 KiB at the reset vector.  It copies an image to RAM, goes to protected mode with paging, does its
loop ``count`` times, and ends the machine: by "Shutdown" on port 0x8900 (Bochs), by port 0xF4 (QEMU's
isa-debug-exit and ours).  ``bare`` gives the loop alone, for Unicorn, which has neither interrupts nor ports here.

May import vmipatch.isa.  Everything lies where these constants say; addresses are physical and linear at once.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

IMAGE = 0x10000  # the image in RAM
IDT, TSS, CODE, DIRECTORY, TABLE, WINDOW_TABLE = 0x10100, 0x10900, 0x11000, 0x13000, 0x14000, 0x15000
IMAGE_SIZE = 0x6000
STACK, KERNEL_STACK, USER_STACK = 0x80000, 0x84000, 0x88000
WINDOW = 0x400000  # 1024 pages, absent until touched
BUFFER = 0x100000  # 1 MiB for the memory loop
ROM_SIZE = 0x10000
ROM_IMAGE = 0x400  # the image in the ROM

GDT = (
    0,
    0x00CF9A000000FFFF,  # 08 code, ring 0
    0x00CF92000000FFFF,  # 10 data, ring 0
    0x00CFFA000000FFFF,  # 18 code, ring 3
    0x00CFF2000000FFFF,  # 20 data, ring 3
    0x0000890000000067 | (TSS & 0xFFFFFF) << 16,  # 28 TSS
)

ALU = """
    mov eax, 0x12345678; mov ebx, 0x9abcdef0; mov edx, 7; mov esi, 3; mov edi, 0
alu:
    add eax, ebx
    xor edx, eax
    lea esi, [eax + edx*4 + 0x1234]
    rol edx, 5
    sub ebx, esi
    adc edi, eax
    and esi, 0xffffff
    or eax, esi
    shr edi, 3
    imul ebx, esi
    bswap eax
    cmp eax, edx
    jb skip
    inc edi
skip:
    mov eax, edi
    not edx
    dec ecx
    jnz alu
"""
MEMORY = """
    mov esi, 0; mov edx, 5
memory:
    mov eax, dword ptr [esi + 0x100000]
    add dword ptr [esi + 0x100004], eax
    mov dword ptr [esi + 0x100008], edx
    movzx edx, byte ptr [esi + 0x100001]
    mov byte ptr [esi + 0x10000d], al
    push eax
    pop ebx
    add edx, dword ptr [esi + 0x100002]
    add esi, 20
    and esi, 0xffffc
    dec ecx
    jnz memory
"""
INTERRUPT = """
    mov ebx, ecx
interrupt:
    int 0x80
    dec ebx
    jnz interrupt
"""
SYSENTER = """
    mov ebx, ecx
fast:
    mov ecx, esp
    mov edx, {back}
    sysenter
back:
    dec ebx
    jnz fast
"""
FAULT = """
    mov ebx, ecx
round:
    mov esi, 0x400000
    mov ecx, 1024
touch:
    mov eax, dword ptr [esi]
    add esi, 4096
    dec ecx
    jnz touch
    int 0x80
    dec ebx
    jnz round
"""
START = """
    .byte 0x0f, 0x01, 0x15; .long {gdtr}
    .byte 0x0f, 0x01, 0x1d; .long {idtr}
    mov ax, 0x28; ltr ax
    mov ecx, 0x174; mov eax, 8; mov edx, 0; wrmsr
    mov ecx, 0x175; mov eax, 0x84000; wrmsr
    mov ecx, 0x176; mov eax, {sysenter}; wrmsr
    mov eax, 0x13000; mov cr3, eax
    mov eax, cr0; or eax, 0x80000000; mov cr0, eax
    mov ecx, {count}
"""
TO_USER = """
    mov ax, 0x23; mov ds, ax; mov es, ax
    push 0x23; push 0x88000; push 2; push 0x1b; push {user}; iretd
user:
"""
HANDLERS = """
    int 0x81
call_gate:
    iretd
unmap:
    pushad
    mov edi, 0x15000; mov ecx, 1024; mov eax, 0; .byte 0xf3, 0xab
    mov eax, cr3; mov cr3, eax
    popad
    iretd
fast_call:
    sysexit
page_fault:
    push eax
    mov eax, cr2
    shr eax, 12
    and eax, 0x3ff
    mov dword ptr [eax*4 + 0x15000], 0x100007
    pop eax
    add esp, 4
    iretd
finish:
    mov dx, 0x8900
    mov al, 0x53; out dx, al; mov al, 0x68; out dx, al; mov al, 0x75; out dx, al; mov al, 0x74; out dx, al
    mov al, 0x64; out dx, al; mov al, 0x6f; out dx, al; mov al, 0x77; out dx, al; mov al, 0x6e; out dx, al
    mov al, 0x10
    out 0xf4, al
    cli
    hlt
"""
# In the ROM, at F0000 with 32-bit segments: copy the image and jump to it.
LOADER = """
    mov ax, 0x10; mov ds, ax; mov es, ax; mov ss, ax
    mov esp, 0x80000
    mov esi, 0xf0400; mov edi, 0x10000; mov ecx, 0x1800; .byte 0xf3, 0xa5
    mov eax, 0x11000
    jmp eax
"""


@dataclass(frozen=True)
class Guest:
    """A loop: its text, whether it runs in ring 3, what one turn of it is and how often a turn holds one."""

    name: str
    body: str
    user: bool = False
    per_turn: int = 0  # things done in a turn that are counted instead of instructions; 0: instructions
    int80: str = "call_gate"


GUESTS = (
    Guest("ALU loop", ALU),
    Guest("memory loop", MEMORY),
    Guest("system call by INT 0x80 and back", INTERRUPT, user=True, per_turn=1),
    Guest("system call by SYSENTER and back", SYSENTER, user=True, per_turn=1),
    Guest("page fault, mapped and repeated", FAULT, user=True, per_turn=1024, int80="unmap"),
)


def rom(guest: Guest, count: int) -> bytes:
    """The guest as a BIOS image; ``count`` turns of its loop."""
    image = bytearray(IMAGE_SIZE)
    code, labels = _code(guest, count)

    def put(address: int, data: bytes) -> None:
        image[address - IMAGE : address - IMAGE + len(data)] = data

    put(IMAGE, struct.pack("<6Q", *GDT))
    put(IMAGE + 0x40, struct.pack("<HI", 8 * len(GDT) - 1, IMAGE))
    put(IMAGE + 0x48, struct.pack("<HI", 0x7FF, IDT))
    for vector, label in ((0x0E, "page_fault"), (0x80, guest.int80), (0x81, "finish")):
        target = CODE + labels[label]
        gate = 0xEE00 if vector >= 0x80 else 0x8E00
        put(IDT + 8 * vector, struct.pack("<HHHH", target & 0xFFFF, 8, gate, target >> 16))
    put(TSS + 4, struct.pack("<II", KERNEL_STACK, 0x10))
    put(TSS + 0x64, struct.pack("<HH", 0, 0x68))
    put(CODE, code)
    put(DIRECTORY, struct.pack("<II", TABLE | 7, WINDOW_TABLE | 7))
    put(TABLE, struct.pack("<1024I", *(page << 12 | 7 for page in range(1024))))
    return _bios(bytes(image))


def bare(guest: Guest, count: int) -> tuple[bytes, int]:
    """The loop alone at CODE, paging off; and the offset where it ends."""
    from vmipatch.isa.assemble import assemble

    code = assemble(f"mov ecx, {count}\n{guest.body}").code
    return code + b"\x90" * 16, len(code)


def _code(guest: Guest, count: int) -> tuple[bytes, dict[str, int]]:
    from vmipatch.isa.assemble import assemble

    text = START + (TO_USER if guest.user else "") + guest.body + HANDLERS
    values = {"gdtr": IMAGE + 0x40, "idtr": IMAGE + 0x48, "count": count}
    addresses = {"sysenter": CODE, "user": CODE, "back": CODE}
    # The second time the labels are known; the addresses have the same size in both.
    for _ in range(2):
        made = assemble(text.format(**values, **addresses))
        for name, label in (("sysenter", "fast_call"), ("user", "user"), ("back", "back")):
            addresses[name] = CODE + made.labels.get(label, 0)
    return made.code, made.labels


def _bios(image: bytes) -> bytes:
    """64 KiB with the way from the reset vector to the image."""
    from vmipatch.isa.assemble import assemble

    bios = bytearray(b"\xf4" * ROM_SIZE)
    loader = assemble(LOADER).code
    bios[0x100 : 0x100 + len(loader)] = loader
    table = struct.pack("<3Q", *GDT[:3])
    bios[0x80 : 0x80 + len(table)] = table
    bios[0xA0:0xA6] = struct.pack("<HI", len(table) - 1, 0xF0080)
    # 16 bits: CLI; LGDT CS:[A0] with a 32-bit base; CR0.PE; a far jump to 08:000F0100.
    bios[0x00:0x18] = bytes.fromhex("fa 66 2e 0f 01 16 a0 00 0f 20 c0 0c 01 0f 22 c0 66 ea 00 01 0f 00 08 00")
    bios[ROM_IMAGE : ROM_IMAGE + len(image)] = image
    bios[0xFFF0:0xFFF5] = bytes.fromhex("ea 00 00 00 f0")  # JMP F000:0000
    return bytes(bios)
