# Writes a byte to port 0x10 as often as the 32-bit number at 0x9000 says (0: for ever), then
# halts. Measures what an exit from ring 0 costs.
# mode: real

    .intel_syntax noprefix
    .code16

    .set COUNT, 0x9000
    .set PORT, 0x10

    .globl start
start:
    mov ecx, [COUNT]
    cmp ecx, 0
    je forever
next:
    out PORT, al
    sub ecx, 1
    jnz next
halt:
    hlt
    jmp halt

forever:
    out PORT, al
    jmp forever
