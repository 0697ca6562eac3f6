"""More of a VM's state and behaviour: FPU, debugging, dirty tracking, nesting, Xen, Hyper-V."""

from ctypes import Structure, Union

from vmexit.abi import kvm_caps as caps
from vmexit.abi.ioctl import KVMIO, READ, WRITE, encode
from vmexit.abi.kvm_structs import SREGS_FIELDS, kvm_cpuid2, s16, s32, u8, u16, u32, u64

KVM_MAX_XCRS = 16
KVM_MSR_FILTER_MAX_RANGES = 16

# Dirty tracking (KVM API 4.8, 4.116, 8.29).
KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1
KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1
KVM_DIRTY_GFN_F_MASK = 0x3

# In pages: where the dirty ring is in the mapping of a vCPU (KVM API 8.29).
KVM_DIRTY_LOG_PAGE_OFFSET = 64

# Attributes of a vCPU (Documentation/virt/kvm/devices/vcpu.rst, 4).
KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0

# Debugging
KVM_GUESTDBG_ENABLE = 0x1
KVM_GUESTDBG_SINGLESTEP = 0x2
KVM_GUESTDBG_USE_SW_BP = 0x10000
KVM_GUESTDBG_USE_HW_BP = 0x20000
KVM_GUESTDBG_INJECT_DB = 0x40000
KVM_GUESTDBG_INJECT_BP = 0x80000
KVM_GUESTDBG_BLOCKIRQ = 0x100000

# MSR filter
KVM_MSR_FILTER_MAX_BITMAP_SIZE = 0x600
KVM_MSR_FILTER_READ = 1 << 0
KVM_MSR_FILTER_WRITE = 1 << 1
KVM_MSR_FILTER_DEFAULT_ALLOW = 0 << 0
KVM_MSR_FILTER_DEFAULT_DENY = 1 << 0

# KVM_CAP_X86_DISABLE_EXITS.
KVM_X86_DISABLE_EXITS_MWAIT = 1 << 0
KVM_X86_DISABLE_EXITS_HLT = 1 << 1
KVM_X86_DISABLE_EXITS_PAUSE = 1 << 2
KVM_X86_DISABLE_EXITS_CSTATE = 1 << 3

# KVM_CAP_DISABLE_QUIRKS.
KVM_X86_QUIRK_LINT0_REENABLED = 1 << 0
KVM_X86_QUIRK_CD_NW_CLEARED = 1 << 1
KVM_X86_QUIRK_LAPIC_MMIO_HOLE = 1 << 2
KVM_X86_QUIRK_OUT_7E_INC_RIP = 1 << 3
KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT = 1 << 4
KVM_X86_QUIRK_FIX_HYPERCALL_INSN = 1 << 5
KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS = 1 << 6

# KVM_CAP_X86_BUS_LOCK_EXIT and KVM_CAP_X86_NOTIFY_VMEXIT.
KVM_BUS_LOCK_DETECTION_OFF = 1 << 0
KVM_BUS_LOCK_DETECTION_EXIT = 1 << 1
KVM_X86_NOTIFY_VMEXIT_ENABLED = 1 << 0
KVM_X86_NOTIFY_VMEXIT_USER = 1 << 1

# Nested state
KVM_STATE_NESTED_FORMAT_VMX = 0
KVM_STATE_NESTED_FORMAT_SVM = 1
KVM_STATE_NESTED_GUEST_MODE = 0x1
KVM_STATE_NESTED_RUN_PENDING = 0x2
KVM_STATE_NESTED_EVMCS = 0x4
KVM_STATE_NESTED_MTF_PENDING = 0x8
KVM_STATE_NESTED_GIF_SET = 0x100
KVM_STATE_NESTED_SMM_GUEST_MODE = 0x1
KVM_STATE_NESTED_SMM_VMXON = 0x2
KVM_STATE_NESTED_VMX_VMCS_SIZE = 0x1000
KVM_STATE_NESTED_SVM_VMCB_SIZE = 0x1000

# sregs2
KVM_SREGS2_FLAGS_PDPTRS_VALID = 1


class kvm_clear_dirty_log(Structure):
    _fields_ = (("slot", u32), ("num_pages", u32), ("first_page", u64), ("dirty_bitmap", u64))


