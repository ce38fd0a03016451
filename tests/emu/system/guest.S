# A 64 KiB BIOS that tries what the architecture defines and prints what happened, one line a case, on port 0xE9.
#
#   as --32 -o guest.o guest.S && ld -m elf_i386 -T guest.ld -o guest.elf guest.o && objcopy -O binary guest.elf guest.rom
#
# Every case begins in the same state: ring 0, flat segments, paging off, interrupts off, known registers, GDT, IDT,
# TSS and page tables rebuilt.  It ends with an exception, or with INT 0x30.  Whatever vector arrives is printed with
# its error code (ffffffff where there is none), CS:EIP, the flags that are not arithmetic, SS:ESP of an outer ring,
# the general registers, CR2, DR6 and TR.  The end of the run is written to port 0xF4 and to Bochs's port 0x8900.

.intel_syntax noprefix
.code32

.set GDT, 0x1000
.set IDT, 0x2000
.set LDT, 0x3000
.set TSSA, 0x4000
.set TSSB, 0x7000
.set TSSC, 0x7800
.set INDEX, 0x8000
.set SCRATCH, 0x9000
.set PAGEDIR, 0x20000
.set PT0, 0x21000
.set PT1, 0x22000
.set PAGE, 0x30000          # what linear 0x400000 is mapped to
.set STACK0, 0x80000        # of the cases
.set STACKX, 0x84000        # ESP0: of handlers reached from outer rings
.set STACK3, 0x88000
.set LIN, 0x400000

.macro CASE name
    .pushsection .cases, "a"
    .long 8801f, 8802f
    .popsection
    .pushsection .names, "a"
8802: .asciz "\name"
    .popsection
8801:
.endm
.macro DONE
    int 0x30
.endm
.macro DESC sel, low, high
    mov dword ptr [GDT + (\sel & 0xFFF8)], \low
    mov dword ptr [GDT + (\sel & 0xFFF8) + 4], \high
.endm
.macro RING3 cs=0x1B, ss=0x23, flags=2
    push \ss
    push STACK3
    push \flags
    push \cs
    push offset 8803f
    iretd
8803:
.endm
.macro PAGING cr0=0x80000011
    mov eax, PAGEDIR
    mov cr3, eax
    mov eax, \cr0
    mov cr0, eax
.endm
.macro PTE value            # of linear 0x400000
    mov dword ptr [PT1], \value
.endm

.section .cases, "a"
case_table:

.globl boot_gdt_register, reset
.section .text
start32:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, STACK0
    mov dword ptr [INDEX], 0
    mov dword ptr [INDEX + 8], 0

next_case:
    cli
    cld
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, STACK0
    mov eax, 0x11
    mov cr0, eax
    xor eax, eax
    mov cr3, eax
    mov cr4, eax
    mov dr7, eax
    mov dr6, eax
    mov fs, ax
    mov gs, ax
    # GDT, LDT, TSSs, IDT, page tables: from the templates.
    mov esi, offset gdt_template
    mov edi, GDT
    mov ecx, (gdt_end - gdt_template) / 4
    rep movsd
    mov edi, LDT
    mov ecx, 0x1000 / 4
    rep stosd
    mov dword ptr [LDT + 8], 0x0000FFFF
    mov dword ptr [LDT + 12], 0x00CFF200
    mov edi, TSSA
    mov ecx, 0x4000 / 4
    rep stosd
    mov dword ptr [TSSA + 4], STACKX
    mov dword ptr [TSSA + 8], 0x10
    mov dword ptr [TSSA + 12], STACKX - 0x1000
    mov dword ptr [TSSA + 16], 0xA9
    mov dword ptr [TSSA + 0x64], 0x00680000
    mov byte ptr [TSSA + 0x68 + 0x2000], 0xFF
    mov dword ptr [TSSB + 4], STACKX - 0x2000
    mov dword ptr [TSSB + 8], 0x10
    mov dword ptr [TSSB + 0x20], offset task_b
    mov dword ptr [TSSB + 0x24], 2
    mov dword ptr [TSSB + 0x28], 0xB0000001
    mov dword ptr [TSSB + 0x2C], 0xB0000002
    mov dword ptr [TSSB + 0x30], 0xB0000003
    mov dword ptr [TSSB + 0x34], 0xB0000004
    mov dword ptr [TSSB + 0x38], STACKX - 0x2000
    mov dword ptr [TSSB + 0x48], 0x10
    mov dword ptr [TSSB + 0x4C], 0x08
    mov dword ptr [TSSB + 0x50], 0x10
    mov dword ptr [TSSB + 0x54], 0x10
    mov dword ptr [TSSB + 0x64], 0x00680000
    mov dword ptr [TSSC + 4], STACKX - 0x3000
    mov dword ptr [TSSC + 8], 0x10
    mov dword ptr [TSSC + 0x20], offset pop_code
    mov dword ptr [TSSC + 0x24], 2
    mov dword ptr [TSSC + 0x28], 0xC0000001
    mov dword ptr [TSSC + 0x2C], 0xC0000002
    mov dword ptr [TSSC + 0x30], 0xC0000003
    mov dword ptr [TSSC + 0x34], 0xC0000004
    mov dword ptr [TSSC + 0x38], STACKX - 0x3000
    mov dword ptr [TSSC + 0x48], 0x10
    mov dword ptr [TSSC + 0x4C], 0x08
    mov dword ptr [TSSC + 0x50], 0x10
    mov dword ptr [TSSC + 0x54], 0x10
    mov dword ptr [TSSC + 0x64], 0x00680000
    mov edi, IDT
    mov edx, offset vectors
    mov ecx, 256
