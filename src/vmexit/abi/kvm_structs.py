"""The structures of KVM's ioctls that x86 has, as ctypes (include/uapi/linux/kvm.h, asm/kvm.h).

Field names are the kernel's. A pointer is a 64-bit integer here: `ctypes.addressof` gives it its
value. A structure that ends in an array of no fixed length has only its head here.
"""

from ctypes import (
    Structure,
    Union,
    c_int16,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
)

u8, u16, u32, u64 = c_uint8, c_uint16, c_uint32, c_uint64
s16, s32, s64 = c_int16, c_int32, c_int64

KVM_NR_INTERRUPTS = 256
KVM_IOAPIC_NUM_PINS = 24
KVM_APIC_REG_SIZE = 0x400
KVM_MAX_XCRS = 16
KVM_MSR_FILTER_MAX_RANGES = 16


# Memory slots (KVM API 4.8, 4.35, 4.116; dirty ring: 8.29).


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


class kvm_dirty_gfn(Structure):
    _fields_ = (("flags", u32), ("slot", u32), ("offset", u64))


class kvm_enc_region(Structure):
    _fields_ = (("addr", u64), ("size", u64))


class kvm_translation(Structure):
    _fields_ = (
        ("linear_address", u64),
        ("physical_address", u64),
        ("valid", u8),
        ("writeable", u8),
        ("usermode", u8),
        ("pad", u8 * 5),
    )


class _coalesced_kind(Union):
    _fields_ = (("pad", u32), ("pio", u32))


class kvm_coalesced_mmio_zone(Structure):
    _anonymous_ = ("u",)
    _fields_ = (("addr", u64), ("size", u32), ("u", _coalesced_kind))


class kvm_coalesced_mmio(Structure):
    _anonymous_ = ("u",)
    _fields_ = (("phys_addr", u64), ("len", u32), ("u", _coalesced_kind), ("data", u8 * 8))


class kvm_coalesced_mmio_ring(Structure):
    _fields_ = (("first", u32), ("last", u32))


# Registers (KVM API 4.11 to 4.14, 4.33 to 4.36, 4.42 to 4.45).


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


