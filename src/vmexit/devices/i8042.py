"""The keyboard controller of a PC, with no keyboard: it resets the machine, and tells the truth.

Commands and bits are those of the IBM PC/AT and PS/2 technical references, keyboard controller.
What is sent to the keyboard is answered as the controller does when nothing at the other end takes
it: 0xfe, with the timeout bit in the status. There is no auxiliary port either, and drivers that
look for one by the loop-back command, the test or bit 5 of the command byte see that at once.
The A20 gate is always open, and its bit says so.
"""

import threading
from collections.abc import Callable

from vmexit.core.bus import State
from vmexit.core.irq import IrqLine
from vmexit.core.saved import Saved
from vmexit.devices.window import Window

DATA, COMMAND = 0, 1

STATUS_FULL, STATUS_SYSTEM, STATUS_COMMAND = 1 << 0, 1 << 2, 1 << 3
STATUS_UNLOCKED, STATUS_AUX, STATUS_TIMEOUT = 1 << 4, 1 << 5, 1 << 6

# The command byte, which is byte 0 of the controller's RAM.
KEYBOARD_INTERRUPT, AUX_INTERRUPT, SYSTEM = 1 << 0, 1 << 1, 1 << 2
KEYBOARD_OFF, AUX_OFF, TRANSLATE = 1 << 4, 1 << 5, 1 << 6
COMMAND_BYTE = KEYBOARD_INTERRUPT | SYSTEM | AUX_OFF | TRANSLATE  # as a BIOS leaves it

READ_RAM, WRITE_RAM, RAM_SIZE = 0x20, 0x60, 0x20
AUX_DISABLE, AUX_ENABLE, AUX_TEST, SELF_TEST, KEYBOARD_TEST = 0xA7, 0xA8, 0xA9, 0xAA, 0xAB
KEYBOARD_DISABLE, KEYBOARD_ENABLE, READ_INPUT_PORT = 0xAD, 0xAE, 0xC0
READ_OUTPUT_PORT, WRITE_OUTPUT_PORT = 0xD0, 0xD1
LOOP_KEYBOARD, LOOP_AUX, SEND_AUX, PULSE = 0xD2, 0xD3, 0xD4, 0xF0
_WITH_DATA = (WRITE_OUTPUT_PORT, LOOP_KEYBOARD, LOOP_AUX, SEND_AUX)

SELF_TEST_PASSED = 0x55
CLOCK_STUCK_HIGH = 0x02  # by the pull-up, as nothing is plugged in that would lower it
RESEND = 0xFE
INPUT_PORT_UNLOCKED = 1 << 7
# The output port: bit 0 low is a reset; 1 is A20, 4 and 5 the interrupts, 6 and 7 the clock and
# data line of the keyboard.
NO_RESET, A20, OUT_KEYBOARD, OUT_AUX, OUT_LINES = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 3 << 6


