# Interrupts that software asks for, in 64-bit mode: they come behind the instruction.
# mode: long

    .include "exceptions-long.inc"

    SETUP

    EXPECT 2f, 2f
1:  int3
2:  EXPECT 2f, 2f
    pushfq
    or dword ptr [rsp], INTERRUPTS
    popfq
1:  int 0x80                        # an interrupt gate
2:  EXPECT 2f, 2f
1:  int 0x81                        # a trap gate
2:  EXPECT 1f, 2f
1:  int 0x90                        # beyond the IDT: #GP, vector * 8 + 2
2:  cli
    EXPECT 1f, 2f
1:  int 2                           # no gate: #GP, vector * 8 + 2
2:  ENTER_USER user, back
user:
    EXPECT 2f, 2f
1:  int3                            # gates that ring 3 may use
2:  EXPECT 2f, 2f
1:  int 0x80
2:  EXPECT 1f, 2f
1:  int 0x81                        # and one that it may not: #GP, vector * 8 + 2
2:  LEAVE_USER

back:
    hlt
    jmp back

    TABLES
