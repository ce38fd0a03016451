# The cases.  One macro call or a few lines each; what they print on a reference is in reference.txt.

pop_code:                   # shows the error code that a task got
    pop eax
    int 0x30

# --- Descriptor loads: each segment register with a descriptor of each type ---------------------------------------
.macro LOADS reg, name
    .irp sel, 0x00, 0x03, 0x08, 0x10, 0x13, 0x20, 0x23, 0x28, 0x38, 0x50, 0x80, 0x88, 0x98, 0xA8, 0xA9, 0xB0, 0x78, 0x60, 0xFFF8, 0x0C, 0x0F
    CASE "load \name \sel ring 0"
    mov eax, \sel
    mov \reg, ax
    DONE
    .endr
.endm
LOADS ds, ds
LOADS ss, ss
LOADS fs, fs
.irp sel, 0x00, 0x08, 0x10, 0x13, 0x23, 0x50, 0x80, 0x88, 0x98, 0xA9
    CASE "load es \sel ring 3"
    RING3
    mov eax, \sel
    mov es, ax
    DONE
.endr
.irp sel, 0x10, 0x20, 0x23, 0x1B, 0x00
    CASE "load ss \sel ring 3"
    RING3
    mov eax, \sel
    mov ss, ax
    DONE
.endr
CASE "ldt data"
    mov ax, 0x60
    lldt ax
    mov ax, 0x0F
    mov es, ax
    mov eax, es:[0x500]
    DONE
CASE "lldt of a data descriptor"
    mov ax, 0x10
    lldt ax
    DONE
CASE "ltr of a busy TSS"
    mov ax, 0xB8
    ltr ax
    DONE
CASE "ltr of a TSS that is not present"
    mov ax, 0xC0
    ltr ax
    DONE
CASE "ltr null"
    xor eax, eax
    ltr ax
    DONE
CASE "accessed bit is set"
    DESC 0x58, 0x0000FFFF, 0x00CF9200
    mov ax, 0x58
    mov gs, ax
    mov eax, [GDT + 0x5C]
    DONE

# --- Limits: byte, word and dword at the edge ----------------------------------------------------------------------
.macro EDGE name, low, high, at, size
    CASE "limit \name at \at, \size"
    DESC 0x58, \low, \high
    mov ax, 0x58
    mov es, ax
    mov eax, 0
    mov esi, \at
    .ifc \size,byte
    mov al, es:[esi]
    .endif
    .ifc \size,word
    mov ax, es:[esi]
    .endif
    .ifc \size,dword
    mov eax, es:[esi]
    .endif
    .ifc \size,store
    mov es:[esi], eax
    .endif
    DONE
.endm
.irp at, 0x0FFC, 0x0FFD, 0x0FFE, 0x0FFF, 0x1000, 0xFFFFFFFF
    .irp size, byte, word, dword
    EDGE "up 0xFFF", 0x90000FFF, 0x00409200, \at, \size
    .endr
.endr
.irp at, 0x0FFC, 0x0FFD, 0x1000
    EDGE "up 0xFFF", 0x90000FFF, 0x00409200, \at, store
.endr
.irp at, 0x1FFC, 0x1FFD, 0x1FFF, 0x2000
    .irp size, byte, dword
    EDGE "pages 1", 0x90000001, 0x00C09200, \at, \size
    .endr
.endr
.irp at, 0x0FFF, 0x1000, 0x1001, 0xFFFC, 0xFFFD, 0xFFFF, 0x10000
    .irp size, byte, dword
    EDGE "down 0xFFF 16", 0x90000FFF, 0x00009600, \at, \size
    .endr
.endr
.irp at, 0x0FFE, 0x1000, 0x10000, 0x20000, 0xFFFFFFFC
    EDGE "down 0xFFF 32", 0x00000FFF, 0x00409600, \at, dword
.endr
CASE "write through a code segment"
    mov ax, 0x08
    mov es, ax
    mov es:[SCRATCH], eax
    DONE
CASE "write to read-only data"
    mov ax, 0x88
    mov es, ax
    mov es:[SCRATCH], eax
    DONE
