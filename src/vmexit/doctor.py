"""Can this host run guests, with what, and what to do where it cannot."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmexit.core.errors import HostError

if TYPE_CHECKING:
    from vmexit.accel.kvm.system import System
    from vmexit.arch.x86.cpuid import Table

# Without the first, guests do not run at all; without the others, some things do not work.
_WANTED = {
    "KVM_CAP_USER_MEMORY": "guest memory",
    "KVM_CAP_IMMEDIATE_EXIT": "interrupting a vCPU",
    "KVM_CAP_READONLY_MEM": "--firmware",
    "KVM_CAP_SET_TSS_ADDR": "real mode on older Intel processors",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR": "real mode on older Intel processors",
    "KVM_CAP_IRQCHIP": "an interrupt controller in the kernel",
    "KVM_CAP_PIT2": "the timer that goes with it",
    "KVM_CAP_IRQFD": "interrupts without a system call",
    "KVM_CAP_IOEVENTFD": "device notifications without an exit",
    "KVM_CAP_DIRTY_LOG_RING": "dirty_ring=, for going back in much memory",
    "KVM_CAP_SYNC_REGS": "registers without a system call",
}

# What a processor offers if it has several cores: --smp decides it.
_OF_SMP = {"ht"}


class Finding(NamedTuple):
    """One thing looked at. `accelerator` marks those that decide whether guests can run."""

    ok: bool
    what: str
    remedy: str = ""
    accelerator: bool = False

    def line(self) -> str:
        """For people."""
        return f"[{'ok' if self.ok else '--'}] {self.what}" + (
            f"; {self.remedy}" if self.remedy else ""
        )


def examine() -> Iterator[Finding]:
    """Look at KVM, then at the software CPU, then at vmexit itself."""
    yield from _examine_kvm()
    yield from _examine_soft()
    yield _examine_steps()


def _examine_kvm() -> Iterator[Finding]:
    from vmexit.abi import kvm_caps
    from vmexit.abi.kvm import KVM_API_VERSION
    from vmexit.accel.kvm.system import System

    try:
        system = System()
    except HostError as error:
        what, _, remedy = str(error).partition("; ")
        yield Finding(False, f"kvm: {what}", remedy, accelerator=True)
        return
    with system:
        try:
            _try_vm(system)
        except HostError as error:
            what, _, remedy = str(error).partition("; ")
            yield Finding(False, f"kvm: {what}", remedy, accelerator=True)
            return
        yield Finding(
            True,
            f"kvm: {system.path} opens, speaks API version {KVM_API_VERSION} and makes VMs",
            accelerator=True,
        )
        yield _try_instructions(system)
        modules = [
            m for m in ("kvm_intel", "kvm_amd", "kvm_pvm") if Path("/sys/module", m).exists()
        ]
        yield Finding(True, f"kvm: module {', '.join(modules) or 'built in, or not visible'}")
        if _in_a_vm():
            yield Finding(
                True,
                "kvm: this host is itself a virtual machine, so KVM is nested",
                "exits cost more than on hardware, and some instructions may not be emulated",
            )
        for name, use in _WANTED.items():
            has = system.check_extension(kvm_caps.CAPABILITIES[name])
            if has:
                yield Finding(True, f"kvm: {name} ({use})")
            else:
                yield Finding(False, f"kvm: {name} ({use}) is missing", "use a newer kernel")
        present = [n for n, c in kvm_caps.CAPABILITIES.items() if system.check_extension(c)]
        yield Finding(True, f"kvm: {len(present)} of {len(kvm_caps.CAPABILITIES)} capabilities")


def _try_vm(system: "System") -> None:
    from vmexit.core.bus import Bus
    from vmexit.core.memory import PAGE_SIZE, GuestMemory

    memory = GuestMemory([(0, PAGE_SIZE)])
    try:
        with system.create_vm(memory, Bus("port"), Bus("MMIO")) as vm:
            vm.create_vcpu(0)
    finally:
        memory.close()


def _try_instructions(system: "System") -> Finding:
    from vmexit.accel.kvm.probe import why_no_kernels

    try:
        why, remedy = why_no_kernels(system), "kernels want --accel soft"
    except HostError as error:
        why, _, remedy = str(error).partition("; ")
    if why:
        return Finding(False, f"kvm: {why}", remedy)
    return Finding(True, "kvm: executes what kernels consist of")


def _in_a_vm() -> bool:
    try:
        return " hypervisor" in Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return False


def _examine_steps() -> Finding:
    from vmexit.core.steps import COMPILED

    if COMPILED:
        return Finding(True, "vmexit: what goes back to snapshots on KVM is compiled")
    return Finding(
        False,
        "vmexit: what goes back to snapshots on KVM is not compiled, and takes longer",
        "with a C compiler and Python's headers (python3-dev) there, install it by pip "
        "--force-reinstall --no-cache-dir",
    )


def _examine_soft() -> Iterator[Finding]:
    from vmexit.accel.soft.engine import SoftAccelerator
    from vmexit.accel.soft.native import UNICORN_VERSION
    from vmexit.core.bus import Bus
    from vmexit.core.memory import PAGE_SIZE, GuestMemory

    if os.uname().machine != "x86_64":
        yield Finding(
            False,
            f"soft: this host is {os.uname().machine}",
            "use an x86-64 host",
            accelerator=True,
        )
        return
    memory = GuestMemory([(0, PAGE_SIZE)])
    try:
        vm = SoftAccelerator().create_vm(memory, Bus("port"), Bus("MMIO"))
        try:
            vm.create_vcpu(0)
        finally:
            vm.close()
    except HostError as error:
        what, _, remedy = str(error).partition("; ")
        yield Finding(False, f"soft: {what}", remedy, accelerator=True)
        return
    finally:
        memory.close()
    yield Finding(
        True,
        f"soft: Unicorn {UNICORN_VERSION} is there and its CPU state is as expected",
        accelerator=True,
    )


def examine_cpuid() -> Iterator[str]:
    """The processor that a guest of each accelerator gets, in lines for people.

    Raises HostError at the end if no accelerator is usable.
    """
    host, usable = _host_features(), False
    for accel, get, why in (
        ("kvm", _kvm_cpuid, "KVM does not offer it here"),
        ("soft", _soft_cpuid, "the software CPU has it not"),
    ):
        try:
            table = get()
        except HostError as error:
            yield f"{accel}: {error}"
        else:
            usable = True
            yield from _cpuid_lines(accel, table, host, why)
    if not usable:
        raise HostError("no accelerator is usable; vmexit doctor says what to do")


def _kvm_cpuid() -> "Table":
    """What KVM shows to the first vCPU of a microvm, whatever it was told."""
    from vmexit.accel.kvm.system import System
    from vmexit.core.bus import Bus
    from vmexit.core.memory import PAGE_SIZE, GuestMemory

    memory = GuestMemory([(0, PAGE_SIZE)])
    try:
        with System() as system, system.create_vm(memory, Bus("port"), Bus("MMIO")) as vm:
            vm.create_irqchip()
            return vm.guest_cpuid(vm.create_vcpu(0))
    finally:
        memory.close()


def _soft_cpuid() -> "Table":
    from vmexit.accel.soft.engine import SoftAccelerator
    from vmexit.core.bus import Bus
    from vmexit.core.memory import PAGE_SIZE, GuestMemory

    memory = GuestMemory([(0, PAGE_SIZE)])
    try:
        vm = SoftAccelerator().create_vm(memory, Bus("port"), Bus("MMIO"))
        try:
            return vm.cpuid(0)
        finally:
            vm.close()
    finally:
        memory.close()


def _host_features() -> list[str]:
    """What this host's processor has, as far as it has a name."""
    from vmexit.arch.x86.cpu_features import canonical

    try:
        text = Path("/proc/cpuinfo").read_text("ascii", "replace")
    except OSError:
        return []
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return [name for flag in flags.partition(":")[2].split() if (name := canonical(flag))]


def _cpuid_lines(accel: str, table: "Table", host: list[str], why: str) -> Iterator[str]:
    from vmexit.arch.x86.cpu_features import offered
    from vmexit.arch.x86.cpuid import brand, family_model_stepping, vendor

    family, model, stepping = family_model_stepping(table)
    yield (
        f"{accel}: {vendor(table).decode('ascii', 'replace')} {brand(table)!r}, "
        f"family {family:#x}, model {model:#x}, stepping {stepping}"
    )
    names = offered(table)
    yield f"{accel}: offers {' '.join(sorted(names))}"
    missing = sorted(set(host) - set(names) - _OF_SMP)
    if missing:
        yield f"{accel}: lacks of this host's {' '.join(missing)}; {why}"
