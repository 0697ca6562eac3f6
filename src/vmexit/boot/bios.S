# A small BIOS in real mode: what GRUB and Linux's setup code ask one for, with a serial console.
#
# The screen of INT 10h is the terminal at COM1, and so is the keyboard of INT 16h. There are no
# drives and no video card, and services that are not here say so as a BIOS does. Numbers and
# registers of each service are those of Ralf Brown's Interrupt List (RBIL), which the comments name.
#
# real_mode.py puts the image at 0xff000, fills in `parameters` and starts at its first byte.
# Build it so, as the test does:
# as --32 -o bios.o bios.S && ld -m elf_i386 -Ttext 0 -e 0 --oformat binary -o bios.bin bios.o

    .intel_syntax noprefix
    .code16

    .set SEGMENT, 0xff00
    .set BDA, 0x40                      # the segment of the BIOS data area (RBIL, MEMORY.LST)
    .set BDA_COM1, 0x00
    .set BDA_EQUIPMENT, 0x10
    .set BDA_BASE_MEMORY, 0x13
    .set BDA_MODE, 0x49
    .set BDA_CURSOR, 0x50               # column, row
    .set BDA_CURSOR_SHAPE, 0x60
    .set BDA_TICKS, 0x6c
    .set BDA_MIDNIGHT, 0x70
    .set TICKS_A_DAY, 0x1800b0
    .set COLUMNS, 80
    .set ROWS, 25
    .set COM1, 0x3f8
    .set COM1_LSR, COM1 + 5
    .set CARRY, 0x01
    .set ZERO, 0x40
    .set ESC, 0x1b

    # What `begin` leaves at SS:BP. A service changes there what it returns in registers.
    .set SI_, 8
    .set BP_, 12
    .set BL_, 20; .set BH_, BL_ + 1
    .set DL_, 24; .set DH_, DL_ + 1
    .set CL_, 28; .set CH_, CL_ + 1
    .set AL_, 32; .set AH_, AL_ + 1
    .set FLAGS_, 40

    .macro begin
    pushad
    push ds
    push es
    mov bp, sp
    push BDA
    pop ds
    cld
    .endm

    # To the services by AH; any other goes on behind it.
    .macro serve number, service, more:vararg
    cmp ah, \number
    je \service
    .ifnb \more
    serve \more
    .endif
    .endm

    .macro print characters:vararg
    .irp character, \characters
    mov al, \character
    call send
    .endr
    .endm

# Power-on: interrupt vectors, BIOS data area, devices; then to what is booted, all registers as
# they were. Interrupts stay off: boot.rst wants it, and GRUB switches them on by itself.
post:
    begin
    xor di, di
    mov es, di
    mov cx, 256
    mov eax, SEGMENT << 16 + nothing - post
    rep stosd
    mov si, offset vectors
1:  cs lodsw                       # a number, and where it leads to
    mov di, ax
    shl di, 2
    cs movsw
    cmp si, offset vectors_end
    jb 1b
1:  cs lodsw                       # a port and a byte for it
    mov dx, ax
    cs lodsb
    out dx, al
    cmp si, offset ports_end
    jb 1b
    # The columns stay 0: by them Linux sees that there is no screen in memory.
    mov word ptr [BDA_COM1], COM1
    mov byte ptr [BDA_MODE], 3
    mov word ptr [BDA_CURSOR_SHAPE], 0x0607
    mov word ptr [BDA_EQUIPMENT], 0x0202  # a serial port, a coprocessor; no floppy, no video card
    pop es
    pop ds
    popad
    jmp dword ptr cs:[entry]

vectors:
    .word 0x08, timer, 0x10, video, 0x11, equipment, 0x12, base_memory, 0x13, disk, 0x15, system
    .word 0x16, keyboard, 0x18, no_boot, 0x19, no_boot, 0x1a, clock
    .word 0x09, master, 0x0a, master, 0x0b, master, 0x0c, master, 0x0d, master, 0x0e, master
    .word 0x0f, master, 0x70, slave, 0x71, slave, 0x72, slave, 0x73, slave, 0x74, slave
    .word 0x75, slave, 0x76, slave, 0x77, slave
