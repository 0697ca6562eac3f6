# SYSCALL from 64-bit code of ring 3, and SYSRET; and what it does where it is not set up.
# mode: long

    .include "exceptions-long.inc"

    SETUP

    SET_MSR STAR, 0, ((USER_CODE32 << 16) + KERNEL_CODE)
    SET_MSR LSTAR, "offset system_call", 0
    SET_MSR FMASK, INTERRUPTS + CARRY, 0
    ENTER_USER user, back
user:
    mov al, 0x7f
    add al, 1                       # overflow, sign and auxiliary carry
    stc
    syscall
    mov [LOG - 8], r11              # what SYSRET gave back
    pushfq
    pop [LOG - 16]
    mov [LOG - 24], rsp
    mov [LOG - 32], cs
    mov [LOG - 28], ss
    LEAVE_USER

back:
    SET_MSR EFER, 0x500 + EFER_NXE, 0
    EXPECT 1f, 2f
1:  syscall                         # without SCE it is #UD
2:  EXPECT 1f, 2f
1:  sysretq
2:  hlt
    jmp 2b

system_call:
    NOTE 0x100
    sysretq

    TABLES
