"""A 16550A UART. Output is instant, so the transmitter is always empty.

Register names and bits are those of the National PC16550D data sheet, section 8. Breaks, parity and
framing errors do not exist, and the divisor has no effect. Input that interrupts comes no faster,
in the long run, than a line at full speed would bring it: an operating system has buffers for that,
and no way to say that they are full. A character timeout, which tells of
bytes below the trigger level, comes at once instead of after the time of four characters.
"""

import threading
from collections.abc import Callable
from typing import Protocol

from vmexit.core.bus import State
from vmexit.core.clock import Clock
from vmexit.core.irq import IrqLine
from vmexit.core.rate import TokenBucket
from vmexit.core.saved import Saved

# Offsets. RBR, THR and DLL share 0, IER and DLM share 1, by direction and by LCR.DLAB.
RBR_THR_DLL, IER_DLM, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RECEIVED, IER_THR_EMPTY, IER_LINE_STATUS, IER_MODEM_STATUS = 1 << 0, 1 << 1, 1 << 2, 1 << 3
LCR_DLAB = 1 << 7
LSR_DATA_READY, LSR_OVERRUN = 1 << 0, 1 << 1
LSR_THR_EMPTY, LSR_IDLE = 1 << 5, 1 << 6
MCR_OUT2, MCR_LOOP = 1 << 3, 1 << 4
# What IIR tells, by priority (data sheet, table 5).
IIR_LINE_STATUS, IIR_RECEIVED, IIR_TIMEOUT, IIR_THR_EMPTY, IIR_MODEM_STATUS, IIR_NONE = (
    0x06, 0x04, 0x0C, 0x02, 0x00, 0x01,
)  # fmt: skip
IIR_FIFO = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER = 1 << 0, 1 << 1
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 1 << 4, 1 << 5, 1 << 6, 1 << 7
MSR_TERI = 1 << 2

FIFO_SIZE = 16
TRIGGER_LEVELS = (1, 4, 8, 14)

# So many reads of LSR in a row, and the guest polls for input. One that only sends reads it once
# or twice before each byte.
POLLING_READS = 8


_PACE = 115_200 // 10  # characters a second: with a divisor of 1, and 10 bits for each
# What may come at once: Linux's line disciplines and tty buffers take several times as much.
_BURST = 16 << 10


_BYTES = [bytes((value,)) for value in range(256)]


class CharBackend(Protocol):
    """The host side of a serial port. No call waits, and none may call the serial port."""

    def write(self, data: bytes) -> None: ...

    def read(self, size: int) -> bytes: ...

    def when_readable(self, function: Callable[[], None]) -> None:
        """Call `function` once, later and from the event loop, when `read` may give something."""
        ...


