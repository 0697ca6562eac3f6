# Makes exceptions in 32-bit protected mode, and logs what their handlers find on the stack.
# mode: protected

# A record is eight 32-bit words: vector, error code, EIP less the word at `expected`, CS, EFLAGS,
# and from ring 3 ESP and SS, else 0 twice; CR2 of a page fault. The word at LOG_NEXT points behind
# the last one; the handler goes on at the word at `next`.

    .intel_syntax noprefix

    .set LOG_NEXT, 0x1fffc
    .set LOG, 0x20000
    .set STACK, 0x9000
    .set ESP0, 0xa000
    .set USER_STACK, 0xb000
    .set DIRECTORY, 0x10000
    .set TABLE, 0x11000
    .set ABSENT_PAGE, 0x80000
    .set READ_ONLY_PAGE, 0x81000
    .set SUPERVISOR_PAGE, 0x82000

    .set CODE, 0x08
    .set DATA, 0x10
    .set USER_CODE, 0x18 + 3
    .set USER_DATA, 0x20 + 3
    .set TASK, 0x28
    .set ABSENT, 0x30               # a data segment that is not present

    .set PRESENT, 1
    .set WRITABLE, 2
    .set USER, 4
    .set CR0_WP_PG, 1 << 16 | 1 << 31
    .set SINGLE_STEP, 1 << 8
    .set INTERRUPTS, 1 << 9

    .macro EXPECT at, to
    mov dword ptr [expected], offset \at
    mov dword ptr [next], offset \to
    .endm

    .code32
    .globl start
start:
    lgdt [gdt_pointer]
    lidt [idt_pointer]
    mov esp, STACK
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, TASK
    ltr ax
    mov dword ptr [LOG_NEXT], LOG
    # The first 4 MiB by pages of 4 KiB, for all rings; then three special ones.
    mov edi, TABLE
    mov eax, PRESENT + WRITABLE + USER
fill:
    stosd
    add eax, 0x1000
    cmp eax, 0x400000
    jb fill
    mov dword ptr [TABLE + ABSENT_PAGE / 0x400], 0
    mov dword ptr [TABLE + READ_ONLY_PAGE / 0x400], READ_ONLY_PAGE + PRESENT
    mov dword ptr [TABLE + SUPERVISOR_PAGE / 0x400], SUPERVISOR_PAGE + PRESENT + WRITABLE
    mov dword ptr [DIRECTORY], TABLE + PRESENT + WRITABLE + USER
    mov eax, DIRECTORY
    mov cr3, eax
    mov eax, cr0
    or eax, CR0_WP_PG
    mov cr0, eax

    EXPECT 1f, 2f
    xor edx, edx
    xor ecx, ecx
1:  div ecx                         # #DE
2:  EXPECT 1f, 2f
1:  ud2                             # #UD
2:  EXPECT 1f, 2f
    mov eax, 0x1230
1:  mov ds, eax                     # #GP(selector)
2:  EXPECT 1f, 2f
    mov eax, ABSENT
1:  mov ds, eax                     # #NP(selector)
2:  EXPECT 1f, 2f
1:  mov ss, eax                     # #SS(selector)
2:  EXPECT 1f, 2f
1:  mov al, [ABSENT_PAGE + 5]       # #PF
2:  EXPECT 1f, 2f
1:  mov [READ_ONLY_PAGE + 6], al    # #PF: present, write
2:  EXPECT 1f, 2f
    pushfd
    or dword ptr [esp], SINGLE_STEP
    popfd
    nop
1:  nop                             # #DB behind the one before
2:  and byte ptr [gate_11 + 5], 0x7f
    EXPECT 1f, 2f
    mov eax, ABSENT
1:  mov ds, eax                     # no gate for #NP, while #NP is delivered: #DF
2:  or byte ptr [gate_11 + 5], 0x80

    # Ring 3, and back to the stack of the TSS.
    push USER_DATA
    push USER_STACK
    push 2
    push USER_CODE
    push offset user
    iretd
user:
    EXPECT 1f, 2f
1:  cli                             # #GP(0)
2:  EXPECT 1f, 2f
1:  mov [SUPERVISOR_PAGE + 7], al   # #PF: present, write, user
2:  EXPECT 1f, 2f
1:  ud2
2:  mov dword ptr [next], 0         # the handler halts
    EXPECT 1f, halt
1:  hlt                             # #GP(0)

halt:
    cli
    mov esp, STACK
    hlt
    jmp halt

    .macro STUB vector, error_code
stub_\vector:
    .if \error_code == 0
    push 0
    .endif
    push \vector
    jmp log
    .endm

    STUB 0, 0
    STUB 1, 0
    STUB 6, 0
    STUB 8, 1
    STUB 11, 1
    STUB 12, 1
    STUB 13, 1
    STUB 14, 1

log:
    pushad
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov edi, [LOG_NEXT]
    lea esi, [esp + 32]
    mov ecx, 5
    cld
    rep movsd
    xor eax, eax
    xor edx, edx
    test byte ptr [esp + 32 + 12], 3
    jz 1f
    mov eax, [esi]
    mov edx, [esi + 4]
1:  stosd
    mov eax, edx
    stosd
    xor eax, eax
    cmp byte ptr [esp + 32], 14
    jne 1f
    mov eax, cr2
1:  stosd
    mov eax, [expected]
    sub [edi - 24], eax
    mov [LOG_NEXT], edi
    and dword ptr [esp + 32 + 16], ~SINGLE_STEP
    mov eax, [next]
    cmp eax, offset halt
    je halt
    mov [esp + 32 + 8], eax
    mov eax, USER_DATA
    test byte ptr [esp + 32 + 12], 3
    jnz 1f
    mov eax, DATA
1:  mov ds, eax
    mov es, eax
    popad
    add esp, 8
    iretd

    .balign 8, 0
expected:
    .long 0
next:
    .long 0

    .balign 8, 0
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # code
    .quad 0x00cf93000000ffff        # data
    .quad 0x00cffb000000ffff        # ring 3: code
    .quad 0x00cff3000000ffff        # data
    .word tss_end - tss - 1, tss
    .byte 0, 0x89, 0, 0
    .quad 0x00cf13000000ffff        # data, not present
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

    .balign 8, 0
tss:
    .long 0, ESP0, DATA
    .fill 22, 4, 0
    .word 0, tss_end - tss
tss_end:

    .macro GATE stub
    .word \stub, CODE
    .byte 0, 0x8e
    .word 0
    .endm

    .balign 8, 0
idt:
    GATE stub_0
    GATE stub_1
    .fill 32, 1, 0
    GATE stub_6
    .fill 8, 1, 0
    GATE stub_8
    .fill 16, 1, 0
gate_11:
    GATE stub_11
    GATE stub_12
    GATE stub_13
    GATE stub_14
idt_end:
idt_pointer:
    .word idt_end - idt - 1
    .long idt
