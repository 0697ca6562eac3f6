# Enters ring 3 and there writes a byte to port 0x10 as often as the 32-bit number at 0x9000 says
# (0: for ever), then 0 to the debug-exit port, as ring 3 may not halt. Measures what an exit from
# ring 3 costs.
# mode: long

    .intel_syntax noprefix
    .code64

    .set COUNT, 0x9000
    .set PORT, 0x10
    .set DEBUG_EXIT, 0xf4
    .set STACK_END, 0x8000          # ring 0, for the frame that IRETQ takes; grows down
    .set USER_STACK_END, 0x7000

    .set USER_DATA, 0x10 + 3        # selectors with ring 3 in their low bits
    .set USER_CODE, 0x18 + 3
    .set TSS_SELECTOR, 0x20
    .set RFLAGS, 0x2                # the bit that is always 1

    # Page tables, one page each: PML4, page directory pointers, page directory.
    .set PML4, 0x10000
    .set PDPT, 0x11000
    .set PD, 0x12000
    .set PRESENT_WRITABLE_USER, 0x7
    .set PAGE_2M, 0x80

    # The TSS, and its I/O bitmap for the first 256 ports: zeros, so ring 3 may use these. That is
    # the portable way: KVM on PVM forgets the IOPL of ring 3.
    .set TSS, 0x13000
    .set TSS_BITMAP_OFFSET, TSS + 0x66
    .set TSS_SIZE, 0x68
    .set TSS_LIMIT, TSS_SIZE + 256 / 8      # one more byte than the bitmap, of ones

    .globl start
start:
    mov esp, STACK_END

    # Map the first GiB to itself, for ring 3, too: the map of the start is for ring 0 only.
    mov edi, PML4
    mov eax, 0
    mov ecx, 4 * 4096 / 8           # the tables and the TSS
    rep stosq
    mov qword ptr [PML4], PDPT + PRESENT_WRITABLE_USER
    mov qword ptr [PDPT], PD + PRESENT_WRITABLE_USER
    mov edi, PD
    mov eax, PAGE_2M + PRESENT_WRITABLE_USER
    mov ecx, 512
fill:
    mov [rdi], rax
    add rdi, 8
    add rax, 0x200000
    loop fill
    mov eax, PML4
    mov cr3, rax

    mov word ptr [TSS_BITMAP_OFFSET], TSS_SIZE
    mov byte ptr [TSS + TSS_LIMIT], 0xff

    lgdt [gdt_pointer]
    mov eax, TSS_SELECTOR
    ltr ax
    mov eax, USER_DATA              # or entering ring 3 clears them
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    push USER_DATA                  # SS
    push USER_STACK_END             # RSP
    push RFLAGS
    push USER_CODE                  # CS
    push offset user                # RIP
    iretq

user:
    mov ecx, [COUNT]
    cmp ecx, 0
    je forever
next:
    out PORT, al
    sub ecx, 1
    jnz next
    mov al, 0
    out DEBUG_EXIT, al
stop:
    jmp stop

forever:
    out PORT, al
    jmp forever

    .balign 8, 0
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 64-bit code, ring 0: 0x08
    .quad 0x00cff3000000ffff        # data, ring 3: 0x10
    .quad 0x00affb000000ffff        # 64-bit code, ring 3: 0x18
    .quad 0x0000890000000000 + TSS_LIMIT + ((TSS & 0xffff) << 16) + ((TSS >> 16) << 32)
    .quad 0                         # the TSS, 16 bytes: 0x20
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt
