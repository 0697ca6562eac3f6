"""After so many instructions a clone, a machine that went back and one that just went on are alike.

Everything that a snapshot has of a machine is compared: of each vCPU the registers, MSRs, x87 and
SSE, local APIC and pending events; interrupt controllers, devices, memory. Only what shows the time
on the host is left out, as each of these takes another time for its instructions; see `timeless()`.
"""

from collections.abc import Iterator

import pytest
from kernels import debian_kernel, initrd_with

from guests import COUNT_AT, COUNTED, DELIVERY, ENDLESS, FOLDER, GUESTS
from vmexit import Machine, Stop, StopReason
from vmexit.accel.kvm import msrs
from vmexit.core.bus import State
from vmexit.machine.machine_state import take
from vmexit.machine.snapshot import Snapshot

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("nothing_left")]

TIMEOUT = 60
XMM = slice(160, 416)  # in an FXSAVE image, XMM0 to XMM15 (SDM vol. 1, table 10-2)
INTERRUPTS = 1 << 9  # RFLAGS.IF
TSC = 0x10
# struct kvm_pit_channel_state (<linux/kvm.h>) has three of these; the last eight bytes of each are
# when its counter was loaded, on the host's clock.
PIT_CHANNEL, PIT_LOADED = 24, 16
# Registers of the real-time clock (MC146818A) that show time: seconds to year, and century; A, with
# whether it is just being updated; and C, what of an update, an alarm, a period has come since.
CLOCK_REGISTERS = (0, 2, 4, 6, 7, 8, 9, 0x32, 0xA, 0xC)

# Those that have interrupt controllers, and timers that a run to the end would depend on.
MICROVM = frozenset({"interrupt-sources", "interrupts", "processors", "smp", "storms"})
MULTIBOOT = "multiboot"
# What guests/smp.S says: how many vCPUs to start.
STARTED = 0x6000


def machine(accel: str, name: str) -> Machine:
    options = {"machine": "microvm", "smp": 2} if name in MICROVM else {}
    if name == MULTIBOOT:
        return Machine("4M", accel, kernel=FOLDER / "multiboot.kernel", serial="null")
    image = FOLDER / f"{name}.bin"
    vm = Machine("4M", accel, image=image, mode=GUESTS[name], serial="null", **options)
    if name in COUNTED:
        vm.memory.write_u32(COUNT_AT, 50)
    if name == "smp":
        vm.memory.write_u32(STARTED, 1)
    return vm


def timeless(state: State) -> State:
    """Without the host's time in it: changes `state`, and returns it."""
    for vcpu in state["vcpus"]:
        if "cpu" in vcpu:
            del vcpu["cpu"]["tsc"]  # the software CPU's: the host's, but for an offset
        else:
            vcpu["msrs"] = msrs.unpack(vcpu["msrs"])
            vcpu["msrs"].pop(TSC, None)  # the processor's, where the VM does not save it
    for name in ("clock", "tsc", "deadlines"):  # KVM's paravirtual clock (KVM_GET_CLOCK); as above
        state["vm"].pop(name, None)
    devices = state["devices"]
    if "acpi-pm" in devices:
        del devices["acpi-pm"]["elapsed"]  # the power management timer: nanoseconds
    if "cmos" in devices:
        ram = bytearray(devices["cmos"]["ram"])
        for register in CLOCK_REGISTERS:
            ram[register] = 0
        devices["cmos"]["ram"] = bytes(ram)
    if "pit" in devices.get("irqchip", {}):
        pit = bytearray(devices["irqchip"]["pit"])
        for channel in range(3):
            at = channel * PIT_CHANNEL + PIT_LOADED
            pit[at : at + 8] = bytes(8)
        devices["irqchip"]["pit"] = bytes(pit)
    return state


def parts(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """All numbers, texts and bytes in a state, by where they are."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from parts(one, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from parts(one, f"{name}[{number}]")
    else:
        yield name, value


def everything(vm: Machine) -> dict[str, object]:
    found = dict(parts(timeless(take(vm._parts)._asdict())))
    for region in vm.memory.regions:
        found[f"memory {region.gpa:#x}"] = vm.memory.read(region.gpa, region.end - region.gpa)
    return found


def without_timer(found: dict[str, object]) -> dict[str, object]:
    """Without what the timer of the software CPU's LAPIC has left, or has brought about."""
    return {name: one for name, one in found.items() if not name.endswith((".timer_left", ".irr"))}


def different(one: dict[str, object], other: dict[str, object]) -> dict[str, object]:
    """What is not the same in both, cut short."""
    names = [name for name in one | other if one.get(name) != other.get(name)]
    return {name: (str(one.get(name))[:80], str(other.get(name))[:80]) for name in names}


def steps(vm: Machine, count: int) -> tuple[int, Stop]:
    """Up to so many instructions of the first vCPU; how many there were, and what ended them."""
    stop = vm.step(timeout=TIMEOUT)
    for number in range(1, count):
        if stop.reason is not StopReason.DEBUG:
            return number, stop
        stop = vm.step(timeout=TIMEOUT)
    return count, stop


def to_the_end(vm: Machine, name: str) -> tuple[int, Stop] | None:
    """Where there is one that does not depend on time, and that any KVM comes to."""
    if name in MICROVM | ENDLESS or name == "debug-exit":  # which goes on behind its port
        return None
    if vm.accel == "kvm" and name in DELIVERY:
        return None
    return 0, vm.run(TIMEOUT)


def compare(vm: Machine, snapshot: Snapshot, name: str, count: int) -> None:
    """`vm` stands where `snapshot` was taken."""
    found = []
    with snapshot.clone() as clone:
        begin = everything(vm)
        assert not different(begin, everything(clone))
        for number, one in enumerate((vm, clone, vm)):
            if number == 2:
                vm.reset_to(snapshot)
                assert not different(begin, everything(vm))
            ends = []
            for went in (steps(one, count), to_the_end(one, name)):
                if went is not None:
                    ends.append((went[0], went[1].reason, went[1].detail, everything(one)))
            found.append(ends)
    assert len({len(ends) for ends in found}) == 1
    for going_on, *others in zip(*found, strict=True):
        for other in others:
            assert going_on[:3] == other[:3]
            assert not different(going_on[3], other[3])


@pytest.mark.parametrize("begin", [20, pytest.param(500, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", [*GUESTS, MULTIBOOT])
def test_a_guest_goes_on_alike(accel, name, begin):
    with machine(accel, name) as vm:
        _, stop = steps(vm, begin)
        if begin > 20 and stop.reason is not StopReason.DEBUG:
            return  # it is over, or this KVM cannot go on: the other beginning is for it
        image = bytearray(vm.vcpus[0].fpu)  # which few guests use
        image[XMM] = bytes(range(256))
        vm.vcpus[0].fpu = bytes(image)
        with vm.snapshot() as snapshot:
            compare(vm, snapshot, name, 150)


@pytest.mark.linux
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_linux_goes_on_alike(count):
    """A program of its user space, for so many instructions, on the software CPU.

    Linux is to take no interrupts meanwhile, which come by the host's time: IF is cleared at the
    snapshot. So there is no kernel in what is compared, but in memory, and in all that it has set.
    """
    flavour = "cloud-amd64"
    options = {"kernel": debian_kernel(flavour), "initrd": initrd_with(flavour), "serial": "null"}
    with Machine("128M", "soft", append="console=ttyS0 quiet", **options) as vm:
        vm.console.expect("/root # ", TIMEOUT)
        vm.console.send("while :; do :; done\n")
        registers = vm.vcpus[0].regs
        assert vm.run(timeout=0.5).reason is StopReason.TIMEOUT  # its first pages are there then
        while registers.cs.selector & 3 != 3:
            assert vm.run(timeout=0.01).reason is StopReason.TIMEOUT
        registers.rflags &= ~INTERRUPTS
        with vm.snapshot() as snapshot, snapshot.clone() as clone:
            begin = without_timer(everything(vm))
            assert not different(begin, without_timer(everything(clone)))
            ends = []
            for one in (vm, clone, vm):
                if len(ends) == 2:
                    vm.reset_to(snapshot)
                    assert not different(begin, without_timer(everything(vm)))
                assert steps(one, count)[0] == count
                assert one.vcpus[0].regs.cs.selector & 3 == 3
                ends.append(without_timer(everything(one)))
            assert different(begin, ends[0])
            assert not different(ends[0], ends[1])
            assert not different(ends[0], ends[2])