CASE "read from execute-only code by cs"
    .byte 0xEA
    .long 1f
    .word 0x80
1:  mov eax, cs:[1b]
    DONE
CASE "write through null ds"
    xor eax, eax
    mov ds, ax
    mov [SCRATCH], eax
    DONE
CASE "execute past the limit of cs"
    DESC 0x58, 0x00000FFF, 0x00409A0F
    .byte 0xEA
    .long 0xFFE
    .word 0x58
CASE "stack limit in ring 3"
    DESC 0x58, 0x00000FFF, 0x0040F208
    RING3
    mov ax, 0x5B
    mov ss, ax
    mov esp, 0x1002
    push eax
    DONE
CASE "stack limit in ring 3, read by ebp"
    DESC 0x58, 0x00000FFF, 0x0040F208
    RING3
    mov ax, 0x5B
    mov ss, ax
    mov ebp, 0xFFD
    mov eax, [ebp]
    DONE
CASE "16-bit stack wraps"
    DESC 0x58, 0x0000FFFF, 0x0000F208
    RING3
    mov ax, 0x5B
    mov ss, ax
    mov esp, 0x12340000
    push ax
    mov eax, esp
    mov esp, 0x8000
    DONE

# --- Far transfers, gates, rings ------------------------------------------------------------------------------------
.irp sel, 0x00, 0x08, 0x0B, 0x10, 0x1B, 0x18, 0x50, 0x53, 0x80, 0xA0, 0xB0, 0x60, 0xFFF8
    CASE "far jmp \sel ring 0"
    .byte 0xEA
    .long 1f
    .word \sel
1:  DONE
    CASE "far jmp \sel ring 3"
    RING3
    .byte 0xEA
    .long 1f
    .word \sel
1:  DONE
.endr
.irp sel, 0x38, 0x3B, 0x40, 0x43, 0x48, 0x4B
    CASE "call gate \sel ring 3"
    RING3
    push 0x77
    push 0x88
    .byte 0x9A
    .long 0
    .word \sel
    CASE "call gate \sel ring 0"
    push 0x77
    push 0x88
    .byte 0x9A
    .long 0
    .word \sel
.endr
CASE "jmp to a call gate ring 3"
    RING3
    .byte 0xEA
    .long 0
    .word 0x3B
.macro TASKFAULT n         # vector n goes to TSS C, whose stack is good, with the error code on it
    mov dword ptr [IDT + \n * 8], 0x00C80000
    mov dword ptr [IDT + \n * 8 + 4], 0x0000E500
.endm
CASE "call gate with a null stack"
    TASKFAULT 10
    mov dword ptr [TSSA + 8], 0
    RING3
    .byte 0x9A
    .long 0
    .word 0x3B
CASE "call gate with a stack of the wrong ring"
    TASKFAULT 10
    mov dword ptr [TSSA + 8], 0x23
    RING3
    .byte 0x9A
    .long 0
    .word 0x3B
CASE "conforming code from ring 3 keeps ring 3"
    RING3
    .byte 0x9A
    .long 1f
    .word 0x50
1:  mov eax, cs
    DONE
CASE "far ret to ring 3"
    push 0x23
    push STACK3
    push 0x1B
    push offset 1f
    retf
1:  mov eax, cs
    mov ebx, ss
    DONE
CASE "far ret to ring 3 drops arguments"
    push 0x23
    push STACK3
    push 5
    push 6
    push 0x1B
    push offset 1f
    retf 8
1:  mov eax, esp
    DONE
CASE "far ret to an inner ring"
    RING3
    push 0x08
    push offset 1f
    retf
1:  DONE
CASE "iret to an inner ring"
    RING3
    push 2
    push 0x08
    push offset 1f
    iretd
1:  DONE
CASE "iret to ring 3 clears inner ds"
    RING3
    mov eax, ds
    mov ebx, es
    DONE
CASE "iret with a bad ss"
    push 0x10
    push STACK3
    push 2
    push 0x1B
    push offset 1f
    iretd
1:  DONE
CASE "iret with a null cs"
    push 2
    push 0
    push offset 1f
    iretd