class kvm_dirty_gfn(Structure):
    _fields_ = (("flags", u32), ("slot", u32), ("offset", u64))


class kvm_enc_region(Structure):
    _fields_ = (("addr", u64), ("size", u64))


class kvm_sregs2(Structure):
    _fields_ = (*SREGS_FIELDS, ("flags", u64), ("pdptrs", u64 * 4))


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


class kvm_msr_filter_range(Structure):
    _fields_ = (("flags", u32), ("nmsrs", u32), ("base", u32), ("bitmap", u64))


class kvm_msr_filter(Structure):
    _fields_ = (("flags", u32), ("ranges", kvm_msr_filter_range * KVM_MSR_FILTER_MAX_RANGES))


class kvm_cpuid_entry(Structure):
    _fields_ = tuple((name, u32) for name in ("function", "eax", "ebx", "ecx", "edx", "padding"))


class kvm_cpuid(Structure):
    _fields_ = (("nent", u32), ("padding", u32))


class kvm_one_reg(Structure):
    _fields_ = (("id", u64), ("addr", u64))


class kvm_reg_list(Structure):
    _fields_ = (("n", u64),)


class kvm_guest_debug_arch(Structure):
    _fields_ = (("debugreg", u64 * 8),)


class kvm_guest_debug(Structure):
    _fields_ = (("control", u32), ("pad", u32), ("arch", kvm_guest_debug_arch))


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


# Ioctls of a VM and of a vCPU.
KVM_SET_NR_MMU_PAGES = encode(KVMIO, 0x44)
KVM_GET_NR_MMU_PAGES = encode(KVMIO, 0x45)
KVM_SET_PMU_EVENT_FILTER = encode(KVMIO, 0xB2, WRITE, kvm_pmu_event_filter)
KVM_CREATE_DEVICE = encode(KVMIO, 0xE0, READ | WRITE, kvm_create_device)
KVM_SET_DEVICE_ATTR = encode(KVMIO, 0xE1, WRITE, kvm_device_attr)
KVM_GET_DEVICE_ATTR = encode(KVMIO, 0xE2, WRITE, kvm_device_attr)
KVM_HAS_DEVICE_ATTR = encode(KVMIO, 0xE3, WRITE, kvm_device_attr)
KVM_GET_FPU = encode(KVMIO, 0x8C, READ, kvm_fpu)
KVM_SET_FPU = encode(KVMIO, 0x8D, WRITE, kvm_fpu)
KVM_SET_GUEST_DEBUG = encode(KVMIO, 0x9B, WRITE, kvm_guest_debug)
KVM_X86_SETUP_MCE = encode(KVMIO, 0x9C, WRITE, u64)
KVM_X86_GET_MCE_CAP_SUPPORTED = encode(KVMIO, 0x9D, READ, u64)
KVM_X86_SET_MCE = encode(KVMIO, 0x9E, WRITE, kvm_x86_mce)
KVM_GET_DEBUGREGS = encode(KVMIO, 0xA1, READ, kvm_debugregs)
KVM_SET_DEBUGREGS = encode(KVMIO, 0xA2, WRITE, kvm_debugregs)
KVM_ENABLE_CAP = encode(KVMIO, 0xA3, WRITE, kvm_enable_cap)
KVM_GET_XSAVE = encode(KVMIO, 0xA4, READ, kvm_xsave)
KVM_SET_XSAVE = encode(KVMIO, 0xA5, WRITE, kvm_xsave)
KVM_GET_XCRS = encode(KVMIO, 0xA6, READ, kvm_xcrs)
KVM_SET_XCRS = encode(KVMIO, 0xA7, WRITE, kvm_xcrs)
KVM_GET_ONE_REG = encode(KVMIO, 0xAB, WRITE, kvm_one_reg)
KVM_SET_ONE_REG = encode(KVMIO, 0xAC, WRITE, kvm_one_reg)
KVM_MEMORY_ENCRYPT_OP = encode(KVMIO, 0xBA, READ | WRITE, u64)
KVM_MEMORY_ENCRYPT_REG_REGION = encode(KVMIO, 0xBB, READ, kvm_enc_region)
KVM_MEMORY_ENCRYPT_UNREG_REGION = encode(KVMIO, 0xBC, READ, kvm_enc_region)
KVM_HYPERV_EVENTFD = encode(KVMIO, 0xBD, WRITE, kvm_hyperv_eventfd)
KVM_GET_NESTED_STATE = encode(KVMIO, 0xBE, READ | WRITE, kvm_nested_state)
KVM_SET_NESTED_STATE = encode(KVMIO, 0xBF, WRITE, kvm_nested_state)
KVM_CLEAR_DIRTY_LOG = encode(KVMIO, 0xC0, READ | WRITE, kvm_clear_dirty_log)
KVM_GET_SUPPORTED_HV_CPUID = encode(KVMIO, 0xC1, READ | WRITE, kvm_cpuid2)
KVM_X86_SET_MSR_FILTER = encode(KVMIO, 0xC6, WRITE, kvm_msr_filter)
KVM_RESET_DIRTY_RINGS = encode(KVMIO, 0xC7)
KVM_GET_SREGS2 = encode(KVMIO, 0xCC, READ, kvm_sregs2)
KVM_SET_SREGS2 = encode(KVMIO, 0xCD, WRITE, kvm_sregs2)
KVM_GET_STATS_FD = encode(KVMIO, 0xCE)
KVM_GET_XSAVE2 = encode(KVMIO, 0xCF, READ, kvm_xsave)

