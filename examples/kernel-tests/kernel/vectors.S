# Interrupts: each vector pushes its number, and an error code where the processor does not, saves the
# registers, and calls interrupt(struct frame *).

    .text
common:
    pushq %rax
    pushq %rbx
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %rbp
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    movq %rsp, %rdi
    call interrupt
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rbp
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rbx
    popq %rax
    addq $16, %rsp
    iretq

    .altmacro
    .macro vector number
vector\number:
    .if \number != 8 && \number != 17 && (\number < 10 || \number > 14)
    pushq $0
    .endif
    pushq $\number
    jmp common
    .endm

    .set n, 0
    .rept 48
    vector %n
    .set n, n + 1
    .endr

    .macro entry number
    .quad vector\number
    .endm

    .section .rodata
    .balign 8
    .globl vectors
vectors:
    .set n, 0
    .rept 48
    entry %n
    .set n, n + 1
    .endr

# task_switch(uint64_t *save, uint64_t load): from one task's stack to another one's.
    .text
    .globl task_switch
task_switch:
    pushfq
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    popfq
    ret

# Where a task begins: its function is in rbx, its argument in r12.
    .globl task_start
task_start:
    movq %r12, %rdi
    call *%rbx
    call task_exit

    .section .note.GNU-stack, "", @progbits
