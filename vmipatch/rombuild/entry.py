"""The 16-bit entry of a ROM: what the BIOS far-calls.  Imports the assembler.

It writes one line of text to the debug ports 0x402 (SeaBIOS, OVMF) and 0xE9 (Bochs, QEMU's isa-debugcon) and to
the first serial port, and returns far with every register as it was.  The transmitter is waited for at most
65535 polls a character, so a machine without a serial port goes on.
"""

from __future__ import annotations

from vmipatch.isa.assemble import assemble

_TEXT = """
    pushf
    push ax
    push cx
    push dx
    push si
    mov si, {text}
next: mov al, byte ptr cs:[si]
    test al, al
    je done
    mov dx, 0x402
    out dx, al
    out 0xe9, al
    push ax
    mov cx, 0xffff
    mov dx, 0x3fd
wait: in al, dx
    test al, 0x20
    jne ready
    loop wait
ready: pop ax
    mov dx, 0x3f8
    out dx, al
    inc si
    jmp next
done: pop si
    pop dx
    pop cx
    pop ax
    popf
    .byte 0xcb
"""


def entry(text: int) -> bytes:
    """The code; ``text`` is the offset in the ROM of a NUL-terminated string."""
    return assemble(_TEXT.format(text=text), bits=16, section="16-bit entry").code


def jump(entry_offset: int) -> bytes:
    """The four bytes of ``rom_entry`` at offset 3: a near jump to the entry, and a zero."""
    return b"\xe9" + ((entry_offset - 6) & 0xFFFF).to_bytes(2, "little") + b"\0"