vectors_end:                            # and `ports`
    .macro set port, values:vararg
    .irp value, \values
    .word \port
    .byte \value
    .endr
    .endm
    # 8259A: ICW1 to 4, vectors from 0x08 and 0x70, and all masked but the timer.
    set 0x20, 0x11
    set 0x21, 0x08, 0x04, 0x01, 0xfe
    set 0xa0, 0x11
    set 0xa1, 0x70, 0x02, 0x01, 0xff
    # 8254: counter 0 as rate generator, 65536 steps, so 18.2 ticks a second.
    set 0x43, 0x34
    set 0x40, 0x00, 0x00
    # MC146818, register B: BCD, 24 hours, no interrupts.
    set 0x70, 0x0b
    set 0x71, 0x02
    # 16550A: no interrupts, FIFO, 8 bits, DTR and RTS.
    set COM1 + 1, 0x00
    set COM1 + 2, 0x01
    set COM1 + 3, 0x03
    set COM1 + 4, 0x03
ports_end:

# How services end.

refuse:                                 # RBIL, INT 15h: AH 86h is "function not supported"
    mov byte ptr [bp + AH_], 0x86
refuse_as_it_is:
    or byte ptr [bp + FLAGS_], CARRY
    jmp leave
succeed:
    mov byte ptr [bp + AH_], 0
succeed_as_it_is:
    and byte ptr [bp + FLAGS_], ~CARRY
leave:
    pop es
    pop ds
    popad
nothing:                                # any other interrupt changes no register
    iret

# Interrupts of devices that nobody has taken over, and what ends the others.
slave:
    push ax
    mov al, 0x20
    out 0xa0, al                        # EOI
    jmp 1f
master:
    push ax
1:  mov al, 0x20
    out 0x20, al
    pop ax
    iret

# RBIL, INT 08h: counts the ticks of the day, and calls INT 1Ch.
timer:
    begin
    mov eax, [BDA_TICKS]
    inc eax
    cmp eax, TICKS_A_DAY
    jb 1f
    xor eax, eax
    mov byte ptr [BDA_MIDNIGHT], 1
1:  mov [BDA_TICKS], eax
    int 0x1c
    mov al, 0x20
    out 0x20, al
    jmp leave

# RBIL, INT 11h, "get equipment list"; INT 12h, "get memory size" in KiB.
equipment:
    begin
    mov ax, [BDA_EQUIPMENT]
    jmp 1f
base_memory:
    begin
    mov ax, [BDA_BASE_MEMORY]
1:  mov [bp + AL_], ax
    jmp leave

# RBIL, INT 13h: there are no drives, so the answer to everything is 01h in AH.
disk:
    begin
    mov byte ptr [bp + AH_], 1
    jmp refuse_as_it_is

# RBIL, INT 18h, "diskless boot hook", and INT 19h, "bootstrap loader": the machine ends.
no_boot:
    mov si, offset no_boot_text
1:  cs lodsb
    call send
    cmp si, offset restart
    jb 1b
    jmp restart
no_boot_text:
    .ascii "\r\nNo bootable device\r\n"
restart:                                # by the reset control register, or by the 8042
    mov dx, 0xcf9
    mov al, 0x06
    out dx, al
    mov al, 0xfe
    out 0x64, al
1:  cli
    hlt
    jmp 1b

# INT 10h. Any other service changes nothing, by which callers see that it is not there.
video:
    begin
    serve 0x01, set_cursor_shape, 0x02, set_cursor, 0x03, get_cursor, 0x06, scroll, 0x07, scroll
    serve 0x09, write_characters, 0x0a, write_characters, 0x0e, teletype, 0x0f, get_mode
    serve 0x13, write_string
    jmp leave

