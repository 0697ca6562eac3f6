"""KVM's own layer: System, Vm, Vcpu, one class a file descriptor, on the real /dev/kvm."""

import errno
import os
import threading
from ctypes import sizeof

import pytest

from vmexit.abi import kvm as abi
from vmexit.abi.kvm_caps import CAPABILITIES, KVM_CAP_NR_MEMSLOTS, KVM_CAP_READONLY_MEM
from vmexit.abi.kvm_structs import kvm_cpuid2, kvm_cpuid_entry2
from vmexit.accel.base import ExitReason
from vmexit.accel.kvm.kick import KICK_SIGNAL
from vmexit.accel.kvm.system import System
from vmexit.arch.x86.segments import general, real_mode, reset
from vmexit.core.bus import Bus
from vmexit.core.errors import GuestCrash, HostError
from vmexit.core.memory import GuestMemory

pytestmark = [pytest.mark.kvm, pytest.mark.engine, pytest.mark.usefixtures("nothing_left")]


class Kvm:
    """A VM with 1 MiB and a vCPU that starts at 0x1000 in real mode."""

    def __init__(self, code: bytes) -> None:
        self.memory = GuestMemory([(0, 1 << 20)])
        self.memory.write(0x1000, code)
        self.pio, self.mmio = Bus("port"), Bus("MMIO")
        self.system = System()
        self.vm = self.system.create_vm(self.memory, self.pio, self.mmio)
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_system_registers(real_mode(0x1000))
        self.vcpu.set_registers(general(0))

    def close(self) -> None:
        self.vm.close()
        self.system.close()
        self.memory.close()


@pytest.fixture
def make():
    made = []

    def make(code: bytes) -> Kvm:
        made.append(Kvm(code))
        return made[-1]

    yield make
    for kvm in made:
        kvm.close()


def test_capabilities_are_asked_for_by_number():
    with System() as system:
        assert system.check_extension(KVM_CAP_NR_MEMSLOTS) > 8
        present = [n for n, c in CAPABILITIES.items() if system.check_extension(c)]
        assert "KVM_CAP_USER_MEMORY" in present
        assert system.check_extension(0xFFFF) == 0


def test_supported_cpuid_is_a_whole_number_of_entries_with_a_vendor():
    with System() as system:
        raw = bytearray(system.supported_cpuid())
    count = kvm_cpuid2.from_buffer(raw).nent
    assert count > 0
    assert len(raw) == sizeof(kvm_cpuid2) + count * sizeof(kvm_cpuid_entry2)
    entries = (kvm_cpuid_entry2 * count).from_buffer(raw, sizeof(kvm_cpuid2))
    vendor = next(
        b"".join(r.to_bytes(4, "little") for r in (e.ebx, e.edx, e.ecx))
        for e in entries
        if e.function == 0
    )
    assert vendor in (b"GenuineIntel", b"AuthenticAMD", b"HygonGenuine", b"CentaurHauls")


def test_run_once_hands_out_raw_exits(make):
    # in al, 0x40; out 0x11, al; mov [0x2000 in the hole], al by ES=0xffff is not there: hlt
    kvm = make(b"\xe4\x40\xe6\x11\xf4")
    run = kvm.vcpu.run_once()
    assert run.exit_reason == abi.KVM_EXIT_IO
    assert (run.io.direction, run.io.port, run.io.size, run.io.count) == (0, 0x40, 1, 1)
    kvm.vcpu.io_data()[:] = b"\x5a"
    run = kvm.vcpu.run_once()
    assert (run.io.direction, run.io.port) == (abi.KVM_EXIT_IO_OUT, 0x11)
    assert bytes(kvm.vcpu.io_data()) == b"\x5a"
    assert kvm.vcpu.run_once().exit_reason == abi.KVM_EXIT_HLT
    assert kvm.pio.unclaimed_reads == kvm.pio.unclaimed_writes == 0  # no bus was asked


def test_run_once_hands_out_string_io_whole(make):
    # mov si, 0x3000; mov cx, 3; mov dx, 0x99; rep outsw; hlt
    kvm = make(b"\xbe\x00\x30\xb9\x03\x00\xba\x99\x00\xf3\x6f\xf4")
    kvm.memory.write(0x3000, b"abcdef")
    seen = b""
    while (run := kvm.vcpu.run_once()).exit_reason == abi.KVM_EXIT_IO:
        assert (run.io.port, run.io.size) == (0x99, 2)
        seen += bytes(kvm.vcpu.io_data())
    assert seen == b"abcdef"
    assert run.exit_reason == abi.KVM_EXIT_HLT


def test_run_once_ends_when_kicked(make):
    kvm = make(b"\xeb\xfe")
    reasons = []
    thread = threading.Thread(
        target=lambda: reasons.append(kvm.vcpu.run_once().exit_reason), daemon=True
    )
    thread.start()
    while thread.is_alive():
        kvm.vcpu.kick()
        thread.join(0.01)
    assert reasons == [abi.KVM_EXIT_INTR]


def test_a_kick_that_comes_first_is_not_lost(make):
    kvm = make(b"\xeb\xfe")
    kvm.vcpu.kick()
    assert kvm.vcpu.run().reason is ExitReason.INTERRUPTED


def test_kicks_leave_no_signal_pending_and_the_mask_as_it_was(make):
    import signal

    kvm = make(b"\xeb\xfe")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for _ in range(20):
        timer = threading.Timer(0.001, kvm.vcpu.kick)
        timer.start()
        assert kvm.vcpu.run().reason is ExitReason.INTERRUPTED
        timer.join()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert KICK_SIGNAL not in signal.sigpending()
    assert signal.getsignal(KICK_SIGNAL) is signal.SIG_DFL  # no process-wide handler


def pages(bitmap: bytes | bytearray) -> list[int]:
    """Without that of the code: what is mapped as it is first read counts as written for KVM."""
    bits = int.from_bytes(bitmap, "little")
    return [page for page in range(256) if bits >> page & 1 and page != 1]


def test_the_dirty_log_has_a_bit_for_each_page_written(make):
    # mov byte [0x5000], 1; mov byte [0x7000], 1; hlt
    kvm = make(b"\xc6\x06\x00\x50\x01\xc6\x06\x00\x70\x01\xf4")
    region = kvm.memory.regions[0]
    kvm.vm.start_dirty_log()
    kvm.vm.dirty_log(region)
    assert kvm.vcpu.run().reason is ExitReason.HALT
    assert pages(kvm.vm.dirty_log(region)) == [5, 7]
    assert not any(kvm.vm.dirty_log(region))  # reading it clears it


def test_the_dirty_log_may_be_read_and_kept(make):
    # mov byte [0x5000], 1; hlt; mov byte [0x7000], 1; hlt; mov byte [0x5000], 1; hlt
    writes = [b"\xc6\x06\x00" + page + b"\x01\xf4" for page in (b"\x50", b"\x70", b"\x50")]
    kvm = make(b"".join(writes))
    region = kvm.memory.regions[0]
    kvm.vm.start_dirty_log()
    kvm.vm.dirty_log(region)

    def written() -> list[int]:
        assert kvm.vcpu.run().reason is ExitReason.HALT
        return pages(kvm.vm.written(region))

    assert written() == [5]
    assert written() == [5, 7]
    kvm.vm.forget_written(region)
    assert written() == [5]


def test_writes_to_a_read_only_slot_go_to_the_bus(make):
    kvm = make(b"\xa0\x00\xf0\xa2\x01\xf0\xf4")  # mov al, [0xf000]; mov [0xf001], al; hlt
    if not kvm.system.check_extension(KVM_CAP_READONLY_MEM):
        pytest.skip("KVM_CAP_READONLY_MEM is missing")
    low = kvm.memory.regions[0]
    kvm.vm.unmap(low)
    kvm.vm.map(low._replace(size=0xF000))
    rom = low._replace(gpa=0xF000, size=0x1000, hva=low.hva + 0xF000, readonly=True)
    kvm.memory.write(0xF000, b"\x42")
    kvm.vm.map(rom)
    assert kvm.vcpu.run().reason is ExitReason.HALT
    assert kvm.mmio.unclaimed_writes == 1
    assert kvm.memory.read(0xF000, 2) == b"\x42\x00"


def test_msrs_are_set_and_read_and_a_refused_one_is_named(make):
    kvm = make(b"\xf4")
    star, nonsense = 0xC000_0081, 0x4000_1234
    assert kvm.vcpu.set_msrs({star: 0x1234_5678_0000_0000}) == []
    assert kvm.vcpu.msrs([star]) == {star: 0x1234_5678_0000_0000}
    # One that KVM does not know is passed over, and the ones behind it are still set.
    lstar = 0xC000_0082
    assert kvm.vcpu.set_msrs({nonsense: 1, lstar: 0x7000}) == [nonsense]
    assert kvm.vcpu.msrs([lstar]) == {lstar: 0x7000}
    with pytest.raises(HostError, match=r"MSR 0x40001234 of vCPU 0"):
        kvm.vcpu.msrs([star, nonsense])


def test_registers_come_back_as_they_were_set(make):
    kvm = make(b"\xf4")
    registers = {name: 0x0101_0101_0101_0101 * i for i, name in enumerate(general(0))}
    registers |= {"rip": 0x7C00, "rflags": 0x246}
    kvm.vcpu.set_registers(registers)
    assert kvm.vcpu.registers() == registers
    system = real_mode(0x4000)._replace(cr2=0xDEAD_B000)
    kvm.vcpu.set_system_registers(system)
    assert kvm.vcpu.system_registers() == system


def test_code_where_no_memory_is_cannot_be_emulated(make):
    kvm = make(b"\xea\x10\x00\xff\xff")  # jmp 0xffff:0x10, the first byte behind RAM
    exit = kvm.vcpu.run()
    assert exit.reason is ExitReason.INTERNAL_ERROR
    assert "could not emulate the instruction at rip 0x10: no guest memory there" in exit.detail


def test_the_packed_registers_are_laid_out_as_the_structures():
    from vmexit.abi.kvm_structs import kvm_regs, kvm_segment, kvm_sregs
    from vmexit.accel.kvm import registers

    assert registers._GENERAL_FORMAT.size == sizeof(kvm_regs)
    assert registers._SYSTEM_FORMAT.size == kvm_sregs.apic_base.offset
    segment = kvm_segment(
        base=1, limit=2, selector=3, type=4, present=5, dpl=6, db=7, s=8, l=9, g=10, avl=11,
        unusable=12,
    )  # fmt: skip
    values = registers._SYSTEM_FORMAT.unpack(
        bytes(segment).ljust(registers._SYSTEM_FORMAT.size, b"\0")
    )
    assert values[:13] == (*range(1, 13), 0)


def test_an_instruction_that_kvm_cannot_emulate_is_decoded(make):
    kvm = make(b"\xf3\x0f\xb8\xc0\xf4")  # popcnt ax, ax
    exit = kvm.vcpu.run()
    if exit.reason is ExitReason.HALT:
        pytest.skip("this KVM executes POPCNT in real mode")
    assert exit.reason is ExitReason.INTERNAL_ERROR
    assert "at rip 0x0: `popcnt ax, ax` (f3 0f b8 c0)" in exit.detail


def test_a_vcpu_that_kvm_has_reset_at_a_triple_fault_is_reported_so(make):
    """AMD's KVM does that before it reports the shutdown; here the reset is ours."""
    kvm = make(b"\xf4")
    registers, system = reset()
    kvm.vcpu.set_system_registers(system)
    kvm.vcpu.set_registers(registers)
    assert "registers are those after reset" in kvm.vcpu._exit(abi.KVM_EXIT_SHUTDOWN).detail
    kvm.vcpu.set_registers(general(0))
    assert kvm.vcpu._exit(abi.KVM_EXIT_SHUTDOWN).detail == "triple fault"


def test_an_exit_that_is_not_known_raises_with_registers(make):
    """No host gives one on demand: the exit reason in the shared page is overwritten."""
    kvm = make(b"\xf4")
    with pytest.raises(GuestCrash, match=r"(?s)exit reason 4711 is not known.*rax=0{16}"):
        kvm.vcpu._exit(4711)


@pytest.mark.parametrize(
    ("suberror", "words"),
    [(1, "emulation failure"), (2, "simultaneous exceptions"), (77, "suberror 77 (unnamed)")],
)
def test_internal_errors_say_what_kvm_reported(make, suberror, words):
    """The exit is put into the shared page as KVM would (KVM API 5)."""
    kvm = make(b"\xf4")
    run = kvm.vcpu.kvm_run()
    run.exit_reason = abi.KVM_EXIT_INTERNAL_ERROR
    run.internal.suberror, run.internal.ndata = suberror, 1
    run.internal.data[0] = 0
    exit = kvm.vcpu._exit(abi.KVM_EXIT_INTERNAL_ERROR)
    assert exit.reason is ExitReason.INTERNAL_ERROR
    assert words in exit.detail
    assert "`hlt` (f4)" in exit.detail
    del run


def test_the_bytes_that_kvm_fetched_win_over_those_in_memory_now(make):
    kvm = make(b"\xf4")
    run = kvm.vcpu.kvm_run()
    run.exit_reason = abi.KVM_EXIT_INTERNAL_ERROR
    failure = run.emulation_failure
    failure.suberror, failure.ndata = abi.KVM_INTERNAL_ERROR_EMULATION, 3
    failure.flags = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    failure.insn_size = 2
    failure.insn_bytes[:2] = b"\x0f\x0b"
    exit = kvm.vcpu._exit(abi.KVM_EXIT_INTERNAL_ERROR)
    assert "KVM could not emulate the instruction at rip 0x0: `ud2` (0f 0b)" in exit.detail
    del run, failure


