# SYSENTER from ring 3 of 32-bit protected mode, and SYSEXIT; and SYSENTER where it is not set up.
# mode: protected

# In front of the log: at ENTERED what ring 0 finds, ESP, CS, SS, EFLAGS; at LEFT ESP, CS, SS of ring
# 3 behind SYSEXIT.

    .include "exceptions-protected.inc"

    .set ENTERED, LOG - 64
    .set LEFT, LOG - 32
    .set KERNEL_STACK, 0xe000
    .set SYSENTER_CS, 0x174
    .set SYSENTER_ESP, 0x175
    .set SYSENTER_EIP, 0x176

    .macro SET_MSR index, value
    mov ecx, \index
    mov eax, \value
    xor edx, edx
    wrmsr
    .endm

    SETUP

    SET_MSR SYSENTER_CS, CODE
    SET_MSR SYSENTER_ESP, KERNEL_STACK
    SET_MSR SYSENTER_EIP, "offset fast_call"
    ENTER_USER user
user:
    mov edx, offset 1f              # where SYSEXIT is to go
    mov ecx, USER_STACK - 64
    stc
    sysenter
1:  mov [LEFT], esp
    mov [LEFT + 4], cs
    mov [LEFT + 8], ss
    EXPECT_LEAVE 1f, back_in_ring_0
1:  hlt                             # #GP(0): ring 3 it is

back_in_ring_0:
    SET_MSR SYSENTER_CS, 0
    EXPECT 1f, halt
1:  sysenter                        # without a code segment: #GP(0)

fast_call:
    pushfd
    pop [ENTERED + 12]
    mov [ENTERED], esp
    mov [ENTERED + 4], cs
    mov [ENTERED + 8], ss
    sysexit

    TABLES