# RBIL, INT 10h/AH=01h, "set text-mode cursor shape": kept for AH=03h.
set_cursor_shape:
    mov [BDA_CURSOR_SHAPE], cx
    jmp leave

# RBIL, INT 10h/AH=02h, "set cursor position": DH row, DL column.
set_cursor:
    call move_cursor
    jmp leave

# RBIL, INT 10h/AH=03h, "get cursor position and size".
get_cursor:
    mov ax, [BDA_CURSOR]
    mov [bp + DL_], ax
    mov ax, [BDA_CURSOR_SHAPE]
    mov [bp + CL_], ax
    jmp leave

# RBIL, INT 10h/AH=06h and 07h, "scroll window": the whole screen can be cleared (AL=0), no more.
scroll:
    or cl, al
    test cx, cx
    jnz leave
    call clear
    jmp leave

# RBIL, INT 10h/AH=09h and 0Ah, "write character (and attribute)": CX times; the cursor stays.
write_characters:
    call to_cursor
    mov bx, dx
    inc bx                              # where the terminal is afterwards, as far as is known
    cmp cx, 1
    jb leave
    ja 1f
    cmp bl, COLUMNS
    jb 2f
1:  mov bx, 0xffff
    cmp cx, COLUMNS * ROWS
    jb 2f
    mov cx, COLUMNS * ROWS
    cmp al, ' '
    jne 2f
    call clear
    jmp leave
2:  call send_glyph
    loop 2b
    mov cs:[terminal], bx
    jmp leave

# RBIL, INT 10h/AH=0Eh, "teletype output": AL.
teletype:
    call type
    jmp leave

# RBIL, INT 10h/AH=0Fh, "get current video mode": 80 columns, mode 3, page 0.
get_mode:
    mov word ptr [bp + AL_], COLUMNS << 8 | 3
    mov byte ptr [bp + BH_], 0
    jmp leave

# RBIL, INT 10h/AH=13h, "write string": CX characters at ES:BP, at row DH, column DL. AL bit 0:
# the cursor moves; bit 1: an attribute follows each character.
write_string:
    mov bl, al
    push [BDA_CURSOR]
    call move_cursor
    mov si, [bp + BP_]
    jcxz 3f
1:  lodsb es:[si]
    call type
    test bl, 2
    jz 2f
    inc si
2:  loop 1b
3:  pop ax
    test bl, 1
    jnz leave
    mov [BDA_CURSOR], ax
    jmp leave

# The cursor to row DH, column DL, as far as there are such.
move_cursor:
    cmp dh, ROWS
    jb 1f
    mov dh, ROWS - 1
1:  cmp dl, COLUMNS
    jb 2f
    mov dl, COLUMNS - 1
2:  mov [BDA_CURSOR], dx
    ret

# AL as a teletype prints it: BEL, BS, LF and CR are not shown; behind the last column is a new line.
type:
    push dx
    call to_cursor
    cmp al, 0x07
    je 4f
    cmp al, 0x08
    je 1f
    cmp al, 0x0d
    je 2f
    cmp al, 0x0a
    je 3f
    call send_glyph
    inc dl
    cmp dl, COLUMNS
    jb 5f
    print 0x0d
    mov dl, 0
    mov al, 0x0a
    jmp 3f
1:  sub dl, 1
    adc dl, 0                           # unless it was 0
    jmp 4f
2:  mov dl, 0
    jmp 4f
3:  cmp dh, ROWS - 1
    adc dh, 0                           # the last row scrolls
4:  call send
5:  mov [BDA_CURSOR], dx
    mov cs:[terminal], dx
    pop dx
    ret

# The terminal's cursor to ours, which goes to DX: ESC [ row ; column H (ECMA-48, CUP).
to_cursor:
    mov dx, [BDA_CURSOR]
    cmp dx, cs:[terminal]
    je 1f
    push ax
    print ESC, '['
    mov al, dh
    call send_place
    print ';'
    mov al, dl
    call send_place
    print 'H'
    mov cs:[terminal], dx
    pop ax
