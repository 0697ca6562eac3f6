"""The Linux x86 boot protocol: `boot_params` (the zero page) with its setup header.

As in `<asm/bootparam.h>`; Linux Documentation/arch/x86/boot.rst and zero-page.rst say what the
fields mean. What vmexit does not fill in is padding here.
"""

from ctypes import Structure

from vmexit.abi.kvm_structs import u8, u16, u32, u64

# loadflags
LOADED_HIGH = 1 << 0
KASLR_FLAG = 1 << 1
QUIET_FLAG = 1 << 5
KEEP_SEGMENTS = 1 << 6
CAN_USE_HEAP = 1 << 7

# xloadflags
XLF_KERNEL_64 = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1
XLF_EFI_HANDOVER_32 = 1 << 2
XLF_EFI_HANDOVER_64 = 1 << 3
XLF_EFI_KEXEC = 1 << 4
XLF_5LEVEL = 1 << 5
XLF_5LEVEL_ENABLED = 1 << 6

E820_MAX_ENTRIES_ZEROPAGE = 128

# What the headers have no name for.
BOOT_FLAG = 0xAA55
HEADER_MAGIC = b"HdrS"
TYPE_OF_LOADER_UNDEFINED = 0xFF
VIDEO_CURRENT_MODE = 0x0F04  # Documentation/admin-guide/svga.rst
INITRD_ADDR_MAX_BEFORE_2_03 = 0x37FF_FFFF
CMDLINE_SIZE_BEFORE_2_06 = 255
# The command line before 2.02: a magic number and an offset at these places of the boot sector.
CL_MAGIC = 0xA33F
CL_MAGIC_OFFSET = 0x20
CL_OFFSET_OFFSET = 0x22
# Entry points, from the beginning of what is loaded.
ENTRY_64_OFFSET = 0x200
# The selectors that the 32-bit and 64-bit protocols require.
BOOT_CS, BOOT_DS = 0x10, 0x18


class setup_header(Structure):
    _pack_ = 1
    _layout_ = "ms"  # Python 3.14 wants it said with _pack_; packed, both layouts are the same
    _fields_ = (
        ("setup_sects", u8),
        ("root_flags", u16),
        ("syssize", u32),
        ("ram_size", u16),
        ("vid_mode", u16),
        ("root_dev", u16),
        ("boot_flag", u16),
        ("jump", u16),
        ("header", u32),
        ("version", u16),
        ("realmode_swtch", u32),
        ("start_sys_seg", u16),
        ("kernel_version", u16),
        ("type_of_loader", u8),
        ("loadflags", u8),
        ("setup_move_size", u16),
        ("code32_start", u32),
        ("ramdisk_image", u32),
        ("ramdisk_size", u32),
        ("bootsect_kludge", u32),
        ("heap_end_ptr", u16),
        ("ext_loader_ver", u8),
        ("ext_loader_type", u8),
        ("cmd_line_ptr", u32),
        ("initrd_addr_max", u32),
        ("kernel_alignment", u32),
        ("relocatable_kernel", u8),
        ("min_alignment", u8),
        ("xloadflags", u16),
        ("cmdline_size", u32),
        ("hardware_subarch", u32),
        ("hardware_subarch_data", u64),
        ("payload_offset", u32),
        ("payload_length", u32),
        ("setup_data", u64),
        ("pref_address", u64),
        ("init_size", u32),
        ("handover_offset", u32),
        ("kernel_info_offset", u32),
    )


class boot_e820_entry(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("addr", u64), ("size", u64), ("type", u32))


class boot_params(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (
        ("_screen_info", u8 * 0x70),
        ("acpi_rsdp_addr", u64),
        ("_obsolete", u8 * 0x48),
        ("ext_ramdisk_image", u32),
        ("ext_ramdisk_size", u32),
        ("ext_cmd_line_ptr", u32),
        ("_efi_info", u8 * 0x11C),
        ("e820_entries", u8),
        ("_edd", u8 * 6),
        ("sentinel", u8),
        ("_pad6", u8),
        ("hdr", setup_header),
        ("_pad7", u8 * 0x24),
        ("_edd_mbr_sig_buffer", u8 * 0x40),
        ("e820_table", boot_e820_entry * E820_MAX_ENTRIES_ZEROPAGE),
        ("_eddbuf", u8 * 0x330),
    )


SETUP_HEADER_OFFSET = 0x1F1
# Where the header may end at most: `edd_mbr_sig_buffer` comes behind it.
SETUP_HEADER_END = 0x290
