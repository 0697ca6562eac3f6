"""The command line: what it runs, prints, writes, and its exit status."""

import json
import os
import shlex
import signal
import subprocess
import time

import pytest
from command import GUESTS, VMEXIT, vmexit

import vmexit as package
from vmexit import Machine
from vmexit.accel.kvm.probe import why_no_kernels
from vmexit.accel.kvm.system import System
from vmexit.core.steps import COMPILED

HOST_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_guest_prints_on_standard_output_and_nothing_else_is_there(accel):
    done = vmexit("run", "--accel", accel, GUESTS / "hello.bin")
    assert done == (0, "Hello from real mode!\n", "")


def test_auto_says_which_accelerator_it_took_and_why():
    done = vmexit("run", GUESTS / "hello.bin")
    assert done.status == 0
    assert done.err.startswith(("vmexit: accelerator kvm: ", "vmexit: accelerator soft: "))
    assert len(done.err.split(": ")[2]) > 5


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_modes(accel, mode):
    done = vmexit("run", GUESTS / f"{mode}-hello.bin", "--mode", mode, "--accel", accel)
    assert done == (0, f"Hello from {mode} mode!\n", "")


def test_exit_status_of_the_debug_exit_port(accel):
    assert vmexit("run", "--accel", accel, GUESTS / "debug-exit.bin").status == 0x21 << 1 | 1


def test_the_debug_exit_port_can_be_another_or_none(accel, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"\xb0\x05\xe6\xf4\xb0\x07\xe6\xf5\xf4")  # out 0xf4, 5; out 0xf5, 7; hlt
    at = ["--load-address", "0x1000", "--accel", accel]
    assert vmexit("run", image, *at).status == 11
    assert vmexit("run", image, *at, "--debug-exit", "0xf5").status == 15
    assert vmexit("run", image, *at, "--debug-exit", "none").status == 0


def test_a_crash_is_status_3_with_registers_and_the_instruction(accel):
    done = vmexit("run", "--accel", accel, GUESTS / "triple-fault.bin", "--mode", "protected")
    assert done.status == 3
    assert done.out == ""
    assert done.err.startswith("vmexit: vcpu 0: shutdown: triple fault")
    assert "`ud2` (0f 0b)" in done.err or "reset the vCPU" in done.err  # AMD's KVM does that
    for name in ("rax=", "rip=", "rflags=", " cs=", "gdt=", "cr0=", "efer="):
        assert name in done.err
    assert "Traceback" not in done.err


