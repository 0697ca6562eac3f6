# Moves strings to and from ports with INS and OUTS in all sizes, forwards and backwards, with and
# without REP. Proves that each element arrives, in order, and that SI, DI and CX end where they
# should. Port 0x60 has no device: what it gives (all ones) is stored from 0x6000 on.
# mode: real

    .intel_syntax noprefix
    .code16

    .set COM1, 0x3f8
    .set UNCLAIMED, 0x60
    .set SINK, 0x10
    .set BUFFER, 0x6000

    .globl start
start:
    # A text to the serial port.
    mov si, offset text
    mov cx, text_end - text
    mov dx, COM1
    rep outsb

    # 8 elements of each size from a port that nobody answers.
    mov dx, UNCLAIMED
    mov di, BUFFER
    mov cx, 8
    rep insb                        # 0x6000..0x6007
    mov cx, 8
    rep insw                        # 0x6008..0x6017
    mov cx, 8
    rep insd                        # 0x6018..0x6037
    insb                            # 0x6038
    insw                            # 0x6039..0x603a
    insd                            # 0x603b..0x603e
    mov [BUFFER + 0x100], di        # 0x603f

    # Numbers out, in all sizes.
    mov dx, SINK
    mov si, offset numbers
    mov cx, 4
    rep outsw
    mov cx, 2
    rep outsd
    mov si, offset numbers
    outsb
    outsw
    outsd
    mov [BUFFER + 0x102], si        # numbers + 7

    # A count of 0: nothing happens.
    mov cx, 0
    rep outsb
    rep insb

    # Backwards.
    std
    mov si, offset numbers_end - 2
    mov cx, 4
    rep outsw
    mov dx, UNCLAIMED
    mov di, BUFFER + 0x4f
    mov cx, 8
    rep insb                        # 0x604f down to 0x6048
    mov di, BUFFER + 0x5e
    mov cx, 4
    rep insw                        # 0x605e down to 0x6058
    mov [BUFFER + 0x104], di        # 0x6056
    mov si, offset numbers_end - 1
    mov di, BUFFER + 0x6f
    mov cx, 16
    rep movsb                       # the numbers once more, at 0x6060
    mov ax, 0x5aa5
    mov cx, 4
    mov di, BUFFER + 0x7e
    rep stosw                       # 0x607e down to 0x6078
    cld

    cmp cx, cx                      # leaves every flag defined
halt:
    hlt
    jmp halt

text:
    .ascii "A string, at once.\n"
text_end:

    .balign 4, 0
numbers:
    .word 0x0100, 0x0302, 0x0504, 0x0706
    .long 0x0b0a0908, 0x0f0e0d0c
numbers_end:
