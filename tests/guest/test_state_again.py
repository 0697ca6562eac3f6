"""A state that KVM has taken before takes fewer requests, and is whole all the same."""

import os
from contextlib import contextmanager
from fcntl import ioctl

import pytest
from resources import resources

from guests import FOLDER
from vmexit import Machine, StopReason
from vmexit.abi.kvm_structs import kvm_regs, kvm_sregs, kvm_vcpu_events
from vmexit.accel.base import ExitReason
from vmexit.accel.kvm import dirty_log, msrs, registers, state, time
from vmexit.accel.kvm.system import System
from vmexit.core import steps
from vmexit.core.bus import Bus
from vmexit.core.errors import HostError
from vmexit.core.memory import GuestMemory
from vmexit.machine import rewind

pytestmark = [pytest.mark.engine, pytest.mark.kvm, pytest.mark.usefixtures("nothing_left")]

# What guests/smp.S says.
STARTED, COUNT, ROUNDS = 0x6000, 0x6008, 2000
WORD = (1 << 64) - 1
FS_BASE_MSR = 0xC0000100
# Real mode: ebx = [0x800]; [ebx] = 0x55; out 0x10, al; from the beginning.
WRITER = bytes.fromhex("66 8b 1e 0008 67 66 c703 55000000 e610 ebf0")
WHERE = 0x800
RAX, CR2, FS_BASE = 0x1122334455667788, 0xFEEDF000, 0x12345000


@pytest.fixture(autouse=True, params=["as it is", "python"])
def steps_of(request, monkeypatch):
    """As it is installed, which should be compiled, and as it is without a compiler."""
    if request.param == "python":
        if not steps.COMPILED:
            pytest.skip("that is how it is installed")
        for module in (state, time, dirty_log, rewind):
            monkeypatch.setattr(module, "Steps", steps.PythonSteps)


def changed(vcpu):
    """A state of `vcpu` with something of its own in each part that KVM_RUN takes."""
    plain = vcpu.state()
    parts = plain["parts"]
    regs = kvm_regs.from_buffer_copy(parts["regs"])
    regs.rax, regs.rip = RAX, 0x1000
    sregs = kvm_sregs.from_buffer_copy(parts["sregs"])
    sregs.cr2, sregs.cr8, sregs.fs.base = CR2, 5, FS_BASE
    sregs.cs.base, sregs.cs.selector = 0, 0
    events = kvm_vcpu_events.from_buffer_copy(parts["events"])
    events.nmi.masked = 1
    parts |= {"regs": bytes(regs), "sregs": bytes(sregs), "events": bytes(events)}
    return plain


def parts_of(vcpu):
    return vcpu.state()["parts"]


@pytest.fixture
def twice():
    """A vCPU that was given a state, then other registers, and the state again; what it was."""
    with Machine("1M", "kvm") as vm:
        (vcpu,) = vm._vcpus()
        plain = changed(vcpu)
        vcpu.restore(plain)
        expected = parts_of(vcpu)
        vcpu.set_registers(vcpu.registers() | {"rax": 1, "rip": 0x2000})
        vcpu.set_system_registers(vcpu.system_registers()._replace(cr2=0, cr8=0))
        vcpu.restore(plain)
        yield vcpu, expected


def test_who_asks_for_registers_sees_them(twice):
    vcpu, expected = twice
    assert vcpu.registers()["rax"] == RAX
    assert (vcpu.system_registers().cr2, vcpu.system_registers().fs.base) == (CR2, FS_BASE)
    assert parts_of(vcpu) == expected
    assert kvm_vcpu_events.from_buffer_copy(expected["events"]).nmi.masked == 1


def test_kvm_run_takes_them(twice):
    """Nobody has asked for one before: the run ends before the first instruction."""
    vcpu, expected = twice
    assert vcpu.kvm_run().kvm_dirty_regs == 7
    vcpu.kick()
    assert vcpu.run().reason is ExitReason.INTERRUPTED
    assert vcpu.kvm_run().kvm_dirty_regs == 0
    found = parts_of(vcpu)
    del found["xsave"], expected["xsave"]  # to enter the guest may change which parts are in use
    assert found == expected


def test_who_changes_one_changes_that_one(twice):
    vcpu, _ = twice
    vcpu.set_registers(vcpu.registers() | {"rbx": 7})
    vcpu.kick()
    vcpu.run()
    registers = vcpu.registers()
    assert (registers["rax"], registers["rbx"]) == (RAX, 7)
    assert vcpu.system_registers().cr2 == CR2


