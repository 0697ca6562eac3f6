# Executes an undefined instruction where no IDT is. Proves that a triple fault ends the run as a
# crash.
# mode: protected

    .intel_syntax noprefix
    .code32

    .globl start
start:
    ud2