1:  mov eax, edx
    and eax, 0xFFFF
    or eax, 0x00080000
    mov [edi], eax
    mov eax, edx
    and eax, 0xFFFF0000
    or eax, 0x8E00
    mov [edi + 4], eax
    add edx, 10
    add edi, 8
    loop 1b
    or byte ptr [IDT + 0x30 * 8 + 5], 0x60
    mov edi, PAGEDIR
    xor eax, eax
    mov ecx, 0x400
    rep stosd
    mov dword ptr [PAGEDIR], PT0 + 7
    mov dword ptr [PAGEDIR + 4], PT1 + 7
    mov edi, PT0
    mov eax, 7
    mov ecx, 0x400
2:  stosd
    add eax, 0x1000
    loop 2b
    mov eax, PAGE + 7
    mov ecx, 0x400
3:  stosd
    loop 3b
    mov edi, PAGE
    mov eax, 0xC0DEC0DE
    mov ecx, 0x400
    rep stosd
    mov edi, SCRATCH
    xor eax, eax
    mov ecx, 0x400
    rep stosd
    lgdt gdt_register
    lidt idt_register
    xor eax, eax
    lldt ax
    mov ax, 0x28
    ltr ax
    push 0x10
    popfd
    push 2
    popfd
    mov ebx, [INDEX]
    inc dword ptr [INDEX]
    lea ebx, [ebx * 8 + case_table]
    cmp ebx, offset case_table_end
    jae finish
    mov esi, [ebx + 4]
    call print_string
    mov ebp, [ebx]
    mov [INDEX + 4], ebp
    mov eax, 0xA1111111
    mov ecx, 0xC2222222
    mov edx, 0xD3333333
    mov ebx, 0xB4444444
    mov esi, 0x56666666
    mov edi, 0xD7777777
    push ebp
    mov ebp, 0xE5555555
    ret

finish:
    mov esi, offset text_end
    call print_string
    mov al, 10
    out 0xE9, al
    mov esi, offset text_shutdown
    mov dx, 0x8900
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:  mov al, 0x10
    out 0xF4, al
    cli
    hlt

print_string:
    lodsb
    test al, al
    jz 1f
    out 0xE9, al
    jmp print_string
1:  ret
print_hex:                  # EAX, eight digits
    push ecx
    push edx
    mov edx, eax
    mov ecx, 8
1:  rol edx, 4
    mov eax, edx
    and eax, 15
    cmp al, 10
    jb 2f
    add al, 39
2:  add al, 48
    out 0xE9, al
    loop 1b
    pop edx
    pop ecx
    ret

.macro SHOW label, offset
    mov esi, offset 8804f
    call print_string
    mov eax, [ebx + \offset]
    call print_hex
    .pushsection .names, "a"
8804: .asciz " \label="
    .popsection
.endm

# Stack: GS FS ES DS, PUSHAD (EDI first), vector, error code, EIP, CS, EFLAGS, ESP, SS.
common:
    pushad
    push ds
    push es
    push fs
    push gs
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    cld
    mov ebx, esp
    and dword ptr [ebx + 12], 0xFFFF
    and dword ptr [ebx + 8], 0xFFFF
    SHOW "vec", 48
    SHOW "err", 52
    SHOW "eip", 56
    and dword ptr [ebx + 60], 0xFFFF
    SHOW "cs", 60
    test byte ptr [ebx + 66], 2
    jnz 1f
    test byte ptr [ebx + 60], 3
    jz 2f
1:  and dword ptr [ebx + 72], 0xFFFF
    SHOW "sp", 68
    SHOW "ss", 72