1:  DONE
CASE "popf in ring 3 leaves if and iopl"
    RING3
    push 0x3202
    popfd
    pushfd
    pop eax
    DONE
CASE "popf in ring 3 with iopl 3 changes if"
    RING3 0x1B, 0x23, 0x3002
    push 0x0202
    popfd
    pushfd
    pop eax
    push 0x3002
    popfd
    DONE
CASE "iret in ring 3 leaves iopl"
    RING3
    push 0x3202
    push 0x1B
    push offset 1f
    iretd
1:  pushfd
    pop eax
    DONE
CASE "ring 1 by far ret"
    push 0xA9
    push STACK3
    push 0xA1
    push offset 1f
    retf
1:  mov eax, cs
    mov ebx, ss
    DONE
CASE "ring 1 may not load cr3"
    push 0xA9
    push STACK3
    push 0xA1
    push offset 1f
    retf
1:  mov eax, cr3
    DONE

# --- Interrupts ------------------------------------------------------------------------------------------------------
.irp n, 0x03, 0x04, 0x0D, 0x20, 0x30
    CASE "int \n ring 3"
    RING3
    .byte 0xCD, \n
    CASE "int \n ring 0"
    .byte 0xCD, \n
.endr
CASE "int3 ring 3"
    or byte ptr [IDT + 3 * 8 + 5], 0x60
    RING3
    int3
CASE "into taken"
    mov al, 0x7F
    add al, 1
    into
    DONE
CASE "into not taken"
    xor eax, eax
    into
    DONE
CASE "divide by zero"
    xor ecx, ecx
    div ecx
CASE "divide overflow"
    mov ecx, 1
    mov edx, 5
    div ecx
CASE "idiv overflow"
    mov eax, 0x80000000
    cdq
    mov ecx, -1
    idiv ecx
CASE "aam 0"
    .byte 0xD4, 0x00
CASE "bound inside"
    mov dword ptr [SCRATCH], 1
    mov dword ptr [SCRATCH + 4], 9
    mov eax, 9
    bound eax, [SCRATCH]
    DONE
CASE "bound outside"
    mov dword ptr [SCRATCH], 1
    mov dword ptr [SCRATCH + 4], 9
    mov eax, 10
    bound eax, [SCRATCH]
    DONE
CASE "ud2"
    ud2
CASE "lock on a register"
    .byte 0xF0, 0x01, 0xC0
CASE "lock on mov"
    .byte 0xF0, 0x89, 0x05
    .long SCRATCH
CASE "sixteen bytes"
    .fill 15, 1, 0x66
    nop
    DONE
CASE "fifteen bytes"
    .fill 14, 1, 0x66
    nop
    DONE
CASE "not-present gate"
    and byte ptr [IDT + 0x21 * 8 + 5], 0x7F
    int 0x21
CASE "past the limit of the idt"
    mov word ptr [SCRATCH], 0x17F
    mov dword ptr [SCRATCH + 2], IDT
    lidt [SCRATCH]
    int 0x31
CASE "gate to data"
    mov word ptr [IDT + 0x21 * 8 + 2], 0x10
    int 0x21
CASE "gate to null"
    mov word ptr [IDT + 0x21 * 8 + 2], 0
    int 0x21
CASE "trap gate keeps if"
    or byte ptr [IDT + 0x30 * 8 + 5], 1
    push 0x202
    popfd
    int 0x30
CASE "interrupt in ring 3 with a stack that is not present"
    mov dword ptr [TSSA + 8], 0x98
    TASKFAULT 10
    TASKFAULT 12
    RING3
    int 0x30
CASE "double fault by a task gate"
    and byte ptr [IDT + 13 * 8 + 5], 0x7F
    and byte ptr [IDT + 11 * 8 + 5], 0x7F
    TASKFAULT 8
    mov ax, 0xFFF8
    mov ds, ax

# --- Privileged instructions in ring 3 ------------------------------------------------------------------------------
.macro PRIVILEGED name, code:vararg
    CASE "ring 3: \name"
    RING3
    \code
    DONE
