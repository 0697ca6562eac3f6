"""QEMU's firmware configuration device: keys of its items, the DMA descriptor (specs/fw_cfg.rst).

The keys that the specification leaves out are those that QEMU's x86 machines and their firmware
have in common. Numbers within items are little-endian, the directory and the descriptor big-endian.
"""

import struct

SIGNATURE, ID, UUID, RAM_SIZE, NOGRAPHIC, NB_CPUS = range(6)
KERNEL_ADDR, KERNEL_SIZE = 0x07, 0x08
INITRD_ADDR, INITRD_SIZE = 0x0A, 0x0B
NUMA, BOOT_MENU, MAX_CPUS = 0x0D, 0x0E, 0x0F
KERNEL_DATA, INITRD_DATA = 0x11, 0x12
CMDLINE_ADDR, CMDLINE_SIZE, CMDLINE_DATA = 0x13, 0x14, 0x15
SETUP_ADDR, SETUP_SIZE, SETUP_DATA = 0x16, 0x17, 0x18
FILE_DIR = 0x19
FILE_FIRST = 0x20
# Bits of a key: to write (which does nothing any more), and of the architecture's own items.
WRITE_CHANNEL, ARCH_LOCAL = 0x4000, 0x8000
IRQ0_OVERRIDE = ARCH_LOCAL | 2

SIGNATURE_TEXT = b"QEMU"
DMA_SIGNATURE = b"QEMU CFG"
VERSION_TRADITIONAL, VERSION_DMA = 1 << 0, 1 << 1

# FWCfgDmaAccess: control, length, address.
DMA_ACCESS = struct.Struct(">IIQ")
DMA_ERROR, DMA_READ, DMA_SKIP, DMA_SELECT, DMA_WRITE = (1 << bit for bit in range(5))
DMA_KEY_SHIFT = 16

# FWCfgFiles: a count, and for each file its size, its key and its name.
DIRECTORY_COUNT = struct.Struct(">I")
DIRECTORY_ENTRY = struct.Struct(">IHxx56s")
FILE_NAME_SIZE = 56  # with a zero byte

# An entry of the file etc/e820: base, length, type.
E820_ENTRY = struct.Struct("<QQI")