# See vmexit.abi.kvm.
REQUIRED_CAPABILITY = {
    KVM_SET_NR_MMU_PAGES: caps.KVM_CAP_MMU_SHADOW_CACHE_CONTROL,
    KVM_GET_NR_MMU_PAGES: caps.KVM_CAP_MMU_SHADOW_CACHE_CONTROL,
    KVM_SET_PMU_EVENT_FILTER: caps.KVM_CAP_PMU_EVENT_FILTER,
    KVM_CREATE_DEVICE: caps.KVM_CAP_DEVICE_CTRL,
    KVM_SET_DEVICE_ATTR: caps.KVM_CAP_DEVICE_CTRL,
    KVM_GET_DEVICE_ATTR: caps.KVM_CAP_DEVICE_CTRL,
    KVM_HAS_DEVICE_ATTR: caps.KVM_CAP_DEVICE_CTRL,
    KVM_SET_GUEST_DEBUG: caps.KVM_CAP_SET_GUEST_DEBUG,
    KVM_X86_SETUP_MCE: caps.KVM_CAP_MCE,
    KVM_X86_GET_MCE_CAP_SUPPORTED: caps.KVM_CAP_MCE,
    KVM_X86_SET_MCE: caps.KVM_CAP_MCE,
    KVM_GET_DEBUGREGS: caps.KVM_CAP_DEBUGREGS,
    KVM_SET_DEBUGREGS: caps.KVM_CAP_DEBUGREGS,
    KVM_ENABLE_CAP: caps.KVM_CAP_ENABLE_CAP_VM,
    KVM_GET_XSAVE: caps.KVM_CAP_XSAVE,
    KVM_SET_XSAVE: caps.KVM_CAP_XSAVE,
    KVM_GET_XCRS: caps.KVM_CAP_XCRS,
    KVM_SET_XCRS: caps.KVM_CAP_XCRS,
    KVM_GET_ONE_REG: caps.KVM_CAP_ONE_REG,
    KVM_SET_ONE_REG: caps.KVM_CAP_ONE_REG,
    KVM_HYPERV_EVENTFD: caps.KVM_CAP_HYPERV_EVENTFD,
    KVM_GET_NESTED_STATE: caps.KVM_CAP_NESTED_STATE,
    KVM_SET_NESTED_STATE: caps.KVM_CAP_NESTED_STATE,
    KVM_CLEAR_DIRTY_LOG: caps.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_GET_SUPPORTED_HV_CPUID: caps.KVM_CAP_HYPERV_CPUID,
    KVM_X86_SET_MSR_FILTER: caps.KVM_CAP_X86_MSR_FILTER,
    KVM_RESET_DIRTY_RINGS: caps.KVM_CAP_DIRTY_LOG_RING,
    KVM_GET_SREGS2: caps.KVM_CAP_SREGS2,
    KVM_SET_SREGS2: caps.KVM_CAP_SREGS2,
    KVM_GET_STATS_FD: caps.KVM_CAP_BINARY_STATS_FD,
    KVM_GET_XSAVE2: caps.KVM_CAP_XSAVE2,
}
