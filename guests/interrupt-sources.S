# Interrupts from the timer of the LAPIC, from the PIT through the PIC and through the I/O APIC, and
# from the serial port through that.
# mode: long

    .include "interrupts.inc"

    .set REDIRECTION, 0x10          # a register of the I/O APIC: two for each pin
    .set LEVEL, 0x8000
    .set PIT_PIN, 2
    .set COM1_PIN, 4

    .set PIC, 0x20
    .set PIC_SLAVE, 0xa0
    .set PIT_COUNTER, 0x40
    .set PIT_CONTROL, 0x43
    .set ONE_SHOT, 0x30             # counter 0, both bytes, mode 0
    .set STATUS, 0xe2               # read-back: the status of counter 0, where
    .set PIT_OUTPUT, 0x80           # is its output

    .set COM1_ENABLE, 0x3f9         # which interrupts; THR_EMPTY is one
    .set COM1_CONTROL, 0x3fc        # and whether any, OUT2
    .set THR_EMPTY, 2
    .set OUT2, 8

    .macro OUTB port, value
    mov al, \value
    out \port, al
    .endm

    .macro OUTB_DX port, value
    mov dx, \port
    OUTB dx, \value
    .endm

    # Have the PIT raise its output in about a millisecond.
    .macro START_PIT
    OUTB PIT_CONTROL, ONE_SHOT
    OUTB PIT_COUNTER, 1193 & 0xff
    OUTB PIT_COUNTER, 1193 >> 8
    .endm

    .macro WAIT_PIT
1:  OUTB PIT_CONTROL, STATUS
    in al, PIT_COUNTER
    test al, PIT_OUTPUT
    jz 1b
    .endm

    .macro ROUTE pin, entry
    mov dword ptr [r9], REDIRECTION + 2 * \pin
    mov dword ptr [r9 + IOAPIC_WINDOW], \entry
    .endm

    SETUP
    # The PICs first, with all masked.
    OUTB PIC, 0x11
    OUTB PIC + 1, PIC_VECTOR
    OUTB PIC + 1, 4
    OUTB PIC + 1, 1
    OUTB PIC_SLAVE, 0x11
    OUTB PIC_SLAVE + 1, PIC_VECTOR + 8
    OUTB PIC_SLAVE + 1, 2
    OUTB PIC_SLAVE + 1, 1
    OUTB PIC_SLAVE + 1, 0xff
    OUTB PIC + 1, 0xff

    # The timer wakes HLT, once.
    mov dword ptr [r8 + TIMER_DIVIDE], DIVIDE_BY_1
    mov dword ptr [r8 + LVT_TIMER], 0x50
    mov dword ptr [r8 + TIMER_INITIAL], MILLISECOND
    EXPECT 1f
    sti
    hlt
1:  cli
    mov r14d, [r8 + TIMER_CURRENT]
    # Then periodically.
    mov dword ptr [r8 + LVT_TIMER], PERIODIC + 0x51
    mov dword ptr [r8 + TIMER_INITIAL], MILLISECOND
    EXPECT 1f
    mov ebx, 3
again:
    sti
    hlt
1:  cli
    dec ebx
    jnz again
    # And not while it is masked.
    mov dword ptr [r8 + LVT_TIMER], MASKED + PERIODIC + 0x51
    sti                             # one may have come before: it is not logged
    nop
    nop
    mov r15d, LOG + 4 * 32
    START_PIT
    WAIT_PIT
    START_PIT
    WAIT_PIT
    cli
    mov dword ptr [r8 + TIMER_INITIAL], 0

    # The PIT through the PIC and LINT0.
    OUTB PIC + 1, 0xfe
    START_PIT
    EXPECT 1f
    sti
    hlt
1:  cli
    OUTB PIC, 0x20
    OUTB PIC + 1, 0xff

    # And through the I/O APIC. An edge while the pin is masked is lost.
    mov dword ptr [r9], REDIRECTION + 2 * PIT_PIN + 1
    mov dword ptr [r9 + IOAPIC_WINDOW], 0
    ROUTE PIT_PIN, MASKED+0x60
    sti
    START_PIT
    WAIT_PIT
    ROUTE PIT_PIN, 0x60
    inc r11                         # 1
    EXPECT 1f
    cli
    START_PIT
    sti
    hlt
1:  cli
    ROUTE PIT_PIN, MASKED

    # A level is not lost, and comes again until the device is content.
    lea r12, [rip + serial]
    mov dword ptr [r9], REDIRECTION + 2 * COM1_PIN + 1
    mov dword ptr [r9 + IOAPIC_WINDOW], 0
    ROUTE COM1_PIN, MASKED+LEVEL+0x61
    sti
    OUTB_DX COM1_CONTROL, OUT2
    OUTB_DX COM1_ENABLE, THR_EMPTY
    jmp 1f
1:  nop
    inc r11                         # 2
    cli
    ROUTE COM1_PIN, LEVEL+0x61
    EXPECT 1f
    sti
    nop
1:  nop
    jmp halt

serial:
    inc r11                         # 3, 4
    cmp r11, 4
    jb 1f
    push rdx
    OUTB_DX COM1_ENABLE, 0
    pop rdx
1:  ret

    TABLES
