"""KVM's dirty rings tell what was written, as its log does."""

import errno
import mmap
import os
import random
import struct
from contextlib import contextmanager

import pytest
from resources import resources

from vmexit import ConfigError, HostError, Machine, StopReason
from vmexit.abi.kvm import KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_MMIO
from vmexit.abi.kvm_caps import KVM_CAP_DIRTY_LOG_RING
from vmexit.abi.kvm_state import KVM_DIRTY_LOG_PAGE_OFFSET
from vmexit.accel.kvm import dirty_ring
from vmexit.accel.kvm.system import System
from vmexit.core.bus import Bus
from vmexit.core.exit_stats import ExitStats
from vmexit.core.memory import PAGE_SIZE, GuestMemory

SIZE, ENTRIES = 32 << 20, 1024
PAGES, FIRST = SIZE // PAGE_SIZE, 16  # the guest writes to none before that
TABLES, CODE, LIST = 0x2000, 0x5000, 0x8000
MMIO = 0x2000_0000  # where no memory is

# From ring 3, where every KVM runs a guest as it is: writes a byte to each page whose GPA is in the
# list at 0x8000, which ends with 0; then to MMIO; and from the beginning.
WRITER = bytes.fromhex(
    "be00800000"  #     mov esi, 0x8000
    "8b06"  #     next: mov eax, [rsi]
    "83c604"  #         add esi, 4
    "85c0"  #           test eax, eax
    "7404"  #           jz done
    "fe00"  #           inc byte [rax]
    "ebf3"  #           jmp next
    "b800000020"  # done: mov eax, 0x20000000
    "c60001"  #         mov byte [rax], 1
    "ebe4"  #           jmp the beginning
)


def has_rings() -> bool:
    try:
        with System() as system:
            return bool(system.check_extension(KVM_CAP_DIRTY_LOG_RING))
    except HostError:
        return False


pytestmark = [
    pytest.mark.engine,
    pytest.mark.kvm,
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(not has_rings(), reason="this KVM has no dirty rings"),
]


@contextmanager
def writer(ring=ENTRIES, **options):
    """A machine with the guest above, just before it begins."""
    with Machine(SIZE, "kvm", mode="long", dirty_ring=ring, **options) as vm:
        in_ring_3(vm)
        yield vm


def in_ring_3(vm):
    vm.load_bytes(WRITER, at=CODE, entry=CODE)
    pml4, pdpt, pd = TABLES, TABLES + PAGE_SIZE, TABLES + 2 * PAGE_SIZE
    # Present, writable, for ring 3; and of 2 MiB (Intel SDM vol. 3, 4.5).
    vm.memory.write(pml4, struct.pack("Q", pdpt | 7))
    vm.memory.write(pdpt, struct.pack("Q", pd | 7))
    vm.memory.write(pd, struct.pack("512Q", *(i << 21 | 0x87 for i in range(512))))
    vcpu = vm._vcpus()[0]
    system = vcpu.system_registers()
    code = system.cs._replace(selector=0x1B, dpl=3)
    data = system.ss._replace(selector=0x13, dpl=3)
    vcpu.set_system_registers(
        system._replace(cs=code, ss=data, ds=data, es=data, fs=data, gs=data, cr3=pml4)
    )


def write(vm, pages):
    """Have the guest write to these pages, in this order."""
    vm.memory.write(LIST, struct.pack(f"{len(pages) + 1}I", *(p * PAGE_SIZE for p in pages), 0))
    stop = vm.run_until(mmio=MMIO, timeout=60)
    assert stop.reason is StopReason.UNTIL, stop


def all_memory(vm):
    return vm.memory.read(0, SIZE)


@pytest.fixture
def full(monkeypatch):
    """How often a ring was full."""
    times = []
    make_room = dirty_ring.DirtyRings.make_room

    def counted(rings):
        times.append(1)
        make_room(rings)

    monkeypatch.setattr(dirty_ring.DirtyRings, "make_room", counted)
    return times


def at_random(chance, count):
    return chance.sample(range(FIRST, PAGES), count)


