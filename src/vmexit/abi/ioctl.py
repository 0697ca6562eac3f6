"""How Linux encodes ioctl numbers on x86 (include/uapi/asm-generic/ioctl.h).

Two bits of direction, 14 bits of argument size, 8 bits of type, 8 bits of number.
"""

from ctypes import Structure, c_uint64, sizeof

_NUMBER_BITS, _TYPE_BITS, _SIZE_BITS = 8, 8, 14
_TYPE_SHIFT = _NUMBER_BITS
_SIZE_SHIFT = _TYPE_SHIFT + _TYPE_BITS
_DIRECTION_SHIFT = _SIZE_SHIFT + _SIZE_BITS

# The type of all of KVM's ioctls.
KVMIO = 0xAE

WRITE, READ = 1, 2  # as seen by the program: it writes the argument, or reads it

Argument = type[Structure] | type[c_uint64]


def encode(kind: int, number: int, direction: int = 0, argument: Argument | None = None) -> int:
    """The ioctl number for `number` of type `kind` with an argument of that C type."""
    size = sizeof(argument) if argument is not None else 0
    return direction << _DIRECTION_SHIFT | size << _SIZE_SHIFT | kind << _TYPE_SHIFT | number
