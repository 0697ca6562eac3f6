# Starts the other vCPUs one by one; all of them count together, which only a real LOCK gets right.
# Then each does something else, for as long as it is let.
# mode: protected

# At 0x6000 the program that runs this says how many vCPUs to start, at 0x6004 whether to go on after
# counting (with 2, all but the first write to a port); else it ends with 0x21 on port 0xf4. 0x6008 is the count, 0x600c the number of
# vCPUs that have begun, 0x6010 of those that have done counting, and from 0x6020 on there is a word
# for each that grows while it does something (not for one that halts).

    .intel_syntax noprefix
    .code32

    .set STARTED, 0x6000
    .set GO_ON, 0x6004
    .set COUNT, 0x6008
    .set BEGUN, 0x600c
    .set DONE, 0x6010
    .set ALIVE, 0x6020
    .set AP_CODE, 0x8000
    .set ROUNDS, 2000

    .set LAPIC, 0xfee00000
    .set SVR, 0xf0
    .set ICR_LOW, 0x300
    .set ICR_HIGH, 0x310
    .set INIT, 0x4500
    .set STARTUP, 0x4600
    .set UNUSED_PORT, 0x80

    .globl start
start:
    mov esi, offset ap_start
    mov edi, AP_CODE
    mov ecx, offset ap_end - ap_start
    rep movsb
    mov ebx, LAPIC
    mov dword ptr [ebx + SVR], 0x1ff
    mov ebp, 1
next:
    cmp ebp, [STARTED]
    ja count
    mov eax, ebp
    shl eax, 24
    mov [ebx + ICR_HIGH], eax
    mov dword ptr [ebx + ICR_LOW], INIT
    mov [ebx + ICR_HIGH], eax
    mov dword ptr [ebx + ICR_LOW], STARTUP + (AP_CODE >> 12)
wait:
    pause
    cmp [BEGUN], ebp
    jb wait
    inc ebp
    jmp next

count:
    mov ecx, ROUNDS
1:  lock inc dword ptr [COUNT]
    dec ecx
    jnz 1b
2:  pause
    mov eax, [DONE]
    cmp eax, [STARTED]
    jb 2b
    cmp dword ptr [GO_ON], 0
    jne 3f
    mov al, 0x21
    out 0xf4, al
3:  inc dword ptr [ALIVE]           # this one reads the LAPIC
    mov eax, [ebx + SVR]
    jmp 3b

    .code16
ap_start:
    cli
    xor ax, ax
    mov ds, ax
    mov ebp, 1
    lock xadd [BEGUN], ebp
    inc ebp                         # its number
    mov ecx, ROUNDS
1:  lock inc dword ptr [COUNT]
    dec ecx
    jnz 1b
    lock inc dword ptr [DONE]
    cmp dword ptr [GO_ON], 2
    je writes
    cmp ebp, 2
    jb spins
    je writes
halts:
    hlt
    jmp halts
spins:
    inc dword ptr [ALIVE + 4]
    jmp spins
writes:
    out UNUSED_PORT, al
    inc dword ptr [ALIVE + 8]
    jmp writes
ap_end:
