"""The KVM lab: the tool itself, on this machine; and in it, vmexit on Linux's own kvm_amd."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from marks import IN_LAB, in_lab

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/kvm-lab"

lab_tool = pytest.mark.lab_tool


class Done(NamedTuple):
    status: int
    out: str
    err: str


def run(command: list[str | Path], **more) -> Done:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110, **more
    )
    return Done(done.returncode, done.stdout, done.stderr)


def lab(*arguments: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Done:
    return run([sys.executable, TOOL, *arguments], env=env, cwd=cwd)


def children(pid: int) -> set[int]:
    """The processes that `pid` has started and that have not ended."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(status.parent.name))
    return found


@pytest.fixture(scope="module", autouse=True)
def fetched() -> None:
    """The kernel is in the cache, so that no test waits for it, and none sees the message."""
    if IN_LAB:
        return
    done = lab("--", "true")
    if "install it: " in done.err or "Debian's kernel is needed" in done.err:
        pytest.skip(done.err.strip())
    assert done.status == 0, done


@lab_tool
def test_output_and_status_are_those_of_the_command():
    script = "printf 'a\\tb\\n'; echo wrong >&2; printf é; seq 30000 | tail -1; exit 3"
    assert lab("--", "sh", "-c", script) == (3, "a\tb\né30000\n", "wrong\n")


@lab_tool
def test_a_signal_that_ends_the_command_is_128_and_its_number():
    assert lab("--", "sh", "-c", "kill -TERM $$") == (128 + signal.SIGTERM, "", "")


@lab_tool
def test_a_command_that_is_not_there():
    done = lab("--", "no-such-command")
    assert (done.status, done.out) == (127, "")
    assert "no-such-command" in done.err


@lab_tool
def test_what_the_command_finds(tmp_path):
    """Folder, environment, arguments, standard input, devices, date, processors."""
    script = (
        'pwd; echo "$HOME|$VMEXIT_IN_LAB|$VMEXIT_SOME|$OTHER|$MORE|$1"; wc -c; nproc; '
        "test -c /dev/kvm && test -d /proc/self && test -w /dev/shm && : >/dev/ptmx && date +%s"
    )
    env = {**os.environ, "VMEXIT_SOME": "it's one", "OTHER": "2"}
    began = int(time.time())
    done = lab(
        "--smp", "2", "--", "MORE=3", "sh", "-c", script, "-", "$a 'b'", env=env, cwd=tmp_path
    )
    assert done.status == 0, done
    *lines, date = done.out.splitlines()
    assert lines == [str(tmp_path), f"{env['HOME']}|1|it's one||3|$a 'b'", "0", "2"]
    assert began <= int(date) <= time.time() + 1  # its clock has whole seconds to begin with


@lab_tool
def test_only_the_folder_for_results_keeps_what_was_written(tmp_path):
    lost, results = tmp_path / "lost", tmp_path / "some results"
    script = f"echo 1 >{lost} && cat {lost} && echo 2 >'{results}/kept'"
    assert lab("--results", results, "--", "sh", "-c", script) == (0, "1\n", "")
    assert not lost.exists()
    assert (results / "kept").read_text() == "2\n"


@lab_tool
def test_a_process_that_the_command_leaves_behind_does_not_hold_the_lab():
    assert lab("--", "sh", "-c", "sleep 1000 & echo ready") == (0, "ready\n", "")


@lab_tool
def test_time_is_limited():
    done = lab("--timeout", "0.5", "--", "sleep", "1000")
    assert (done.status, done.out) == (124, "")
    assert done.err.startswith("kvm-lab: ") and "--timeout" in done.err


@lab_tool
def test_a_processor_without_svm_is_an_error_in_one_line():
    done = lab("--cpu", "qemu64,-svm", "--", "true")
    assert (done.status, done.out) == (125, "")
    assert done.err.startswith("kvm-lab: ") and "/dev/kvm" in done.err
    assert done.err.count("\n") == 1


@lab_tool
def test_a_missing_program_is_an_error_that_names_its_package(tmp_path):
    done = lab("--", "true", env={**os.environ, "PATH": str(tmp_path)})
    assert done == (
        125,
        "",
        "kvm-lab: there is no qemu-system-x86_64; install it: apt-get install qemu-system-x86\n",
    )


@lab_tool
def test_without_apt_there_is_no_kernel(tmp_path):
    (tmp_path / "qemu-system-x86_64").symlink_to("/bin/true")
    env = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = lab("--", "true", env=env)
    assert (done.status, done.out) == (125, "")
    assert done.err == "kvm-lab: there is no apt-get; install it: apt-get install apt\n"


@lab_tool
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_lab_that_a_signal_ends(number, tmp_path):
    command = [sys.executable, TOOL, "--", "sh", "-c", "echo ready; exec sleep 1000"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=env) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            (qemu,) = children(process.pid)
            process.send_signal(number)
            status = process.wait(20)
        finally:
            process.kill()
    assert status == (-number if number is signal.SIGKILL else 128 + number)
    until = time.monotonic() + 10
    while (left := Path(f"/proc/{qemu}").exists()) and time.monotonic() < until:
        time.sleep(0.05)
    if left:
        os.kill(qemu, signal.SIGKILL)
    assert not left
    assert list(tmp_path.iterdir()) == []


@lab_tool
def test_two_labs_at_once():
    command = [sys.executable, TOOL, "--", "sh", "-c", "echo ready; exit 5"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as one,
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as other,
    ):
        for process in (one, other):
            assert process.communicate(timeout=100)[0] == b"ready\n"
            assert process.returncode == 5


def vmexit(*arguments: str | Path) -> Done:
    return run([sys.executable, "-m", "vmexit", *arguments])


@in_lab
@pytest.mark.kvm
def test_doctor_finds_kvm_usable():
    done = vmexit("doctor")
    assert done.status == 0, done
    assert "[ok] kvm: /dev/kvm opens" in done.out
    assert "[ok] kvm: module kvm_amd" in done.out


# Those that need nothing but a processor and the serial port, and end by themselves.
@in_lab
@pytest.mark.kvm
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("counter", "real"),
        ("debug-exit", "real"),
        ("hello", "real"),
        ("long-hello", "long"),
        ("mmio", "protected"),
        ("mmio64", "long"),
        ("modes", "real"),
        ("protected-hello", "protected"),
        ("strings", "real"),
        ("triple-fault", "protected"),
    ],
)
def test_a_guest_does_the_same_on_kvm_and_on_the_software_cpu(name, mode):
    image = ROOT / f"guests/{name}.bin"
    kvm, soft = (
        vmexit("run", image, "--mode", mode, "--accel", accel, "--timeout", "60")
        for accel in ("kvm", "soft")
    )
    assert (kvm.status, kvm.out) == (soft.status, soft.out)
    # A crash is told; its registers, AMD's KVM has reset by then.
    assert bool(kvm.err) == bool(soft.err)
