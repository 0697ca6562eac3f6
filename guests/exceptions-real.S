# Makes interrupts and exceptions in real mode, and logs what their handlers find on the stack.
# mode: real

# A record is five 16-bit words: vector, IP less BX, CS less the guest's, FLAGS, FLAGS of the
# handler. They begin at 2000:0; DI points behind the last one. The handler goes on at SI.

    .intel_syntax noprefix

    .set LOG_SEGMENT, 0x2000
    .set STACK, 0x8000
    .set SINGLE_STEP, 1 << 8
    .set INTERRUPTS, 1 << 9
    .set FLAGS, INTERRUPTS + 0x8d7  # all that tell of a result, and the bit that is always 1
    .set RESTORED, 0x7000

    .macro VECTOR number
    mov word ptr [\number * 4], offset handler_\number - 0x1000
    mov word ptr [\number * 4 + 2], cs
    .endm

    .macro HANDLER number
handler_\number:
    push \number
    jmp log
    .endm

    .macro EXPECT at, to
    mov bx, offset \at - 0x1000
    mov si, offset \to - 0x1000
    .endm

    .code16
    .globl start
start:
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, STACK
    mov ax, LOG_SEGMENT
    mov es, ax
    xor di, di
    VECTOR 0
    VECTOR 1
    VECTOR 3
    VECTOR 4
    VECTOR 5
    VECTOR 6
    VECTOR 0x80

    EXPECT 1f, 2f
    xor ax, ax
    cwd
    xor cx, cx
1:  div cx                          # #DE: at the instruction
2:  EXPECT 1f, 2f
1:  ud2                             # #UD
2:  EXPECT 2f, 2f
    push FLAGS
    popf
1:  int 0x80                        # behind it, with IF in the flags
2:  pushf
    pop word ptr [RESTORED]         # IRET has brought them back
    EXPECT 2f, 2f
1:  int3
2:  cli
    EXPECT 2f, 2f
    mov al, 0x7f
    add al, 1                       # overflow
1:  into
2:  EXPECT 1f, 2f
    mov ax, 9
1:  bound ax, dword ptr [limits]    # #BR
2:  EXPECT 1f, 2f
    pushf
    pop ax
    or ax, SINGLE_STEP
    push ax
    popf
    nop
1:  nop                             # #DB behind the one before
2:  hlt
    jmp 2b

    HANDLER 0
    HANDLER 1
    HANDLER 3
    HANDLER 4
    HANDLER 5
    HANDLER 6
    HANDLER 0x80

log:
    push ax
    push bp
    mov bp, sp
    mov ax, [bp + 4]                # vector
    stosw
    mov ax, [bp + 6]                # IP
    sub ax, bx
    stosw
    mov ax, cs
    neg ax
    add ax, [bp + 8]                # CS
    stosw
    mov ax, [bp + 10]               # FLAGS
    stosw
    pushf
    pop ax
    stosw                           # and those of the handler
    and word ptr [bp + 10], ~SINGLE_STEP
    mov [bp + 6], si
    pop bp
    pop ax
    add sp, 2
    iret

limits:
    .word 0, 8
