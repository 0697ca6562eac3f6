"""Traces of real runs, by the command: valid however they end, and true about the machine."""

import json
import os
import signal
import subprocess

import pytest
from command import GUESTS, VMEXIT, vmexit

from vmexit import ChromeTrace, Machine, StopReason, VmexitError

# mov byte [si+0x100], 1; add si, 0x1000; out 0x10, al; jmp back: writes to all pages of a segment
SPIN = bytes.fromhex("c684000101 81c60010 e610 ebf3")


def events(path, **wanted):
    found = json.loads(path.read_text())["traceEvents"]
    return [e for e in found if all(e.get(k) == v for k, v in wanted.items())]


def test_a_chrome_trace_of_a_guest(accel, tmp_path):
    trace = tmp_path / "trace"
    done = vmexit(
        "run", "--accel", accel, GUESTS / "counter.bin", "--trace", trace,
        "--trace-format", "chrome", "--serial", "null",
    )  # fmt: skip
    assert done.status == 0
    exits = events(trace, cat="exit")
    assert [e["args"].get("data") for e in exits] == [f"{n:02x}00" for n in range(10)] + [None]
    assert exits[-1]["name"] == "hlt"
    assert len(events(trace, cat="guest")) >= 11
    other = json.loads(trace.read_text())["otherData"]
    assert other["accelerator"] == accel and other["vcpus"] == 1
    assert [(s["gpa"], s["size"], s["readonly"]) for s in other["slots"]] == [(0, 128 << 20, False)]


@pytest.mark.parametrize("end", ["timeout", "sigterm"])
def test_it_is_valid_however_the_run_ends(accel, tmp_path, end):
    trace, image = tmp_path / "trace", tmp_path / "spin.bin"
    image.write_bytes(bytes(0x1000) + SPIN)
    command = [*VMEXIT, "run", "--accel", accel, str(image), "--trace", str(trace)]
    command += ["--trace-format", "chrome", "--timeout", "0.3" if end == "timeout" else "60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        if end == "sigterm":
            while not trace.exists() or not os.path.getsize(trace):
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == (124 if end == "timeout" else 143)
    assert events(trace, cat="exit", name="out 0x10")


def test_a_trace_of_a_run_that_was_killed_is_read_to_where_it_ends(accel, tmp_path):
    trace, image = tmp_path / "trace", tmp_path / "spin.bin"
    image.write_bytes(bytes(0x1000) + SPIN)
    command = [*VMEXIT, "run", "--accel", accel, str(image), "--trace", str(trace)]
    command += ["--trace-format", "chrome", "--timeout", "60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while not trace.exists() or os.path.getsize(trace) < 1 << 17:
            assert process.poll() is None
        process.kill()
    done = vmexit("report", trace, "-o", tmp_path / "page.html")
    assert done.status == 0
    assert int(done.out.split()[0]) > 100
    assert '"cutOff": true' in (tmp_path / "page.html").read_text()


def test_memory_that_is_written_is_told(accel, tmp_path):
    with open(tmp_path / "trace", "w+") as file:
        trace = ChromeTrace(file)
        with Machine("1M", accel, observer=trace) as vm:
            seen = []
            vm.on_pio(0x10, write=lambda a: seen.append(a) or (len(seen) == 16 and vm.stop()))
            vm.load_bytes(SPIN)
            vm.vcpus[0].regs.ds = vm.vcpus[0].regs.ds._replace(base=0x8_0000, selector=0x8000)
            vm.begin_trace(trace)
            assert vm.run(timeout=60).reason is StopReason.STOPPED
        with pytest.raises(VmexitError, match="is closed"):
            vm.begin_trace(trace)
        trace.close()
    written: dict[int, int] = {}
    for event in events(tmp_path / "trace", name="dirty"):
        assert event["args"]["chunk"] == 0x8000
        for gpa, pages in event["args"]["pages"].items():
            written[int(gpa, 16)] = written.get(int(gpa, 16), 0) + pages
    # All pages of the segment; the code was there before, but KVM counts what it wrote itself.
    expected = {0x8_0000, 0x8_8000}
    assert written.keys() & set(range(0x8_0000, 0x10_0000, 0x8000)) == expected
    assert all(written[gpa] >= 8 for gpa in expected)


def test_devices_have_tracks_by_their_names(accel, tmp_path):
    trace = tmp_path / "trace"
    vmexit(
        "run", "--accel", accel, GUESTS / "hello.bin", "--trace", trace, "--trace-format", "chrome"
    )
    names = [e["args"]["name"] for e in events(trace, name="thread_name")]
    assert names == ["vCPU 0", "UART"]
    assert {e["args"]["device"] for e in events(trace, cat="exit") if "port" in e["args"]} == {
        "UART"
    }


def test_nothing_looks_at_memory_unless_it_is_asked_for(accel, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("the dirty log was started")

    monkeypatch.setattr("vmexit.accel.kvm.vm.KvmVm.start_dirty_log", never)
    monkeypatch.setattr("vmexit.accel.soft.engine.SoftVm.start_dirty_log", never)
    with (
        open(tmp_path / "trace", "w") as file,
        Machine("1M", accel, observer=ChromeTrace(file)) as vm,
    ):
        vm.load_bytes(b"\xe6\x10\xf4")
        assert vm.run(timeout=60).reason is StopReason.HALT


def test_a_format_without_a_trace_is_a_mistake():
    done = vmexit("run", GUESTS / "hello.bin", "--trace-format", "chrome")
    assert (done.status, done.out) == (2, "")
    assert done.err == (
        "vmexit: --trace-format says how to write a trace; give --trace FILE, too\n"
    )


def test_a_trace_that_cannot_be_written_is_one_line():
    done = vmexit("run", GUESTS / "counter.bin", "--trace", "/dev/full", "--trace-format", "chrome")
    assert done.status == 4
    assert "cannot write /dev/full: No space left on device" in done.err
    assert "Traceback" not in done.err
