# Starts a second vCPU, which says who it is, counts its starts, and sends the first one interrupts.
# mode: long

# At 0x7000 the second vCPU writes the id in its LAPIC, at 0x7004 it counts how often it started.
# The first one leaves the id in its own LAPIC in RBX, and what the other wrote in RAX.

    .include "interrupts.inc"

    .set AP_CODE, 0x8000
    .set AP_ID, 0x7000
    .set AP_STARTS, 0x7004
    .set AP_STACK, 0x7800
    .set CR0_PE, 1 << 0
    .set CODE32, 0x08

    SETUP
    mov esi, offset ap_start
    mov edi, AP_CODE
    mov ecx, offset ap_end - ap_start
    rep movsb
    mov dword ptr [r8 + ICR_HIGH], 1 << 24
    mov dword ptr [r8 + ICR_LOW], STARTUP + (AP_CODE >> 12)     # not before INIT
    mov dword ptr [r8 + ICR_LOW], INIT
    mov dword ptr [r8 + ICR_LOW], STARTUP + (AP_CODE >> 12)
    EXPECT 1f
    sti
    hlt                             # until it sends 0x62
1:  cli
    mov dword ptr [r8 + ICR_LOW], STARTUP + (AP_CODE >> 12)     # nor when it runs
    # Have it answer once more, and be sure that it is still there.
    mov dword ptr [r8 + ICR_LOW], NMI
    EXPECT 1f
    sti
    hlt
1:  cli
    mov ebx, [r8 + APIC_ID]
    mov eax, [AP_ID]
    mov r14d, [AP_STARTS]
    jmp halt

    .code16
ap_start:
    cli
    lgdt cs:[ap_gdt_pointer - ap_start]
    mov eax, cr0
    or eax, CR0_PE
    mov cr0, eax
    jmp CODE32:(AP_CODE + ap_protected - ap_start)

    .code32
ap_protected:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, AP_STACK
    lidt [AP_CODE + ap_idt_pointer - ap_start]
    mov ebx, LAPIC
    mov eax, [ebx + APIC_ID]
    mov [AP_ID], eax
    lock inc dword ptr [AP_STARTS]
    mov dword ptr [ebx + ICR_HIGH], 0
    mov dword ptr [ebx + ICR_LOW], FIXED + 0x62
1:  hlt
    jmp 1b

ap_nmi:
    mov dword ptr [ebx + ICR_LOW], FIXED + 0x66
    iretd

    .balign 8, 0
ap_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # code
    .quad 0x00cf93000000ffff        # data
ap_gdt_pointer:
    .word ap_gdt_pointer - ap_gdt - 1
    .long AP_CODE + ap_gdt - ap_start
ap_idt:
    .quad 0, 0
    .word AP_CODE + ap_nmi - ap_start, CODE32, 0x8e00, 0
ap_idt_pointer:
    .word ap_idt_pointer - ap_idt - 1
    .long AP_CODE + ap_idt - ap_start
ap_end:

    .code64
    TABLES