.endm
PRIVILEGED "hlt", hlt
PRIVILEGED "cli", cli
PRIVILEGED "sti", sti
PRIVILEGED "clts", clts
PRIVILEGED "lgdt", lgdt [SCRATCH]
PRIVILEGED "lidt", lidt [SCRATCH]
PRIVILEGED "lldt", lldt ax
PRIVILEGED "ltr", ltr ax
PRIVILEGED "lmsw", lmsw ax
PRIVILEGED "mov cr0", mov eax, cr0
PRIVILEGED "mov to cr3", mov cr3, eax
PRIVILEGED "mov dr7", mov eax, dr7
PRIVILEGED "invlpg", invlpg [SCRATCH]
PRIVILEGED "wbinvd", wbinvd
PRIVILEGED "invd", invd
PRIVILEGED "rdmsr", rdmsr
PRIVILEGED "smsw is free", smsw eax; mov eax, 0
PRIVILEGED "sldt is free", sldt eax
PRIVILEGED "str is free", str eax
PRIVILEGED "sgdt is free", sgdt [SCRATCH]
.irp iopl, 0, 3
    CASE "ring 3: cli with iopl \iopl"
    RING3 0x1B, 0x23, 2+\iopl*0x1000
    cli
    DONE
.endr

# --- Ports: iopl and the bitmap ---------------------------------------------------------------------------------------
.macro PORTS name, base, byte, code:vararg
    CASE "port \name"
    mov word ptr [TSSA + 0x66], \base
    mov byte ptr [TSSA + 0x68 + 0x10], \byte
    RING3
    mov edx, 0x80
    \code
    DONE
.endm
PORTS "allowed by the bitmap", 0x68, 0, out dx, al
PORTS "refused by the bitmap", 0x68, 1, out dx, al
PORTS "word with its second byte refused", 0x68, 2, out dx, ax
PORTS "dword with its last byte refused", 0x68, 8, out dx, eax
PORTS "dword allowed beside a refused one", 0x68, 0x10, out dx, eax
PORTS "bitmap past the limit", 0x2069, 0, out dx, al
PORTS "no bitmap", 0xFFFF, 0, in al, dx
PORTS "in refused", 0x68, 1, in al, dx
CASE "port with iopl 3 asks no bitmap"
    mov byte ptr [TSSA + 0x68 + 0x10], 0xFF
    RING3 0x1B, 0x23, 0x3002
    out 0x80, al
    DONE
CASE "string output is refused too"
    mov byte ptr [TSSA + 0x68 + 0x10], 0xFF
    RING3
    mov edx, 0x80
    mov esi, SCRATCH
    outsb
    DONE

# --- Paging: who may do what -------------------------------------------------------------------------------------------
.macro PAGED name, pde, pte, ring, what, cr0=0x80000011
    CASE "page \name: \what ring \ring"
    mov dword ptr [PAGEDIR + 4], PT1 + \pde
    mov dword ptr [PT1], PAGE + \pte
    PAGING \cr0
    mov eax, 0x12121212
    mov ebx, 0
    .if \ring == 3
    RING3
    .endif
    .ifc \what,read
    mov eax, [LIN + 4]
    .endif
    .ifc \what,write
    mov [LIN + 4], eax
    .endif
    .ifc \what,both
    add [LIN + 4], eax
    .endif
    .ifc \what,run
    mov dword ptr [PAGE], 0x30CD
    mov ecx, LIN
    jmp ecx
    .endif
    mov ebx, [PT1]
    mov ecx, [PAGEDIR + 4]
    DONE
.endm
.irp pte, 0, 1, 3, 5, 7
    .irp what, read, write
    PAGED "pte \pte", 7, \pte, 3, \what
    PAGED "pte \pte", 7, \pte, 0, \what
    PAGED "pte \pte wp", 7, \pte, 0, \what, 0x80010011
    .endr
.endr
.irp pde, 0, 1, 3, 5
    .irp what, read, write
    PAGED "pde \pde", \pde, 7, 3, \what
    PAGED "pde \pde wp", \pde, 7, 0, \what, 0x80010011
    .endr
