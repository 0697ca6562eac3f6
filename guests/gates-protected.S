# Interrupts that software asks for in 32-bit protected mode, through gates of each kind, from ring
# 0, from ring 3 and from virtual-8086 mode: they come behind the instruction.
# mode: protected

    .include "exceptions-protected.inc"

    .set IMAGE, 0x1000              # where it is, and its code segment in virtual-8086 mode
    .set VIRTUAL_CODE, IMAGE >> 4
    .set VIRTUAL_STACK, 0x0b00      # SS
    .set VIRTUAL_SP, 0x0800

    .macro ENTER_VIRTUAL to, flags
    push 0x444                      # GS, FS, DS, ES
    push 0x333
    push 0x222
    push 0x111
    push VIRTUAL_STACK
    push VIRTUAL_SP
    push \flags
    push VIRTUAL_CODE
    push offset \to - IMAGE
    iretd
    .endm

    SETUP

    EXPECT 2f, 2f
1:  int3
2:  EXPECT 2f, 2f
    mov al, 0x7f
    add al, 1                       # overflow
1:  into
2:  EXPECT 2f, 2f
    push FIXED + INTERRUPTS
    popfd
1:  int 0x80                        # an interrupt gate
2:  pushfd
    pop [LOG_NEXT - 4]              # IRET has set IF again
    EXPECT 2f, 2f
1:  int 0x81                        # a trap gate
2:  EXPECT 2f, 2f
1:  int 0x82                        # a 16-bit gate: a frame of 6 bytes
2:  EXPECT 2f, 2f
1:  int 0x83                        # conforming code
2:  cli
    EXPECT 1f, 2f
1:  int 0x90                        # beyond the IDT: #GP, vector * 8 + 2
2:  EXPECT 1f, 2f
1:  int 0x0f                        # no gate: #GP, vector * 8 + 2
2:  EXPECT 1f, 2f
1:  int 0x84                        # a gate that is not present: #NP, vector * 8 + 2

    # From ring 3.
2:  ENTER_USER user
user:
    EXPECT 2f, 2f
1:  int3                            # gates that ring 3 may use
2:  EXPECT 2f, 2f
1:  int 0x80
2:  EXPECT 2f, 2f
1:  int 0x83                        # conforming code: still ring 3, and no other stack
2:  EXPECT 1f, 2f
1:  int 0x81                        # a gate for ring 0: #GP, vector * 8 + 2
2:  EXPECT 1f, 2f
1:  int 14                          # so is that of a page fault
2:  EXPECT_LEAVE 1f, virtual
1:  hlt                             # #GP(0)

    # Virtual-8086 mode. INT is the monitor's affair where IOPL is below 3: #GP(0).
virtual:
    EXPECT_LEAVE (1f-IMAGE), trusted
    ENTER_VIRTUAL 1f, FIXED + VIRTUAL_8086
    .code16
1:  int 0x80
    # Where it is 3, INT goes through the IDT, to ring 0, with nine words on the stack.
    .code32
trusted:
    EXPECT (2f-IMAGE), (2f-IMAGE)
    ENTER_VIRTUAL 1f, FIXED + VIRTUAL_8086 + IOPL_3
    .code16
1:  int 0x80
2:  mov dword ptr cs:[next - IMAGE], 0
    mov dword ptr cs:[expected - IMAGE], offset 1f - IMAGE
    mov dword ptr cs:[back - IMAGE], offset halt
1:  ud2
    .code32

    TABLES
