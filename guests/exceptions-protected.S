# Makes exceptions in 32-bit protected mode, and logs what their handlers find on the stack.
# mode: protected

    .include "exceptions-protected.inc"

    SETUP

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
    # But not behind MOV SS and POP SS: it comes behind the next instruction.
2:  EXPECT 1f, 2f
    mov ecx, DATA
    pushfd
    or dword ptr [esp], SINGLE_STEP
    popfd
    mov ss, ecx
    nop
1:  nop
2:  EXPECT 1f, 2f
    push DATA
    pushfd
    or dword ptr [esp], SINGLE_STEP
    popfd
    pop ss
    nop
1:  nop
2:  and byte ptr [gate_11 + 5], 0x7f
    EXPECT 1f, 2f
    mov eax, ABSENT
1:  mov ds, eax                     # no gate for #NP, while #NP is delivered: #DF
2:  or byte ptr [gate_11 + 5], 0x80

    # Ring 3, and back to the stack of the TSS.
    ENTER_USER user
user:
    EXPECT 1f, 2f
1:  cli                             # #GP(0)
2:  EXPECT 1f, 2f
1:  mov al, [SUPERVISOR_PAGE + 7]   # #PF: present, user
2:  EXPECT 1f, 2f
1:  mov [SUPERVISOR_PAGE + 7], al   # #PF: present, write, user
2:  EXPECT 1f, 2f
1:  mov al, [ABSENT_PAGE]           # #PF: user
2:  EXPECT 1f, 2f
1:  ud2
2:  EXPECT_LEAVE 1f, halt
1:  hlt                             # #GP(0)

    TABLES