def test_other_exits_are_told_apart(make):
    kvm = make(b"\xf4")
    run = kvm.vcpu.kvm_run()
    run.exit_reason, run.hw.hardware_exit_reason = abi.KVM_EXIT_UNKNOWN, 0x31
    exit = kvm.vcpu._exit(abi.KVM_EXIT_UNKNOWN)
    assert (exit.reason, exit.detail) == (ExitReason.UNKNOWN, "hardware exit reason 0x31")
    run.exit_reason = abi.KVM_EXIT_FAIL_ENTRY
    run.fail_entry.hardware_entry_failure_reason = 0x8000_0021
    exit = kvm.vcpu._exit(abi.KVM_EXIT_FAIL_ENTRY)
    assert exit.reason is ExitReason.FAIL_ENTRY
    assert "invalid guest state (VMX)" in exit.detail
    run.exit_reason = abi.KVM_EXIT_SYSTEM_EVENT
    for number, event in ((1, "POWEROFF"), (2, "RESET"), (3, "CRASH")):
        run.system_event.type = number
        exit = kvm.vcpu._exit(abi.KVM_EXIT_SYSTEM_EVENT)
        assert exit.reason is ExitReason.SYSTEM_EVENT
        assert exit.event is not None and exit.event.name == event
    for reason, name in (
        (abi.KVM_EXIT_DEBUG, ExitReason.DEBUG),
        (abi.KVM_EXIT_IRQ_WINDOW_OPEN, ExitReason.IRQ_WINDOW),
        (abi.KVM_EXIT_SHUTDOWN, ExitReason.SHUTDOWN),
    ):
        assert kvm.vcpu._exit(reason).reason is name
    del run


def test_a_second_vcpu_needs_its_own_index(make):
    kvm = make(b"\xf4")
    with pytest.raises(HostError, match="vCPU 0 exists already"):
        kvm.vm.create_vcpu(0)
    assert kvm.vm.create_vcpu(1).index == 1


def test_overlapping_slots_are_refused_in_words(make):
    kvm = make(b"\xf4")
    low = kvm.memory.regions[0]
    with pytest.raises(HostError, match=r"memory slot 0x1000\.\.0x1fff: .*use less --memory"):
        kvm.vm.map(low._replace(gpa=0x1000, size=0x1000))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nonexistent/kvm", r"does not exist; load kvm_intel or kvm_amd.*--accel soft"),
        ("/dev/null", r"is not a KVM device .*--accel soft"),
        ("/dev", r"cannot open /dev: .*--accel soft"),
    ],
)
def test_what_is_no_kvm_device_is_refused_with_a_remedy(path, words):
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match=words):
        System(path)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_write_that_an_ioeventfd_waits_for_is_no_exit(make):
    """KVM API 4.59: only the value asked for, at the address and size asked for."""
    # In big real mode (limits of 4 GiB) DS reaches MMIO: here it is just above the RAM of 1 MiB.
    code = bytes.fromhex(
        "b8ffff 8ed8"  # mov ax, 0xffff; mov ds, ax: linear 0xffff0
        "66b801000000 66a36000"  # mov eax, 1; mov [0x60], eax: GPA 0x100050
        "66b802000000 66a36000"  # 2
        "66b801000000 66a36400"  # 1, but elsewhere
        "f4"
    )
    kvm = make(code)
    seen: list[tuple[int, int]] = []

    class Registers:
        widths = (4,)

        def read(self, offset: int, size: int) -> int:
            return 0

        def write(self, offset: int, size: int, value: int) -> None:
            seen.append((offset, value))

    kvm.mmio.attach(0x10_0000, 0x1000, Registers())
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        kvm.vm.assign_ioeventfd(0x10_0050, 4, 1, event)
        assert kvm.vcpu.run().reason is ExitReason.HALT
        assert os.eventfd_read(event) == 1
        assert seen == [(0x50, 2), (0x54, 1)]
        with pytest.raises(HostError, match="refused an ioeventfd at 0x100050: File exists"):
            kvm.vm.assign_ioeventfd(0x10_0050, 4, 1, event)
    finally:
        os.close(event)


@pytest.mark.parametrize("files", [True, False], ids=["", "no more files"])
def test_what_is_closed_later_has_its_number_until_it_is_gone(monkeypatch, files):
    """Or the next VM would have the name that KVM still has in debugfs for this one."""
    memory, jobs, last = GuestMemory([(0, 1 << 20)]), [], {}

    def close(fd: int) -> None:
        last[fd] = os.readlink(f"/proc/self/fd/{fd}")
        os_close(fd)

    def no_file(*_) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    os_close = os.close
    with System() as system:
        vm = system.create_vm(memory, Bus("port"), Bus("MMIO"))
        vm.create_irqchip()
        vm.later = jobs.append
        fd = vm.fd
        vm.close()
        assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:kvm-vm"
        (job,) = jobs
        monkeypatch.setattr(os, "close", close)
        if not files:
            monkeypatch.setattr(os, "open", no_file)
        job()
        monkeypatch.undo()
        assert last[fd] == (os.devnull if files else "anon_inode:kvm-vm")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    memory.close()