1:  ret

# AL + 1 in two digits.
send_place:
    inc al
    aam
    add ax, 0x3030
    xchg al, ah
    call send
    xchg al, ah
    jmp send

# ESC [ 2 J (ECMA-48, ED).
clear:
    print ESC, '[', '2', 'J'
    mov word ptr cs:[terminal], 0xffff
    ret

# AL, a character of code page 437, as ASCII that looks like it.
send_glyph:
    push ax
    push si
    mov si, offset glyphs
1:  cmp al, cs:[si]
    je 2f
    add si, 2
    cmp si, offset glyphs_end
    jb 1b
    cmp al, ' '
    jb 2f
    cmp al, 0x7f
    jb 3f
2:  mov al, cs:[si + 1]
3:  call send
    pop si
    pop ax
    ret
glyphs:
    .byte 0x00, ' ', 0xff, ' ', 0x18, '^', 0x19, 'v', 0x1a, '>', 0x1b, '<', 0xc4, '-'
    .byte 0xcd, '-', 0xb3, '|', 0xba, '|', 0xda, '+', 0xbf, '+', 0xc0, '+', 0xd9, '+'
glyphs_end:
    .byte 0, '?'                        # any other

# AL to COM1. If that does not get ready the byte is sent anyway: a guest must not hang there.
send:
    push ax
    push cx
    push dx
    mov ah, al
    mov cx, 0x1000
    mov dx, COM1_LSR
1:  in al, dx
    test al, 0x20
    loopz 1b
    mov al, ah
    mov dx, COM1
    out dx, al
    pop dx
    pop cx
    pop ax
    ret

# INT 16h. 10h to 12h, for keyboards with 101 keys, do the same as 00h to 02h.
keyboard:
    begin
    and ah, ~0x10
    serve 0x00, read_key, 0x01, check_key, 0x02, get_shift
    jmp leave

# RBIL, INT 16h/AH=00h, "get keystroke": waits for one. AH scan code, AL character.
read_key:
    sti                                 # the clock goes on
    call poll_key
    jz read_key
    mov word ptr cs:[key], 0
    mov [bp + AL_], ax
    jmp leave

# RBIL, INT 16h/AH=01h, "check for keystroke": it stays; the zero flag tells that there is none.
check_key:
    or byte ptr [bp + FLAGS_], ZERO
    call poll_key
    jz leave
    and byte ptr [bp + FLAGS_], ~ZERO
    mov [bp + AL_], ax
    jmp leave

# RBIL, INT 16h/AH=02h, "get shift flags": a terminal tells of none.
get_shift:
    mov word ptr [bp + AL_], 0
    jmp leave

# The key that waits in AX; the zero flag if there is none. Characters have the scan code 0, as if
# typed by Alt and the keypad.
poll_key:
    mov ax, cs:[key]
    test ax, ax
    jnz 9f
    mov cx, 1
    call receive
    jz 9f
    cmp al, ESC
    je 1f
    mov si, offset keys
    call find_key
    jz 8f
    cmp al, 0x80                        # a character; there is no UTF-8 here
    jb 8f
    jmp 7f
1:  mov cx, 0x4000                      # what follows a key's ESC comes at once: some 10 ms
    call receive
    mov ax, 0x011b
    jz 8f                               # the key ESC itself
    call receive                        # behind [ or O
    jz 7f
    cmp al, '9'
    ja 2f
    mov ah, al
    call receive                        # the ~ behind a digit
    mov al, ah
2:  mov si, offset sequences
    call find_key
    jz 8f
7:  xor ax, ax                          # none that we know
8:  mov cs:[key], ax
    test ax, ax
9:  ret

# AL in a table: the zero flag, and the key in AX. Otherwise AH is 0.
find_key:
    mov ah, 0
1:  cmp al, cs:[si]
    jne 2f
    mov ax, cs:[si + 1]
    ret
