# Makes faults of each kind in 64-bit mode, and logs what their handlers find on the stack.
# mode: long

    .include "exceptions-long.inc"

    SETUP

    # Faults, with RIP at the instruction.
    EXPECT 1f, 2f
    xor edx, edx
    xor ecx, ecx
1:  div ecx                         # #DE
2:  EXPECT 1f, 2f
1:  ud2                             # #UD
2:  EXPECT 1f, 2f
    stc
    mov rax, NOT_CANONICAL
1:  mov al, [rax]                   # #GP(0), carry set
2:  EXPECT 1f, 2f
    clc
    mov eax, 0x1230
1:  mov ds, eax                     # #GP(selector): beyond the GDT
2:  EXPECT 1f, 2f
    mov eax, ABSENT
1:  mov ds, eax                     # #NP(selector)
2:  EXPECT 1f, 2f
1:  mov ss, eax                     # #SS(selector)

    # The frame is aligned to 16 bytes, and RSP in it is as it was.
2:  mov esp, STACK - 4
    EXPECT 1f, 2f
1:  ud2
2:  mov esp, STACK

    # Page faults, on a stack of their own: absent, write, read-only, no-execute.
    EXPECT 1f, 2f
    mov rbx, ABSENT_PAGE + 0x123
1:  mov al, [rbx]
2:  EXPECT 1f, 2f
1:  mov [rbx], al
2:  EXPECT 1f, 2f
    mov ebx, READ_ONLY_PAGE + 8
1:  mov [rbx], al
2:  mov r13d, NO_EXECUTE_PAGE
    lea r14, [rip + 2f]
    mov ebx, NO_EXECUTE_PAGE
    jmp rbx

    # A trap: single step comes behind the instruction.
2:  EXPECT 1f, 2f
    pushfq
    or dword ptr [rsp], SINGLE_STEP
    popfq
    nop
1:  nop
2:  mov esp, STACK

    # A fault while a fault is delivered: #NP for the gate of vector 11 itself makes #DF.
    and byte ptr [gate_11 + 5], 0x7f
    EXPECT 1f, 2f
    mov eax, ABSENT
1:  mov ds, eax
2:  or byte ptr [gate_11 + 5], 0x80

    # No stack for the frame: #UD becomes #SS, and that again, so #DF. So does #PF without its own.
    EXPECT 1f, 2f
    mov rsp, NOT_CANONICAL + 0x800
1:  ud2
2:  mov esp, STACK
    mov rbx, ABSENT_PAGE + 0x800
    mov [ist_1], rbx
    EXPECT 1f, 2f
1:  mov al, [rbx]
2:  mov qword ptr [ist_1], IST1

    # To ring 3: each exception comes back to the stack of the TSS.
    ENTER_USER user, back
user:
    EXPECT 1f, 2f
1:  cli                             # #GP(0): IOPL is 0
2:  EXPECT 1f, 2f
1:  ud2
2:  EXPECT 1f, 2f
    mov ebx, SUPERVISOR_PAGE + 0x40
1:  mov al, [rbx]                   # #PF: present, user
2:  EXPECT 1f, 2f
1:  mov [rbx], al                   # #PF: present, write, user
2:  mov rbx, ABSENT_PAGE + 0x456
    EXPECT 1f, 2f
1:  mov [rbx], al                   # #PF: write, user
2:  LEAVE_USER

back:
    hlt
    jmp back

    TABLES