def test_the_last_of_several_counts(twice):
    vcpu, expected = twice
    vcpu.set_registers(vcpu.registers() | {"rax": 3})
    other = vcpu.state()
    known = vcpu._access()._last[0].state
    for plain in (other, known, other, known):
        vcpu.restore(plain)
    assert parts_of(vcpu) == expected
    vcpu.restore(other)
    vcpu.kick()
    vcpu.run()
    assert vcpu.registers()["rax"] == 3


def test_another_machine_gets_it_whole(twice):
    """Its vCPU has never run, and has no LAPIC switched on that it could show."""
    first, expected = twice
    known = first._access()._last[0].state
    with Machine("1M", "kvm") as vm:
        (vcpu,) = vm._vcpus()
        vcpu.restore(known)
        assert parts_of(vcpu) == expected
        assert kvm_sregs.from_buffer_copy(expected["sregs"]).apic_base == 0


@contextmanager
def new_vcpu(machine):
    """One to which nobody has told where to begin."""
    memory = GuestMemory([(0, 1 << 20)])
    with System() as system, system.create_vm(memory, Bus("port"), Bus("MMIO")) as vm:
        if machine == "microvm":
            vm.create_irqchip()
        yield vm.create_vcpu(0)
    memory.close()


def run_once(vcpu):
    vcpu.kick()
    vcpu.run_once()


def run(vcpu):
    vcpu.kick()
    vcpu.run()


def load(vcpu, name, at, byte):
    """Load a part of the state of `vcpu` with one byte of it changed."""
    part = next(part for part in vcpu._access()._parts.every if part.name == name)
    data = bytearray(vcpu.state()["parts"][name])
    data[at] = byte
    vcpu.set(name, part.set, data)


# What changes a vCPU: MSRs, MXCSR and an XMM register, XCR0, DR0, a run.
CHANGES = {
    "msrs": lambda vcpu: vcpu.set_msrs({0x175: 0x1234}),
    "fpu": lambda vcpu: vcpu.set_fpu(vcpu.fpu()[:160] + bytes([7] * 16) + vcpu.fpu()[176:]),
    "xcr0": lambda vcpu: load(vcpu, "xcrs", 16, 3),  # x87 and SSE
    "dr0": lambda vcpu: load(vcpu, "debugregs", 1, 0x10),
    "run": run,
    "run_once": run_once,
}


@pytest.mark.parametrize("machine", ["bare", "microvm"])
@pytest.mark.parametrize(
    ("there", "before"),
    [(None, None), *((name, None) for name in CHANGES), *((None, name) for name in CHANGES)],
)
def test_a_new_vcpu_and_one_that_was_changed_get_it_whole(there, before, machine):
    """Of what a new one has already nothing is loaded into it; into the other all is."""
    indices = 0x174, 0x175, 0x176
    with new_vcpu(machine) as vcpu:
        if there is not None:
            CHANGES[there](vcpu)
        plain = changed(vcpu)
        vcpu.restore(plain)  # now KVM has taken it
        expected, values = parts_of(vcpu), vcpu.msrs(indices)
    with new_vcpu(machine) as vcpu:
        assert vcpu.new
        if before is not None:
            CHANGES[before](vcpu)
            assert not vcpu.new
        vcpu.restore(plain)
        assert (parts_of(vcpu), vcpu.msrs(indices)) == (expected, values)


def test_what_a_new_vcpu_has_is_not_loaded(monkeypatch):
    with new_vcpu("bare") as vcpu:
        plain = changed(vcpu)
        vcpu.restore(plain)
    asked = []
    for _ in range(2):  # the first finds out what a new one has
        with new_vcpu("bare") as vcpu:
            for module in (registers, msrs):
                monkeypatch.setattr(module, "ioctl", lambda *a: asked.append(a[1]) or ioctl(*a))
            asked.clear()
            vcpu.restore(plain)
            monkeypatch.undo()
            vcpu.attach_thread()  # as a run begins
            assert vcpu.kvm_run().kvm_dirty_regs == 7
            vcpu.detach_thread()
    assert asked == []


def test_a_vcpu_that_waits_for_its_start_begins_where_it_is_told():
    """KVM_RUN would take its registers when it has begun already, and put it back."""
    options = {"machine": "microvm", "smp": 3, "image": FOLDER / "smp.bin", "mode": "protected"}
    with Machine("1M", "kvm", **options) as vm:
        vm.memory.write_u32(STARTED, 2)
        with vm.snapshot() as snap:

            def finish(one):
                stop = one.run(timeout=60)
                assert (stop.reason, stop.value) == (StopReason.DEBUG_EXIT, 0x21), stop
                return one.memory.read_u32(COUNT)

            counts = [finish(vm)]
            for _ in range(3):
                vm.reset_to(snap)
                counts.append(finish(vm))
                with snap.clone() as twin:
                    counts.append(finish(twin))
            assert counts == [3 * ROUNDS] * 7


@pytest.mark.parametrize("machine", ["bare", "microvm"])
def test_no_kvm_without_them(machine, monkeypatch):
    """Where KVM_RUN takes no registers they are loaded at once."""
    monkeypatch.setattr(state, "KVM_CAP_SYNC_REGS", 0x7FFF_0000)  # which no KVM has
    monkeypatch.setattr(state, "_kinds", {})
    with Machine("1M", "kvm", machine=machine) as vm:
        (vcpu,) = vm._vcpus()
        plain = changed(vcpu)
        for _ in range(2):
            vcpu.restore(plain)
            assert vcpu.kvm_run().kvm_dirty_regs == 0
            assert vcpu.registers()["rax"] == RAX


def test_what_kvm_refuses_is_no_state_that_it_has_taken():
    """The second time as the first: at once, and not when it is to run."""
    with Machine("1M", "kvm") as vm:
        (vcpu,) = vm._vcpus()
        plain = vcpu.state()
        sregs = kvm_sregs.from_buffer_copy(plain["parts"]["sregs"])
        sregs.cr4 |= 1 << 63
        plain["parts"]["sregs"] = bytes(sregs)
        before = parts_of(vcpu)
        for _ in range(2):
            with pytest.raises(HostError, match="KVM refused the sregs of vCPU 0"):
                vcpu.restore(plain)
        vcpu.restore(plain | {"parts": before})
        assert parts_of(vcpu) == before


def test_what_kvm_refuses_the_second_time_is_named(twice):
    vcpu, _ = twice
    again = vcpu._access()._last[0]
    (xcrs,) = [one.data for one in again._loadable.beside if one.what == "xcrs"]
    good = bytes(xcrs)
    try:
        xcrs[16:24] = bytes(8)  # the x87 FPU is always in XCR0 (SDM vol. 1, 13.3)
        with pytest.raises(HostError, match="KVM refused the xcrs of vCPU 0"):
            vcpu.restore(again.state)
    finally:
        xcrs[:] = good  # others may find it in `_known`
    vcpu.restore(again.state)
    assert vcpu.registers()["rax"] == RAX


def test_a_vcpu_that_goes_back_has_its_msrs_back(twice):
    vcpu, _ = twice
    known = vcpu._access()._last[0].state
    indices = (0x174, 0x175, 0x176, 0x277)
    before = vcpu.msrs(indices)
    for changes in ({0x175: 0x1234}, {0x174: 1, 0x176: 2}, {}, {0x277: 0x0606060606060606}):
        assert vcpu.set_msrs(changes) == []
        assert vcpu.msrs(indices) == before | changes
        vcpu.restore(known)
        assert vcpu.msrs(indices) == before


def test_going_back_copies_what_was_written():
    """Again and again the same, then another page, then one less."""
    with Machine("4M", "kvm") as vm:
        vm.load_bytes(WRITER)
        vm.memory.write_u32(WHERE, 0x5000)
        vm.on_pio(0x10, write=lambda access: vm.stop())
        with vm.snapshot() as snap:
            pages = bytes(vm.memory[0:0x10_0000])
            for where in [0x5000] * 5 + [0x9000] * 3 + [0x5000, 0x7000] * 2 + [0x5000] * 70:
                vm.memory.write_u32(WHERE, where)
                assert vm.run(timeout=60).reason is StopReason.STOPPED
                assert vm.memory.read_u32(where) == 0x55
                vm.reset_to(snap)
                assert vm.memory[0:0x10_0000] == pages


