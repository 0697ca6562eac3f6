# A multiboot 1 kernel: prints on the serial port who loaded it, its command line, how much memory
# there is below and above 1 MiB (KiB), how many processors (by fw_cfg), the memory map, and each
# module with its string and its content. Then it writes 0x10 to the debug-exit port; 0x20 if it was not entered as the
# specification says, 0x21 if something that it was promised is missing, 0x22 if its bss is not 0.
# mode: multiboot

    .intel_syntax noprefix
    .code32

    .set MAGIC, 0x1badb002
    .set FLAGS, 1 << 0 | 1 << 1 | 1 << 16   # pages, memory, addresses
    .set LOADED, 0x2badb002
    .set WANTED, 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    .set STACK, 0x1000

    .set COM1, 0x3f8
    .set LINE_STATUS, COM1 + 5
    .set CAN_TRANSMIT, 0x20
    .set DEBUG_EXIT, 0xf4
    .set FW_CFG, 0x510
    .set NB_CPUS, 5

    # Offsets in the information.
    .set MEM_LOWER, 4
    .set MEM_UPPER, 8
    .set CMDLINE, 16
    .set MODS_COUNT, 20
    .set MODS_ADDR, 24
    .set MMAP_LENGTH, 44
    .set MMAP_ADDR, 48
    .set NAME, 64

    .balign 4
header:
    .long MAGIC, FLAGS, -(MAGIC + FLAGS)
    .long header, header, loaded, bss_end, start

    .globl start
start:
    cmp eax, LOADED
    mov al, 0x20
    jne leave
    mov eax, cr0                    # protected mode, no paging
    and eax, 0x80000001
    cmp eax, 1
    mov al, 0x20
    jne leave
    mov edi, offset loaded
    mov ecx, offset bss_end
    sub ecx, edi
    xor eax, eax
    repe scasb
    mov al, 0x22
    jne leave
    mov esp, offset loaded + STACK
    pushf
    pop eax
    test eax, 1 << 17 | 1 << 9      # VM, IF
    mov al, 0x20
    jnz leave
    mov eax, [ebx]
    and eax, WANTED
    cmp eax, WANTED
    mov al, 0x21
    jne leave

    mov esi, offset by
    call print
    mov esi, [ebx + NAME]
    call print
    mov esi, offset command
    call print
    mov esi, [ebx + CMDLINE]
    call print
    mov esi, offset memory
    call print
    mov eax, [ebx + MEM_LOWER]
    call print_hex
    mov al, ' '
    call put
    mov eax, [ebx + MEM_UPPER]
    call print_hex

    mov esi, offset processors
    call print
    mov eax, NB_CPUS
    mov dx, FW_CFG
    out dx, ax
    inc dx
    in al, dx
    mov ah, al
    in al, dx
    xchg al, ah
    call print_hex

    mov ebp, [ebx + MMAP_ADDR]
    mov edi, ebp
    add edi, [ebx + MMAP_LENGTH]
range:
    cmp ebp, edi
    jae modules
    mov esi, offset map
    call print
    mov eax, [ebp + 8]              # base, length, type
    call print_hex
    mov eax, [ebp + 4]
    call print_hex
    mov al, ' '
    call put
    mov eax, [ebp + 16]
    call print_hex
    mov eax, [ebp + 12]
    call print_hex
    mov al, ' '
    call put
    mov eax, [ebp + 20]
    call print_hex
    add ebp, [ebp]                  # the size does not count itself
    add ebp, 4
    jmp range

modules:
    mov ebp, [ebx + MODS_ADDR]
    mov edi, [ebx + MODS_COUNT]
module:
    sub edi, 1
    jc done
    mov esi, offset with
    call print
    mov eax, [ebp]
    call print_hex
    mov al, ' '
    call put
    mov esi, [ebp + 8]
    call print
    mov esi, offset colon
    call print
    mov esi, [ebp]
content:
    cmp esi, [ebp + 4]
    jae next
    lodsb
    call put
    jmp content
next:
    add ebp, 16
    jmp module

done:
    mov al, '\n'
    call put
    mov al, 0x10
leave:
    out DEBUG_EXIT, al
    hlt
    jmp leave

# Prints the string at ESI. Changes EAX, EDX, ESI.
print:
    lodsb
    test al, al
    jz 1f
    call put
    jmp print
1:  ret

# Prints the 8 digits of EAX. Changes EAX, ECX, EDX.
print_hex:
    mov ecx, 8
1:  rol eax, 4
    push eax
    and al, 0xf
    cmp al, 10
    sbb al, 0x69                    # '0' to '9', 'A' to 'F', by DAS
    das
    call put
    pop eax
    loop 1b
    ret

# Prints AL. Changes EAX, EDX.
put:
    mov ah, al
    mov dx, LINE_STATUS
1:  in al, dx
    test al, CAN_TRANSMIT
    jz 1b
    mov al, ah
    mov dx, COM1
    out dx, al
    ret

by:
    .asciz "loader: "
command:
    .asciz "\ncommand line: "
memory:
    .asciz "\nmemory: "
processors:
    .asciz "\nprocessors: "
map:
    .asciz "\nmap: "
with:
    .asciz "\nmodule: "
colon:
    .asciz ": "