def test_going_back_undoes_what_was_written(full):
    """Few pages, many, the same ones, others; and what the host writes."""
    chance = random.Random(1)
    with writer() as vm, vm.snapshot() as snap:
        before, again = all_memory(vm), at_random(chance, 12)
        for count in (3, 3, 0, 1, 50, 200, 3, *[12] * 100, 300, 0, 12):
            pages = again if count == 12 else at_random(chance, count)
            write(vm, pages)
            assert [vm.memory.read(p * PAGE_SIZE, 1) for p in pages] == [b"\1"] * count
            vm.memory.write(chance.randrange(FIRST, PAGES) * PAGE_SIZE, b"by the host")
            vm.reset_to(snap)
            assert all_memory(vm) == before
        assert vm._parts.memory.mapped < 20, "it was mapped anew each time"
    assert not full


def test_more_than_a_ring_holds(full):
    chance = random.Random(2)
    with writer() as vm, vm.snapshot() as snap:
        before = all_memory(vm)
        for count in (10, 10, 3 * ENTRIES, 10, 3000, 2000, 500, 500, 500, 10):
            write(vm, at_random(chance, count))
            vm.reset_to(snap)
            assert all_memory(vm) == before
    assert full


def test_a_clone_has_rings_too(full):
    chance = random.Random(3)
    with writer() as vm, vm.snapshot() as snap:
        before = all_memory(vm)
        with snap.clone() as twin:
            for count in (5, 5, 2000, 5, 5):
                write(twin, at_random(chance, count))
                twin.reset_to(snap)
                assert all_memory(twin) == before
        assert all_memory(vm) == before
    assert full


def test_each_vcpu_has_one(full):
    """The second vCPU writes, and its ring is full; the first one waits for an interrupt."""
    with Machine(SIZE, "kvm", machine="microvm", smp=2, mode="long", dirty_ring=ENTRIES) as vm:
        in_ring_3(vm)
        first, second = vm._vcpus()
        with vm.snapshot() as snap:
            before = all_memory(vm)
            for _ in range(3):
                second.set_system_registers(first.system_registers())
                second.set_registers(first.registers())
                write(vm, [*range(FIRST, FIRST + 1500), *range(4000, 5500)])
                vm.reset_to(snap)
                assert all_memory(vm) == before
    assert full


def test_what_a_trace_shows():
    """The sampler asks for what is new since it asked the last time."""
    with writer() as vm:
        kvm, (region,) = vm._parts.vm, vm.memory.regions
        kvm.start_dirty_log()
        write(vm, [20, 21, 8000])
        seen = kvm.dirty_log(region)
        assert {20, 21, 8000} <= set(bits(seen))
        write(vm, [21, 30])
        assert {21, 30} <= set(bits(kvm.dirty_log(region)))
        write(vm, [30])
        assert not {20, 21, 8000} & set(bits(kvm.dirty_log(region)))


def bits(bitmap):
    value = int.from_bytes(bitmap, "little")
    return [n for n in range(len(bitmap) * 8) if value >> n & 1]


def test_where_there_are_none_it_is_the_log(monkeypatch):
    monkeypatch.setattr(dirty_ring, "KVM_CAP_DIRTY_LOG_RING", 0x7FFF_0000)  # which no KVM has
    with writer() as vm, vm.snapshot() as snap:
        before = all_memory(vm)
        for pages in ([20], [30, 4000], [20], []):
            write(vm, pages)
            vm.reset_to(snap)
            assert all_memory(vm) == before
        assert vm._parts.vm._rings is None


def test_no_room_to_map_one(monkeypatch):
    maps = mmap.mmap

    def fails_for_a_ring(fd, size, **options):
        if "offset" in options:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return maps(fd, size, **options)

    monkeypatch.setattr(mmap, "mmap", fails_for_a_ring)
    before = resources()
    with pytest.raises(HostError, match="cannot map vCPU 0: Cannot allocate memory") as raised:
        Machine(SIZE, "kvm", dirty_ring=ENTRIES)
    assert raised.value.__traceback__ is not None  # and so all frames are still there
    assert resources() == before


