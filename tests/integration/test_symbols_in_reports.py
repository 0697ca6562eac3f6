"""Backtraces of running guests, crash reports with names, and where the names come from."""

import re
import subprocess

import pytest
from command import assert_one_line, vmexit
from nested_guest import CALL_NOTHING, DEBUG_EXIT, TRIPLE_FAULT, build

from vmexit import GuestCrash, ImageError, Machine, StopReason

CALLS = ["innermost", "inner", "outer", "outermost", "_start"]


def functions(frames) -> list[str]:
    return [frame.name.partition("+")[0] for frame in frames]


def test_the_backtrace_of_a_guest_with_frame_pointers(accel, tmp_path) -> None:
    kernel = build(tmp_path, DEBUG_EXIT)
    with Machine("64M", accel, kernel=kernel) as vm:
        assert vm.run(timeout=20).reason is StopReason.DEBUG_EXIT
        frames = vm.backtrace()
        assert functions(frames) == CALLS
        assert not any(frame.guess for frame in frames)
        for frame, caller in zip(frames, CALLS, strict=True):  # each where gdb says it is
            listed = subprocess.run(
                ["nm", kernel], capture_output=True, text=True, check=True
            ).stdout
            start = int(re.search(rf"(\w+) \w {caller}\n", listed)[1], 16)
            assert frame.name == f"{caller}+{frame.address - start:#x}"
        assert vm.backtrace(limit=2) == frames[:2] and vm.backtrace(limit=0) == []
        assert vm.symbols.address("inner") is not None


def test_without_frame_pointers_what_is_on_the_stack_is_guessed(accel, tmp_path) -> None:
    kernel = build(tmp_path, DEBUG_EXIT, "-fomit-frame-pointer")
    with Machine("64M", accel, kernel=kernel) as vm:
        assert vm.run(timeout=20).reason is StopReason.DEBUG_EXIT
        here, *guesses = vm.backtrace()
        assert not here.guess and all(frame.guess for frame in guesses)
        assert functions([here, *guesses]) == CALLS
        assert str(guesses[0]) == f"{guesses[0].address:#018x} ? {guesses[0].name}"


def test_without_symbols_there_are_addresses_and_no_guesses(accel, tmp_path) -> None:
    kernel = build(tmp_path, DEBUG_EXIT, "-s")
    with Machine("64M", accel, kernel=kernel) as vm:
        vm.run(timeout=20)
        assert not vm.symbols
        assert [frame.name for frame in vm.backtrace()] == [
            f"{frame.address:#x}" for frame in vm.backtrace()
        ]
        assert len(vm.backtrace()) == len(CALLS)
    kernel = build(tmp_path, DEBUG_EXIT, "-s", "-fomit-frame-pointer")
    with Machine("64M", accel, kernel=kernel) as vm:
        vm.run(timeout=20)
        assert len(vm.backtrace()) == 1


def crash(*options: object, kernel) -> str:
    # The software CPU keeps the registers of the crash; AMD's KVM resets the vCPU.
    done = vmexit("run", "--accel", "soft", "--kernel", kernel, *options)
    assert done.status == 3, done
    return done.err


def test_a_crash_report_has_names_and_the_calls_that_led_there(tmp_path) -> None:
    report = crash(kernel=build(tmp_path, TRIPLE_FAULT))
    assert re.search(r"rip=\w+ rflags=\w+  innermost\+0x\w+: `ud2` \(0f 0b\)\n", report)
    _, _, trace = report.partition("\nbacktrace:\n")
    lines = trace.splitlines()
    assert [re.fullmatch(r"  0x\w{16} (\w+)\+0x\w+", line)[1] for line in lines] == CALLS


def test_who_called_nothing_is_in_the_report(tmp_path) -> None:
    report = crash(kernel=build(tmp_path, CALL_NOTHING))
    lines = report.partition("\nbacktrace:\n")[2].splitlines()
    assert lines[0] == "  0x00000dead0000000 0xdead0000000"
    assert [line.split()[-1].partition("+")[0] for line in lines[1:]] == CALLS


def test_the_exception_of_a_crash_has_them_too(tmp_path) -> None:
    kernel = build(tmp_path, TRIPLE_FAULT)
    subprocess.run(["strip", "-o", tmp_path / "stripped", kernel], check=True)
    with Machine("64M", "soft", kernel=tmp_path / "stripped", symbols=kernel) as vm:
        stop = vm.run(timeout=20)
        with pytest.raises(GuestCrash, match=r"(?s)innermost\+0x.*backtrace:.* _start\+0x"):
            stop.check()


def test_names_come_from_a_system_map(tmp_path) -> None:
    kernel = build(tmp_path, TRIPLE_FAULT)
    table = tmp_path / "System.map"
    done = vmexit("symbols", kernel)
    assert done.status == 0 and done.err == ""
    table.write_text(done.out)
    subprocess.run(["strip", kernel], check=True)
    assert "backtrace:\n  0x0000000001000" in crash(kernel=kernel)
    assert "outermost" not in crash(kernel=kernel)
    assert "outermost+0x" in crash("--symbols", table, kernel=kernel)


def test_a_file_that_has_no_symbols_does_not_hide_the_crash(tmp_path) -> None:
    kernel, wrong = build(tmp_path, TRIPLE_FAULT), tmp_path / "wrong"
    wrong.write_text("hello\n")
    report = crash("--symbols", wrong, kernel=kernel)
    assert "`ud2` (0f 0b)" in report and "backtrace:\n  0x" in report
    assert report.rstrip().splitlines()[-1].startswith(f"no symbols: symbol file {wrong}: line 1")
    with Machine("64M", "soft", kernel=kernel, symbols=wrong) as vm:
        assert vm.run(timeout=20).crashed
        with pytest.raises(ImageError, match="line 1 is no symbol"):
            vm.backtrace()


def test_a_file_of_symbols_that_is_not_there_is_told_at_once(tmp_path) -> None:
    kernel = build(tmp_path, DEBUG_EXIT)
    done = vmexit("run", "--accel", "soft", "--kernel", kernel, "--symbols", tmp_path / "no")
    assert_one_line(done, 2, "symbol file", "check the path")


def test_a_machine_without_a_kernel_has_no_symbols() -> None:
    with Machine("1M", "soft") as vm:
        assert len(vm.symbols) == 0 and len(vm.backtrace()) == 1
