"""Row `create`: making a machine, running it to its first exit and taking it apart."""

import time
from collections.abc import Iterator

from measure import Row, Unavailable, interleave, ratios, spread
from native import TIMEOUT, program, run

from vmexit import HostError, Machine, StopReason

MEMORY = 128 << 20
TARGET = 1.3

_HLT = b"\xf4"


def rows(quick: bool) -> Iterator[Row]:
    """In-process, in blocks that alternate with the C program's."""
    rounds, block = (2, 5) if quick else (20, 20)
    c = program("kvm_create")

    def in_c() -> float:
        times = run(c, str(block), str(MEMORY)).split()
        return spread([int(time) / 1e6 for time in times]).median

    def in_python() -> float:
        return spread([_once() for _ in range(block)]).median

    try:
        _once()  # loads modules, asks for the supported CPUID
    except HostError as error:
        raise Unavailable(str(error)) from error
    ours, theirs = interleave(rounds, (in_python, in_c))
    ratio = ratios(ours, theirs)
    yield Row(
        "create",
        f"Machine(memory=128M, accel=kvm), load_bytes(hlt), run(), close() against the same ioctls "
        f"in C, one thread; {rounds} blocks of {block} each, medians of blocks, ratio per block",
        rounds * block,
        f"{spread(ours).text(' ms')}",
        f"{spread(theirs).text(' ms')}",
        f"{ratio.text('x')}",
        f"<= {TARGET}x",
        ratio.median <= TARGET,
        ratio.around(TARGET),
        figures={"vmexit_ms": spread(ours), "c_ms": spread(theirs), "ratio": ratio},
    )


def _once() -> float:
    begin = time.perf_counter()
    with Machine(memory=MEMORY, accel="kvm") as vm:
        vm.load_bytes(_HLT)
        stop = vm.run(timeout=TIMEOUT)
    taken = time.perf_counter() - begin
    assert stop.reason is StopReason.HALT
    return taken * 1e3
