# Prints "Hello from real mode!" on the serial port, waiting before each byte until the port can
# take it, then halts. Proves that real-mode code runs and that port I/O reaches a device.
# mode: real

    .intel_syntax noprefix
    .code16

    .set COM1, 0x3f8
    .set LINE_STATUS, COM1 + 5
    .set CAN_TRANSMIT, 0x20

    .globl start
start:
    mov si, offset message
next:
    lodsb
    cmp al, 0
    je done
    mov ah, al
    mov dx, LINE_STATUS
poll:
    in al, dx
    test al, CAN_TRANSMIT
    jz poll
    mov al, ah
    mov dx, COM1
    out dx, al
    jmp next
done:
    cmp al, al                      # leaves every flag defined
halt:
    hlt
    jmp halt

message:
    .asciz "Hello from real mode!\n"
