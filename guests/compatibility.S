# Makes exceptions and software interrupts in compatibility mode: in 32-bit code of ring 3, below a
# 64-bit kernel, whose handlers get the frames of 64-bit mode.
# mode: long

    .include "exceptions-long.inc"

    SETUP
    ENTER_USER user, back
user:
    EXPECT 1f, 2f
    BEGIN_32
1:  ud2
2:  END_32
    EXPECT 2f, 2f
    BEGIN_32
1:  int 0x80
2:  END_32
    EXPECT 1f, 2f
    BEGIN_32
1:  int 0x81                        # a gate for ring 0: #GP, vector * 8 + 2
2:  END_32
    EXPECT 2f, 2f
    BEGIN_32
    mov al, 0x7f
    add al, 1                       # overflow
1:  into                            # which 64-bit code does not have
2:  END_32
    EXPECT 1f, 2f
    BEGIN_32
1:  mov [SUPERVISOR_PAGE + 0x40], al
2:  END_32
    LEAVE_USER

back:
    hlt
    jmp back

    TABLES
