# Reads and writes ports in all sizes, with the port as a constant and in DX. Proves that sizes and
# data are right, and that a read leaves the rest of EAX alone: what port 0x20 gave (there is no
# device) is in EBX, ECX and ESI at the end, and that of port 0x24 at 0x5000.
# mode: real

    .intel_syntax noprefix
    .code16

    .set RESULTS, 0x5000

    .globl start
start:
    # Reads, constant port.
    mov eax, 0x01020304
    in al, 0x20
    mov ebx, eax                    # 0x010203ff
    mov eax, 0x01020304
    in ax, 0x20
    mov ecx, eax                    # 0x0102ffff
    mov eax, 0x01020304
    in eax, 0x20
    mov esi, eax                    # 0xffffffff

    # Reads, port in DX.
    mov dx, 0x24
    mov eax, 0x05060708
    in al, dx
    mov [RESULTS], eax              # 0x050607ff
    mov eax, 0x05060708
    in ax, dx
    mov [RESULTS + 4], eax          # 0x0506ffff
    mov eax, 0x05060708
    in eax, dx
    mov [RESULTS + 8], eax          # 0xffffffff

    # Writes.
    mov eax, 0x8899aabb
    out 0x20, al
    out 0x20, ax
    out 0x20, eax
    out 0x10, al
    out 0x10, ax
    out 0x10, eax
    out dx, al
    out dx, ax
    out dx, eax
    mov dx, 0x10
    out dx, al
    out dx, ax
    out dx, eax
    mov dx, 0x8020                  # above 0xff a port fits into DX only
    out dx, ax

    cmp eax, 0x8899aabb             # a write changes nothing: ZF is set
halt:
    hlt
    jmp halt
