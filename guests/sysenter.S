# SYSENTER from 64-bit code of ring 3 and from 32-bit code, and SYSEXIT; and what they do where they
# are not set up. In long mode only Intel's processors have them.
# mode: long

    .include "exceptions-long.inc"

    .set KERNEL_STACK, 0xe000

    # Note RSP, CS and SS that SYSEXIT has brought.
    .macro NOTE_EXIT at
    mov [\at], esp
    mov [\at + 4], cs
    mov [\at + 6], ss
    .endm

    SETUP

    SET_MSR SYSENTER_CS, KERNEL_CODE, 0
    SET_MSR SYSENTER_ESP, KERNEL_STACK, 0
    SET_MSR SYSENTER_EIP, "offset fast_call", 0
    ENTER_USER user, back
user:
    mov edi, 64
    lea rdx, [rip + 1f]             # where SYSEXIT is to go
    mov ecx, USER_STACK - 64
    stc
    sysenter
1:  NOTE_EXIT LOG-8
    BEGIN_32
    mov edi, 32
    mov edx, offset 1f
    mov ecx, USER_STACK - 128
    clc
    sysenter
1:  NOTE_EXIT LOG-16
    END_32
    LEAVE_USER

back:
    EXPECT 1f, 2f
    SET_MSR SYSENTER_CS, 0, 0
1:  sysenter                        # without a code segment: #GP(0)
2:  EXPECT 1f, 2f
1:  sysexitd                        # likewise
2:  hlt
    jmp 2b

fast_call:
    NOTE rdi
    cmp edi, 32
    je 1f
    sysexitq
1:  sysexitd

    TABLES
