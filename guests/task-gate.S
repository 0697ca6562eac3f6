# A double fault in 32-bit protected mode for want of a stack, handled by a task of its own.
# mode: protected

# The task logs a record of ten 32-bit words, at LOG: error code, EIP less `expected`, CS, EFLAGS,
# ESP and SS of the task that it interrupts, by that one's TSS; the link to that, TR, EFLAGS and
# CR0.TS of its own. Then the interrupted task goes on at `next`, with a stack.

    .include "exceptions-protected.inc"

    .set TSS_ESP, 0x38              # offsets in a TSS
    .set TSS_CR3, 0x1c
    .set TSS_EIP, 0x20
    .set TSS_FLAGS, 0x24
    .set TSS_CS, 0x4c
    .set TSS_SS, 0x50
    .set TASK_STACK, 0xc000
    .set CR0_TS, 1 << 3

    SETUP

    mov dword ptr [tss + TSS_CR3], DIRECTORY    # leaving a task does not store it
    mov eax, offset fault_task
    mov word ptr [spare + 2], ax
    mov word ptr [spare], 0x67
    mov byte ptr [spare + 5], 0x89
    mov dword ptr [gate_8], SPARE << 16
    mov dword ptr [gate_8 + 4], 0x8500      # a task gate

    EXPECT 1f, 2f
    mov esp, ABSENT_PAGE + 0x800
1:  push eax                        # #PF, for which there is no stack either: #DF
2:  push 0x1234                     # there is a stack again
    pop [LOG - 8]
    str [LOG - 12]
    mov eax, cr2
    mov [LOG - 16], eax
    jmp halt

task:
    mov edi, LOG
    pop eax                         # error code
    stosd
    mov eax, [tss + TSS_EIP]
    sub eax, [expected]
    stosd
    mov eax, [tss + TSS_CS]
    stosd
    mov eax, [tss + TSS_FLAGS]
    stosd
    mov eax, [tss + TSS_ESP]
    stosd
    mov eax, [tss + TSS_SS]
    stosd
    movzx eax, word ptr [fault_task]
    stosd
    str eax
    stosd
    pushfd
    pop eax
    stosd
    mov eax, cr0
    and eax, CR0_TS
    stosd
    mov eax, [next]
    mov [tss + TSS_EIP], eax
    mov dword ptr [tss + TSS_ESP], STACK
    iretd                           # NT is set, so back to the other task

    .balign 8, 0
fault_task:
    .fill 7, 4, 0                   # link, stacks
    .long DIRECTORY                 # CR3
    .long task, 2, 0, 0, 0, 0, TASK_STACK, 0, 0, 0
    .long DATA, CODE, DATA, DATA, DATA, DATA, 0
    .word 0, 0x68

    TABLES
