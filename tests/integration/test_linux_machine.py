"""What Debian's kernel says of the machine it is in, and which machines it can be in."""

import signal
import time

import pytest
from command import assert_one_line, vmexit
from kernels import busybox_initrd, debian_kernel
from linux_guest import Guest

pytestmark = [pytest.mark.linux, pytest.mark.timeout(200)]

# There is no PCI, which the kernel finds fatal, and no machine check architecture.
KNOWN = (
    "PCI: Fatal: No config space access function found",
    "PCI: System does not support PCI",
    "mce: Unable to init MCE device (rc: -5)",
)
SOAK = pytest.mark.soak


def boot(append: str = "", *more: str, flavour: str = "cloud-amd64") -> Guest:
    guest = Guest(debian_kernel(flavour), busybox_initrd(), append, *more)
    guest.boot()
    return guest


def interrupts(guest: Guest) -> dict[str, list[int]]:
    """By what stands first in the lines of /proc/interrupts, the counts of the CPUs."""
    found = {}
    for line in guest.run("cat /proc/interrupts").splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name.strip()] = [int(word) for word in rest.split() if word.isdigit()]
    return found


@pytest.mark.parametrize("flavour", ["cloud-amd64", pytest.param("amd64", marks=SOAK)])
def test_the_kernel_warns_of_nothing(flavour):
    with boot("quiet", flavour=flavour) as guest:
        said = guest.run("dmesg -r | grep '^<[0-4]>'").splitlines()
        assert [line for line in said if not line.endswith(KNOWN)] == []


def test_interrupts_arrive_where_and_as_often_as_they_should():
    with boot("quiet") as guest:
        before = interrupts(guest)
        alarm = "/sys/class/rtc/rtc0/wakealarm"
        guest.run(f"echo +2 > {alarm}; seq 500; sleep 4")
        after = interrupts(guest)
        assert after["4"][0] - before["4"][0] >= 30  # the console, 16 bytes at a time
        assert after["8"][0] - before["8"][0] == 1  # the alarm
        assert 4 <= after["LOC"][0] - before["LOC"][0] < 4 * 300
        assert [after[name] for name in ("SPU", "ERR", "MIS")] == [[0], [0], [0]]


def test_processors_go_off_and_on_again_and_each_takes_work():
    with boot("quiet", "--smp", "2") as guest:
        where = "taskset -c {} sh -c 'cut -d\" \" -f39 /proc/self/stat'"
        assert [guest.run(where.format(cpu)) for cpu in (0, 1)] == ["0", "1"]
        online = "/sys/devices/system/cpu/cpu1/online"
        for _ in range(3):
            assert guest.run(f"echo 0 > {online}; nproc") == "1"
            assert guest.run(f"echo 1 > {online}; nproc") == "2"
        assert guest.run(where.format(1)) == "1"
        counts = interrupts(guest)
        assert all(n > 0 for name in ("LOC", "RES", "CAL") for n in counts[name])


def test_a_panic_on_two_processors_resets_the_machine():
    with boot("quiet panic=-1", "--smp", "2") as guest:
        guest.type("echo c > /proc/sysrq-trigger\n")
        assert guest.status() == 0
        assert b"Kernel panic" in guest.output


@pytest.mark.parametrize("smp", [pytest.param("1", marks=SOAK), "2"])
def test_a_guest_that_stays_in_its_panic_is_ended_by_ctrl_c(smp):
    with boot("quiet", "--smp", smp) as guest:
        guest.type("echo c > /proc/sysrq-trigger\n")
        guest.expect(b"end Kernel panic")
        time.sleep(0.5)
        began = time.monotonic()
        guest.process.send_signal(signal.SIGINT)
        assert guest.status() == 130
        assert time.monotonic() - began < 2


@SOAK
def test_both_clocks_of_the_machine_go_alike():
    with boot("quiet") as guest:
        folder = "/sys/devices/system/clocksource/clocksource0"
        assert guest.run(f"cat {folder}/available_clocksource") == "tsc acpi_pm "
        for source in ("acpi_pm", "tsc"):
            guest.run(f"echo {source} > {folder}/current_clocksource")
            assert guest.run(f"cat {folder}/current_clocksource") == source
            began, clock = time.monotonic(), float(guest.run("cut -d' ' -f1 /proc/uptime"))
            guest.run("sleep 2")
            went = float(guest.run("cut -d' ' -f1 /proc/uptime")) - clock
            assert abs(time.monotonic() - began - went) < 0.5
        assert abs(int(guest.run('date +%s -d "$(hwclock -u -r | cut -c5-24)"')) - time.time()) < 5


@pytest.mark.parametrize(
    ("memory", "least"),
    [pytest.param("96M", 50, marks=SOAK), pytest.param("3G", 2900, marks=SOAK), ("5G", 4800)],
)
def test_memory_of_any_size_is_there(memory, least):
    with boot("quiet", "--memory", memory) as guest:
        found = int(guest.run("grep MemTotal /proc/meminfo | tr -dc 0-9"))
        assert least << 10 < found < 5 << 20


def test_memory_that_is_too_small_for_the_kernel_is_refused_with_what_it_needs():
    kernel, initrd = debian_kernel("cloud-amd64"), busybox_initrd()
    run = ("run", "--accel", "soft", "--kernel", kernel, "--initrd", initrd)
    done = vmexit(*run, "--memory", "16M")
    assert_one_line(done, 2, "segment of the kernel", "use --memory ", "M or more")
    needed = done.err.partition("--memory ")[2].split("M")[0]
    done = vmexit(*run, "--memory", f"{needed}M", "--timeout", "1", "--append", "console=ttyS0")
    if done.status == 2:  # and then the initrd
        assert_one_line(done, 2, "the initrd", "use --memory ")
    else:
        assert done.status == 124, done


def test_a_command_line_and_an_initrd_that_cannot_be(tmp_path):
    kernel = debian_kernel("cloud-amd64")
    run = ("run", "--accel", "soft", "--kernel", kernel)
    done = vmexit(*run, "--append", "x" * 3000)
    assert_one_line(done, 2, "3000 bytes", "2047", "shorter --append")
    done = vmexit(*run, "--initrd", tmp_path / "nothing")
    assert_one_line(done, 2, "nothing", "No such file")
    large = tmp_path / "large"
    large.write_bytes(b"")
    large.open("r+b").truncate(200 << 20)
    done = vmexit(*run, "--initrd", large, "--memory", "256M")
    assert_one_line(done, 2, "initrd", "use --memory")


def test_an_initrd_that_is_none_is_the_kernels_to_complain_of(tmp_path):
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"no archive" * 1000)
    with Guest(debian_kernel("cloud-amd64"), garbage, "panic=-1") as guest:
        assert guest.status() == 0
        assert b"Initramfs unpacking failed" in guest.output
        assert b"Kernel panic" in guest.output
