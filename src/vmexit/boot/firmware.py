"""Firmware: a ROM that ends at 4 GiB, started at the reset vector."""

from vmexit.arch.x86.layout import ROM_END, ROM_MAX_SIZE, ROM_SHADOW_END, ROM_SHADOW_SIZE
from vmexit.arch.x86.segments import reset
from vmexit.boot.entry import BootEntry
from vmexit.core.errors import ConfigError, GuestAddressError, ImageError
from vmexit.core.memory import PAGE_SIZE, GuestMemory


def load(memory: GuestMemory, data: bytes) -> BootEntry:
    """Map `data` read-only up to 4 GiB, and put its last 128 KiB below 1 MiB as well.

    The copy below 1 MiB is RAM, as on a PC whose chipset has shadowed its ROM there: firmware
    such as SeaBIOS keeps variables in it.
    """
    if not data or len(data) % PAGE_SIZE or len(data) > ROM_MAX_SIZE:
        raise ImageError(
            f"a firmware ROM of {len(data)} bytes cannot be; it must be a multiple of "
            f"{PAGE_SIZE} and at most {ROM_MAX_SIZE} bytes: pass the unpacked ROM file"
        )
    shadow = data[-ROM_SHADOW_SIZE:]
    try:
        memory.write(ROM_SHADOW_END - len(shadow), shadow)
    except GuestAddressError as error:
        raise ConfigError("firmware needs at least 1 MiB of memory; use --memory 1M") from error
    memory.add_rom(ROM_END - len(data), data)
    return BootEntry(*reset())
