"""`struct kvm_run`: what a vCPU and its VMM share (KVM API 5)."""

from ctypes import Structure, Union

from vmexit.abi.kvm_structs import (
    kvm_debug_exit_arch,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
    u8,
    u16,
    u32,
    u64,
)


class kvm_sync_regs(Structure):
    _fields_ = (("regs", kvm_regs), ("sregs", kvm_sregs), ("events", kvm_vcpu_events))


class _hw(Structure):
    _fields_ = (("hardware_exit_reason", u64),)


class _fail_entry(Structure):
    _fields_ = (("hardware_entry_failure_reason", u64), ("cpu", u32))


class _ex(Structure):
    _fields_ = (("exception", u32), ("error_code", u32))


class _io(Structure):
    _fields_ = (
        ("direction", u8),
        ("size", u8),
        ("port", u16),
        ("count", u32),
        ("data_offset", u64),
    )


class _debug(Structure):
    _fields_ = (("arch", kvm_debug_exit_arch),)


class _mmio(Structure):
    _fields_ = (("phys_addr", u64), ("data", u8 * 8), ("len", u32), ("is_write", u8))


class _hypercall(Structure):
    _fields_ = (("nr", u64), ("args", u64 * 6), ("ret", u64), ("longmode", u32), ("pad", u32))


class _tpr_access(Structure):
    _fields_ = (("rip", u64), ("is_write", u32), ("pad", u32))


class _internal(Structure):
    _fields_ = (("suberror", u32), ("ndata", u32), ("data", u64 * 16))


class _emulation_failure(Structure):
    _fields_ = (
        ("suberror", u32),
        ("ndata", u32),
        ("flags", u64),
        ("insn_size", u8),
        ("insn_bytes", u8 * 15),
    )


class _system_event_data(Union):
    _fields_ = (("flags", u64), ("data", u64 * 16))


class _system_event(Structure):
    _anonymous_ = ("u",)
    _fields_ = (("type", u32), ("ndata", u32), ("u", _system_event_data))


class _eoi(Structure):
    _fields_ = (("vector", u8),)


class _synic(Structure):
    _fields_ = (
        ("msr", u32),
        ("pad2", u32),
        ("control", u64),
        ("evt_page", u64),
        ("msg_page", u64),
    )


class _hyperv_hcall(Structure):
    _fields_ = (("input", u64), ("result", u64), ("params", u64 * 2))


class _syndbg(Structure):
    _fields_ = (
        ("msr", u32),
        ("pad2", u32),
        ("control", u64),
        ("status", u64),
        ("send_page", u64),
        ("recv_page", u64),
        ("pending_page", u64),
    )


class _hyperv_union(Union):
    _fields_ = (("synic", _synic), ("hcall", _hyperv_hcall), ("syndbg", _syndbg))


class kvm_hyperv_exit(Structure):
    _fields_ = (("type", u32), ("pad1", u32), ("u", _hyperv_union))


class _xen_hcall(Structure):
    _fields_ = (
        ("longmode", u32),
        ("cpl", u32),
        ("input", u64),
        ("result", u64),
        ("params", u64 * 6),
    )


class _xen_union(Union):
    _fields_ = (("hcall", _xen_hcall),)


class kvm_xen_exit(Structure):
    _fields_ = (("type", u32), ("u", _xen_union))


class _msr(Structure):
    _fields_ = (("error", u8), ("pad", u8 * 7), ("reason", u32), ("index", u32), ("data", u64))


class _notify(Structure):
    _fields_ = (("flags", u32),)


class _exit(Union):
    _fields_ = (
        ("hw", _hw),
        ("fail_entry", _fail_entry),
        ("ex", _ex),
        ("io", _io),
        ("debug", _debug),
        ("mmio", _mmio),
        ("hypercall", _hypercall),
        ("tpr_access", _tpr_access),
        ("internal", _internal),
        ("emulation_failure", _emulation_failure),
        ("system_event", _system_event),
        ("eoi", _eoi),
        ("hyperv", kvm_hyperv_exit),
        ("msr", _msr),
        ("xen", kvm_xen_exit),
        ("notify", _notify),
        ("padding", u8 * 256),
    )


class _synced(Union):
    _fields_ = (("regs", kvm_sync_regs), ("padding", u8 * 2048))


class kvm_run(Structure):
    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", u8),
        ("immediate_exit", u8),
        ("padding1", u8 * 6),
        ("exit_reason", u32),
        ("ready_for_interrupt_injection", u8),
        ("if_flag", u8),
        ("flags", u16),
        ("cr8", u64),
        ("apic_base", u64),
        ("exit", _exit),
        ("kvm_valid_regs", u64),
        ("kvm_dirty_regs", u64),
        ("s", _synced),
    )
