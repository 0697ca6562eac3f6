"""x87 and SSE of the software CPU, as an image of FXSAVE."""

import struct

from vmexit.accel.soft.native import Engine
from vmexit.arch.x86 import fxsave

_ST = struct.Struct("<QH")  # mantissa, exponent
_MXCSR_MASK = 0xFFFF
_TOP_SHIFT = 11  # FSW: the register that ST(0) is


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
        image = bytearray(fxsave.SIZE)
        tags, status = read(self._tags), read(self._status)
        in_use = fxsave.abridged_tags(tags)
        control, mxcsr = read(self._control), read(self._mxcsr)
        fxsave.HEAD.pack_into(image, 0, control, status, in_use, 0, 0, 0, mxcsr, _MXCSR_MASK)
        for i in range(8):  # FP0 to FP7 are the physical registers
            mantissa, exponent = self._read_st(self._physical[(i + (status >> _TOP_SHIFT)) & 7])
            image[fxsave.st(i)] = _ST.pack(mantissa, exponent & 0xFFFF)
        for i, register in enumerate(self._xmm):
            image[fxsave.xmm(i)] = read(register).to_bytes(16, "little")
        return bytes(image)

    def _read_st(self, register: int) -> tuple[int, int]:
        value = self._engine.reg_read(register)
        assert isinstance(value, tuple)
        return value

    def write(self, image: bytes) -> None:
        """Load such an image."""
        write = self._engine.reg_write
        control, status, in_use, _, _, _, mxcsr, _ = fxsave.HEAD.unpack_from(image)
        write(self._control, control)
        write(self._status, status)
        write(self._mxcsr, mxcsr & _MXCSR_MASK)
        for i in range(8):
            write(self._physical[(i + (status >> _TOP_SHIFT)) & 7], _ST.unpack(image[fxsave.st(i)]))
        write(self._tags, fxsave.full_tags(in_use))
        for i, register in enumerate(self._xmm):
            write(register, int.from_bytes(image[fxsave.xmm(i)], "little"))