2:  add si, 3
    cmp byte ptr cs:[si], 0
    jne 1b
    test si, si
    ret

    .macro on character, key, more:vararg
    .byte \character
    .word \key
    .ifnb \more
    on \more
    .endif
    .endm
keys:       # Enter: a pipe sends LF, a terminal CR. Backspace: terminals send either. Tab.
    on 0x0a, 0x1c0d, 0x0d, 0x1c0d, 0x08, 0x0e08, 0x7f, 0x0e08, 0x09, 0x0f09
    .byte 0
sequences:  # up, down, right, left, Home, End; Home, Delete, End, Page Up, Page Down
    on 'A', 0x4800, 'B', 0x5000, 'C', 0x4d00, 'D', 0x4b00, 'H', 0x4700, 'F', 0x4f00
    on '1', 0x4700, '3', 0x5300, '4', 0x4f00, '5', 0x4900, '6', 0x5100
    .byte 0

# A byte from COM1 in AL, looked for CX times; the zero flag if there is none.
receive:
    push cx
    push dx
    mov dx, COM1_LSR
1:  in al, dx
    inc al                              # all ones: there is no port
    jz 2f
    dec al
    test al, 0x01
    loopz 1b
    jz 2f
    mov dx, COM1
    in al, dx                           # leaves the flags
2:  pop dx
    pop cx
    ret

# INT 15h.
system:
    begin
    cmp ax, 0xe820
    je memory_map
    cmp ax, 0xe801
    je memory_size
    serve 0x24, a20, 0x87, move_block, 0x88, extended_memory
    jmp refuse

# RBIL, INT 15h/AX=2400h to 2403h: the A20 gate is open, and nothing closes it.
a20:
    cmp al, 0x01
    je succeed
    cmp al, 0x02
    je 1f
    cmp al, 0x03
    jne refuse
    mov word ptr [bp + BL_], 0x03       # by the keyboard controller and by port 92h, too
    jmp succeed
1:  mov byte ptr [bp + AL_], 1
    jmp succeed

# RBIL, INT 15h/AH=87h, "copy extended memory": CX words; at ES:SI a GDT whose third and fourth
# descriptor are source and destination. Status 02h is "exception": too much, or beyond a limit.
move_block:
    cmp cx, 1
    jb succeed
    mov byte ptr [bp + AH_], 0x02
    cmp cx, 0x8000
    ja refuse_as_it_is
    cmp si, 0x10000 - 0x20
    ja refuse_as_it_is
    movzx ecx, cx
    lea eax, [ecx * 2 - 1]
    cmp es:[si + 0x10], ax
    jb refuse_as_it_is
    cmp es:[si + 0x18], ax
    jb refuse_as_it_is
    mov edi, es:[si + 0x1a]             # base 0 to 23, and the access byte
    shl edi, 8
    movzx eax, byte ptr es:[si + 0x1f]  # base 24 to 31
    or edi, eax
    ror edi, 8
    movzx eax, byte ptr es:[si + 0x17]
    mov esi, es:[si + 0x12]
    shl esi, 8
    or esi, eax
    ror esi, 8
    lgdtd cs:[gdt_register]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp 0x08:1f
1:  mov ax, 0x10
    mov ds, ax
    mov es, ax
    addr32 rep movsw
    mov ax, 0x18                        # limits as in real mode
    mov ds, ax
    mov es, ax
    mov eax, cr0
    and al, ~1
    mov cr0, eax
    jmp SEGMENT:succeed
    .balign 8
gdt:    # 08h: 16-bit code, here; 10h: data of 4 GiB; 18h: data of 64 KiB
    .quad 0, 0x00009b0ff000ffff, 0x00cf93000000ffff, 0x000093000000ffff
gdt_register:
    .word gdt_register - gdt - 1
    .long (SEGMENT << 4) + gdt

# RBIL, INT 15h/AH=88h, "get extended memory size": KiB from 1 MiB on.
extended_memory:
    mov ax, cs:[extended_kib]
    mov [bp + AL_], ax
    jmp succeed_as_it_is

