# Runs for ever and does nothing. Proves that a guest without exits can be stopped.
# mode: real

    .intel_syntax noprefix
    .code16

    .globl start
start:
    jmp start
