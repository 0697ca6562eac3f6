"""Each guest does, on each accelerator, what its source says that it does."""

import pytest

from guests import COUNT_AT, DELIVERY, ENDLESS, FOLDER, GUESTS, Run, run_guest
from vmexit import Machine, StopReason

pytestmark = pytest.mark.engine

# What AMD's KVM does to a vCPU before it reports a triple fault.
RESET = "reset the vCPU"


@pytest.fixture
def run(accel, tmp_path, nothing_left):
    def run(name: str, **more) -> Run:
        return run_guest(accel, name, tmp_path / "serial", **more)

    return run


def outs(result: Run, port: int) -> list[str]:
    return [e["data"] for e in result.exits if e.get("port") == port and e["dir"] == "out"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hello", "Hello from real mode!\n"),
        ("protected-hello", "Hello from protected mode!\n"),
        ("long-hello", "Hello from long mode!\n"),
        ("modes", "PL\n"),
    ],
)
def test_prints_and_halts(run, name, text):
    result = run(name)
    assert result.serial == text
    assert result.stop.reason is StopReason.HALT
    assert result.stop.status == 0
    assert result.exits[-1] == {"vcpu": 0, "exit": "hlt"}
    assert len(outs(result, 0x3F8)) == len(text)


def test_the_port_counter(run):
    result = run("counter")
    numbers = [int.from_bytes(bytes.fromhex(data), "little") for data in outs(result, 0x10)]
    assert numbers == list(range(10))
    assert result.stop.reason is StopReason.HALT


def test_a_write_to_the_debug_exit_port_ends_a_guest_that_goes_on_for_ever(run):
    stop = run("debug-exit").stop
    assert (stop.reason, stop.value, stop.status) == (StopReason.DEBUG_EXIT, 0x21, 0x43)


def test_an_endless_loop_is_ended_by_the_timeout(run):
    result = run("endless", timeout=0.3)
    assert result.stop.reason is StopReason.TIMEOUT
    assert result.exits == []
    # `jmp .` is the first instruction, so that is where it still is.
    assert result.registers["rip"] == 0


def test_a_triple_fault_is_a_crash_that_names_the_instruction(run):
    stop = run("triple-fault").stop
    assert stop.reason is StopReason.SHUTDOWN
    assert stop.crashed and stop.status == 3
    if RESET in stop.detail:
        return  # AMD's KVM: the registers are gone
    assert "`ud2` (0f 0b)" in stop.dump
    assert "rip=0000000000001" in stop.dump


def test_mmio_reaches_the_bus_in_each_size(run):
    for name, sizes in (("mmio", {1, 2, 4}), ("mmio64", {4, 8})):
        exits = [e for e in run(name).exits if e["exit"] == "mmio"]
        assert {e["size"] for e in exits if e["dir"] == "write"} >= sizes
        assert {e["size"] for e in exits if e["dir"] == "read"} >= sizes
        assert all(set(e["data"]) == {"f"} for e in exits if e["dir"] == "read")


def test_string_io_comes_as_one_exit_a_repetition_or_as_its_elements(run):
    result = run("strings")
    assert result.serial
    assert "".join(bytes.fromhex(d).decode() for d in outs(result, 0x3F8)) == result.serial
    reads = [e for e in result.exits if e.get("port") == 0x60]
    # `count` elements an exit; how KVM cuts them is its own affair, their sum is the guest's.
    assert sum(e["count"] for e in reads) >= 3 * 8
    assert result.stop.reason is StopReason.HALT


def test_counted_loops_make_so_many_exits(run):
    for name in ("out-loop", "ring3-out"):
        assert len(outs(run(name, count=7), 0x10)) == 7


@pytest.mark.kvm
@pytest.mark.parametrize("name", sorted(GUESTS.keys() - DELIVERY))
def test_both_accelerators_show_the_same_exits_registers_and_memory(name, tmp_path):
    timeout = 0.3 if name in ENDLESS else 60
    kvm, soft = (
        run_guest(accel, name, tmp_path / accel, timeout=timeout) for accel in ("kvm", "soft")
    )
    assert soft.exits == kvm.exits
    assert soft.registers == kvm.registers or RESET in kvm.stop.detail
    assert soft.memory == kvm.memory
    assert soft.serial == kvm.serial
    assert (soft.stop.reason, soft.stop.value) == (kvm.stop.reason, kvm.stop.value)


@pytest.mark.parametrize(
    ("what", "original", "patched"),
    [
        # mov word [TSS + 0x66], 0x68: the bitmap begins beyond the limit of the TSS
        ("no bitmap", b"\x66\x30\x01\x00\x68\x00", b"\x66\x30\x01\x00\xff\xff"),
        # mov byte [TSS + limit], 0xff: goes to the bits of ports 0x10 to 0x17 instead
        ("a bit set", b"\x88\x30\x01\x00\xff", b"\x6a\x30\x01\x00\xff"),
    ],
)
def test_ring_3_may_not_use_a_port_that_the_tss_denies(accel, what, original, patched):
    image = (FOLDER / "ring3-out.bin").read_bytes()
    assert image.count(original) == 1, what
    with Machine("64M", accel, mode="long") as vm:
        vm.load_bytes(image.replace(original, patched), at=0, entry=0x1000)
        vm.memory.write_u32(COUNT_AT, 3)
        seen = []
        vm.on_pio(0x10, write=seen.append)
        stop = vm.run(timeout=20)
    assert stop.reason is StopReason.SHUTDOWN  # #GP, and there is no IDT
    assert seen == []
    if accel == "soft":
        assert "#GP (error code 0x0)" in stop.detail
        assert "`out 0x10, al`" in stop.detail