def test_msrs_are_compared_by_value():
    entries = msrs.pack({0x174: 0x10, 0x175: 0x2000, 0x176: 0x3000})
    with Machine("1M", "kvm") as vm:
        (vcpu,) = vm._vcpus()
        wanted = msrs.Wanted(entries)
        assert vcpu.set_msrs({0x174: 0x10, 0x175: 1, 0x176: 0x3000}) == []
        assert wanted.unlike(vcpu.fd) == {0x175: 0x2000}
        vcpu.set_msrs({0x175: 0x2000})
        assert wanted.unlike(vcpu.fd) == {}
        vcpu.set_msrs({0x176: 5})
        assert wanted.unlike(vcpu.fd) == {0x176: 0x3000}
        # One that does not exist is unlike, each time, and the others are still looked at.
        broken = msrs.Wanted(msrs.pack({0x174: 1, 0x4B564DFF: 2, 0x175: 0x2000}))
        for _ in range(2):
            assert broken.unlike(vcpu.fd) == {0x174: 1, 0x4B564DFF: 2}


def test_the_counter_of_a_vcpu_is_saved_once():
    """By the VM, which is exact; where it cannot, by the vCPU."""
    with Machine("1M", "kvm") as vm:
        (vcpu,) = vm._vcpus()
        by_vm = vm._parts.vm.state(vm._parts.vm.moment())["tsc"] is not None
        assert (time.IA32_TSC in msrs.unpack(vcpu.state()["msrs"])) is not by_vm


def test_a_counter_that_was_saved_by_offset_goes_where_there_are_none(monkeypatch):
    with Machine("1M", "kvm") as vm, Machine("1M", "kvm") as twin:
        saved = vm._parts.vm.state(vm._parts.vm.moment())
        if saved["tsc"] is None:
            pytest.skip("this KVM tells no offsets")
        saved["tsc"] = [1 << 50]
        new = time.VmTime(twin._parts.vm._system, twin._parts.vm.fd, twin._vcpus())
        monkeypatch.setattr(new, "_offsets", None)
        written = []
        (vcpu,) = twin._vcpus()
        monkeypatch.setattr(vcpu, "set_msrs", lambda values: written.append(values) or [])
        new.load(saved, twin._parts.vm.moment())
        assert written == [{time.IA32_TSC: 1 << 50}]


def test_a_kvm_that_keeps_no_offset_is_not_told_again():
    with Machine("1M", "kvm") as vm:
        vm_time = vm._parts.vm._vm_time()
        saved = vm._parts.vm.state(vm._parts.vm.moment())
        if saved["tsc"] is None:
            pytest.skip("this KVM tells no offsets")
        offset = vm_time._offsets[0]
        for _ in range(3):
            vm._parts.vm.restore(saved, vm._parts.vm.moment())
            told = offset._word.value
        before = offset.get()
        offset.set(before + (1 << 40) & WORD)
        keeps = offset.get() == before + (1 << 40) & WORD
        assert time._keeps_offsets[vm._parts.vm._system.path] is keeps
        if keeps:
            vm._parts.vm.restore(saved, vm._parts.vm.moment())
            assert min(offset.get() - told & WORD, told - offset.get() & WORD) < 1 << 36


def test_msrs_are_those_that_wait(twice):
    """EFER, FS and GS bases are among the system registers, which have not been loaded yet."""
    vcpu, _ = twice
    assert vcpu.msrs([FS_BASE_MSR]) == {FS_BASE_MSR: FS_BASE}


def test_msrs_that_are_set_stay(twice):
    vcpu, _ = twice
    assert vcpu.set_msrs({FS_BASE_MSR: 0x7000}) == []
    vcpu.kick()
    vcpu.run()
    assert vcpu.system_registers().fs.base == 0x7000


