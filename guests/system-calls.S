# SYSCALL and SYSENTER from ring 3, and back; and what they do where they are not set up.
# mode: long

    .include "exceptions-long.inc"

    # Ring 0 was entered: note RCX, R11, RSP, CS, SS, RFLAGS, and where.
    .macro NOTE mark
    pushfq
    pop rax
    mov qword ptr [r15], \mark
    mov [r15 + 8], rcx
    mov [r15 + 16], r11
    mov [r15 + 24], rsp
    mov word ptr [r15 + 32], cs
    mov word ptr [r15 + 40], ss
    mov [r15 + 48], rax
    add r15, 80
    .endm

    .set KERNEL_STACK, 0xe000       # of SYSENTER

    SETUP

    SET_MSR STAR, 0, ((USER_CODE32 << 16) + KERNEL_CODE)
    SET_MSR LSTAR, "offset system_call", 0
    SET_MSR FMASK, INTERRUPTS + CARRY, 0
    SET_MSR SYSENTER_CS, KERNEL_CODE, 0
    SET_MSR SYSENTER_ESP, KERNEL_STACK, 0
    SET_MSR SYSENTER_EIP, "offset fast_call", 0
    ENTER_USER user, back
user:
    stc
    syscall
1:  mov [LOG - 8], r11              # what SYSRET gave back
    lea rdx, [rip + 2f]             # where SYSEXIT is to go
    mov ecx, USER_STACK - 64
    sysenter
2:  mov [LOG - 16], rsp
    LEAVE_USER

back:
    # Without SCE it is #UD, and without a code segment SYSENTER is #GP(0).
    SET_MSR EFER, 0x500 + EFER_NXE, 0
    SET_MSR SYSENTER_CS, 0, 0
    EXPECT 1f, 2f
1:  syscall
2:  EXPECT 1f, 2f
1:  sysenter
2:  hlt
    jmp 2b

system_call:
    NOTE 0x100
    sysretq

fast_call:
    NOTE 0x101
    rex.w sysexit

    TABLES
