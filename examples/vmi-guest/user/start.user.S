/* Entry of ring 3, and the two ways into the kernel. */
    .text
    .globl user_entry
user_entry:
    call user_main
    movl %eax, %ebx
    movl $1, %eax
    int $0x80
1:  jmp 1b

/* u32 call_int(number, first, second, third): the compiler's convention has EAX, EDX, ECX and the stack. */
    .globl call_int
call_int:
    pushl %ebx
    movl %edx, %ebx
    movl 8(%esp), %edx
    int $0x80
    popl %ebx
    ret

    .globl call_sysenter, sysenter_return
call_sysenter:
    pushl %ebx
    movl %edx, %ebx
    movl 8(%esp), %edx
    pushl %ebp
    movl %esp, %ebp
    sysenter
sysenter_return:
    popl %ebp
    popl %ebx
    ret
