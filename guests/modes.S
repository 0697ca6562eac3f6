# Goes from real mode to protected mode, where it prints "P", and on to long mode, where it prints
# "L", with a GDT and page tables of its own; then halts. Proves that mode switches work.
# mode: real

    .intel_syntax noprefix

    .set COM1, 0x3f8
    .set LINE_STATUS, COM1 + 5
    .set CAN_TRANSMIT, 0x20

    .set CODE32, 0x08
    .set DATA, 0x10
    .set CODE64, 0x18

    .set CR0_PE, 1 << 0
    .set CR0_PG, 1 << 31
    .set CR4_PAE, 1 << 5
    .set EFER, 0xc0000080
    .set EFER_LME, 1 << 8

    # Page tables, one page each: PML4, page directory pointers, page directory.
    .set PML4, 0x10000
    .set PDPT, 0x11000
    .set PD, 0x12000
    .set PRESENT_WRITABLE, 0x3
    .set PAGE_2M, 0x80

    # Wait until the serial port can take a byte, then send it. Changes AL and DX.
    .macro PRINT byte
1:  mov dx, LINE_STATUS
    in al, dx
    test al, CAN_TRANSMIT
    jz 1b
    mov dx, COM1
    mov al, \byte
    out dx, al
    .endm

    .code16
    .globl start
start:
    lgdt [gdt_pointer]
    mov eax, cr0
    or eax, CR0_PE
    mov cr0, eax
    jmp CODE32:protected

    .code32
protected:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov ss, eax
    PRINT 'P'

    # Map the first GiB to itself.
    mov edi, PML4
    mov eax, 0
    mov ecx, 3 * 4096 / 4
    rep stosd
    mov dword ptr [PML4], PDPT + PRESENT_WRITABLE
    mov dword ptr [PDPT], PD + PRESENT_WRITABLE
    mov edi, PD
    mov eax, PAGE_2M + PRESENT_WRITABLE
    mov ecx, 512
fill:
    mov [edi], eax
    add edi, 8
    add eax, 0x200000
    loop fill

    mov eax, cr4
    or eax, CR4_PAE
    mov cr4, eax
    mov eax, PML4
    mov cr3, eax
    mov ecx, EFER
    rdmsr
    or eax, EFER_LME
    wrmsr
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    jmp CODE64:long

    .code64
long:
    PRINT 'L'
    PRINT '\n'
    mov rax, 0x1122334455667788     # only 64-bit mode has this
    cmp rax, rax                    # leaves every flag defined
halt:
    hlt
    jmp halt

    .balign 8, 0
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # 32-bit code, flat
    .quad 0x00cf93000000ffff        # data, flat
    .quad 0x00af9b000000ffff        # 64-bit code
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
