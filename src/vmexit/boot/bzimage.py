"""bzImage: the setup header of a Linux kernel, and the compressed kernel inside.

Linux Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
"""

from typing import NamedTuple

from vmexit.abi.linux_boot import (
    BOOT_FLAG,
    CMDLINE_SIZE_BEFORE_2_06,
    HEADER_MAGIC,
    INITRD_ADDR_MAX_BEFORE_2_03,
    LOADED_HIGH,
    SETUP_HEADER_END,
    SETUP_HEADER_OFFSET,
    XLF_KERNEL_64,
    setup_header,
)
from vmexit.arch.x86.layout import HIGH_MEMORY
from vmexit.boot import compression
from vmexit.core.errors import ImageError

_SECTOR = 512
_MAX_VERSION_LENGTH = 256
_LOW_KERNEL = 0x1_0000  # where a zImage goes (loadflags, bit 0)


class BzImage(NamedTuple):
    """The setup header with the defaults of fields that its protocol version does not have yet.

    Sizes are in bytes. `setup` is the real-mode part with the boot sector, `payload` the range of
    the file with the compressed kernel (empty if the header does not tell), `load` the GPA that
    the protected-mode part is made for.
    """

    version: int
    name: str
    loadflags: int
    setup: int
    header_end: int
    load: int
    code32_start: int
    initrd_addr_max: int
    cmdline_size: int
    relocatable: bool
    alignment: int
    min_alignment: int
    xloadflags: int
    pref_address: int
    init_size: int
    payload: range
    code: range

    @property
    def protocol_version(self) -> str:
        """As people write it: "2.15"."""
        return f"{self.version >> 8}.{self.version & 0xFF:02}"

    @property
    def loaded_high(self) -> bool:
        """Whether the protected-mode part goes to 1 MiB or above, and not to 64 KiB."""
        return bool(self.loadflags & LOADED_HIGH)

    @property
    def offers_64(self) -> bool:
        """Whether there is a 64-bit entry point (2.12)."""
        return bool(self.xloadflags & XLF_KERNEL_64) and self.offers_32

    @property
    def offers_32(self) -> bool:
        """Whether the protected-mode part can be entered without the real-mode part.

        Not before 2.05: such kernels, and loaders that look like one (GRUB's lnxboot.img says
        2.03), count on what their real-mode part did.
        """
        return self.version >= 0x205 and self.loaded_high and len(self.code) > 0


def is_bzimage(data: bytes | memoryview) -> bool:
    """Whether `data` has the magic number of a setup header."""
    return bytes(data[0x202:0x206]) == HEADER_MAGIC


def parse(data: bytes | memoryview) -> BzImage:
    """Read the setup header, of any protocol version from 2.00. Raises ImageError."""
    if not is_bzimage(data):
        raise ImageError("the kernel has no Linux setup header; pass a bzImage or a vmlinux")
    if len(data) < 2 * _SECTOR:
        raise _damaged("it is cut short")
    # The header of an old kernel ends earlier; what follows it there is code, and not read.
    raw = bytes(data[SETUP_HEADER_OFFSET:SETUP_HEADER_END])
    header = setup_header.from_buffer_copy(raw)
    version = header.version
    if header.boot_flag != BOOT_FLAG:
        raise _damaged(f"its boot flag is {header.boot_flag:#x}, not {BOOT_FLAG:#x}")
    if version >> 8 != 2:
        raise ImageError(
            f"the kernel has boot protocol {version >> 8}.{version & 0xFF:02}; "
            "vmexit knows 2.00 to 2.15: choose another kernel"
        )
    setup = _SECTOR * ((header.setup_sects or 4) + 1)
    if setup > len(data):
        raise _damaged(f"its setup code of {setup} bytes reaches behind its end")
    high = bool(header.loadflags & LOADED_HIGH)
    load = HIGH_MEMORY if high else _LOW_KERNEL
    relocatable = version >= 0x205 and header.relocatable_kernel != 0
    alignment = header.kernel_alignment if relocatable else 0
    if alignment & (alignment - 1) or (relocatable and not alignment):
        raise _damaged(f"its alignment {alignment:#x} is not a power of 2")
    code = range(setup, len(data))
    pref_address = header.pref_address if version >= 0x20A else 0
    if pref_address >> 52:
        raise _damaged(f"its preferred address {pref_address:#x} is beyond any memory")
    return BzImage(
        version=version,
        name=_name(data, header.kernel_version, setup),
        loadflags=header.loadflags,
        setup=setup,
        header_end=min(0x202 + (header.jump >> 8), SETUP_HEADER_END),
        load=load,
        code32_start=header.code32_start,
        initrd_addr_max=header.initrd_addr_max if version >= 0x203 else INITRD_ADDR_MAX_BEFORE_2_03,
        cmdline_size=header.cmdline_size if version >= 0x206 else CMDLINE_SIZE_BEFORE_2_06,
        relocatable=relocatable,
        alignment=alignment,
        min_alignment=header.min_alignment if version >= 0x20A else 0,
        xloadflags=header.xloadflags if version >= 0x20C else 0,
        pref_address=pref_address,
        init_size=header.init_size if version >= 0x20A else 0,
        payload=_payload(header.payload_offset, header.payload_length, code)
        if version >= 0x208 and header.payload_length
        else range(0),
        code=code,
    )


def unpack(data: bytes | memoryview, image: BzImage) -> bytes:
    """The kernel proper, usually an ELF file. Raises ImageError if it cannot be unpacked."""
    name = payload_compression(data, image)
    if name is None:
        raise ImageError("the kernel's payload is packed in no known way; choose --protocol 32")
    packed = memoryview(data)[image.payload.start : image.payload.stop]
    # The last 4 bytes are the size that the kernel itself unpacks to (arch/x86/boot/compressed).
    size = int.from_bytes(packed[-4:], "little")
    kernel = compression.unpack(packed, name, min(size, compression.MAX_UNPACKED))
    if len(kernel) != size:
        raise _damaged(f"its payload unpacks to {len(kernel)} bytes, and should to {size}")
    return kernel


def payload_compression(data: bytes | memoryview, image: BzImage) -> str | None:
    """How the payload is packed: gzip, xz, …; None if that cannot be told."""
    if not image.payload:
        return None
    return compression.detect(memoryview(data)[image.payload.start : image.payload.stop])


def _payload(offset: int, length: int, code: range) -> range:
    """The payload in the file. Its offset counts from the protected-mode part (boot.rst)."""
    start = code.start + offset
    if start + length > code.stop:
        raise _damaged(f"its payload of {length} bytes at {start:#x} reaches behind its end")
    return range(start, start + length)


def _name(data: bytes | memoryview, pointer: int, setup: int) -> str:
    """The version string, as far as there is one and it can be printed."""
    start = pointer + 0x200
    if not pointer or start >= setup:
        return ""
    raw = bytes(data[start : min(start + _MAX_VERSION_LENGTH, setup)]).partition(b"\0")[0]
    text = raw.decode("ascii", "replace")
    return text if text.isprintable() else ""


def _damaged(what: str) -> ImageError:
    return ImageError(f"the Linux kernel is damaged: {what}; build it again")