_SREGS = (
    *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
    ("gdt", kvm_dtable),
    ("idt", kvm_dtable),
    *((name, u64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
)


class kvm_sregs(Structure):
    _fields_ = (*_SREGS, ("interrupt_bitmap", u64 * (KVM_NR_INTERRUPTS // 64)))


class kvm_sregs2(Structure):
    _fields_ = (*_SREGS, ("flags", u64), ("pdptrs", u64 * 4))


class kvm_fpu(Structure):
    _fields_ = (
        ("fpr", u8 * 16 * 8),
        ("fcw", u16),
        ("fsw", u16),
        ("ftwx", u8),
        ("pad1", u8),
        ("last_opcode", u16),
        ("last_ip", u64),
        ("last_dp", u64),
        ("xmm", u8 * 16 * 16),
        ("mxcsr", u32),
        ("pad2", u32),
    )


class kvm_xsave(Structure):
    _fields_ = (("region", u32 * 1024),)


class kvm_xcr(Structure):
    _fields_ = (("xcr", u32), ("reserved", u32), ("value", u64))


class kvm_xcrs(Structure):
    _fields_ = (
        ("nr_xcrs", u32),
        ("flags", u32),
        ("xcrs", kvm_xcr * KVM_MAX_XCRS),
        ("padding", u64 * 16),
    )


class kvm_debugregs(Structure):
    _fields_ = (
        ("db", u64 * 4),
        ("dr6", u64),
        ("dr7", u64),
        ("flags", u64),
        ("reserved", u64 * 9),
    )


class kvm_msr_entry(Structure):
    _fields_ = (("index", u32), ("reserved", u32), ("data", u64))


class kvm_msrs(Structure):
    _fields_ = (("nmsrs", u32), ("pad", u32))


class kvm_msr_list(Structure):
    _fields_ = (("nmsrs", u32),)


class kvm_msr_filter_range(Structure):
    _fields_ = (("flags", u32), ("nmsrs", u32), ("base", u32), ("bitmap", u64))


class kvm_msr_filter(Structure):
    _fields_ = (("flags", u32), ("ranges", kvm_msr_filter_range * KVM_MSR_FILTER_MAX_RANGES))


class kvm_cpuid_entry(Structure):
    _fields_ = tuple((name, u32) for name in ("function", "eax", "ebx", "ecx", "edx", "padding"))


class kvm_cpuid(Structure):
    _fields_ = (("nent", u32), ("padding", u32))


class kvm_cpuid_entry2(Structure):
    _fields_ = (
        *((name, u32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", u32 * 3),
    )


class kvm_cpuid2(Structure):
    _fields_ = (("nent", u32), ("padding", u32))


class kvm_one_reg(Structure):
    _fields_ = (("id", u64), ("addr", u64))


class kvm_reg_list(Structure):
    _fields_ = (("n", u64),)


# Events, run states, debugging (KVM API 4.31, 4.38, 4.87).


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


class kvm_mp_state(Structure):
    _fields_ = (("mp_state", u32),)


class kvm_interrupt(Structure):
    _fields_ = (("irq", u32),)


class kvm_signal_mask(Structure):
    _fields_ = (("len", u32),)


class kvm_guest_debug_arch(Structure):
    _fields_ = (("debugreg", u64 * 8),)


class kvm_guest_debug(Structure):
    _fields_ = (("control", u32), ("pad", u32), ("arch", kvm_guest_debug_arch))


class kvm_debug_exit_arch(Structure):
    _fields_ = (("exception", u32), ("pad", u32), ("pc", u64), ("dr6", u64), ("dr7", u64))


class kvm_tpr_access_ctl(Structure):
    _fields_ = (("enabled", u32), ("flags", u32), ("reserved", u32 * 8))


class kvm_vapic_addr(Structure):
    _fields_ = (("vapic_addr", u64),)


class kvm_x86_mce(Structure):
    _fields_ = (
        ("status", u64),
        ("addr", u64),
        ("misc", u64),
        ("mcg_status", u64),
        ("bank", u8),
        ("pad1", u8 * 7),
        ("pad2", u64 * 3),
    )


# Interrupt controllers, timers, eventfds (KVM API 4.24 to 4.27, 4.52, 4.59, 4.71 to 4.75).


class _irq_level_line(Union):
    _fields_ = (("irq", u32), ("status", s32))


class kvm_irq_level(Structure):
    _anonymous_ = ("u",)
    _fields_ = (("u", _irq_level_line), ("level", u32))


class kvm_pic_state(Structure):
    _fields_ = tuple(
        (name, u8)
        for name in (
            "last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select", "poll",
            "special_mask", "init_state", "auto_eoi", "rotate_on_auto_eoi",
            "special_fully_nested_mode", "init4", "elcr", "elcr_mask",
        )
    )  # fmt: skip


class _ioapic_fields(Structure):
    _fields_ = (
        ("vector", u8),
        ("delivery_mode", u8, 3),
        ("dest_mode", u8, 1),
        ("delivery_status", u8, 1),
        ("polarity", u8, 1),
        ("remote_irr", u8, 1),
        ("trig_mode", u8, 1),
        ("mask", u8, 1),
        ("reserve", u8, 7),
        ("reserved", u8 * 4),
        ("dest_id", u8),
    )


class _ioapic_entry(Union):
    _fields_ = (("bits", u64), ("fields", _ioapic_fields))


class kvm_ioapic_state(Structure):
    _fields_ = (
        ("base_address", u64),
        ("ioregsel", u32),
        ("id", u32),
        ("irr", u32),
        ("pad", u32),
        ("redirtbl", _ioapic_entry * KVM_IOAPIC_NUM_PINS),
    )


class _irqchip_state(Union):
    _fields_ = (("dummy", u8 * 512), ("pic", kvm_pic_state), ("ioapic", kvm_ioapic_state))


class kvm_irqchip(Structure):
    _fields_ = (("chip_id", u32), ("pad", u32), ("chip", _irqchip_state))


class kvm_lapic_state(Structure):
    _fields_ = (("regs", u8 * KVM_APIC_REG_SIZE),)


class kvm_pit_config(Structure):
    _fields_ = (("flags", u32), ("pad", u32 * 15))


class kvm_pit_channel_state(Structure):
    _fields_ = (
        ("count", u32),
        ("latched_count", u16),
        *(
            (name, u8)
            for name in (
                "count_latched", "status_latched", "status", "read_state", "write_state",
                "write_latch", "rw_mode", "mode", "bcd", "gate",
            )
        ),
        ("count_load_time", s64),
    )  # fmt: skip


class kvm_pit_state(Structure):
    _fields_ = (("channels", kvm_pit_channel_state * 3),)


class kvm_pit_state2(Structure):
    _fields_ = (("channels", kvm_pit_channel_state * 3), ("flags", u32), ("reserved", u32 * 9))


class kvm_reinject_control(Structure):
    _fields_ = (("pit_reinject", u8), ("reserved", u8 * 31))


class kvm_irq_routing_irqchip(Structure):
    _fields_ = (("irqchip", u32), ("pin", u32))


class _msi_device(Union):
    _fields_ = (("pad", u32), ("devid", u32))


class kvm_irq_routing_msi(Structure):
    _anonymous_ = ("u",)
    _fields_ = (("address_lo", u32), ("address_hi", u32), ("data", u32), ("u", _msi_device))


class kvm_irq_routing_hv_sint(Structure):
    _fields_ = (("vcpu", u32), ("sint", u32))


class kvm_irq_routing_xen_evtchn(Structure):
    _fields_ = (("port", u32), ("vcpu", u32), ("priority", u32))


class _irq_routing_target(Union):
    _fields_ = (
        ("irqchip", kvm_irq_routing_irqchip),
        ("msi", kvm_irq_routing_msi),
        ("hv_sint", kvm_irq_routing_hv_sint),
        ("xen_evtchn", kvm_irq_routing_xen_evtchn),
        ("pad", u32 * 8),
    )


class kvm_irq_routing_entry(Structure):
    _fields_ = (
        ("gsi", u32),
        ("type", u32),
        ("flags", u32),
        ("pad", u32),
        ("u", _irq_routing_target),
    )


class kvm_irq_routing(Structure):
    _fields_ = (("nr", u32), ("flags", u32))


class kvm_irqfd(Structure):
    _fields_ = (("fd", u32), ("gsi", u32), ("flags", u32), ("resamplefd", u32), ("pad", u8 * 16))


class kvm_ioeventfd(Structure):
    _fields_ = (
        ("datamatch", u64),
        ("addr", u64),
        ("len", u32),
        ("fd", s32),
        ("flags", u32),
        ("pad", u8 * 36),
    )


class kvm_msi(Structure):
    _fields_ = (
        ("address_lo", u32),
        ("address_hi", u32),
        ("data", u32),
        ("flags", u32),
        ("devid", u32),
        ("pad", u8 * 12),
    )


class kvm_clock_data(Structure):
    _fields_ = (
        ("clock", u64),
        ("flags", u32),
        ("pad0", u32),
        ("realtime", u64),
        ("host_tsc", u64),
        ("pad", u32 * 4),
    )


# Capabilities, devices, statistics, performance counters (KVM API 4.37, 4.79, 4.80, 4.120, 4.131).


class kvm_enable_cap(Structure):
    _fields_ = (("cap", u32), ("flags", u32), ("args", u64 * 4), ("pad", u8 * 64))


class kvm_create_device(Structure):
    _fields_ = (("type", u32), ("fd", u32), ("flags", u32))


class kvm_device_attr(Structure):
    _fields_ = (("flags", u32), ("group", u32), ("attr", u64), ("addr", u64))


class kvm_stats_header(Structure):
    _fields_ = tuple(
        (name, u32)
        for name in ("flags", "name_size", "num_desc", "id_offset", "desc_offset", "data_offset")
    )


class kvm_stats_desc(Structure):
    _fields_ = (
        ("flags", u32),
        ("exponent", s16),
        ("size", u16),
        ("offset", u32),
        ("bucket_size", u32),
    )


class kvm_pmu_event_filter(Structure):
    _fields_ = (
        ("action", u32),
        ("nevents", u32),
        ("fixed_counter_bitmap", u32),
        ("flags", u32),
        ("pad", u32 * 4),
    )


# Nested virtualization (KVM API 4.114).


class _vmx_smm(Structure):
    _fields_ = (("flags", u16),)


class kvm_vmx_nested_state_hdr(Structure):
    _fields_ = (
        ("vmxon_pa", u64),
        ("vmcs12_pa", u64),
        ("smm", _vmx_smm),
        ("pad", u16),
        ("flags", u32),
        ("preemption_timer_deadline", u64),
    )


class kvm_svm_nested_state_hdr(Structure):
    _fields_ = (("vmcb_pa", u64),)


class _nested_state_hdr(Union):
    _fields_ = (
        ("vmx", kvm_vmx_nested_state_hdr),
        ("svm", kvm_svm_nested_state_hdr),
        ("pad", u8 * 120),
    )


class kvm_nested_state(Structure):
    _fields_ = (("flags", u16), ("format", u16), ("size", u32), ("hdr", _nested_state_hdr))


# Xen and Hyper-V guests (KVM API 4.48, 4.118, 4.126 to 4.129).


class kvm_xen_hvm_config(Structure):
    _fields_ = (
        ("flags", u32),
        ("msr", u32),
        ("blob_addr_32", u64),
        ("blob_addr_64", u64),
        ("blob_size_32", u8),
        ("blob_size_64", u8),
        ("pad2", u8 * 30),
    )


class kvm_hyperv_eventfd(Structure):
    _fields_ = (("conn_id", u32), ("fd", s32), ("flags", u32), ("padding", u32 * 3))