class Serial:
    """Any vCPU and the event loop may enter at any time: one lock guards the registers, and the
    backend is called without it.

    Without an interrupt line a guest has to poll, and input is looked for whenever it reads LSR.
    With one, the backend tells of input, but bytes are taken only for a guest that has enabled the
    interrupt for them, or polls: what comes before an operating system has set up the port
    waits on the host, and is not lost when that clears the FIFO.
    """

    widths = (1,)

    def __init__(
        self, backend: CharBackend, irq: IrqLine | None = None, clock: Clock | None = None
    ) -> None:
        """Without a `clock` input is as fast as the guest takes it."""
        self._backend = backend
        self._irq = irq
        self._pace = TokenBucket(clock, _PACE, _BURST) if clock is not None else None
        self._later = clock.timer(self._go_on) if clock is not None else None
        self._lock = threading.Lock()
        self._taking = threading.Lock()
        self._level = False  # of the interrupt line
        self._armed = False  # the backend will call
        self._unread = b""  # taken from the backend, when room that was for it went away
        self._untold = 0  # so many of the last received bytes the guest does not know of
        self.reset()

    def reset(self) -> None:
        """The state after master reset (data sheet, table 1); the divisor is that of 9600 baud."""
        with self._lock:
            self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
            self._divisor = 12
            self._overrun = False
            self._received = bytearray()
            self._untold = 0
            self._thr_empty = False  # that it became empty has not been told yet
            self._deltas = 0  # MSR bits 0 to 3
            self._status_reads = 0
            self._update()

    def read(self, offset: int, size: int) -> int:
        if offset == LSR:
            if self._irq is None:
                self._take()
            elif self._nothing_new():
                self._status_reads += 1
                return LSR_THR_EMPTY | LSR_IDLE
        with self._lock:
            value = self._read(offset)
            arm = offset in (LSR, RBR_THR_DLL) and self._must_arm()
        if arm:
            self._backend.when_readable(self._readable)
        return value

    def _nothing_new(self) -> bool:
        """Whether LSR can be told without the lock, as before almost every byte that is sent.

        What changes at the same moment may as well have come a moment later.
        """
        return not (
            self._received
            or self._unread
            or self._overrun
            or self._status_reads >= POLLING_READS - 1
        )

    def _read(self, offset: int) -> int:
        if offset == LSR:
            self._status_reads += 1
            if self._unread:
                self._accept()
            status = LSR_THR_EMPTY | LSR_IDLE
            if self._received:
                status |= LSR_DATA_READY
                self._untold = 0
            if self._overrun:
                status |= LSR_OVERRUN
                self._overrun = False
                self._update()
            return status
        if offset == RBR_THR_DLL:
            if self._lcr & LCR_DLAB:
                return self._divisor & 0xFF
            if not self._received:
                return 0
            byte = self._received.pop(0)
            self._untold = min(self._untold, len(self._received))
            self._accept()
            return byte
        if offset == IER_DLM:
            return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
        if offset == IIR_FCR:
            cause = self._cause()
            if cause in (IIR_RECEIVED, IIR_TIMEOUT):
                self._untold = 0
            if cause == IIR_THR_EMPTY:
                self._thr_empty = False
                self._update()
            return cause | (IIR_FIFO if self._fcr & FCR_ENABLE else 0)
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        if offset == MSR:
            status = self._modem_status() | self._deltas
            self._deltas = 0
            self._update()
            return status
        return self._scr

    def _modem_status(self) -> int:
        if not self._mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | MSR_DCD
        # Looped back, the four outputs DTR, RTS, OUT1, OUT2 appear as DSR, CTS, RI, DCD.
        lines = ((0, MSR_DSR), (1, MSR_CTS), (2, MSR_RI), (3, MSR_DCD))
        return sum(line for bit, line in lines if self._mcr >> bit & 1)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == RBR_THR_DLL and not (
            self._lcr & LCR_DLAB or self._ier & IER_THR_EMPTY or self._mcr & MCR_LOOP
        ):
            # A byte to send, of which no interrupt will tell: nothing here changes.
            self._status_reads = 0
            self._backend.write(_BYTES[value])
            return
        with self._lock:
            self._status_reads = 0
            out = self._write(offset, value)
            arm = offset != RBR_THR_DLL and self._must_arm()
        if out:
            self._backend.write(out)
        if arm:
            self._backend.when_readable(self._readable)

    def _write(self, offset: int, value: int) -> bytes:
        """Store a register; returns what is to be sent."""
        if offset == RBR_THR_DLL:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
                return b""
            if self._ier & IER_THR_EMPTY:
                self._sent()
            if self._mcr & MCR_LOOP:
                self._receive(value)
                return b""
            return _BYTES[value]
        if offset == IER_DLM:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
            else:
                self._enable(value & 0x0F)
        elif offset == IIR_FCR:
            if (value ^ self._fcr) & FCR_ENABLE or value & FCR_CLEAR_RECEIVER:
                self._clear()
            self._fcr = value & 0xC9
            self._accept()
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            before = self._modem_status()
            self._mcr = value & 0x1F
            after = self._modem_status()
            self._deltas |= (before ^ after) >> 4 & ~MSR_TERI
            if before & ~after & MSR_RI:  # of RI, only the end counts
                self._deltas |= MSR_TERI
            self._accept()
        elif offset == SCR:
            self._scr = value
        return b""

    # Interrupts.

    def _enable(self, ier: int) -> None:
        """To enable the interrupt for an empty THR raises it, as it is empty."""
        if ier & ~self._ier & IER_THR_EMPTY:
            self._thr_empty = True
        elif not ier & IER_THR_EMPTY:
            self._thr_empty = False
        self._ier = ier
        self._accept()

    def _sent(self) -> None:
        """THR was filled, which ends its interrupt, and is empty again: another edge."""
        if self._thr_empty:
            self._thr_empty = False
            self._update()
        self._thr_empty = True
        self._update()

    def _cause(self) -> int:
        """The interrupt that IIR shows."""
        ier = self._ier
        if not ier or self._irq is None:
            return IIR_NONE
        if ier & IER_LINE_STATUS and self._overrun:
            return IIR_LINE_STATUS
        if ier & IER_RECEIVED and self._received:
            trigger = TRIGGER_LEVELS[self._fcr >> 6] if self._fcr & FCR_ENABLE else 1
            return IIR_RECEIVED if len(self._received) >= trigger else IIR_TIMEOUT
        if ier & IER_THR_EMPTY and self._thr_empty:
            return IIR_THR_EMPTY
        if ier & IER_MODEM_STATUS and self._deltas:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update(self) -> None:
        """Give the interrupt line its level.

        On a PC it comes through a gate that OUT2 opens. Looped back, that should be closed, but
        drivers that test themselves in loopback expect their interrupts.
        """
        if self._irq is None:
            return
        level = self._mcr & MCR_OUT2 != 0 and self._cause() != IIR_NONE
        if level is not self._level:
            self._level = level
            self._irq.set_level(level)

    # Input.

    def _receive(self, byte: int) -> None:
        """A byte that was looped back. If there is no room, one is lost: data sheet, 8.4."""
        self._put_back()  # a test of the port is to see its own bytes only
        full = self._room() <= 0
        self._overrun |= full
        if not self._fcr & FCR_ENABLE:
            self._received[:] = (byte,)  # it takes the place of what was not read
        elif not full:
            self._received.append(byte)
        self._update()

    def _room(self) -> int:
        return (FIFO_SIZE if self._fcr & FCR_ENABLE else 1) - len(self._received)

    def _wanted(self) -> int:
        """The number of bytes that may come from outside now."""
        if self._mcr & MCR_LOOP:
            return 0
        if self._irq is not None and self._ier & IER_RECEIVED:
            return min(self._room(), self._paced())
        if self._irq is None or self._status_reads >= POLLING_READS:
            return self._room()
        return 0

    def _paced(self) -> int:
        """How much the line may have brought; later there will be more."""
        if self._pace is None or self._later is None:
            return FIFO_SIZE
        tokens = self._pace.tokens
        if not tokens:
            self._later.set(self._pace.ready_at(FIFO_SIZE))
        return tokens

    def _go_on(self) -> None:
        """The line has brought more."""
        with self._lock:
            self._accept()
            arm = self._must_arm()
        if arm:
            self._backend.when_readable(self._readable)

    def _accept(self) -> None:
        """Take what was left over, if there is room for it now."""
        if self._unread and (wanted := self._wanted()) > 0:
            taken, self._unread = self._unread[:wanted], self._unread[wanted:]
            self._received += taken
            self._untold += len(taken)
            if self._pace is not None:
                self._pace.take(len(taken))
        self._update()

    def _put_back(self) -> None:
        """What came from outside and the guest cannot have seen comes again later."""
        if self._untold:
            self._unread = bytes(self._received[-self._untold :]) + self._unread
            del self._received[-self._untold :]
        self._untold = 0

    def _clear(self) -> None:
        """Empty the receiver. What the guest cannot have seen comes again: on a wire it would be
        lost, but here it may be a file, and an operating system sets the port up bit by bit.
        """
        self._put_back()
        self._received.clear()

    def _must_arm(self) -> bool:
        """Whether the backend must be asked to call; it is taken as done."""
        if self._armed or self._irq is None or self._wanted() <= 0:
            return False
        self._armed = True
        return True

    def _readable(self) -> None:
        """The backend has something."""
        self._take()
        with self._lock:
            self._armed = False
            arm = self._must_arm()
        if arm:
            self._backend.when_readable(self._readable)

    def _take(self) -> None:
        """Take what the backend has, as much as there is room for: nothing is lost."""
        if not self._taking.acquire(blocking=False):
            return  # another vCPU does it, and the room is for one
        try:
            with self._lock:
                if self._unread:
                    self._accept()
                wanted = self._wanted()
            data = self._backend.read(wanted) if wanted > 0 else b""
            if data:
                with self._lock:
                    self._unread += data
                    self._accept()
        finally:
            self._taking.release()

    def state(self) -> State:
        with self._lock:
            return {
                "version": 2,
                "ier": self._ier,
                "fcr": self._fcr,
                "lcr": self._lcr,
                "mcr": self._mcr,
                "scr": self._scr,
                "divisor": self._divisor,
                "overrun": self._overrun,
                "received": bytes(self._received),
                "unread": self._unread,
                "untold": self._untold,
                "thr_empty": self._thr_empty,
                "deltas": self._deltas,
            }

    def restore(self, state: State) -> None:
        """Raises ConfigError for a state that another version, or something else, has made."""
        saved = Saved(state, "a serial port", 2)
        ier, fcr = saved.number("ier", 0x0F), saved.number("fcr", 0xC9)
        lcr, mcr = saved.number("lcr", 0xFF), saved.number("mcr", 0x1F)
        scr, divisor = saved.number("scr", 0xFF), saved.number("divisor", 0xFFFF)
        overrun, thr_empty = saved.flag("overrun"), saved.flag("thr_empty")
        deltas = saved.number("deltas", 0x0F)
        received = saved.data("received", FIFO_SIZE)
        unread = saved.data("unread", 4 * FIFO_SIZE)
        untold = saved.number("untold", len(received))
        with self._lock:
            self._ier, self._fcr, self._lcr, self._mcr = ier, fcr & 0xC9, lcr, mcr
            self._scr, self._divisor = scr, divisor
            self._overrun, self._thr_empty, self._deltas = overrun, thr_empty, deltas
            self._received, self._unread, self._untold = bytearray(received), unread, untold
            self._status_reads = 0
            if self._irq is not None:  # whatever the other end believes
                self._level = mcr & MCR_OUT2 != 0 and self._cause() != IIR_NONE
                self._irq.set_level(self._level)
            arm = self._must_arm()
        if arm:
            self._backend.when_readable(self._readable)
