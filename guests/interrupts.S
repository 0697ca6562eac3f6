# Takes interrupts from the APICs and the PICs, and logs when each one came. For two vCPUs of a
# machine with interrupt controllers; the second one is started, says its APIC id, and halts.
# mode: long

# A record is four 64-bit words: vector, RIP less the value in R13, RFLAGS, R11. R15 points behind
# the last one. The handler of NMIs sends another one the first time.

    .intel_syntax noprefix

    .set LOG, 0x20000
    .set STACK, 0x9000
    .set AP_CODE, 0x8000            # where the second vCPU starts
    .set AP_MARK, 0x7000            # it writes 0xa0 + its APIC id there

    .set LAPIC, 0xfee00000          # in R8; registers at
    .set TPR, 0x80
    .set EOI, 0xb0
    .set SVR, 0xf0
    .set ICR_LOW, 0x300
    .set ICR_HIGH, 0x310
    .set LVT_TIMER, 0x320
    .set TIMER_INITIAL, 0x380
    .set TIMER_DIVIDE, 0x3e0
    .set APIC_ENABLED, 0x100
    .set SPURIOUS, 0xff
    .set TO_SELF, 0x40000
    .set NMI, 0x4400                # physical, asserted
    .set INIT, 0x4500
    .set STARTUP, 0x4600
    .set PERIODIC, 0x20000
    .set MASKED, 0x10000
    .set DIVIDE_BY_1, 0xb
    .set MILLISECOND, 25000         # of the timer's clock, 25 MHz

    .set IOAPIC, 0xfec00000         # in R9
    .set REDIRECTION, 0x10
    .set PIT_PIN, 2

    .set PIC, 0x20
    .set PIC_SLAVE, 0xa0
    .set PIC_VECTOR, 0x20
    .set PIT_COUNTER, 0x40
    .set PIT_CONTROL, 0x43
    .set ONE_SHOT, 0x30             # counter 0, both bytes, mode 0

    .set INTERRUPTS, 1 << 9

    # Interrupts that only this CPU sends itself.
    .macro SEND vector
    mov dword ptr [r8 + ICR_LOW], TO_SELF + \vector
    .endm

    .macro OUTB port, value
    mov al, \value
    out \port, al
    .endm

    # Have the PIT raise its output in about a millisecond.
    .macro START_PIT
    OUTB PIT_CONTROL, ONE_SHOT
    OUTB PIT_COUNTER, 1193 & 0xff
    OUTB PIT_COUNTER, 1193 >> 8
    .endm

    .macro WRITE_IOAPIC index, value
    mov dword ptr [r9], \index
    mov dword ptr [r9 + 0x10], \value
    .endm

    .code64
    .globl start
start:
    mov esp, STACK
    # 256 gates to 256 stubs of 16 bytes each.
    mov edi, offset idt
    mov eax, offset stubs
    mov ecx, 256
fill:
    mov [rdi], ax
    mov dword ptr [rdi + 2], 0x18   # the code segment that the image starts with
    mov word ptr [rdi + 5], 0x8e
    mov qword ptr [rdi + 7], 0
    add edi, 16
    add eax, 16
    loop fill
    lidt [idt_pointer]
    mov r15d, LOG
    xor r11d, r11d
    mov r8d, LAPIC
    mov r9d, IOAPIC
    mov dword ptr [r8 + SVR], APIC_ENABLED + SPURIOUS

    # Behind the instruction that follows STI, and not before.
    SEND 0x40
    lea r13, [rip + 1f]
    sti
    nop
1:  nop
    # No window between STI and CLI.
    cli
    SEND 0x41
    sti
    cli
    nop
    inc r11
    lea r13, [rip + 1f]
    sti
    nop
1:  cli
    # At once behind POPF.
    SEND 0x42
    lea r13, [rip + 1f]
    pushfq
    or dword ptr [rsp], INTERRUPTS
    popfq
1:  nop
    cli
    # The highest first.
    SEND 0x43
    SEND 0x73
    SEND 0x53
    lea r13, [rip + 1f]
    sti
    nop
1:  nop
    nop
    cli
    # What is not above the task priority waits.
    mov dword ptr [r8 + TPR], 0x50
    SEND 0x55
    SEND 0x65
    lea r13, [rip + 1f]
    sti
    nop
1:  nop
    inc r11
    lea r13, [rip + 1f]
    mov dword ptr [r8 + TPR], 0
    jmp 1f                          # the software CPU looks at the end of a block only
