# Accesses guest physical addresses from 0xd0000000 on, where no memory is, in sizes 1, 2 and 4:
# plain reads and writes, read-modify-write, string instructions. Proves that each becomes MMIO
# of the right address, size and data; what it read is stored from 0x5000 on.
# mode: protected

    .intel_syntax noprefix
    .code32

    .set HOLE, 0xd0000000
    .set RESULTS, 0x5000

    .globl start
start:
    mov ebx, HOLE
    mov edi, RESULTS

    # Writes, of constants and of registers.
    mov byte ptr [ebx], 0x11
    mov word ptr [ebx + 2], 0x2233
    mov dword ptr [ebx + 4], 0x44556677
    mov eax, 0x8899aabb
    mov [ebx + 8], al
    mov [ebx + 9], ah
    mov [ebx + 10], ax
    mov [ebx + 12], eax

    # Reads: the smaller ones must leave the rest of the register alone.
    mov eax, 0x01020304
    mov al, [ebx]
    mov [edi], eax                  # 0x010203ff
    mov eax, 0x01020304
    mov ah, [ebx + 1]
    mov [edi + 4], eax              # 0x0102ff04
    mov eax, 0x01020304
    mov ax, [ebx + 2]
    mov [edi + 8], eax              # 0x0102ffff
    mov eax, [ebx + 4]
    mov [edi + 12], eax             # 0xffffffff
    movzx eax, byte ptr [ebx + 8]
    mov [edi + 16], eax             # 0x000000ff
    movsx eax, word ptr [ebx + 10]
    mov [edi + 20], eax             # 0xffffffff

    # Read-modify-write: a read of all ones, then a write.
    and byte ptr [ebx + 0x10], 0x5a         # writes 0x5a
    xor word ptr [ebx + 0x12], 0x00ff       # writes 0xff00
    add dword ptr [ebx + 0x14], 2           # writes 1
    or dword ptr [ebx + 0x18], 1            # writes 0xffffffff
    mov eax, 0x12345678
    xchg [ebx + 0x1c], eax                  # writes 0x12345678
    mov [edi + 24], eax             # 0xffffffff

    # Strings: memory to the hole, a constant to the hole, the hole to memory.
    mov esi, offset words
    mov edi, HOLE + 0x20
    mov ecx, 2
    rep movsd
    mov eax, 0x0badcafe
    mov ecx, 2
    rep stosw                       # 0xcafe twice
    mov esi, HOLE + 0x30
    mov edi, RESULTS + 28
    mov ecx, 4
    rep movsb                       # 0xffffffff

    cmp ecx, ecx                    # leaves every flag defined
halt:
    hlt
    jmp halt

    .balign 4, 0
words:
    .long 0x03020100, 0x07060504
