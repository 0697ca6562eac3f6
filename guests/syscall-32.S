# SYSCALL from 32-bit code of ring 3 to a 64-bit kernel, and SYSRET. AMD's processors have it; on
# Intel's it is #UD.
# mode: long

    .include "exceptions-long.inc"

    SETUP

    SET_MSR STAR, 0, ((USER_CODE32 << 16) + KERNEL_CODE)
    SET_MSR CSTAR, "offset system_call", 0
    SET_MSR FMASK, INTERRUPTS + CARRY, 0
    ENTER_USER user, back
user:
    BEGIN_32
    stc
    syscall
    mov [LOG - 4], cs
    mov [LOG - 2], ss
    pushfd
    pop [LOG - 8]
    END_32
    LEAVE_USER

back:
    hlt
    jmp back

system_call:
    NOTE 0x100
    sysretd

    TABLES
