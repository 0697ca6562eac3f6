# Writes 0x21 to the debug-exit port, and would then run for ever. Proves that the write ends the
# run, with exit status 0x43.
# mode: real

    .intel_syntax noprefix
    .code16

    .globl start
start:
    mov al, 0x21
    out 0xf4, al
forever:
    jmp forever
