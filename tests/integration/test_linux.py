"""Debian's stock kernels on the software CPU: to a shell, and what the shell can do."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from kernels import busybox_initrd, debian_kernel, vmlinux
from linux_guest import Guest

pytestmark = [pytest.mark.linux, pytest.mark.timeout(300)]

# What a healthy kernel does not say.
COMPLAINTS = ("WARNING:", "BUG:", "Oops", "unchecked MSR", "nobody cared", "Spurious", "lockup")


def boot(kernel=None, append="", *more: str) -> Guest:
    return Guest(kernel or debian_kernel("cloud-amd64"), busybox_initrd(), append, *more)


@pytest.fixture
def guest():
    with boot(None, "quiet") as guest:
        guest.boot()
        yield guest


def processor_time(pid: int) -> float:
    """Seconds that a process has used a processor, in user and in system mode (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check_shell(guest: Guest) -> None:
    log = guest.boot()
    assert "Linux version" in log
    assert not [word for word in COMPLAINTS if word in log]
    assert guest.run("uname -sm") == "Linux x86_64"
    guest.type("poweroff -f\n")
    assert guest.status() == 0


@pytest.mark.parametrize("flavour", ["cloud-amd64", "amd64"])
@pytest.mark.parametrize("form", ["bzImage", "vmlinux"])
def test_stock_kernels_boot_to_a_shell_and_power_off(flavour, form):
    kernel = debian_kernel(flavour) if form == "bzImage" else vmlinux(flavour)
    with boot(kernel) as guest:
        check_shell(guest)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("flavour", ["cloud-amd64", "amd64"])
@pytest.mark.parametrize("form", ["bzImage", "vmlinux"])
def test_20_boots_of_20_succeed(flavour, form):
    kernel = debian_kernel(flavour) if form == "bzImage" else vmlinux(flavour)
    for _ in range(20):
        with boot(kernel) as guest:
            check_shell(guest)


@pytest.mark.parametrize("protocol", ["elf", "64", "32", "16"])
def test_each_boot_protocol_reaches_the_shell(protocol):
    with boot(None, "nokaslr", "--protocol", protocol) as guest:
        check_shell(guest)


def test_reboot_ends_with_status_0(guest):
    guest.type("reboot -f\n")
    assert guest.status() == 0


def test_a_panic_that_is_to_reboot_ends():
    with boot(None, "quiet panic=-1") as guest:
        guest.boot()
        guest.type("echo c > /proc/sysrq-trigger\n")
        assert guest.status() == 0
        assert b"Kernel panic" in guest.output


def test_a_panic_without_an_init_ends():
    with boot(None, "panic=-1 rdinit=/nothing root=/dev/nothing") as guest:
        assert guest.status() == 0
        assert b"Kernel panic" in guest.output


def test_what_a_shell_does(guest):
    size = 3 << 20
    zeros = hashlib.sha256(bytes(size)).hexdigest()
    assert guest.run("dd if=/dev/zero bs=64k count=48 2>/dev/null | sha256sum") == f"{zeros}  -"
    assert guest.run("seq 1 1000 | grep 7 | sort -rn | head -n 2 | tr '\\n' ' '") == "997 987 "
    assert guest.run("i=0; while [ $i -lt 50 ]; do i=$((i+1)); /bin/true; done; echo $i") == "50"
    guest.run("mkdir /www; echo it works > /www/page; httpd -h /www -p 127.0.0.1:80")
    assert guest.run("wget -q -O - http://127.0.0.1/page") == "it works"
    assert guest.run("sleep 1000 & sleep 1; kill $!; wait; echo over") == "over"


def test_time_passes_as_on_the_host(guest):
    assert abs(int(guest.run("date -u +%s")) - time.time()) < 10
    before, began = float(guest.run("cut -d' ' -f1 /proc/uptime")), time.monotonic()
    guest.run("sleep 5")
    after, passed = float(guest.run("cut -d' ' -f1 /proc/uptime")), time.monotonic() - began
    assert abs((after - before) - passed) < 1
    assert passed > 4.9


@pytest.mark.parametrize("cpus", [1, 2])
def test_an_idle_guest_leaves_the_host_alone(cpus):
    with boot(None, "quiet", "--smp", str(cpus)) as guest:
        guest.boot()
        guest.run("sleep 1")
        used, began = processor_time(guest.process.pid), time.monotonic()
        time.sleep(6)
        used, passed = processor_time(guest.process.pid) - used, time.monotonic() - began
        share = used / passed
        assert share < 0.03, f"{share:.1%} of a CPU"


@pytest.mark.parametrize("cpus", [2, 4])
def test_several_processors(cpus):
    with boot(None, "", "--smp", str(cpus)) as guest:
        log = guest.boot()
        assert not [word for word in COMPLAINTS if word in log]
        assert guest.run("nproc") == str(cpus)
        ticks = f"awk '/LOC/ {{ for (i = 2; i < {cpus} + 2; i++) print $i }}' /proc/interrupts"
        work = f"for i in $(seq {2 * cpus}); do seq 200 | sort -n | sha256sum & done; wait"
        before = [int(n) for n in guest.run(ticks).split()]
        sums = guest.run(work + " 2>/dev/null").split("\n")
        expected = hashlib.sha256("".join(f"{i}\n" for i in range(1, 201)).encode()).hexdigest()
        assert [s for s in sums if s.endswith("-")] == [f"{expected}  -"] * 2 * cpus
        after = [int(n) for n in guest.run(ticks).split()]
        assert all(b > a for a, b in zip(before, after, strict=True))
        guest.type("poweroff -f\n")
        assert guest.status() == 0


def test_ctrl_c_at_the_console_interrupts_the_guests_program(guest):
    # Before that program runs, ^C is a key of the shell's line editor, or the shell's own.
    guest.type("sh -c 'echo $((6*6))-asleep; exec sleep 1000'\n")
    guest.expect(b"36-asleep\r")
    guest.type("\x03")
    guest.expect(b"/root # ")
    guest.type("echo status-$?\n")
    guest.expect(b"status-130")


def test_a_long_paste_arrives_whole(guest):
    lines = "".join(f"{i:07d}\n" for i in range(12_500))
    guest.type("stty -echo; cat > /tmp/pasted; stty echo\n")
    guest.expect(b"stty echo")
    guest.type(lines + "\x04")
    expected = hashlib.sha256(lines.encode()).hexdigest()
    guest.expect(b"/root # ")
    assert guest.run("sha256sum < /tmp/pasted") == f"{expected}  -"


@pytest.mark.parametrize(
    "seconds", [20, pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
)
def test_long_work_under_timer_interrupts_is_right(seconds):
    with boot(None, "quiet", "--timeout", str(seconds + 200)) as guest:
        guest.boot()
        work = (
            "cat > /tmp/work <<'X'\n"
            "end=$(($(date +%s)+" + str(seconds) + ")); n=0\n"
            "while [ $(date +%s) -lt $end ]; do\n"
            'a=$(seq 2000 | sort -r | sort -n | sha256sum); [ "${a%% *}" = $1 ] || echo WRONG\n'
            "n=$((n+1)); done; echo rounds $n\n"
            "X\n"
        )
        guest.type(work)
        right = hashlib.sha256("".join(f"{i}\n" for i in range(1, 2001)).encode()).hexdigest()
        said = guest.run(f"sh /tmp/work {right}", seconds + 100)
        assert "WRONG" not in said
        assert int(said.rpartition("rounds ")[2]) > seconds // 10
        log = guest.run("dmesg")
        assert not [word for word in COMPLAINTS if word in log]
