"""Rows `exits`: exits a second of whole programs, vmexit's and C's."""

import time
from collections.abc import Iterator

from counted import COUNT_AT, MEMORY, PORT, BareVcpu, CountedGuest, counts
from measure import Row, attempt, differences, interleave, ratios, spread
from native import BUILD, TIMEOUT, program, run

from vmexit import Access, Machine, StopReason


def rows(quick: bool) -> Iterator[Row]:
    """One row a guest and a way to take its exits."""
    rounds = 3 if quick else 15
    for guest, count in counts(quick):
        yield from attempt(f"exits ring {guest.ring}", _guest_rows(guest, rounds, count))


def _guest_rows(guest: CountedGuest, rounds: int, count: int) -> Iterator[Row]:
    c = program("kvm_loop")
    state = BUILD / f"{guest.name}-{count}.state"
    with BareVcpu(guest) as bare:
        bare.start(count)
        state.write_bytes(bare.state())

        def in_c() -> float:
            return int(run(c, state, str(count)).split()[0]) / count / 1e3

        def with_device() -> float:
            bare.start(count)
            begin = time.perf_counter_ns()
            bare.vcpu.run()
            taken = time.perf_counter_ns() - begin
            assert bare.counter.count == count
            return taken / count / 1e3

        def with_callback() -> float:
            return _machine(guest, count)

        c_times, device, callback = interleave(rounds, (in_c, with_device, with_callback))
    where = f"guest {guest.name}, ring {guest.ring}, {count} exits a round"
    for name, what, ours in (
        ("device", "a device straight on the bus of a KVM vCPU", device),
        ("on_pio", "Machine.on_pio(0x10, write=callback)", callback),
    ):
        extra, ratio = differences(ours, c_times), ratios(ours, c_times)
        yield Row(
            f"exits ring {guest.ring}, {name}",
            f"{what} against a C program with the same image, registers and memory ({where})",
            rounds,
            _rate(ours),
            _rate(c_times),
            f"{ratio.median:.2f}x the time, {extra.median:+.2f} µs an exit",
            figures={
                "vmexit_us": spread(ours),
                "c_us": spread(c_times),
                "extra_us": extra,
                "ratio": ratio,
            },
        )


def _rate(times: list[float]) -> str:
    median = spread(times).median
    return f"{1e6 / median:,.0f}/s ({median:.2f} µs)"


def _machine(guest: CountedGuest, count: int) -> float:
    seen = 0

    def callback(access: Access) -> None:
        nonlocal seen
        seen += 1

    with Machine(memory=MEMORY, accel="kvm", image=guest.path, mode=guest.mode) as vm:
        vm.memory.write_u32(COUNT_AT, count)
        vm.on_pio(PORT, write=callback)
        begin = time.perf_counter_ns()
        stop = vm.run(timeout=TIMEOUT)
        taken = time.perf_counter_ns() - begin
    assert stop.reason in (StopReason.HALT, StopReason.DEBUG_EXIT), stop
    assert seen == count
    return taken / count / 1e3