# RBIL, INT 15h/AX=E801h: KiB from 1 MiB to 16 MiB, and pieces of 64 KiB above that.
memory_size:
    mov ax, cs:[below_16m]
    mov [bp + AL_], ax
    mov [bp + CL_], ax
    mov ax, cs:[above_16m]
    mov [bp + BL_], ax
    mov [bp + DL_], ax
    jmp succeed_as_it_is

# RBIL, INT 15h/AX=E820h, "get system memory map": EBX is the number of the entry, ES:DI a buffer
# of ECX bytes.
memory_map:
    cmp edx, 0x534d4150                 # "SMAP"
    jne refuse
    cmp ecx, 20
    jb refuse
    movzx eax, word ptr cs:[map_entries]
    cmp ebx, eax
    jae refuse
    cmp di, 0x10000 - 20
    ja refuse
    imul si, bx, 20
    add si, offset map
    mov cx, 10
    rep movs word ptr es:[di], word ptr cs:[si]
    inc bx
    cmp bx, ax
    jb 1f
    xor bx, bx                          # that was the last
1:  mov [bp + BL_], bx
    mov [bp + AL_], edx
    mov dword ptr [bp + CL_], 20
    jmp succeed_as_it_is

# INT 1Ah.
clock:
    begin
    serve 0x00, get_ticks, 0x01, set_ticks, 0x02, get_time, 0x04, get_date
    jmp refuse

# RBIL, INT 1Ah/AH=00h, "get system time": CX:DX ticks, here since power-on; AL midnight has passed.
get_ticks:
    mov eax, [BDA_TICKS]
    mov [bp + DL_], ax
    shr eax, 16
    mov [bp + CL_], ax
    mov al, 0
    xchg al, [BDA_MIDNIGHT]
    mov [bp + AL_], al
    jmp succeed

# RBIL, INT 1Ah/AH=01h, "set system time".
set_ticks:
    mov [BDA_TICKS], dx
    mov [BDA_TICKS + 2], cx
    mov byte ptr [BDA_MIDNIGHT], 0
    jmp succeed

    .macro cmos number, place, more:vararg
    mov al, \number
    call read_cmos
    mov [bp + \place], al
    .ifnb \more
    cmos \more
    .endif
    .endm

# RBIL, INT 1Ah/AH=02h, "get real-time clock time": BCD, CH hours, CL minutes, DH seconds.
get_time:
    call wait_clock
    cmos 0x04, CH_, 0x02, CL_, 0x00, DH_
    mov byte ptr [bp + DL_], 0          # no daylight saving time
    jmp succeed

# RBIL, INT 1Ah/AH=04h, "get real-time clock date": BCD, CH century, CL year, DH month, DL day.
get_date:
    call wait_clock
    cmos 0x32, CH_, 0x09, CL_, 0x08, DH_, 0x07, DL_
    jmp succeed

# Until the clock stays as it is for a while (MC146818, UIP). If there is none the service fails.
wait_clock:
    mov cx, 0x4000
1:  mov al, 0x0a
    call read_cmos
    test al, 0x80
    loopnz 1b
    jz 2f
    pop ax
    jmp refuse
2:  ret

# Register AL to AL.
read_cmos:
    out 0x70, al
    in al, 0x71
    ret

key:            .word 0                 # of the keyboard; 0 if there is none
terminal:       .word 0                 # where its cursor is: column, row; 0xffff unknown

# What real_mode.py fills in.
    .org 0xa00
parameters:
entry:          .word 0, 0              # IP, CS
extended_kib:   .word 0
below_16m:      .word 0
above_16m:      .word 0
map_entries:    .word 0
map:                                    # of 20 bytes each

# Where a processor starts after reset, and the model of the machine: an AT (RBIL, INT 15h/AH=C0h).
    .org 0xff0
    jmp SEGMENT:restart
    .org 0xffe
    .byte 0xfc, 0
