# More interrupts or exceptions than a processor can take, for ever. The word at 0x9000 says which.
# For a machine with interrupt controllers.
# mode: long

# At 0x9008 it counts what it has taken, at 0x9010 what it has done besides.

    .intel_syntax noprefix

    .set KIND, 0x9000
    .set TAKEN, 0x9008
    .set DONE, 0x9010
    .set STACK, 0x9000
    .set AP_CODE, 0x8000            # where the second vCPU starts
    .set IVT_NMI, 8

    .set LAPIC, 0xfee00000          # in RBX; registers at
    .set EOI, 0xb0
    .set SVR, 0xf0
    .set ICR_LOW, 0x300
    .set ICR_HIGH, 0x310
    .set LVT_TIMER, 0x320
    .set TIMER_INITIAL, 0x380
    .set TIMER_DIVIDE, 0x3e0
    .set TO_SELF, 0x40000
    .set NMI, 0x4400                # physical, asserted
    .set INIT, 0x4500
    .set STARTUP, 0x4600
    .set PERIODIC, 0x20000
    .set DIVIDE_BY_1, 0xb

    .set IOAPIC, 0xfec00000         # in RBP
    .set REDIRECTION, 0x10
    .set LEVEL, 0x8000
    .set COM1_PIN, 4
    .set RTC_PIN, 8

    .set VECTOR, 0x40
    .set IPI_VECTOR, 0x50
    .set PIC_VECTOR, 0x30

    .macro outb port, value
    mov al, \value
    out \port, al
    .endm

    .text
    .code64
    .globl start
start:
    mov ebx, LAPIC
    mov ebp, IOAPIC
    mov esp, STACK

    lea rdi, idt[rip]               # every gate leads to `interrupt`, but for some
    lea rax, interrupt[rip]
    mov ecx, 256
1:  call set_gate
    loop 1b
    lea rdi, idt[rip + 1 * 16]
    lea rax, exception[rip]
    call set_gate
    lea rdi, idt[rip + 6 * 16]
    call set_gate
    lea rdi, idt[rip + 14 * 16]
    lea rax, exception_with_code[rip]
    call set_gate
    lea rdi, idt[rip + IPI_VECTOR * 16]
    lea rax, ipi[rip]
    call set_gate
    lidt idtr[rip]
    mov dword ptr [rbx + SVR], 0x1ff

    mov eax, [KIND]
    lea rdx, kinds[rip]
    movsxd rax, [rdx + 4 * rax]
    add rax, rdx
    jmp rax

    .balign 4
kinds:
    .long pit - kinds, rtc - kinds, lapic_timer - kinds, ipis - kinds, level - kinds
    .long startups - kinds, nmis - kinds, undefined - kinds, steps - kinds, page_faults - kinds
    .long timer_settings - kinds

set_gate:                           # of RAX at RDI, which it moves on
    mov rdx, rax
    mov [rdi], dx
    mov dword ptr [rdi + 2], 0x8e000000 | 0x18
    mov byte ptr [rdi + 4], 0
    shr rdx, 16
    mov [rdi + 6], dx
    mov qword ptr [rdi + 8], 0
    add rdi, 16
    ret

interrupt:
    inc qword ptr [TAKEN]
    push rax
    mov al, 0x0c                    # an RTC goes on once register C was read
    out 0x70, al
    in al, 0x71
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
    pop rax
    mov dword ptr [rbx + EOI], 0
    iretq

ipi:                                # as soon as it is over comes the next
    inc qword ptr [TAKEN]
    mov dword ptr [rbx + ICR_LOW], TO_SELF | IPI_VECTOR
    mov dword ptr [rbx + EOI], 0
    iretq

exception_with_code:
    add rsp, 8
exception:
    inc qword ptr [TAKEN]
    iretq

pit:                                # channel 0, mode 2, the shortest period
    outb 0x20, 0x11
    outb 0xa0, 0x11
    outb 0x21, PIC_VECTOR
    outb 0xa1, PIC_VECTOR + 8
    outb 0x21, 4
    outb 0xa1, 2
    outb 0x21, 1
    outb 0xa1, 1
    outb 0x21, 0
    outb 0xa1, 0
    outb 0x43, 0x34
    outb 0x40, 2
    outb 0x40, 0
    jmp work

rtc:                                # 8192 Hz
    mov ecx, RTC_PIN
    mov eax, VECTOR
    call route
    outb 0x70, 0x0a
    outb 0x71, 0x23
    outb 0x70, 0x0b
    outb 0x71, 0x42
    jmp work

lapic_timer:
    mov dword ptr [rbx + TIMER_DIVIDE], DIVIDE_BY_1
    mov dword ptr [rbx + LVT_TIMER], PERIODIC | VECTOR
    mov dword ptr [rbx + TIMER_INITIAL], 1
    jmp work

ipis:
    mov dword ptr [rbx + ICR_LOW], TO_SELF | IPI_VECTOR
    jmp work

level:                              # COM1 can always send, and says so, and nobody listens
    mov ecx, COM1_PIN
    mov eax, LEVEL | VECTOR
    call route
    mov dx, 0x3fc
    outb dx, 8
    mov dx, 0x3f9
    outb dx, 2
    jmp work

route:                              # pin ECX, entry EAX
    lea edx, [2 * rcx + REDIRECTION + 1]
    mov [rbp], edx
    mov dword ptr [rbp + 0x10], 0
    dec edx
    mov [rbp], edx
    mov [rbp + 0x10], eax
    ret

work:
    sti
1:  inc qword ptr [DONE]
    jmp 1b

copy_ap:
    lea rsi, ap[rip]
    mov edi, AP_CODE
    mov ecx, offset ap_end - ap
    rep movsb
    mov word ptr [IVT_NMI], offset ap_nmi - ap
    mov word ptr [IVT_NMI + 2], AP_CODE >> 4
    mov dword ptr [rbx + ICR_HIGH], 1 << 24
start_ap:
    mov dword ptr [rbx + ICR_LOW], INIT
    mov dword ptr [rbx + ICR_LOW], STARTUP | AP_CODE >> 12
    ret

startups:
    call copy_ap
1:  inc qword ptr [DONE]
    call start_ap
    jmp 1b

nmis:
    call copy_ap
1:  inc qword ptr [DONE]
    mov dword ptr [rbx + ICR_LOW], NMI
    jmp 1b

undefined:
    ud2

steps:
    pushfq
    or dword ptr [rsp], 0x100
    popfq
1:  inc qword ptr [DONE]
    jmp 1b

page_faults:
    mov rax, 0x700000000000
    inc qword ptr [rax]

timer_settings:                     # never the same, and all of them far away
    mov dword ptr [rbx + TIMER_DIVIDE], DIVIDE_BY_1
    mov eax, 0xffffffff
1:  inc qword ptr [DONE]
    mov [rbx + TIMER_INITIAL], eax
    dec eax
    jmp 1b

    .code16
ap:                                 # in real mode, with CS:0 here
    mov ax, 0x800
    mov ss, ax
    mov sp, 0x800
1:  inc cx
    jmp 1b
ap_nmi:
    inc dword ptr cs:[TAKEN - AP_CODE]
    iret
ap_end:

    .balign 16
idtr:
    .word 256 * 16 - 1
    .quad idt
    .balign 16
idt:
    .skip 256 * 16