.endr
PAGED "pte 7", 7, 7, 3, both
PAGED "pte 5", 7, 5, 3, both
PAGED "pte 7", 7, 7, 0, run
PAGED "pte 0", 7, 0, 0, run
PAGED "pte 3", 7, 3, 3, run
CASE "access across two pages, the second missing"
    mov dword ptr [PT1 + 4], 0
    PAGING
    mov eax, [LIN + 0xFFE]
    DONE
CASE "write across two pages, the second missing, changes nothing"
    mov dword ptr [PT1 + 4], 0
    PAGING
    mov ebx, 0x55555555
    mov esi, LIN + 0xFFE
    mov [esi], ebx
CASE "push to a missing page leaves esp"
    mov dword ptr [PT1], 0
    PAGING
    RING3
    mov esp, LIN + 4
    push eax
CASE "4 MiB page"
    mov eax, cr4
    or eax, 0x10
    mov cr4, eax
    mov dword ptr [PAGEDIR + 4], 0x87
    PAGING
    mov eax, [LIN + PAGE]
    mov ebx, [PAGEDIR + 4]
    DONE
CASE "4 MiB page written"
    mov eax, cr4
    or eax, 0x10
    mov cr4, eax
    mov dword ptr [PAGEDIR + 4], 0x87
    PAGING
    mov [LIN + PAGE], eax
    mov ebx, [PAGEDIR + 4]
    DONE
CASE "stale translation goes with invlpg"
    PAGING
    mov eax, [LIN]
    mov dword ptr [PT1], PAGE + 0x1007
    mov dword ptr [PAGE + 0x1000], 0x99999999
    invlpg [LIN]
    mov ebx, [LIN]
    DONE
CASE "stale translation goes with cr3"
    PAGING
    mov eax, [LIN]
    mov dword ptr [PT1], 0
    mov ecx, cr3
    mov cr3, ecx
    mov ebx, [LIN]
    DONE
CASE "paging without protection"
    mov eax, 0x80000010
    mov cr0, eax
CASE "cache disabled without not-write-through"
    mov eax, 0x20000011
    mov cr0, eax
CASE "reserved bit of cr4"
    mov eax, 0x80000000
    mov cr4, eax

# --- Single step, breakpoints ---------------------------------------------------------------------------------------------
CASE "single step"
    push 0x102
    popfd
    nop
    nop
    DONE
CASE "single step after mov ss"
    mov eax, 0x10
    push 0x102
    popfd
    mov ss, ax
    nop
    DONE
CASE "single step does not enter the handler"
    push 0x102
    popfd
    int 0x30
CASE "single step in ring 3"
    RING3 0x1B, 0x23, 0x102
    nop
    DONE
CASE "execution breakpoint"
    mov eax, offset 1f
    mov dr0, eax
    mov eax, 0x401
    mov dr7, eax
    xor eax, eax
1:  inc eax
    DONE
CASE "execution breakpoint with rf goes on"
    mov eax, offset 1f
    mov dr0, eax
    mov eax, 0x401
    mov dr7, eax
    xor eax, eax
    push 0x10002
    push 0x08
    push offset 1f
    iretd
1:  inc eax
    DONE
CASE "write breakpoint"
    mov eax, SCRATCH
    mov dr1, eax
    mov eax, 0x00D00404
    mov dr7, eax
    mov eax, [SCRATCH]
    mov [SCRATCH + 4], eax
    mov [SCRATCH + 3], al
    nop
    DONE
CASE "read breakpoint"
    mov eax, SCRATCH
    mov dr2, eax
    mov eax, 0x03000410
    mov dr7, eax
    mov ebx, [SCRATCH]
    nop
    DONE
CASE "general detect"
    mov eax, 0x2400
    mov dr7, eax
    mov eax, dr0
    DONE
CASE "icebp"
    .byte 0xF1

# --- Tasks -------------------------------------------------------------------------------------------------------------
CASE "jmp to a tss"
    .byte 0xEA
    .long 0
    .word 0x30
CASE "call to a tss"
    .byte 0x9A
    .long 0
    .word 0x30
