"""Interrupt controllers, timers, clocks, eventfds of KVM (KVM API 4.24 to 4.27, 4.52 to 4.75)."""

from ctypes import Structure, Union

from vmexit.abi import kvm_caps as caps
from vmexit.abi.ioctl import KVMIO, READ, WRITE, encode
from vmexit.abi.kvm_structs import s32, s64, u8, u16, u32, u64

KVM_IOAPIC_NUM_PINS = 24
KVM_APIC_REG_SIZE = 0x400

# ioeventfd, irqfd, routing.
KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2
KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1
KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2
KVM_IRQ_ROUTING_HV_SINT = 4
KVM_IRQ_ROUTING_XEN_EVTCHN = 5
KVM_MSI_VALID_DEVID = 1 << 0

# In-kernel interrupt controllers and timer
KVM_PIT_SPEAKER_DUMMY = 1
KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_NR_IRQCHIPS = 3
KVM_PIT_FLAGS_HPET_LEGACY = 0x1
KVM_PIT_FLAGS_SPEAKER_DATA_ON = 0x2

# Clock
KVM_CLOCK_TSC_STABLE = 2
KVM_CLOCK_REALTIME = 1 << 2
KVM_CLOCK_HOST_TSC = 1 << 3


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


class kvm_interrupt(Structure):
    _fields_ = (("irq", u32),)


class kvm_tpr_access_ctl(Structure):
    _fields_ = (("enabled", u32), ("flags", u32), ("reserved", u32 * 8))


class kvm_vapic_addr(Structure):
    _fields_ = (("vapic_addr", u64),)


# Ioctls of a VM and of a vCPU.
KVM_CREATE_IRQCHIP = encode(KVMIO, 0x60)
KVM_IRQ_LINE = encode(KVMIO, 0x61, WRITE, kvm_irq_level)
KVM_GET_IRQCHIP = encode(KVMIO, 0x62, READ | WRITE, kvm_irqchip)
KVM_SET_IRQCHIP = encode(KVMIO, 0x63, READ, kvm_irqchip)
KVM_IRQ_LINE_STATUS = encode(KVMIO, 0x67, READ | WRITE, kvm_irq_level)
KVM_REGISTER_COALESCED_MMIO = encode(KVMIO, 0x67, WRITE, kvm_coalesced_mmio_zone)
KVM_UNREGISTER_COALESCED_MMIO = encode(KVMIO, 0x68, WRITE, kvm_coalesced_mmio_zone)
KVM_SET_GSI_ROUTING = encode(KVMIO, 0x6A, WRITE, kvm_irq_routing)
KVM_REINJECT_CONTROL = encode(KVMIO, 0x71)
KVM_IRQFD = encode(KVMIO, 0x76, WRITE, kvm_irqfd)
KVM_CREATE_PIT2 = encode(KVMIO, 0x77, WRITE, kvm_pit_config)
KVM_SET_BOOT_CPU_ID = encode(KVMIO, 0x78)
KVM_IOEVENTFD = encode(KVMIO, 0x79, WRITE, kvm_ioeventfd)
KVM_SET_CLOCK = encode(KVMIO, 0x7B, WRITE, kvm_clock_data)
KVM_GET_CLOCK = encode(KVMIO, 0x7C, READ, kvm_clock_data)
KVM_GET_PIT2 = encode(KVMIO, 0x9F, READ, kvm_pit_state2)
KVM_SET_PIT2 = encode(KVMIO, 0xA0, WRITE, kvm_pit_state2)
KVM_SET_TSC_KHZ = encode(KVMIO, 0xA2)
KVM_GET_TSC_KHZ = encode(KVMIO, 0xA3)
KVM_SIGNAL_MSI = encode(KVMIO, 0xA5, WRITE, kvm_msi)
KVM_INTERRUPT = encode(KVMIO, 0x86, WRITE, kvm_interrupt)
KVM_GET_LAPIC = encode(KVMIO, 0x8E, READ, kvm_lapic_state)
KVM_SET_LAPIC = encode(KVMIO, 0x8F, WRITE, kvm_lapic_state)
KVM_TPR_ACCESS_REPORTING = encode(KVMIO, 0x92, READ | WRITE, kvm_tpr_access_ctl)
KVM_SET_VAPIC_ADDR = encode(KVMIO, 0x93, WRITE, kvm_vapic_addr)
KVM_NMI = encode(KVMIO, 0x9A)
KVM_KVMCLOCK_CTRL = encode(KVMIO, 0xAD)
KVM_SMI = encode(KVMIO, 0xB7)

# See vmexit.abi.kvm.
REQUIRED_CAPABILITY = {
    KVM_CREATE_IRQCHIP: caps.KVM_CAP_IRQCHIP,
    KVM_IRQ_LINE: caps.KVM_CAP_IRQCHIP,
    KVM_GET_IRQCHIP: caps.KVM_CAP_IRQCHIP,
    KVM_SET_IRQCHIP: caps.KVM_CAP_IRQCHIP,
    KVM_IRQ_LINE_STATUS: caps.KVM_CAP_IRQ_INJECT_STATUS,
    KVM_REGISTER_COALESCED_MMIO: caps.KVM_CAP_COALESCED_MMIO,
    KVM_UNREGISTER_COALESCED_MMIO: caps.KVM_CAP_COALESCED_MMIO,
    KVM_SET_GSI_ROUTING: caps.KVM_CAP_IRQ_ROUTING,
    KVM_REINJECT_CONTROL: caps.KVM_CAP_REINJECT_CONTROL,
    KVM_IRQFD: caps.KVM_CAP_IRQFD,
    KVM_CREATE_PIT2: caps.KVM_CAP_PIT2,
    KVM_SET_BOOT_CPU_ID: caps.KVM_CAP_SET_BOOT_CPU_ID,
    KVM_IOEVENTFD: caps.KVM_CAP_IOEVENTFD,
    KVM_SET_CLOCK: caps.KVM_CAP_ADJUST_CLOCK,
    KVM_GET_CLOCK: caps.KVM_CAP_ADJUST_CLOCK,
    KVM_GET_PIT2: caps.KVM_CAP_PIT_STATE2,
    KVM_SET_PIT2: caps.KVM_CAP_PIT_STATE2,
    KVM_SET_TSC_KHZ: caps.KVM_CAP_TSC_CONTROL,
    KVM_GET_TSC_KHZ: caps.KVM_CAP_GET_TSC_KHZ,
    KVM_SIGNAL_MSI: caps.KVM_CAP_SIGNAL_MSI,
    KVM_GET_LAPIC: caps.KVM_CAP_IRQCHIP,
    KVM_SET_LAPIC: caps.KVM_CAP_IRQCHIP,
    KVM_TPR_ACCESS_REPORTING: caps.KVM_CAP_VAPIC,
    KVM_SET_VAPIC_ADDR: caps.KVM_CAP_VAPIC,
    KVM_NMI: caps.KVM_CAP_USER_NMI,
    KVM_KVMCLOCK_CTRL: caps.KVM_CAP_KVMCLOCK_CTRL,
    KVM_SMI: caps.KVM_CAP_X86_SMM,
}
