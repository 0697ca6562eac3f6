"""The interrupt controllers of a PC in the kernel: two PICs, an I/O APIC, and the interval timer.

The local APICs come with the vCPUs. GSIs 0 to 15 are the ISA interrupts, which reach both the PICs
and the I/O APIC, where GSI 0 has pin 2, as on every PC; those up to 23 reach the I/O APIC only.
GSI 2 leads nowhere: that input of the master PIC is the slave's.
"""

import errno
import struct
from collections.abc import Mapping
from ctypes import sizeof
from fcntl import ioctl
from functools import cache

from vmexit.abi.kvm_irq import (
    KVM_CREATE_IRQCHIP,
    KVM_CREATE_PIT2,
    KVM_GET_IRQCHIP,
    KVM_GET_PIT2,
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQ_LINE,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQFD,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_PIT_SPEAKER_DUMMY,
    KVM_SET_GSI_ROUTING,
    KVM_SET_IRQCHIP,
    KVM_SET_PIT2,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_pit_config,
    kvm_pit_state2,
)
from vmexit.core.bus import State
from vmexit.core.errors import ConfigError, HostError

# The slave first: as long as it has a request, to set either of the two raises input 2 of the
# master, which the master's own state then overwrites.
_CHIPS = {
    "pic_slave": KVM_IRQCHIP_PIC_SLAVE,
    "pic_master": KVM_IRQCHIP_PIC_MASTER,
    "ioapic": KVM_IRQCHIP_IOAPIC,
}

_PIC_PINS, _TIMER_PIN, _CASCADE_GSI = 8, 2, 2


class KvmIrqChip:
    """`vmexit.core.irq.IrqChip`, made by `KvmVm.create_irqchip()`. Any thread may call it."""

    def __init__(self, fd: int) -> None:
        """`fd` is the VM's. The timer has port 0x61 as well. Raises HostError."""
        self._fd = fd
        try:
            ioctl(fd, KVM_CREATE_IRQCHIP)
            ioctl(fd, KVM_SET_GSI_ROUTING, _routing())
            ioctl(fd, KVM_CREATE_PIT2, bytes(kvm_pit_config(flags=KVM_PIT_SPEAKER_DUMMY)))
        except OSError as error:
            raise HostError(
                f"KVM refused to make interrupt controllers: {error.strerror}; use --accel soft"
            ) from error
        self._at_reset = self.state()

    def set_level(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE (KVM API 4.25). Raises ConfigError for what is no GSI."""
        _check(gsi)
        ioctl(self._open_fd(), KVM_IRQ_LINE, struct.pack("II", gsi, level))

    def close(self) -> None:
        """The VM is closed: its descriptor's number may be another file's from now on."""
        self._fd = -1

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise HostError("the VM of these interrupt controllers is closed; make another one")
        return self._fd

    def assign_irqfd(self, gsi: int, eventfd: int) -> None:
        """Each write to `eventfd` is an edge of `gsi` from now on, with no exit (KVM API 4.75)."""
        self._irqfd(gsi, eventfd, 0)

    def deassign_irqfd(self, gsi: int, eventfd: int) -> None:
        """The end of that."""
        self._irqfd(gsi, eventfd, KVM_IRQFD_FLAG_DEASSIGN)

    def _irqfd(self, gsi: int, eventfd: int, flags: int) -> None:
        _check(gsi)
        fd = self._open_fd()
        try:
            ioctl(fd, KVM_IRQFD, bytes(kvm_irqfd(fd=eventfd, gsi=gsi, flags=flags)))
        except OSError as error:
            remedy = {
                errno.EBUSY: "an eventfd has one GSI: give this one an eventfd of its own",
                errno.EBADF: "give an open eventfd",
            }.get(error.errno or 0, "give an eventfd")
            raise HostError(
                f"KVM refused an irqfd for GSI {gsi}: {error.strerror}; {remedy}"
            ) from error

    def reset(self) -> None:
        """As after power-on, but for the local APICs: they are the vCPUs'."""
        self.restore(self._at_reset)

    def state(self) -> State:
        """The kernel's own structures, as bytes; without the local APICs."""
        fd = self._open_fd()
        state: dict[str, object] = {"version": 1}
        for name, number in _CHIPS.items():
            chip = bytearray(bytes(kvm_irqchip(chip_id=number)))
            ioctl(fd, KVM_GET_IRQCHIP, chip, True)
            state[name] = bytes(chip)
        pit = bytearray(sizeof(kvm_pit_state2))
        ioctl(fd, KVM_GET_PIT2, pit, True)
        state["pit"] = bytes(pit)
        return state

    def restore(self, state: State) -> None:
        """Raises ConfigError for what is no state of these."""
        chips = {name: _structure(state, name, sizeof(kvm_irqchip)) for name in _CHIPS}
        pit = _structure(state, "pit", sizeof(kvm_pit_state2))
        for name, number in _CHIPS.items():
            if int.from_bytes(chips[name][:4], "little") != number:
                raise ConfigError(f"the state of {name} is another chip's; save it anew")
        fd = self._open_fd()
        for chip in chips.values():
            ioctl(fd, KVM_SET_IRQCHIP, bytes(chip))
        ioctl(fd, KVM_SET_PIT2, bytes(pit))


def _check(gsi: int) -> None:
    if not 0 <= gsi < KVM_IOAPIC_NUM_PINS:
        raise ConfigError(f"there is no GSI {gsi}; use 0 to {KVM_IOAPIC_NUM_PINS - 1}")


@cache
def _routing() -> bytearray:
    """The wires of a PC (KVM API 4.52), which KVM only reads."""
    routes: list[tuple[int, int, int]] = []  # GSI, chip, pin
    for gsi in range(KVM_IOAPIC_NUM_PINS):
        if gsi == _CASCADE_GSI:
            continue
        if gsi < _PIC_PINS:
            routes.append((gsi, KVM_IRQCHIP_PIC_MASTER, gsi))
        elif gsi < 2 * _PIC_PINS:
            routes.append((gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - _PIC_PINS))
        routes.append((gsi, KVM_IRQCHIP_IOAPIC, _TIMER_PIN if gsi == 0 else gsi))
    table = bytearray(bytes(kvm_irq_routing(nr=len(routes))))
    for gsi, chip, pin in routes:
        entry = kvm_irq_routing_entry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP)
        entry.u.irqchip.irqchip, entry.u.irqchip.pin = chip, pin
        table += bytes(entry)
    return table


def _structure(state: Mapping[str, object], name: str, size: int) -> bytes:
    data = state.get(name)
    if state.get("version") != 1 or not isinstance(data, bytes) or len(data) != size:
        raise ConfigError(
            "this is not the state of KVM's interrupt controllers, version 1; save it anew"
        )
    return data
