"""A 16550A UART, for guests that poll it: no interrupts, and output is instant.

Register names and bits are those of the National PC16550D data sheet, section 8.
"""

import threading
from typing import Protocol

from vmexit.core.bus import State
from vmexit.core.errors import ConfigError

# Offsets. RBR, THR and DLL share 0, IER and DLM share 1, by direction and by LCR.DLAB.
RBR_THR_DLL, IER_DLM, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

LCR_DLAB = 1 << 7
LSR_DATA_READY, LSR_OVERRUN = 1 << 0, 1 << 1
LSR_THR_EMPTY, LSR_IDLE = 1 << 5, 1 << 6
MCR_LOOP = 1 << 4
IIR_NONE, IIR_FIFO = 0x01, 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER = 1 << 0, 1 << 1
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 1 << 4, 1 << 5, 1 << 6, 1 << 7

FIFO_SIZE = 16


class CharBackend(Protocol):
    """The host side of a serial port. Neither call waits."""

    def write(self, data: bytes) -> None: ...
    def read(self, size: int) -> bytes: ...


class Serial:
    """Any vCPU may enter at any time: one lock guards the registers, and the backend is called
    without it.
    """

    widths = (1,)

    def __init__(self, backend: CharBackend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """The state after master reset (data sheet, table 1); the divisor is that of 9600 baud."""
        with self._lock:
            self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
            self._divisor = 12
            self._overrun = False
            self._received = bytearray()

    def read(self, offset: int, size: int) -> int:
        if offset == LSR:
            self._poll()
        with self._lock:
            return self._read(offset)

    def _read(self, offset: int) -> int:
        if offset == RBR_THR_DLL:
            if self._lcr & LCR_DLAB:
                return self._divisor & 0xFF
            return self._received.pop(0) if self._received else 0
        if offset == IER_DLM:
            return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
        if offset == IIR_FCR:
            return IIR_NONE | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        if offset == LSR:
            status = LSR_THR_EMPTY | LSR_IDLE
            if self._received:
                status |= LSR_DATA_READY
            if self._overrun:
                status |= LSR_OVERRUN
                self._overrun = False
            return status
        if offset == MSR:
            return self._modem_status()
        return self._scr

    def _modem_status(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | MSR_DCD
        # Looped back, the four outputs DTR, RTS, OUT1, OUT2 appear as DSR, CTS, RI, DCD.
        lines = ((0, MSR_DSR), (1, MSR_CTS), (2, MSR_RI), (3, MSR_DCD))
        return sum(line for bit, line in lines if self._mcr >> bit & 1)

    def write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            out = self._write(offset, value)
        if out:
            self._backend.write(out)

    def _write(self, offset: int, value: int) -> bytes:
        """Store a register; returns what is to be sent."""
        if offset == RBR_THR_DLL:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
            elif self._mcr & MCR_LOOP:
                self._receive(bytes((value,)))
            else:
                return bytes((value,))
        elif offset == IER_DLM:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
            else:
                self._ier = value & 0x0F
        elif offset == IIR_FCR:
            if (value ^ self._fcr) & FCR_ENABLE or value & FCR_CLEAR_RECEIVER:
                self._received.clear()
            self._fcr = value & 0xC9
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._mcr = value & 0x1F
        elif offset == SCR:
            self._scr = value
        return b""

    def _receive(self, data: bytes) -> None:
        room = self._room()
        self._overrun |= len(data) > room
        if self._fcr & FCR_ENABLE:
            self._received += data[:room]
        else:
            self._received[:] = data[-1:]  # the last one takes the place of what was not read

    def _room(self) -> int:
        return (FIFO_SIZE if self._fcr & FCR_ENABLE else 1) - len(self._received)

    def _poll(self) -> None:
        """Take what the backend has, as much as there is room for: nothing is lost."""
        if not self._polling.acquire(blocking=False):
            return  # another vCPU does it, and the room is for one
        try:
            with self._lock:
                room = 0 if self._mcr & MCR_LOOP else self._room()
            data = self._backend.read(room) if room > 0 else b""
            if data:
                with self._lock:
                    self._receive(data)
        finally:
            self._polling.release()

    def state(self) -> State:
        with self._lock:
            return {
                "version": 1,
                "ier": self._ier,
                "fcr": self._fcr,
                "lcr": self._lcr,
                "mcr": self._mcr,
                "scr": self._scr,
                "divisor": self._divisor,
                "overrun": self._overrun,
                "received": bytes(self._received),
            }

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        received = state.get("received")
        numbers = [state.get(k) for k in ("ier", "fcr", "lcr", "mcr", "scr", "divisor")]
        if (
            state.get("version") != 1
            or not isinstance(received, bytes)
            or len(received) > FIFO_SIZE
            or not all(isinstance(n, int) and 0 <= n <= 0xFFFF for n in numbers)
        ):
            raise ConfigError("this is not the state of a serial port, version 1; save it anew")
        with self._lock:
            ier, fcr, lcr, mcr, scr, divisor = (n for n in numbers if isinstance(n, int))
            self._ier, self._fcr, self._lcr = ier & 0x0F, fcr & 0xC9, lcr & 0xFF
            self._mcr, self._scr, self._divisor = mcr & 0x1F, scr & 0xFF, divisor
            self._overrun = bool(state.get("overrun"))
            self._received = bytearray(received)
