# Makes exceptions that cannot be delivered in 64-bit mode: another one is instead, and that is #DF
# for some of them only (SDM vol. 3, table 6-5).
# mode: long

    .include "exceptions-long.inc"

    SETUP

    # Benign, then contributory: the gate is not present, so #NP (vector * 8 + 2, and 1: EXT).
    and byte ptr [gate_6 + 5], 0x7f
    EXPECT 1f, 2f
1:  ud2
2:  or byte ptr [gate_6 + 5], 0x80

    # Contributory, then a page fault, which has a stack of its own: it is the stack that is absent.
    EXPECT 1f, 2f
    mov rsp, ABSENT_PAGE + 0x800
    xor edx, edx
    xor ecx, ecx
1:  div ecx

    # A page fault, then a contributory one: #DF.
2:  mov esp, STACK
    and byte ptr [gate_14 + 5], 0x7f
    EXPECT 1f, 2f
    mov rbx, ABSENT_PAGE
1:  mov al, [rbx]
2:  or byte ptr [gate_14 + 5], 0x80

    # INT with a gate that is not present is #NP; a page fault while it is delivered is one.
    EXPECT 1f, 2f
1:  int 0x82
2:  EXPECT 1f, 2f
    mov rsp, ABSENT_PAGE + 0x800
1:  int 0x80
2:  EXPECT 1f, 2f
    mov rsp, ABSENT_PAGE + 0x800
1:  int3

2:  mov esp, STACK
halt:
    hlt
    jmp halt

    TABLES
