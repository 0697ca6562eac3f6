# Accesses guest physical addresses from 0xd0000000 on, where no memory is, in 64-bit mode: 8 bytes
# at a time, and 4 bytes across an 8-byte boundary. Proves that wide and unaligned accesses come
# out whole; what it read is stored from 0x5000 on.
# mode: long

    .intel_syntax noprefix
    .code64

    .set HOLE, 0xd0000000
    .set RESULTS, 0x5000

    .globl start
start:
    mov ebx, HOLE
    mov edi, RESULTS

    # Writes.
    mov byte ptr [rbx], 0x11
    mov word ptr [rbx + 2], 0x2233
    mov dword ptr [rbx + 4], 0x44556677
    mov rax, 0x8899aabbccddeeff
    mov [rbx + 8], rax
    mov qword ptr [rbx + 0x10], -2          # a 32-bit constant, sign-extended
    mov r9, 0x0123456789abcdef
    mov [rbx + 0x18], r9

    # Reads: 4 bytes clear the upper half of the register, smaller ones leave the rest alone.
    mov rax, 0x0102030405060708
    mov al, [rbx]
    mov [rdi], rax                  # 0x01020304050607ff
    mov rax, 0x0102030405060708
    mov ax, [rbx + 2]
    mov [rdi + 8], rax              # 0x010203040506ffff
    mov eax, [rbx + 4]
    mov [rdi + 16], rax             # 0x00000000ffffffff
    mov r8, [rbx + 8]
    mov [rdi + 24], r8              # 0xffffffffffffffff
    movsxd rax, dword ptr [rbx + 4]
    mov [rdi + 32], rax             # 0xffffffffffffffff

    # 4 bytes at offset 6: across an 8-byte boundary.
    mov dword ptr [rbx + 6], 0xa1b2c3d4
    mov eax, [rbx + 6]
    mov [rdi + 40], rax             # 0x00000000ffffffff

    # Read-modify-write.
    add qword ptr [rbx + 0x20], 2           # writes 1
    mov rax, 0x1122334455667788
    xchg [rbx + 0x28], rax                  # writes 0x1122334455667788
    mov [rdi + 48], rax             # 0xffffffffffffffff

    # Strings: to the hole, and from it to memory.
    mov edi, HOLE + 0x30
    mov rax, r9
    mov ecx, 2
    rep stosq
    mov esi, HOLE + 0x40
    mov edi, RESULTS + 56
    mov ecx, 2
    rep movsq                       # 0xffffffffffffffff twice

    cmp ecx, ecx                    # leaves every flag defined
halt:
    hlt
    jmp halt