def test_the_timeout_is_status_124(accel):
    done = vmexit("run", "--accel", accel, GUESTS / "endless.bin", "--timeout", "0.2")
    assert done == (124, "", "vmexit: timeout: the guest still ran after 0.2 s\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_twice_ends_in_order_too(accel, number, tmp_path):
    guest, path = GUESTS / "out-loop.bin", tmp_path / "qmp"
    command = ["run", "--accel", accel, guest, "--debugcon", "0x10", "--qmp", f"unix:{path}"]
    for n in range(8):
        with subprocess.Popen(
            [*VMEXIT, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.read(1) == b"\0"  # it runs
            for wait in (0, n / 1000, n / 1000):
                time.sleep(wait)
                process.send_signal(number)
            assert b"Traceback" not in process.stderr.read()
            assert process.wait(60) in (128 + number, -number)  # when it has ended all but itself
        assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_busy_guest_even_if_nobody_reads_its_output(accel, number, tmp_path):
    trace = tmp_path / "trace"
    guest = GUESTS / "out-loop.bin"  # the count at 0x9000 is 0: it writes to a port for ever
    command = ["run", "--accel", accel, guest, "--trace", trace, "--debugcon", "0x10"]
    with subprocess.Popen(
        [*VMEXIT, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1) == b"\0"  # it runs; from here on the pipe fills up
        process.send_signal(number)
        process.wait(60)
        err = process.stderr.read()
    assert process.returncode == 128 + number
    assert err == (b"vmexit: interrupted\n" if number == signal.SIGINT else b"")
    # The trace is whole to its last line.
    assert {json.loads(line)["port"] for line in trace.read_text().splitlines()} == {0x10}


def test_the_timeout_holds_even_if_nobody_reads_the_output(accel):
    guest = GUESTS / "out-loop.bin"
    command = ["run", "--accel", accel, guest, "--debugcon", "0x10", "--timeout", "2"]
    with subprocess.Popen([*VMEXIT, *command], stdout=subprocess.PIPE) as process:
        process.wait(60)
    assert process.returncode == 124


def test_closed_standard_descriptors_are_nothing_to_trip_over(accel):
    for closed in ("<&-", ">&-", "<&- >&- 2>&-"):
        command = " ".join(map(str, [*VMEXIT, "run", "--accel", accel, GUESTS / "hello.bin"]))
        done = subprocess.run(
            ["sh", "-c", f"{command} {closed}"], capture_output=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_trace_has_one_object_an_exit(accel, tmp_path):
    trace = tmp_path / "trace"
    done = vmexit("run", "--accel", accel, GUESTS / "counter.bin", "--trace", trace)
    assert done.status == 0
    exits = [json.loads(line) for line in trace.read_text().splitlines()]
    times = [exit.pop("t") for exit in exits]
    assert times == sorted(times)
    expected = [
        {
            "vcpu": 0, "exit": "io", "dir": "out", "port": 16, "size": 2, "count": 1,
            "data": n.to_bytes(2, "little").hex(),
        }
        for n in range(10)
    ]  # fmt: skip
    assert exits == [*expected, {"vcpu": 0, "exit": "hlt"}]


def test_a_trace_of_mmio(accel, tmp_path):
    trace = tmp_path / "trace"
    vmexit("run", "--accel", accel, GUESTS / "mmio.bin", "--mode", "protected", "--trace", trace)
    first = json.loads(trace.read_text().splitlines()[0])
    assert set(first) == {"t", "vcpu", "exit", "dir", "gpa", "size", "data"}
    assert (first["exit"], first["dir"]) == ("mmio", "write")
    assert first["gpa"] >= 0xD000_0000
    assert len(first["data"]) == 2 * first["size"]


def test_log_exits_and_stats_go_to_standard_error(accel):
    done = vmexit("run", "--accel", accel, GUESTS / "counter.bin", "--log-exits", "--stats")
    assert done.out == ""
    lines = done.err.splitlines()
    assert lines[:10] == [f"vcpu 0: io out port 0x0010 size 2 data {n:02x}00" for n in range(10)]
    assert lines[10] == "vcpu 0: hlt"
    rows, _, vcpus = "\n".join(lines[11:]).partition("\n\n")
    table = [line.split() for line in rows.splitlines()]
    assert ["io", "out", "0x0010/2", "10", "90.9%"] in [row[:5] for row in table]
    assert [row[:2] for row in table][-1] == ["total", "11"]
    assert all(float(time) > 0 for time in table[1][5:])
    assert [line.split()[0] for line in vcpus.splitlines()] == ["vcpu", "0"]


@pytest.mark.parametrize(
    ("options", "shell", "adds"),
    [
        (("--log-exits",), "2>>", "io out port 0x00f4"),
        (("--trace", "/dev/stdout"), ">>", '"exit":"io"'),
        (("--trace", "/dev/fd/5"), "5>>", '"exit":"io"'),
        (("--serial", "file:/dev/stderr"), "2>>", ""),
        (("--debugcon", "0x402=/dev/stdout"), ">>", ""),
    ],
)
def test_what_a_standard_stream_leads_to_is_added_to(accel, tmp_path, options, shell, adds):
    log = tmp_path / "log"
    log.write_text("precious\n")
    command = shlex.join(
        [*VMEXIT, "run", "--accel", accel, str(GUESTS / "debug-exit.bin"), *options]
    )
    done = subprocess.run(["sh", "-c", f"{command} {shell}{log}"], timeout=60, check=False)
    assert done.returncode == 0x21 << 1 | 1
    text = log.read_text()
    assert text.startswith("precious\n") and adds in text and "\0" not in text


def test_the_serial_port_to_a_file_and_to_nowhere(accel, tmp_path):
    log = tmp_path / "log"
    done = vmexit("run", "--accel", accel, GUESTS / "hello.bin", "--serial", f"file:{log}")
    assert (done.out, log.read_text()) == ("", "Hello from real mode!\n")
    done = vmexit("run", "--accel", accel, GUESTS / "hello.bin", "--serial", "null")
    assert done == (0, "", "")


def test_the_guest_reads_standard_input_from_its_serial_port(accel, tmp_path):
    # Echo until a zero byte: l: mov dx,0x3fd; in al,dx; test al,1; jz l; mov dx,0x3f8; in al,dx;
    # test al,al; jz end; out dx,al; jmp l; end: hlt
    code = bytes.fromhex("bafd03eca80174f8baf803ec84c07403eeebedf4")
    image = tmp_path / "echo"
    image.write_bytes(code)
    text = bytes(range(1, 256)) * 20
    done = subprocess.run(
        [*VMEXIT, "run", "--accel", accel, image, "--load-address", "0x1000"],
        input=text + b"\0",
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout == text


def test_the_debug_console_to_standard_output_and_to_a_file(accel, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"\xe4\xe9\xe6\xe9\xf4")  # in al, 0xe9; out 0xe9, al; hlt
    at = ["--load-address", "0x1000", "--accel", accel]
    done = subprocess.run(
        [*VMEXIT, "run", image, *at, "--debugcon", "0xe9"], capture_output=True, check=True
    )
    assert done.stdout == b"\xe9"  # which is also what a read gives
    vmexit("run", image, *at, "--debugcon", f"0xe9={tmp_path / 'log'}")
    assert (tmp_path / "log").read_bytes() == b"\xe9"


def test_a_boot_sector_as_a_bios_starts_it(accel, tmp_path):
    image = tmp_path / "boot"
    # push cs; pop ax; out 0x10, ax; call next (whose return address is linked for 0x7c00)
    code = bytes.fromhex("0e58e710e8000058e710b001e6f4")
    image.write_bytes(code.ljust(510, b"\x90") + b"\x55\xaa")
    done = vmexit(
        "run", image, "--load-address", "0x7c00", "--entry", "0:0x7c00", "--accel", accel,
        "--log-exits",
    )  # fmt: skip
    assert done.status == 3
    assert done.err.count("data 0000") == 1  # CS
    assert done.err.count("data 077c") == 1  # 0x7c07


def test_a_boot_sector_at_0x7c00(accel, tmp_path):
    image = tmp_path / "boot"
    image.write_bytes(b"\xb0\x2a\xe6\xf4".ljust(510, b"\x90") + b"\x55\xaa")
    done = vmexit("run", image, "--load-address", "0x7c00", "--entry", "0x7c00", "--accel", accel)
    assert done.status == 42 << 1 | 1


def test_memory_sizes(accel, tmp_path):
    image = tmp_path / "image"
    # Long mode: write and read back the last 8 bytes of 16 MiB; the tables end there: below them.
    image.write_bytes(bytes.fromhex("48c704250000ff002a000000678a04250000ff00e6f4"))
    for size in ("16M", "16777216", "0x1000000", "16384K"):
        done = vmexit(
            "run", image, "-m", size, "--load-address", "0x1000", "--mode", "long",
            "--accel", accel,
        )  # fmt: skip
        assert done.status == 42 << 1 | 1, size


@pytest.mark.skipif(HOST_MEMORY < 4 << 30, reason="the host has less than 4 GiB of memory")
def test_more_than_3_gib_goes_on_behind_the_hole(accel, tmp_path):
    image = tmp_path / "image"
    # mov rbx, 0x1_0000_0000; mov byte [rbx], 42; mov al, [rbx]; out 0xf4, al
    image.write_bytes(bytes.fromhex("48bb0000000001000000c6032a8a03e6f4"))
    arguments = ["run", image, "--load-address", "0x1000", "--mode", "long", "--accel", accel]
    assert vmexit(*arguments, "-m", "3073M").status == 42 << 1 | 1
    assert vmexit(*arguments, "-m", "3G").status == 3  # nothing is mapped there


def test_output_into_a_closed_pipe_ends_the_command_quietly(accel):
    with subprocess.Popen(
        [*VMEXIT, "run", "--accel", accel, GUESTS / "counter.bin", "--log-exits"],
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        process.stderr.close()
        process.wait(60)
    assert process.returncode == 128 + signal.SIGPIPE


def test_version_help_and_no_arguments():
    assert vmexit("--version") == (0, f"vmexit {package.__version__}\n", "")
    assert "exit status" in vmexit("run", "--help").out
    for command in ("run", "doctor", "inspect"):
        assert vmexit(command, "--help").status == 0
    done = vmexit()
    assert done.status == 2
    assert "usage: vmexit" in done.out + done.err


def test_doctor_reports_both_accelerators():
    done = vmexit("doctor")
    assert done.status == 0
    assert "soft: Unicorn" in done.out
    assert "kvm: " in done.out


def test_doctor_tells_whether_all_is_compiled():
    (line,) = [line for line in vmexit("doctor").out.splitlines() if "compiled" in line]
    assert line.startswith("[ok]" if COMPILED else "[--]")
    assert COMPILED or "python3-dev" in line


@pytest.mark.kvm
def test_doctor_tells_whether_kvm_runs_kernels():
    lines = vmexit("doctor").out.splitlines()
    assert any("KVM_CAP_PIT2" in line for line in lines)
    (line,) = [line for line in lines if "kernels" in line]
    with System() as system:
        runs = not why_no_kernels(system)
    assert line.startswith("[ok]" if runs else "[--]")
    assert runs or "--accel soft" in line


@pytest.mark.kvm
def test_doctor_shows_the_processor_that_a_guest_on_kvm_sees():
    done = vmexit("doctor", "--cpuid")
    assert done.status == 0
    kvm = [line.split() for line in done.out.splitlines() if line.startswith("kvm: ")]
    offered, lacks = kvm[1], kvm[2] if len(kvm) > 2 else []
    assert "ht" not in lacks
    # As the guest of a microvm says it: cpuid leaf 1, ECX bit 20 is SSE4.2.
    with Machine("1M", "kvm", machine="microvm", mode="protected") as vm:
        vm.load_bytes(bytes.fromhex("b801000000 0fa2 b001 e6f4"), at=0x1000)
        vm.run(timeout=30)
        assert ("sse4_2" in offered) == bool(vm.vcpus[0].regs.rcx >> 20 & 1)


def test_inspect_names_what_it_sees_and_how_to_run_it(tmp_path):
    done = vmexit("inspect", GUESTS / "hello.bin")
    assert done.status == 0
    assert "a flat image" in done.out
    assert f"run it with: vmexit run {GUESTS / 'hello.bin'}" in done.out
    assert "0x00001000" in done.out
    boot = tmp_path / "boot"
    boot.write_bytes(b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa")
    done = vmexit("inspect", boot)
    assert "boot sector" in done.out
    assert "--load-address 0x7c00 --entry 0x0:0x7c00" in done.out
    assert "jmp 0x7c00" in done.out


def test_what_inspect_says_about_an_elf_file_can_be_done(tmp_path):
    done = vmexit("inspect", "/bin/true")
    assert (done.status, "a 64-bit ELF file" in done.out) == (0, True)
    assert "a program for an operating system" in done.out
    source, loose, linked = tmp_path / "k.S", tmp_path / "k.o", tmp_path / "k.elf"
    source.write_text(".globl _start\n_start: movb $0x21, %al\noutb %al, $0xf4\n")
    subprocess.run(["as", "-o", loose, source], check=True)
    subprocess.run(["ld", "-Ttext=0x100000", "-o", linked, loose], check=True)
    assert "link it first" in vmexit("inspect", loose).out
    commands = [
        line.partition("with: ")[2].split()
        for line in vmexit("inspect", linked).out.splitlines()
        if " with: " in line
    ]
    assert len(commands) == 2
    subprocess.run(commands[0], check=True)
    assert commands[1][0] == "vmexit"
    assert vmexit(*commands[1][1:]).status == 0x21 << 1 | 1