CASE "jmp to a busy tss"
    .byte 0xEA
    .long 0
    .word 0xB8
CASE "jmp to a tss that is not present"
    .byte 0xEA
    .long 0
    .word 0xC0
CASE "jmp to a tss from ring 3"
    RING3
    .byte 0xEA
    .long 0
    .word 0x30
CASE "task gate from ring 3"
    RING3
    .byte 0x9A
    .long 0
    .word 0x7B
CASE "interrupt through a task gate"
    mov dword ptr [IDT + 0x21 * 8], 0x00300000
    mov dword ptr [IDT + 0x21 * 8 + 4], 0x0000E500
    int 0x21
CASE "fault through a task gate has its code on the new stack"
    mov dword ptr [TSSB + 0x20], offset 1f
    mov dword ptr [IDT + 13 * 8], 0x00300000
    mov dword ptr [IDT + 13 * 8 + 4], 0x0000E500
    mov ax, 0xFFF8
    mov ds, ax
1:  pop eax
    mov ebx, [TSSB]
    DONE
CASE "call to a task and back"
    mov dword ptr [TSSB + 0x20], offset 1f
    mov ebx, 0x77
    .byte 0x9A
    .long 0
    .word 0x30
    pushfd
    pop eax
    xor ecx, ecx
    str cx
    mov edx, [GDT + 0x34]
    DONE
1:  mov ecx, 0x88
    iretd
CASE "a task with a bad ss"
    TASKFAULT 10
    mov dword ptr [TSSB + 0x50], 0x23
    .byte 0xEA
    .long 0
    .word 0x30
CASE "a task with a bad cs"
    TASKFAULT 10
    mov dword ptr [TSSB + 0x4C], 0x10
    .byte 0xEA
    .long 0
    .word 0x30
CASE "a task whose tss is too small"
    DESC 0x58, 0x70000066, 0x00008900
    .byte 0xEA
    .long 0
    .word 0x58
CASE "a task sets ts"
    mov dword ptr [TSSB + 0x20], offset 1f
    .byte 0xEA
    .long 0
    .word 0x30
1:  mov eax, cr0
    and eax, 8
    DONE
CASE "fpu with ts"
    mov eax, 0x19
    mov cr0, eax
    fnop
CASE "fpu emulated"
    mov eax, 0x15
    mov cr0, eax
    fnop
CASE "wait with ts and mp"
    mov eax, 0x1B
    mov cr0, eax
    fwait

# --- Virtual 8086 ---------------------------------------------------------------------------------------------------------
.macro V86 name, iopl, code:vararg
    CASE "v86 \name"
    push 0
    push 0
    push 0
    push 0xF000
    push 0x9000
    push 0xFFF0
    push 0x20002 + \iopl * 0x1000
    push 0xF000
    push offset (8805f - 0xF0000)
    iretd
    .code16
8805: \code
    .byte 0xCD, 0x30
    .code32
.endm
V86 "int with iopl 3", 3, nop
V86 "int with iopl 0", 0, nop
V86 "cli with iopl 0", 0, cli
V86 "cli with iopl 3", 3, cli
V86 "sti with iopl 0", 0, sti
V86 "pushf with iopl 0", 0, pushf
V86 "pushf with iopl 3", 3, pushf; pop ax
V86 "popf with iopl 0", 0, popf
V86 "hlt", 3, hlt
V86 "mov cr0", 3, mov eax, cr0
V86 "lgdt", 3, lgdt [0]
V86 "segment load", 3, mov ax, 0x1234; mov ds, ax; mov bx, ds
V86 "address arithmetic", 3, mov ax, 0x900; mov es, ax; mov byte ptr es:[5], 0x77; mov al, es:[5]
V86 "sldt", 3, sldt ax
V86 "arpl", 3, arpl ax, bx
V86 "int3", 3, int3
V86 "out by the bitmap", 0, out 0x80, al
V86 "offset past 64 K", 3, mov ax, ds:[0xFFFF]
V86 "bios address", 3, push cs; pop ds; mov ax, ds:[0xFFF0]
V86 "iret with iopl 0", 0, iret