2:  and dword ptr [ebx + 64], 0x003FF700
    SHOW "fl", 64
    SHOW "a", 44
    SHOW "c", 40
    SHOW "d", 36
    SHOW "b", 32
    SHOW "p", 24
    SHOW "s", 20
    SHOW "i", 16
    SHOW "ds", 12
    SHOW "es", 8
    sub esp, 12
    mov ebx, esp
    mov eax, cr2
    mov [ebx], eax
    mov eax, dr6
    and eax, 0xE00F
    mov [ebx + 4], eax
    xor eax, eax
    str ax
    mov [ebx + 8], eax
    cmp dword ptr [ebx + 64], 14
    jne 3f
    SHOW "cr2", 0
3:  SHOW "dr6", 4
    SHOW "tr", 8
    mov al, 10
    out 0xE9, al
    jmp next_case

task_b:
    int 0x30

.align 16
vectors:
.set n, 0
.rept 256
    .if (n == 8) || (n == 10) || (n == 11) || (n == 12) || (n == 13) || (n == 14) || (n == 17)
    .byte 0x66, 0x90, 0x0F, 0x1F, 0x00
    .else
    .byte 0x68
    .long 0xFFFFFFFF
    .endif
    .byte 0xE9
    .long vectors_long + 10 * n - (vectors + 10 * n + 10)
    .set n, n + 1
.endr
vectors_long:
.set n, 0
.rept 256
    .byte 0x68
    .long n
    .byte 0xE9
    .long common - (vectors_long + 10 * n + 10)
    .set n, n + 1
.endr

.align 8
gdt_template:
    .quad 0
    .quad 0x00CF9A000000FFFF    # 08 code, ring 0
    .quad 0x00CF92000000FFFF    # 10 data, ring 0
    .quad 0x00CFFA000000FFFF    # 18 code, ring 3
    .quad 0x00CFF2000000FFFF    # 20 data, ring 3
    .quad 0x0000890040002068    # 28 TSS A
    .quad 0x0000890070000068    # 30 TSS B
    .long 0x00080000 + (gate_0 - 0xF0000), 0x000FEC00   # 38 call gate, DPL 3
    .long 0x00080000 + (gate_0 - 0xF0000), 0x000FEC02   # 40 the same, two parameters
    .long 0x00080000 + (gate_0 - 0xF0000), 0x000F8C00   # 48 call gate, DPL 0
    .quad 0x00CF9E000000FFFF    # 50 conforming code, ring 0
    .quad 0                     # 58 for the cases
    .quad 0x0000820030000FFF    # 60 LDT
    .quad 0x000F9A000000FFFF    # 68 code, 16 bits
    .quad 0x000F92000000FFFF    # 70 data, 16 bits
    .quad 0x0000E50000300000    # 78 task gate to TSS B, DPL 3
    .quad 0x00CF98000000FFFF    # 80 execute-only code
    .quad 0x00CF90000000FFFF    # 88 read-only data
    .quad 0x00CF96000000FFFF    # 90 expand-down, limit 4G-1: nothing is valid
    .quad 0x00CF12000000FFFF    # 98 data, not present
    .quad 0x00CFBA000000FFFF    # A0 code, ring 1
    .quad 0x00CFB2000000FFFF    # A8 data, ring 1
    .quad 0x00CF1A000000FFFF    # B0 code, not present
    .quad 0x00008B0070000068    # B8 TSS B, busy
    .quad 0x0000090070000068    # C0 TSS B, not present
    .quad 0x0000890078000068    # C8 TSS C
gdt_end:
gdt_register: .word gdt_end - gdt_template - 1
    .long GDT
idt_register: .word 0x7FF
    .long IDT
boot_gdt_register: .word gdt_end - gdt_template - 1
    .long gdt_template
text_end: .asciz "end of cases"
text_shutdown: .asciz "Shutdown"

gate_0:                     # where the call gates lead: shows what is on the new stack
    mov eax, [esp]
    mov ecx, [esp + 4]
    mov edx, [esp + 8]
    mov ebx, [esp + 12]
    mov esi, cs
    mov edi, ss
    int 0x30

.include "cases.S"

.section .casesend, "a"
case_table_end:

.section .reset, "ax"
.code16
reset:
    cli
    .byte 0x66, 0x2E, 0x0F, 0x01, 0x16      # lgdt cs:[boot_gdt_register], 32-bit operand
    .word boot_gdt16
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xEA
    .long start32
    .word 0x08
.section .vector, "ax"
    .byte 0xEA
    .word reset16, 0xF000
    .fill 11, 1, 0