class I8042:
    """Register 0 is the data port, 1 the status and command port; `data` and `command` are views
    of one each, as port 0x61, which is between them, is another device's.

    Any vCPU may enter: one lock; the reset is asked for without it.
    """

    widths = (1,)

    def __init__(
        self, keyboard_irq: IrqLine, aux_irq: IrqLine, reset_machine: Callable[[], None]
    ) -> None:
        self._lines = keyboard_irq, aux_irq
        self._levels = [False, False]
        self._reset_machine = reset_machine
        self._lock = threading.Lock()
        self.data, self.command = Window(self, DATA), Window(self, COMMAND)
        self.reset()

    def reset(self) -> None:
        """Nothing to read, no command under way."""
        with self._lock:
            self._ram = bytearray(RAM_SIZE)
            self._ram[0] = COMMAND_BYTE
            self._command = 0  # that waits for its data byte
            self._out = 0
            self._flags = 0  # STATUS_FULL and what belongs to the byte; STATUS_COMMAND
            self._update()

    def _update(self) -> None:
        full, aux = self._flags & STATUS_FULL, self._flags & STATUS_AUX
        enabled = self._ram[0]
        levels = [
            bool(full and not aux and enabled & KEYBOARD_INTERRUPT),
            bool(full and aux and enabled & AUX_INTERRUPT),
        ]
        for i, line in enumerate(self._lines):
            if levels[i] is not self._levels[i]:
                line.set_level(levels[i])
        self._levels = levels

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            if offset == COMMAND:
                system = STATUS_SYSTEM if self._ram[0] & SYSTEM else 0
                return self._flags | system | STATUS_UNLOCKED
            self._flags &= STATUS_COMMAND
            self._update()
            return self._out

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset == COMMAND:
                self._flags |= STATUS_COMMAND
                reset = self._start(value)
            else:
                self._flags &= ~STATUS_COMMAND
                reset = self._continue(value)
            self._update()
        if reset:
            self._reset_machine()

    def _answer(self, byte: int, flags: int = 0) -> None:
        """Put a byte into the output buffer; one that nobody has read is lost."""
        self._out = byte
        self._flags = self._flags & STATUS_COMMAND | STATUS_FULL | flags

    def _start(self, command: int) -> bool:
        """A command; returns whether it is a reset. One that is not known does nothing."""
        self._command = 0
        if READ_RAM <= command < READ_RAM + RAM_SIZE:
            self._answer(self._ram[command - READ_RAM])
        elif WRITE_RAM <= command < WRITE_RAM + RAM_SIZE or command in _WITH_DATA:
            self._command = command
        elif command == SELF_TEST:
            self._ram[0] |= SYSTEM
            self._answer(SELF_TEST_PASSED)
        elif command in (KEYBOARD_TEST, AUX_TEST):
            self._answer(CLOCK_STUCK_HIGH)
        elif command == KEYBOARD_DISABLE:
            self._ram[0] |= KEYBOARD_OFF
        elif command == KEYBOARD_ENABLE:
            self._ram[0] &= ~KEYBOARD_OFF
        elif command == READ_INPUT_PORT:
            self._answer(INPUT_PORT_UNLOCKED)
        elif command == READ_OUTPUT_PORT:
            self._answer(self._output_port())
        return command >= PULSE and not command & NO_RESET

    def _output_port(self) -> int:
        port = NO_RESET | A20 | OUT_LINES
        if self._flags & STATUS_FULL:
            port |= OUT_AUX if self._flags & STATUS_AUX else OUT_KEYBOARD
        return port

    def _continue(self, byte: int) -> bool:
        """The data byte of a command, or one for the keyboard; returns whether it is a reset."""
        command, self._command = self._command, 0
        if WRITE_RAM <= command < WRITE_RAM + RAM_SIZE:
            self._ram[command - WRITE_RAM] = byte
            self._ram[0] |= AUX_OFF
        elif command == WRITE_OUTPUT_PORT:
            return not byte & NO_RESET
        elif command in (LOOP_KEYBOARD, LOOP_AUX):  # a controller without auxiliary port has one
            self._answer(byte)
        else:
            self._answer(RESEND, STATUS_TIMEOUT | (STATUS_AUX if command == SEND_AUX else 0))
        return False

    def state(self) -> State:
        with self._lock:
            return {
                "version": 1,
                "ram": bytes(self._ram),
                "command": self._command,
                "out": self._out,
                "flags": self._flags,
            }

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        saved = Saved(state, "a keyboard controller", 1)
        ram = saved.data("ram", RAM_SIZE, RAM_SIZE)
        command, out = saved.number("command", 0xFF), saved.number("out", 0xFF)
        flags = saved.number("flags", 0xFF)
        with self._lock:
            self._ram, self._command, self._out = bytearray(ram), command, out
            self._ram[0] |= AUX_OFF
            self._flags = flags & (STATUS_FULL | STATUS_COMMAND | STATUS_AUX | STATUS_TIMEOUT)
            self._update()
            for line, level in zip(self._lines, self._levels, strict=True):
                line.set_level(level)  # whatever the other end believes
