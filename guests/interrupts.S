# Interrupts that a CPU sends itself through its LAPIC: when it takes them, and in which order.
# mode: long

    .include "interrupts.inc"

    .set SAMPLES, 48

    SETUP

    # Behind the instruction that follows STI, and not before.
    SEND 0x40
    EXPECT 1f
    sti
    nop
1:  nop
    # No window between STI and CLI.
    cli
    SEND 0x41
    sti
    cli
    nop
    inc r11                         # 1
    EXPECT 1f
    sti
    nop
1:  cli
    # At once behind POPF.
    SEND 0x42
    EXPECT 1f
    pushfq
    or dword ptr [rsp], INTERRUPTS
    popfq
1:  cli
    # And at once behind the IRET of another one that was pending: the highest first.
    SEND 0x43
    SEND 0x73
    SEND 0x53
    EXPECT 1f
    sti
    nop
1:  cli

    # What is not above the task priority waits, and comes when that is lower.
    mov dword ptr [r8 + TPR], 0x50
    SEND 0x55
    SEND 0x65
    EXPECT 1f
    sti
    nop
1:  nop
    inc r11                         # 2
    EXPECT 1f
    mov dword ptr [r8 + TPR], 0
    jmp 1f                          # the software CPU looks at the end of a block only
1:  cli
    # Nor does it come once the priority was raised over it; at most as a spurious one.
    SEND 0x56
    mov dword ptr [r8 + TPR], 0x50
    EXPECT 1f
    sti
    nop
    jmp 1f
1:  cli
    inc r11                         # 3
    mov dword ptr [r8 + TPR], 0
    EXPECT 1f
    sti
    nop
1:  cli

    # A handler that sets IF: one of a higher class interrupts it, others wait for its EOI.
    lea r12, [rip + nest]
    EXPECT 1f
    SEND 0x63
    sti
    nop
1:  cli
    inc r11                         # 7

    # An NMI comes whatever IF says; another one only behind the IRET of the first.
    EXPECT 1f
    lea r12, [rip + resend]
    mov dword ptr [r8 + ICR_HIGH], 0
    mov dword ptr [r8 + ICR_LOW], NMI
    jmp 1f
1:  nop

    # None comes between MOV SS and the instruction behind it, where RIP is that of R13.
    lea r12, [rip + count]
    mov ebx, SAMPLES
    mov dword ptr [r8 + TIMER_DIVIDE], DIVIDE_BY_1
    mov dword ptr [r8 + LVT_TIMER], PERIODIC + 0x80
    mov dword ptr [r8 + TIMER_INITIAL], MILLISECOND / 7
    EXPECT 2f
    mov eax, DATA
    sti
    nop                             # the shadow of STI is over: that of MOV SS is to be seen
1:  mov ss, eax
2:  nop
    test ebx, ebx
    jg 1b                           # one more may come before the last is seen
    jmp halt

nest:
    xor r12d, r12d                  # only for the first one
    SEND 0x64                       # the same class
    SEND 0x33                       # a lower one
    SEND 0x70                       # a higher one
    EXPECT 1f
    inc r11                         # 4
    sti
    nop
1:  nop
    inc r11                         # 5
    EXPECT 1f
    mov dword ptr [r8 + EOI], 0     # then come those of the same class, and the lower ones
    jmp 1f
1:  cli
    inc r11                         # 6
    ret

resend:
    xor r12d, r12d
    mov dword ptr [r8 + ICR_LOW], NMI
    jmp 1f
1:  nop
    inc r11                         # 8
    ret

count:
    dec ebx
    jg 1f
    mov dword ptr [r8 + TIMER_INITIAL], 0
1:  ret

    TABLES
