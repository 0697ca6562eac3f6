# The way to 64-bit code: a loader enters at `start` in 32-bit protected mode (PVH), as vmexit does.

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18                  # sizes of name and entry; XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start

    .section .text.boot, "ax"
    .code32
    .globl start
start:
    cld
    movl $boot_stack_end, %esp

    # The first GiB is mapped to itself, with pages of 2 MiB.
    movl $boot_pdpt + 3, boot_pml4
    movl $boot_pd + 3, boot_pdpt
    movl $boot_pd, %edi
    movl $0x83, %eax                # present, writable, large
    movl $512, %ecx
1:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    decl %ecx
    jnz 1b

    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x20, %eax                 # PAE
    movl %eax, %cr4
    movl $0xc0000080, %ecx          # EFER
    rdmsr
    orl $0x100, %eax                # LME
    wrmsr
    movl %cr0, %eax
    orl $0x80010000, %eax           # PG, and WP: read-only is so for the kernel, too
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $start64

    .code64
start64:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    movl %eax, %ss
    xorl %ebp, %ebp                 # backtraces end here
    call kernel_main
    hlt

# Where a function returns to that a test has called: it stops the machine at this port.
    .globl call_done
call_done:
    outb %al, $0x80
    jmp call_done

    .section .rodata
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 64-bit code
    .quad 0x00cf93000000ffff        # data
gdt_pointer:
    .word . - gdt - 1
    .quad gdt

    .section .bss
    .balign 4096
    .globl boot_pml4
boot_pml4:
    .skip 4096
boot_pdpt:
    .skip 4096
boot_pd:
    .skip 4096
boot_stack:
    .skip 16384
    .globl boot_stack_end
boot_stack_end:

    .section .note.GNU-stack, "", @progbits
