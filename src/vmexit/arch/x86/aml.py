"""AML: the byte code in which ACPI tables describe devices (ACPI 6.4, chapter 20).

Each function returns the bytes of one object or term; they nest as in ASL:

>>> name("_S5_", package(integer(5), integer(5))).hex()
'085f53355f1206020a050a05'
"""

import re

_ZERO, _ONE = b"\x00", b"\x01"
_BYTE, _WORD, _DWORD, _STRING, _QWORD = b"\x0a", b"\x0b", b"\x0c", b"\x0d", b"\x0e"
_NAME, _SCOPE, _BUFFER, _PACKAGE = b"\x08", b"\x10", b"\x11", b"\x12"
_DEVICE = b"\x5b\x82"
_DUAL_NAME, _MULTI_NAME = b"\x2e", b"\x2f"
_REGION, _FIELD = b"\x5b\x80", b"\x5b\x81"
_METHOD, _STORE, _NOTIFY, _RETURN = b"\x14", b"\x70", b"\x86", b"\xa4"
_ARGUMENT_0, _SERIALIZED = 0x68, 1 << 3
_SYSTEM_IO, _BYTE_ACCESS = b"\x01", b"\x01"

_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_EISA_ID = re.compile(r"[A-Z]{3}[0-9A-F]{4}")


def name_string(path: str) -> bytes:
    r"""A name: "COM1", "\_SB", "^^FOO.BAR" (20.2.2). Short segments are filled up with `_`."""
    prefix = re.match(r"\\|\^*", path)
    root = prefix[0] if prefix else ""
    rest = path[len(root) :]
    segments = rest.split(".") if rest else []
    for segment in segments:
        if not _SEGMENT.fullmatch(segment):
            raise ValueError(f"{path!r} is no ACPI name: a segment is 1 to 4 of A-Z, 0-9 and _")
    names = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    if not segments:
        names = _ZERO
    elif len(segments) == 2:
        names = _DUAL_NAME + names
    elif len(segments) > 2:
        names = _MULTI_NAME + bytes((len(segments),)) + names
    return root.encode() + names


def integer(value: int) -> bytes:
    """An unsigned integer of up to 64 bits, in its shortest form (20.2.3)."""
    if value in (0, 1):
        return (_ZERO, _ONE)[value]
    for prefix, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4), (_QWORD, 8)):
        if 0 <= value < 1 << 8 * size:
            return prefix + value.to_bytes(size, "little")
    raise ValueError(f"{value} is no AML integer: it has 64 bits without sign")


def string(text: str) -> bytes:
    """A string of ASCII characters, none of them NUL."""
    if "\0" in text or not text.isascii():
        raise ValueError(f"{text!r} is no AML string: it is ASCII without NUL")
    return _STRING + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """The integer for a device ID such as "PNP0501" (19.3.4, EISAID)."""
    if not _EISA_ID.fullmatch(text):
        raise ValueError(f"{text!r} is no EISA ID: three letters and four hexadecimal digits")
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return _DWORD + (letters << 16 | int(text[3:], 16)).to_bytes(4, "big")


def package(*elements: bytes) -> bytes:
    """A package of at most 255 objects."""
    return _PACKAGE + _with_length(bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """A buffer with these bytes."""
    return _BUFFER + _with_length(integer(len(data)) + data)


def name(path: str, value: bytes) -> bytes:
    """Name (path, value): a named object."""
    return _NAME + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) { terms }."""
    return _SCOPE + _with_length(name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) { terms }."""
    return _DEVICE + _with_length(name_string(path) + b"".join(terms))


def io_region(path: str, port: int, size: int) -> bytes:
    """OperationRegion (path, SystemIO, port, size)."""
    return _REGION + name_string(path) + _SYSTEM_IO + integer(port) + integer(size)


def byte_field(region: str, path: str) -> bytes:
    """Field (region, ByteAcc, NoLock, Preserve) { path, 8 }."""
    return _FIELD + _with_length(name_string(region) + _BYTE_ACCESS + name_string(path) + b"\x08")


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """Method (path, arguments, Serialized) { terms }."""
    flags = bytes((arguments | _SERIALIZED,))
    return _METHOD + _with_length(name_string(path) + flags + b"".join(terms))


def notify(path: str, value: int) -> bytes:
    """Notify (path, value)."""
    return _NOTIFY + name_string(path) + integer(value)


def returns(path: str) -> bytes:
    """Return (path)."""
    return _RETURN + name_string(path)


def store_argument(number: int, path: str) -> bytes:
    """Store (ArgN, path)."""
    return _STORE + bytes((_ARGUMENT_0 + number,)) + name_string(path)


def resource_template(*descriptors: bytes) -> bytes:
    """The buffer for _CRS: descriptors, and the end tag without checksum (6.4.2.9)."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io(port: int, size: int) -> bytes:
    """IO (Decode16): `size` ports from `port` (6.4.2.5)."""
    return b"\x47\x01" + _u16(port) + _u16(port) + b"\x01" + bytes((size,))


def irq(*irqs: int) -> bytes:
    """IRQNoFlags: ISA interrupts, edge-triggered, active high (6.4.2.1)."""
    return b"\x22" + _u16(sum(1 << irq for irq in irqs))


def extended_irq(gsi: int, *, level: bool, active_low: bool = False, shared: bool = False) -> bytes:
    """Interrupt (ResourceConsumer): one GSI (6.4.3.6)."""
    flags = 1 | (not level) << 1 | active_low << 2 | shared << 3
    return b"\x89\x06\0" + bytes((flags, 1)) + _u32(gsi)


def memory32_fixed(gpa: int, size: int) -> bytes:
    """Memory32Fixed (ReadWrite): `size` bytes from `gpa` (6.4.3.4)."""
    return b"\x86\x09\0\x01" + _u32(gpa) + _u32(size)


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _with_length(body: bytes) -> bytes:
    """`body` behind a PkgLength, which counts its own 1 to 4 bytes, too (20.2.4)."""
    if len(body) + 1 < 1 << 6:
        return bytes((len(body) + 1,)) + body
    for more in (1, 2, 3):
        length = len(body) + 1 + more
        if length < 1 << 4 + 8 * more:
            head = more << 6 | length & 0xF
            return bytes((head,)) + (length >> 4).to_bytes(more, "little") + body
    raise ValueError(f"an AML package of {len(body)} bytes is too long: it has 28 bits of length")
