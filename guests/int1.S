# INT1, which makes #DB behind it, whatever TF and the gate say; from ring 0 and from ring 3.
# mode: long

    .include "exceptions-long.inc"

    .macro INT1                     # the assembler does not know it by a name
    .byte 0xf1
    .endm

    SETUP

    EXPECT 1f, 1f
    INT1
1:  ENTER_USER user, back
user:
    EXPECT 1f, 1f
    INT1
1:  LEAVE_USER

back:
    hlt
    jmp back

    TABLES
