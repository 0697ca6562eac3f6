"""x87 and SSE of the software CPU, in the form in which FXSAVE stores them (SDM vol. 1, 10.5.1)."""

import struct

from vmexit.accel.base import FXSAVE_SIZE
from vmexit.accel.soft.native import Engine

_HEAD = struct.Struct("<HHBxHQQII")  # FCW, FSW, FTW, FOP, FIP, FDP, MXCSR, MXCSR_MASK
_ST, _ST_STEP, _XMM = 32, 16, 160
_MXCSR_MASK = 0xFFFF
_TOP_SHIFT = 11  # FSW: the register that ST(0) is
_EMPTY = 3  # a register's tag in the full tag word, of two bits each


class Fpu:
    """The registers of the CPU that an engine has, by its public interface."""

    def __init__(self, engine: Engine) -> None:
        from unicorn import x86_const

        self._engine = engine
        self._control, self._status = x86_const.UC_X86_REG_FPCW, x86_const.UC_X86_REG_FPSW
        self._tags, self._mxcsr = x86_const.UC_X86_REG_FPTAG, x86_const.UC_X86_REG_MXCSR
        self._physical = [x86_const.UC_X86_REG_FP0 + i for i in range(8)]
        self._xmm = [x86_const.UC_X86_REG_XMM0 + i for i in range(16)]

    def close(self) -> None:
        """Let go of the engine."""
        del self._engine

    def read(self) -> bytes:
        """The image, of 512 bytes."""
        read = self._engine.reg_read
        image = bytearray(FXSAVE_SIZE)
        tags, status = read(self._tags), read(self._status)
        full = sum((tags >> 2 * i & 3 != _EMPTY) << i for i in range(8))
        control, mxcsr = read(self._control), read(self._mxcsr)
        _HEAD.pack_into(image, 0, control, status, full, 0, 0, 0, mxcsr, _MXCSR_MASK)
        for i in range(8):  # FP0 to FP7 are the physical registers
            mantissa, exponent = self._read_st(self._physical[(i + (status >> _TOP_SHIFT)) & 7])
            struct.pack_into("<QH", image, _ST + i * _ST_STEP, mantissa, exponent & 0xFFFF)
        for i, register in enumerate(self._xmm):
            at = _XMM + 16 * i
            image[at : at + 16] = read(register).to_bytes(16, "little")
        return bytes(image)

    def _read_st(self, register: int) -> tuple[int, int]:
        value = self._engine.reg_read(register)
        assert isinstance(value, tuple)
        return value

    def write(self, image: bytes) -> None:
        """Load such an image."""
        write = self._engine.reg_write
        control, status, full, _, _, _, mxcsr, _ = _HEAD.unpack_from(image)
        write(self._control, control)
        write(self._status, status)
        write(self._mxcsr, mxcsr & _MXCSR_MASK)
        for i in range(8):
            mantissa, exponent = struct.unpack_from("<QH", image, _ST + i * _ST_STEP)
            write(self._physical[(i + (status >> _TOP_SHIFT)) & 7], (mantissa, exponent))
        tags = sum((0 if full >> i & 1 else _EMPTY) << 2 * i for i in range(8))
        write(self._tags, tags)
        for i, register in enumerate(self._xmm):
            at = _XMM + 16 * i
            write(register, int.from_bytes(image[at : at + 16], "little"))
