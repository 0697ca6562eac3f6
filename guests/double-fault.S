# A double fault whose handler logs it and then makes another, of which it cannot take care any
# more: a triple fault. In 32-bit protected mode, without paging and without IRET.
# mode: protected

# The log, at LOG: error code, EIP less that of the instruction, CS, ESP at the handler.

    .intel_syntax noprefix

    .set LOG, 0x20000
    .set STACK, 0x9000
    .set CODE, 0x08
    .set DATA, 0x10

    .code32
    .globl start
start:
    lgdt [gdt_pointer]
    lidt [idt_pointer]
    mov esp, STACK
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
first:
    ud2                             # no gate for it, so #NP; nor for that: #DF
on_double_fault:
    mov [LOG + 12], esp
    pop [LOG]
    pop eax
    sub eax, offset first
    mov [LOG + 4], eax
    pop [LOG + 8]
    mov byte ptr [gate_8 + 5], 0x0e # not present
second:
    ud2

    .balign 8, 0
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # code
    .quad 0x00cf93000000ffff        # data
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

    .balign 8, 0
idt:
    .fill 6 * 8, 1, 0
    .word 0, CODE, 0x0e00, 0        # 6: not present
    .fill 8, 1, 0
gate_8:
    .word on_double_fault, CODE, 0x8e00, 0
    .fill 2 * 8, 1, 0
    .word 0, CODE, 0x0e00, 0        # 11: not present
    .fill 8, 1, 0
idt_end:
idt_pointer:
    .word idt_end - idt - 1
    .long idt
