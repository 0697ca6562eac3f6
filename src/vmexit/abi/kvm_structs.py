"""The structures that every VM on KVM needs: memory slots, registers (include/uapi/linux/kvm.h).

Field names are the kernel's. A pointer is a 64-bit integer here: `ctypes.addressof` gives it its
value. A structure that ends in an array of no fixed length has only its head here.
"""

from ctypes import Structure, c_int16, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64

u8, u16, u32, u64 = c_uint8, c_uint16, c_uint32, c_uint64
s16, s32, s64 = c_int16, c_int32, c_int64

KVM_NR_INTERRUPTS = 256


class kvm_userspace_memory_region(Structure):
    _fields_ = (
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
    )


class kvm_dirty_log(Structure):
    _fields_ = (("slot", u32), ("padding1", u32), ("dirty_bitmap", u64))


class kvm_clear_dirty_log(Structure):
    _fields_ = (("slot", u32), ("num_pages", u32), ("first_page", u64), ("dirty_bitmap", u64))


class kvm_mp_state(Structure):
    _fields_ = (("mp_state", u32),)


class kvm_regs(Structure):
    _fields_ = tuple(
        (name, u64)
        for name in (
            "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
            "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
            "rip", "rflags",
        )
    )  # fmt: skip


class kvm_segment(Structure):
    _fields_ = (
        ("base", u64),
        ("limit", u32),
        ("selector", u16),
        *((name, u8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl")),
        ("unusable", u8),
        ("padding", u8),
    )


class kvm_dtable(Structure):
    _fields_ = (("base", u64), ("limit", u16), ("padding", u16 * 3))


# What kvm_sregs and kvm_sregs2 have in common.
SREGS_FIELDS = (
    *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
    ("gdt", kvm_dtable),
    ("idt", kvm_dtable),
    *((name, u64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
)


class kvm_sregs(Structure):
    _fields_ = (*SREGS_FIELDS, ("interrupt_bitmap", u64 * (KVM_NR_INTERRUPTS // 64)))


class kvm_msr_entry(Structure):
    _fields_ = (("index", u32), ("reserved", u32), ("data", u64))


class kvm_msrs(Structure):
    _fields_ = (("nmsrs", u32), ("pad", u32))


class kvm_msr_list(Structure):
    _fields_ = (("nmsrs", u32),)


class kvm_cpuid_entry2(Structure):
    _fields_ = (
        *((name, u32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", u32 * 3),
    )


class kvm_cpuid2(Structure):
    _fields_ = (("nent", u32), ("padding", u32))


class kvm_translation(Structure):
    _fields_ = (
        ("linear_address", u64),
        ("physical_address", u64),
        ("valid", u8),
        ("writeable", u8),
        ("usermode", u8),
        ("pad", u8 * 5),
    )


class kvm_signal_mask(Structure):
    _fields_ = (("len", u32),)


class _exception_event(Structure):
    _fields_ = (
        ("injected", u8),
        ("nr", u8),
        ("has_error_code", u8),
        ("pending", u8),
        ("error_code", u32),
    )


class _interrupt_event(Structure):
    _fields_ = (("injected", u8), ("nr", u8), ("soft", u8), ("shadow", u8))


class _nmi_event(Structure):
    _fields_ = (("injected", u8), ("pending", u8), ("masked", u8), ("pad", u8))


class _smi_event(Structure):
    _fields_ = (("smm", u8), ("pending", u8), ("smm_inside_nmi", u8), ("latched_init", u8))


class _triple_fault_event(Structure):
    _fields_ = (("pending", u8),)


class kvm_vcpu_events(Structure):
    _fields_ = (
        ("exception", _exception_event),
        ("interrupt", _interrupt_event),
        ("nmi", _nmi_event),
        ("sipi_vector", u32),
        ("flags", u32),
        ("smi", _smi_event),
        ("triple_fault", _triple_fault_event),
        ("reserved", u8 * 26),
        ("exception_has_payload", u8),
        ("exception_payload", u64),
    )


class kvm_debug_exit_arch(Structure):
    _fields_ = (("exception", u32), ("pad", u32), ("pc", u64), ("dr6", u64), ("dr7", u64))