def test_a_fork_loads_nothing(twice):
    """It shares the page that they wait in, and no vCPU of its parent listens to it."""
    vcpu, expected = twice
    child = os.fork()
    if not child:
        try:
            vcpu.registers()
        except HostError as error:
            os._exit(7 if "make one after the fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert vcpu.kvm_run().kvm_dirty_regs == 7
    assert parts_of(vcpu) == expected


def test_a_fork_puts_nothing_in_their_place(twice):
    vcpu, _ = twice
    known = vcpu._access()._last[0].state
    vcpu.set_registers(vcpu.registers() | {"rax": 5})
    child = os.fork()
    if not child:
        try:
            vcpu.restore(known)
        except HostError as error:
            os._exit(7 if "make one after the fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert vcpu.registers()["rax"] == 5


def test_a_fork_loads_nothing_into_a_new_one():
    """Though there may be nothing to ask KVM for, who would refuse it."""
    with new_vcpu("bare") as vcpu:
        plain = changed(vcpu)
        vcpu.restore(plain)
    for _ in range(2):  # the first finds out what a new one has
        with new_vcpu("bare") as vcpu:
            child = os.fork()
            if not child:
                try:
                    vcpu.restore(plain)
                except HostError as error:
                    os._exit(7 if "make one after the fork" in str(error) else 8)
                os._exit(9)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            assert vcpu.kvm_run().kvm_dirty_regs == 0
            vcpu.restore(plain)
            assert vcpu.registers()["rax"] == RAX


@pytest.mark.parametrize("known", [False, True])
def test_an_error_of_a_state_that_is_refused_keeps_nothing_open(known, monkeypatch):
    """Neither of one that KVM sees for the first time, nor of one that is for a new vCPU."""
    with new_vcpu("bare") as vcpu:
        plain = changed(vcpu)
        if known:
            vcpu.restore(plain)
    before, kept = resources(), []
    for _ in range(3):
        with new_vcpu("bare") as vcpu:
            monkeypatch.setattr(vcpu, "set_all", fails)
            monkeypatch.setattr(vcpu, "set_beside", fails)
            with pytest.raises(HostError, match="it has failed") as caught:
                vcpu.restore(plain)
            kept.append(caught.value)
            monkeypatch.undo()
    assert resources() == before
    assert len(kept) == 3


def fails(_):
    raise HostError("it has failed")


@pytest.mark.parametrize("what", ["a vCPU", "memory"])
def test_an_error_that_is_kept_keeps_nothing_open(what, monkeypatch):
    """Its frames hold what was going on: by that the vCPU's pages, or guest memory."""
    before = resources()
    with Machine("4M", "kvm") as vm:
        vm.load_bytes(WRITER)
        vm.memory.write_u32(WHERE, 0x5000)
        vm.on_pio(0x10, write=lambda access: vm.stop())
        with vm.snapshot() as snap:

            def round():
                vm.run(timeout=60)
                vm.reset_to(snap)

            for _ in range(4):
                round()
            if what == "memory":
                monkeypatch.setattr(dirty_log.SlotLog, "forget", fails)
            else:
                again = vm._vcpus()[0]._access()._last[0]
                again._steps.call(-1, 0, bytearray(8))  # which fails
                again._asked = len(again._steps)
                monkeypatch.setattr(again._vcpu, "set_beside", fails)
                del again
            with pytest.raises(HostError, match="it has failed") as raised:
                for _ in range(100):  # the log is emptied now and then
                    round()
    assert raised.value.__traceback__ is not None
    assert resources() == before


def test_what_kvm_run_refuses_is_told(twice):
    vcpu, _ = twice
    sregs = vcpu.kvm_run().s.regs.sregs
    sregs.cr4 |= 1 << 63
    for _ in range(2):  # and is not taken for loaded then
        with pytest.raises(HostError, match="KVM refused the system registers of vCPU 0"):
            vcpu.run()
    sregs.cr4 &= ~(1 << 63)
    assert vcpu.registers()["rax"] == RAX


def test_a_timer_that_was_armed_is_armed_by_the_vms_counter(monkeypatch):
    """The vCPU is loaded while another one shows, by which it would have been due long ago."""
    deadline = 1 << 60
    with Machine("1M", "kvm", machine="microvm") as vm:
        (vcpu,) = vm._vcpus()
        found = vcpu.msrs_that_exist([time.IA32_TSC_DEADLINE])
        armed = {time.IA32_TSC_DEADLINE: deadline, 0x174: 8}
        access = vm._parts.vm._state_access()
        saved = access.save(vcpu)._replace(msrs=msrs.pack(armed))
        monkeypatch.setattr(access, "save", lambda vcpu: saved)
        by_vm = vm._parts.vm.state(vm._parts.vm.moment())["tsc"] is not None
        kept = msrs.unpack(access.plain(vcpu)["msrs"])
        assert kept == ({0x174: 8} if by_vm else armed), found
        saved = saved._replace(msrs=msrs.pack({time.IA32_TSC_DEADLINE: 0}))
        assert msrs.unpack(access.plain(vcpu)["msrs"]) == {time.IA32_TSC_DEADLINE: 0}


# 16-bit: mov eax, 1; cpuid; hlt
CPUID = bytes.fromhex("66b801000000 0fa2 f4")


def test_a_machine_without_lapic_shows_none():
    with Machine("1M", "kvm") as vm:
        vm.load_bytes(CPUID, at=0x1000)
        assert vm.run(timeout=30).reason is StopReason.HALT
        assert not vm.vcpus[0].regs.rdx >> 9 & 1
