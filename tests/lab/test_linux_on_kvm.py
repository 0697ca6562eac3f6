"""Debian's stock kernels on KVM, in the lab: vCPUs, interrupts, clock, idling, endings."""

import os
import re
import time
from pathlib import Path

import pytest
from kernels import busybox_initrd, debian_kernel, vmlinux
from linux_guest import Guest
from marks import linux_in_lab

pytestmark = linux_in_lab

COMPLAINTS = re.compile(r"WARNING:|BUG:|Oops|unchecked MSR|nobody cared|Spurious|lockup|stall")


def boot(append="quiet", smp=1, flavour="cloud-amd64", form="bzImage", accel="kvm") -> Guest:
    kernel = debian_kernel(flavour) if form == "bzImage" else vmlinux(flavour)
    return Guest(kernel, busybox_initrd(), append, "--smp", str(smp), accel=accel)


def check(smp: int, flavour: str, form: str) -> None:
    with boot(smp=smp, flavour=flavour, form=form) as guest:
        log = guest.boot()
        assert not COMPLAINTS.search(log), log
        assert guest.run("nproc") == str(smp)
        assert guest.run("grep -c ^processor /proc/cpuinfo") == str(smp)
        guest.type("poweroff\n")
        assert guest.status() == 0


@pytest.mark.parametrize(
    ("smp", "flavour", "form"),
    [
        (1, "cloud-amd64", "bzImage"),
        (2, "cloud-amd64", "vmlinux"),
        (4, "cloud-amd64", "bzImage"),
        (2, "amd64", "bzImage"),
    ],
)
def test_stock_kernels_boot_to_a_shell(smp, flavour, form):
    check(smp, flavour, form)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("smp", [1, 2, 4])
def test_20_boots_of_20_succeed(smp):
    kernels = [(f, form) for f in ("cloud-amd64", "amd64") for form in ("bzImage", "vmlinux")]
    for flavour, form in kernels * 5:
        check(smp, flavour, form)


@pytest.fixture(scope="module")
def pair():
    """A guest on two vCPUs that several tests look at."""
    with boot(smp=2) as guest:
        guest.boot()
        yield guest


def test_interrupts_reach_both_vcpus(pair):
    """Timer, reschedule and call interrupts; the serial port's, which is level or edge by ACPI."""
    pair.run("taskset 1 true; taskset 2 true; sleep 1")
    lines = pair.run("cat /proc/interrupts").splitlines()
    counts = {line.split()[0]: line.split()[1:3] for line in lines[1:]}
    for name in ("LOC:", "CAL:"):
        assert all(int(number) > 0 for number in counts[name]), lines
    serial = [line for line in lines if "ttyS0" in line]
    assert serial and "IO-APIC" in serial[0], lines
    assert counts["ERR:"][0] == "0"


def test_the_clock_is_kvms_and_goes_right(pair):
    assert pair.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") in (
        "kvm-clock",
        "tsc",
    )
    begin = time.monotonic()
    assert pair.run("sleep 5; echo slept") == "slept"
    assert 4.5 < time.monotonic() - begin < 15
    assert abs(int(pair.run("date +%s")) - time.time()) < 3


def test_an_idle_guest_leaves_the_processor_alone(pair):
    def used() -> float:
        fields = Path(f"/proc/{pair.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    pair.run("true")
    time.sleep(3)  # what its last command has left to do
    before, begin = used(), time.monotonic()
    time.sleep(10)
    assert used() - before < 0.03 * (time.monotonic() - begin)


def test_work_on_both_vcpus_gives_right_results(pair):
    script = "head -c 300000 /dev/zero | sha256sum"
    one = pair.run(script)
    both = pair.run(f"(taskset 1 sh -c '{script}' & taskset 2 sh -c '{script}'; wait)")
    assert one.split()[0] == "886715e4051e827f4fe215df3053af3f85ad0d352db2c829c7487af6d78efe30"
    assert [line.split()[0] for line in both.splitlines()] == [one.split()[0]] * 2


@pytest.mark.parametrize("smp", [1, 2])
def test_reboot_ends_with_status_0(smp):
    with boot(smp=smp) as guest:
        guest.boot()
        guest.type("reboot\n")
        assert guest.status() == 0


def test_a_panic_that_is_to_reboot_ends():
    with boot("quiet panic=-1") as guest:
        guest.boot()
        guest.type("echo c > /proc/sysrq-trigger\n")
        assert guest.status() == 0
        assert b"Kernel panic" in guest.output
