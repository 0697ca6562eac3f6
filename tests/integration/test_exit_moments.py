"""The moments around each exit: left, the access, enters; on both accelerators."""

import re

import pytest

from vmexit import Access, ExitObserver, Machine, StopReason

# mov al, 1; out 0x10, al; in al, 0x20; mov [0x8000], al (a GPA with no RAM); hlt
ACCESSES = bytes.fromhex("b001 e610 e420 a20080 f4")


class Recorder(ExitObserver):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def left(self, vcpu: int) -> None:
        self.seen.append("left")

    def enters(self, vcpu: int) -> None:
        self.seen.append("enters")

    def io(self, vcpu, write, port, size, count, data) -> None:
        self.seen.append("out" if write else "in")

    def mmio(self, vcpu, write, gpa, data) -> None:
        self.seen.append("mmio")

    def other(self, vcpu, exit, detail) -> None:
        self.seen.append(exit)

    def device(self, access: Access) -> int:
        self.seen.append("device")
        return 0

    @property
    def text(self) -> str:
        return " ".join(self.seen)


def run(accel: str, recorder: Recorder) -> Machine:
    return Machine("32K", accel, observer=recorder)


def test_the_device_is_called_between_the_moments(accel):
    recorder = Recorder()
    with run(accel, recorder) as vm:
        vm.on_pio(0x10, write=recorder.device)
        vm.on_pio(0x20, read=recorder.device)
        vm.on_mmio(0x8000, 0x1000, write=recorder.device)
        vm.load_bytes(ACCESSES)
        assert vm.run(timeout=60).reason is StopReason.HALT
    # KVM may come back for nothing now and then, and the software CPU begins a stretch anew.
    text = re.sub(r"(left enters )+", "left enters ", recorder.text)
    assert text.startswith("left enters ")
    assert re.sub(r"left enters (?=left )", "", text.removeprefix("left enters ")) == (
        "left out device enters left device in enters left mmio device enters left hlt"
    )


def test_a_string_read_is_one_exit(accel):
    recorder = Recorder()
    with run(accel, recorder) as vm:
        vm.on_pio(0x20, read=lambda a: recorder.device(a))
        # mov cx, 3; mov dx, 0x20; mov di, 0x5000; rep insb; hlt
        vm.load_bytes(bytes.fromhex("b90300 ba2000 bf0050 f36c f4"))
        assert vm.run(timeout=60).reason is StopReason.HALT
    assert "left device device device in enters" in recorder.text
    assert recorder.seen.count("in") == 1


def test_a_later_run_begins_anew(accel):
    recorder = Recorder()
    with run(accel, recorder) as vm:
        vm.load_bytes(bytes.fromhex("f4 e610 f4"))
        vm.run(timeout=60)
        vm.run(timeout=60)
    assert re.sub(r"(left enters )+", "left enters ", recorder.text) == (
        "left enters left hlt left enters left out enters left hlt"
    )


@pytest.mark.parametrize("moment", ["left", "enters"])
def test_what_a_moment_raises_ends_the_run_and_is_raised(accel, moment):
    """An OSError, too: it is not to be taken for one of KVM_RUN itself."""

    class Failing(Recorder):
        def left(self, vcpu: int) -> None:
            super().left(vcpu)
            if moment == "left" and "out" in self.seen:
                raise InterruptedError(4, "from the observer")

        def enters(self, vcpu: int) -> None:
            super().enters(vcpu)
            if moment == "enters" and "out" in self.seen:
                raise InterruptedError(4, "from the observer")

    with run(accel, Failing()) as vm:
        vm.load_bytes(bytes.fromhex("e610 e611 ebfe"))
        with pytest.raises(InterruptedError, match="from the observer"):
            vm.run(timeout=60)


def test_a_kick_is_told_as_leaving_only(accel):
    recorder = Recorder()
    with run(accel, recorder) as vm:
        vm.load_bytes(bytes.fromhex("ebfe"))  # jmp to itself
        assert vm.run(timeout=0.05).reason is StopReason.TIMEOUT
        assert set(recorder.seen) == {"left", "enters"}
        assert recorder.seen[-1] == "left"
