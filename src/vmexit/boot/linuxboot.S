# An option ROM that boots a Linux kernel which the firmware configuration device has: firmware that
# knows nothing of it, but of option ROMs, such as SeaBIOS, boots a kernel so.
#
# Firmware copies it to a 2 KiB boundary below 1 MiB, and finds by its PnP header that it boots
# something (Plug and Play BIOS Specification 1.0A, chapter 3). It copies setup code, kernel, command
# line and initial RAM disk to the addresses that go with them, by DMA, and starts the setup code in
# real mode (Linux boot.rst, "Running the Kernel").
#
# as --32 -o linuxboot.o linuxboot.S && ld -m elf_i386 -Ttext 0 --oformat binary -o linuxboot.bin linuxboot.o
# What makes the sum of its bytes 0 is put into its last byte when it is read.

    .intel_syntax noprefix
    .code16

    .set BLOCKS, 1                  # of 512 bytes

    .set SELECTOR, 0x510
    .set DATA, 0x511
    .set DMA_LOW, 0x518
    .set READ, 1 << 1
    .set SELECT, 1 << 3

    .set CMDLINE_ADDR, 0x13
    .set SETUP_ADDR, 0x16
    .set SETUP_SECTORS, 0x20        # selectors behind the boot sector

    .globl _start
_start:
rom:
    .byte 0x55, 0xaa, BLOCKS
    mov ax, 0x20                    # it is a boot device
    lret
    .org 0x1a
    .word pnp - rom

    .balign 16
pnp:
    .ascii "$PnP"
    .byte 1, 2                      # version, length in 16 bytes
    .word 0                         # the next one
    .byte 0
    .byte 0                         # checksum: as the ROM has one, firmware does not look
    .long 0                         # device
    .word 0, name - rom             # manufacturer, product
    .byte 0, 0, 0                   # class
    .byte 1 << 2                    # boot device
    .word 0, 0, boot - rom, 0, 0    # the vector at which it boots

name:
    .asciz "Linux kernel"

# Address, size and data of each thing to copy.
items:
    .byte 0x16, 0x17, 0x18          # setup code
    .byte 0x13, 0x14, 0x15          # command line
    .byte 0x07, 0x08, 0x11          # kernel
    .byte 0x0a, 0x0b, 0x12          # initial RAM disk
items_end:

boot:
    cld
    mov si, offset items - rom
next:
    xor eax, eax
    lods al, byte ptr cs:[si]
    call number
    mov edi, eax
    xor eax, eax
    lods al, byte ptr cs:[si]
    call number
    mov ecx, eax
    xor eax, eax
    lods al, byte ptr cs:[si]
    call copy
    cmp si, offset items_end - rom
    jb next

    mov ax, CMDLINE_ADDR
    call number
    mov ebx, eax
    mov ax, SETUP_ADDR
    call number
    sub ebx, eax
    sub ebx, 16                     # the stack ends below the command line
    shr eax, 4
    cli
    mov ds, ax
    mov es, ax
    mov fs, ax
    mov gs, ax
    mov ss, ax
    mov esp, ebx
    add ax, SETUP_SECTORS
    push ax
    xor eax, eax
    push ax
    xor ebx, ebx
    xor ecx, ecx
    xor edx, edx
    xor esi, esi
    xor edi, edi
    xor ebp, ebp
    lret

# The number in item AX, in EAX. Changes CX, DX.
number:
    mov dx, SELECTOR
    out dx, ax
    mov dx, DATA
    mov cx, 4
1:  in al, dx
    ror eax, 8
    loop 1b
    ret

# Copies ECX bytes of item EAX to EDI. Changes EAX, ECX, EDX, EDI.
copy:
    shl eax, 16
    or eax, SELECT | READ
    bswap eax
    bswap ecx
    bswap edi
    push edi                        # the descriptor, from its end
    push dword ptr 0
    push ecx
    push eax
    xor eax, eax
    mov ax, ss
    shl eax, 4
    movzx edx, sp
    add eax, edx
    bswap eax
    mov dx, DMA_LOW
    out dx, eax
    pop eax                         # 0 if it went well
    add sp, 12
    test eax, eax
    jnz fail
    ret

fail:
    int 0x18                        # the next boot device, please

    .org BLOCKS * 512 - 1
    .byte 0