# --- Selectors asked about ---------------------------------------------------------------------------------------------------
.irp sel, 0x00, 0x08, 0x10, 0x1B, 0x28, 0x38, 0x50, 0x60, 0x78, 0x80, 0x88, 0x98, 0xFFF8
    CASE "lar \sel ring 3"
    RING3
    mov ecx, \sel
    lar eax, ecx
    setz bl
    and eax, 0xFFF0FFFF     # SDM 2A, LAR: bits 19:16 are undefined
    DONE
    CASE "lsl \sel ring 0"
    mov ecx, \sel
    lsl eax, ecx
    setz bl
    DONE
    CASE "verr \sel ring 3"
    RING3
    mov ecx, \sel
    verr cx
    setz bl
    verw cx
    setz bh
    DONE
.endr
.irp pair, 0x0003, 0x0300, 0x0101, 0x0201
    CASE "arpl \pair"
    mov eax, \pair & 0xFF
    mov ecx, \pair >> 8
    arpl ax, cx
    setz bl
    DONE
.endr

# --- Restart: nothing is half done -------------------------------------------------------------------------------------------
CASE "rep movs stops at a missing page"
    mov dword ptr [PT1 + 4], 0
    PAGING
    mov esi, PAGE
    mov edi, LIN + 0xFF8
    mov ecx, 8
    rep movsd
CASE "rep stos across a limit"
    DESC 0x58, 0x90000FFF, 0x00409200
    mov ax, 0x58
    mov es, ax
    mov edi, 0xFF8
    mov ecx, 4
    rep stosd
CASE "pusha across a limit in ring 3"
    DESC 0x58, 0x00000FFF, 0x0040F208
    RING3
    mov ax, 0x5B
    mov ss, ax
    mov esp, 16
    pushad
CASE "enter to a missing page"
    mov dword ptr [PT1], 0
    PAGING
    RING3
    mov esp, LIN + 8
    enter 16, 1
CASE "xchg with a missing page"
    mov dword ptr [PT1], 0
    PAGING
    xchg eax, [LIN]
CASE "cmpxchg writes its operand even if unequal"
    mov dword ptr [PT1], PAGE + 5
    PAGING
    RING3
    mov eax, 1
    cmpxchg [LIN], ecx
CASE "pop to a missing page leaves esp"
    mov dword ptr [PT1], 0
    PAGING
    push 0x77
    pop dword ptr [LIN]
CASE "les with a bad selector leaves the register"
    mov dword ptr [SCRATCH], 0x1234
    mov dword ptr [SCRATCH + 4], 0xFFF8
    les ebx, [SCRATCH]
CASE "call far to a missing stack page"
    mov dword ptr [PT1], 0
    PAGING
    RING3
    mov esp, LIN + 4
    .byte 0x9A
    .long 1f
    .word 0x1B
1:  DONE

# --- SYSENTER, alignment ------------------------------------------------------------------------------------------------------
CASE "sysenter without a cs"
    RING3
    sysenter
CASE "sysenter and its frame"
    mov ecx, 0x174
    mov eax, 8
    xor edx, edx
    wrmsr
    mov ecx, 0x175
    mov eax, STACKX
    wrmsr
    mov ecx, 0x176
    mov eax, offset 1f
    wrmsr
    RING3 0x1B, 0x23, 0x3002
    sysenter
1:  mov eax, cs
    mov ebx, ss
    mov edi, esp
    DONE
CASE "sysexit"
    mov ecx, 0x174
    mov eax, 8
    xor edx, edx
    wrmsr
    mov ecx, STACK3
    mov edx, offset 1f
    sysexit
1:  mov eax, cs
    mov ebx, ss
    DONE
CASE "sysexit in ring 3"
    RING3
    sysexit
CASE "alignment check in ring 3"
    mov eax, 0x40011
    mov cr0, eax
    RING3 0x1B, 0x23, 0x40002
    mov eax, [SCRATCH + 1]
    DONE
CASE "no alignment check in ring 0"
    mov eax, 0x40011
    mov cr0, eax
    push 0x40002
    popfd
    mov eax, [SCRATCH + 1]
    DONE
