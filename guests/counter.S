# Writes 0 to 9 to port 0x10, 16 bits each, then halts. Proves that port writes come out in order,
# each exactly once.
# mode: real

    .intel_syntax noprefix
    .code16

    .globl start
start:
    mov ax, 0
next:
    out 0x10, ax
    add ax, 1
    cmp ax, 10
    jne next
halt:
    hlt
    jmp halt