1:  nop
    nop
    cli

    # The timer wakes HLT, once; then periodically.
    mov dword ptr [r8 + TIMER_DIVIDE], DIVIDE_BY_1
    mov dword ptr [r8 + LVT_TIMER], 0x50
    mov dword ptr [r8 + TIMER_INITIAL], MILLISECOND
    lea r13, [rip + 1f]
    sti
    hlt
1:  cli
    mov dword ptr [r8 + LVT_TIMER], PERIODIC + 0x51
    mov dword ptr [r8 + TIMER_INITIAL], MILLISECOND
    lea r13, [rip + 1f]
    mov ebx, 3
    sti
again:
    hlt
1:  dec ebx
    jnz again
    cli
    mov dword ptr [r8 + TIMER_INITIAL], 0
    mov dword ptr [r8 + LVT_TIMER], MASKED
    sti                             # one more may have come meanwhile: it is not logged
    mov r14d, 1
    nop
    nop
    cli
    xor r14d, r14d

    # An NMI comes whatever IF says; another one only behind the IRET of the first.
    lea r13, [rip + 1f]
    mov dword ptr [r8 + ICR_HIGH], 0
    mov dword ptr [r8 + ICR_LOW], NMI
    jmp 1f
1:  nop
    nop

    # The PIT through the PIC and LINT0.
    OUTB PIC, 0x11
    OUTB PIC + 1, PIC_VECTOR
    OUTB PIC + 1, 4
    OUTB PIC + 1, 1
    OUTB PIC_SLAVE, 0x11
    OUTB PIC_SLAVE + 1, PIC_VECTOR + 8
    OUTB PIC_SLAVE + 1, 2
    OUTB PIC_SLAVE + 1, 1
    OUTB PIC_SLAVE + 1, 0xff
    OUTB PIC + 1, 0xfe
    START_PIT
    lea r13, [rip + 1f]
    sti
    hlt
1:  cli
    OUTB PIC, 0x20
    OUTB PIC + 1, 0xff
    # And through the I/O APIC.
    WRITE_IOAPIC (REDIRECTION+2*PIT_PIN+1), 0
    WRITE_IOAPIC (REDIRECTION+2*PIT_PIN), 0x60
    START_PIT
    lea r13, [rip + 1f]
    sti
    hlt
1:  cli

    # The second vCPU.
    mov esi, offset ap_start
    mov edi, AP_CODE
    mov ecx, offset ap_end - ap_start
    rep movsb
    mov dword ptr [r8 + ICR_HIGH], 1 << 24
    mov dword ptr [r8 + ICR_LOW], INIT
    mov dword ptr [r8 + ICR_LOW], STARTUP + (AP_CODE >> 12)
    mov dword ptr [r8 + ICR_LOW], STARTUP + (AP_CODE >> 12)
wait:
    pause
    cmp dword ptr [AP_MARK], 0
    je wait
    mov ebx, [AP_MARK]
halt:
    hlt
    jmp halt

log:
    push rax
    test r14d, r14d
    jnz logged
    mov rax, [rsp + 8]
    mov [r15], rax
    mov rax, [rsp + 16]
    sub rax, r13
    mov [r15 + 8], rax
    mov rax, [rsp + 32]
    mov [r15 + 16], rax
    mov [r15 + 24], r11
    add r15, 32
logged:
    cmp byte ptr [rsp + 8], 2
    je nmi
    cmp byte ptr [rsp + 8], PIC_VECTOR
    je done                         # the PIC gets its EOI elsewhere
    mov dword ptr [r8 + EOI], 0
done:
    pop rax
    add rsp, 8
    iretq
nmi:
    add r11, 0x100
    cmp r11b, 0x80
    jae done
    or r11b, 0x80
    mov dword ptr [r8 + ICR_LOW], NMI    # not before the IRET
    nop
    nop
    add r11, 0x1000
    jmp done

    .balign 16
stubs:
    .set number, 0
    .rept 256
    .balign 16
    push number
    jmp log
    .set number, number + 1
    .endr

    .code16
ap_start:
    mov eax, 1
    cpuid
    shr ebx, 24
    add ebx, 0xa0
    mov [AP_MARK], ebx
1:  cli
    hlt
    jmp 1b
ap_end:

    .code64
    .balign 16
idt:
    .fill 256 * 16, 1, 0
idt_end:
idt_pointer:
    .word idt_end - idt - 1
    .quad idt