def test_who_runs_it_by_single_exits_gets_on(full):
    with writer() as vm:
        (vcpu,) = vm._vcpus()
        vm._parts.vm.start_dirty_log()
        vm.memory.write(LIST, struct.pack("3001I", *(p * PAGE_SIZE for p in range(16, 3016)), 0))
        reasons = [vcpu.run_once().exit_reason]
        while reasons[-1] != KVM_EXIT_MMIO and len(reasons) < 100:
            reasons.append(vcpu.run_once().exit_reason)
        assert set(reasons) == {KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_MMIO}
    assert len(full) == len(reasons) - 1


def test_who_observes_exits_sees_that_one(full):
    seen = ExitStats()
    with writer(observer=seen) as vm, vm.snapshot() as snap:
        for count in (1, 1, 3000):
            write(vm, range(FIRST, FIRST + count))
            vm.reset_to(snap)
    assert full
    told = {exit: count for (exit, _), count in seen.counts.items()}
    assert told["dirty_ring_full"] == len(full)


def test_a_trace_that_begins_later_sees_what_is_written_again():
    with writer() as vm, vm.snapshot() as snap:
        for _ in range(4):
            write(vm, [100, 200])
            vm.reset_to(snap)
        kvm, (region,) = vm._parts.vm, vm.memory.regions
        kvm.start_dirty_log()
        write(vm, [100])
        assert 100 in bits(kvm.dirty_log(region))


@pytest.mark.parametrize("entries", [1, 512, 1000, 131072, -1024])
def test_a_size_that_cannot_be(entries):
    with pytest.raises(ConfigError, match=f"ring of {entries} entries cannot be; use a power of"):
        Machine(SIZE, "soft", dirty_ring=entries)


def test_the_software_cpu_has_none_and_needs_none():
    with Machine(SIZE, "soft", dirty_ring=ENTRIES) as vm, vm.snapshot() as snap:
        vm.memory.write(0x5000, b"written")
        vm.reset_to(snap)
        assert vm.memory.read(0x5000, 7) == bytes(7)


@pytest.fixture
def made_up():
    """Rings of a VM with one whose entries are ours to write, and the file that it is."""
    memory = GuestMemory([(0, SIZE)])
    file = os.memfd_create("ring")
    start = KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
    os.ftruncate(file, start + ENTRIES * 16)
    with System() as system, system.create_vm(memory, Bus("port"), Bus("MMIO")) as vm:
        rings = dirty_ring.DirtyRings(vm.fd, ENTRIES)
        rings.add(file)

        def tell(first, *entries):
            data = b"".join(struct.pack("IIQ", 1, slot, page) for slot, page in entries)
            os.pwrite(file, data, start + first * 16)

        yield rings, tell
        rings.close()
    os.close(file)
    memory.close()


def test_entries_of_nothing_that_is_asked_for_are_passed_over(made_up):
    rings, tell = made_up
    log = rings.log(3, 100)
    tell(0, (3, 5), (2, 6), (3, 1 << 60), (3, 200), (1 << 16 | 3, 7), (3, 99))
    assert bits(log.read()) == [5, 7, 99]


def test_it_goes_round(made_up):
    rings, tell = made_up
    log = rings.log(0, PAGES)
    tell(0, *[(0, 1)] * 1000)
    assert bits(log.read()) == [1]
    log.forget()
    tell(1000, *[(0, 2)] * 24)
    tell(0, *[(0, 3)] * 10)
    assert bits(log.read()) == [2, 3]
    same = log.read()
    assert log.read() is same


def test_what_came_after_reading_is_not_forgotten(made_up):
    rings, tell = made_up
    log = rings.log(0, PAGES)
    tell(0, (0, 1))
    assert bits(log.read()) == [1]
    tell(1, (0, 2))
    rings.make_room()  # another vCPU's ring was full
    log.forget()
    assert bits(log.read()) == [2]
    log.forget()
    assert bits(log.read()) == []


def test_one_that_overflows_is_told(made_up):
    """Some KVMs emulate so much at a time that they do not see it coming."""
    rings, tell = made_up
    log = rings.log(0, PAGES)
    tell(0, *[(0, 1)] * 600)
    log.read()
    tell(600, *[(0, 2)] * 424)
    for _ in range(2):
        with pytest.raises(HostError, match="KVM let a dirty ring overflow, so that it"):
            log.read()
    with pytest.raises(HostError, match="overflow"):
        rings.make_room()
