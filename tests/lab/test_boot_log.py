"""What Debian's kernel says of the machine: the same on either CPU, and no worse than on QEMU.

The software CPU would need minutes in the lab. So its log comes from a file that `make test-lab`
records outside, by running this module as a program: `test_boot_log.py FILE`.
"""

import difflib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels import busybox_initrd, debian_kernel
from linux_guest import Guest
from marks import linux_in_lab

pytestmark = linux_in_lab

SOFT_LOG = Path(__file__).parents[2] / "build" / "soft-boot.log"
QEMU = "qemu-system-x86_64"
MEMORY = "256M"
EVERYTHING = "loglevel=8"

# The two may differ in these lines, and in no others.
MAY_DIFFER = re.compile(
    "|".join(
        (
            # Clocks, timers and what is measured with them. KVM has a clock of its own.
            r"^(clocksource|kvm-clock|tsc|sched_clock|hrtimer):|^Calibrating delay loop",
            r"^TSC deadline timer|setting system clock to",
            # The hypervisor which CPUID names: the software CPU has none.
            r"^Hypervisor detected:|^kvm-guest:|^Booting paravirtualized kernel on",
            # The processor: its name, features and their mitigations, counters, caches.
            r"^smpboot: CPU0:|^x86/cpu:|^process: using AMD|^Disabled fast string|^intel_pstate:",
            r"^Spectre |^Performance Events:|^Last level .TLB|^Using GB pages|1\.00 GiB page",
            # XSAVE, and the room that a signal needs for it.
            r"^x86/fpu:|^signal: max sigframe size",
            # The interrupt controller's newer mode.
            r"x2apic",
            # MTRR and PAT: KVM's MTRRs begin blank.
            r"MTRRs|^x86/PAT:",
        )
    )
)

# Other threads of the kernel say these, whenever they get to it: they are to come, but anywhere.
ANYWHERE = re.compile(
    r"^Trying to unpack rootfs|^Freeing initrd memory|^audit: type=2000|^random: crng init done"
)

# The lab's processor, which is QEMU's, contradicts itself on the size of what XSAVE stores: the
# kernel warns once, with everything that it knows, on any VMM.
LABS_WARNING = re.compile(
    r"^-+\[ cut here \]-+\nXSAVE consistency problem(?s:.*?)^---\[ end trace \w+ \]---\n"
    r"(^CPUID\[0d, ..\].*\n)*",
    re.MULTILINE,
)

# What is wrong in the log: by its level, or by what it says. Not that a clock was read late, which
# the lab's load decides.
WRONG = "'^<[0-4]>|WARNING|BUG|[Ee]rror|[Ff]ailed'"
LATE = re.compile(r"^clocksource: .*(delay|skew)|^hrtimer: interrupt took")


class QemuGuest(Guest):
    """The same guest on QEMU's microvm."""

    def __init__(self, kernel: Path, initrd: Path, append: str, smp: int) -> None:
        command = [QEMU, "-M", "microvm,rtc=on", "-accel", "kvm", "-cpu", "host"]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-serial", "stdio", "-m", MEMORY, "-smp", str(smp)]
        command += ["-kernel", str(kernel), "-initrd", str(initrd)]
        self.output = b""
        self.process = subprocess.Popen(
            [*command, "-append", f"console=ttyS0 {append}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )


def boot(accel: str, append: str, smp: int = 1) -> Guest:
    kernel, initrd = debian_kernel("cloud-amd64"), busybox_initrd()
    if accel == QEMU:
        return QemuGuest(kernel, initrd, append, smp)
    return Guest(kernel, initrd, append, "-m", MEMORY, "--smp", str(smp), accel=accel)


def messages(log: str) -> list[str]:
    """The kernel's lines without their times, but for those about the lab's processor."""
    lines = re.findall(r"^(?:<\d+>)?\[ *\d+\.\d+\] (.*)$", log.replace("\r", ""), re.MULTILINE)
    return LABS_WARNING.sub("", "".join(f"{line}\n" for line in lines)).splitlines()


def comparable(log: str) -> tuple[list[str], list[str]]:
    """What the log says in order, and what it says sometime."""
    lines = [line for line in messages(log) if not MAY_DIFFER.search(line)]
    lines = [re.sub(r"audit\([\d.:]+\)", "audit(TIME)", line) for line in lines]
    lines = [re.sub(r"[\d.]+ BogoMIPS", "N BogoMIPS", line) for line in lines]
    return (
        [line for line in lines if not ANYWHERE.search(line)],
        sorted(line for line in lines if ANYWHERE.search(line)),
    )


def difference(one: str, other: str) -> list[str]:
    """Lines that only one of the logs has: `-` and `+` in front, in the order of the logs."""
    found: list[str] = []
    for mine, theirs in zip(comparable(one), comparable(other), strict=True):
        lines = difflib.unified_diff(mine, theirs, n=0, lineterm="")
        found += [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    return found


def soft_log() -> str:
    if not SOFT_LOG.exists():
        pytest.skip(f"no {SOFT_LOG.name}, which make test-lab records outside of the lab")
    return SOFT_LOG.read_text()


def test_kvm_and_the_software_cpu_show_the_kernel_the_same_machine():
    expected = soft_log()
    with boot("kvm", EVERYTHING) as guest:
        log = guest.boot()
    assert len(messages(log)) > 150, log  # it is a whole one
    assert difference(expected, log) == []


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("ttyS0 at I/O 0x3f8 (irq = 4", "ttyS0 at I/O 0x3f8 (irq = 5"),
        ("GSI 0-23", "GSI 0-15"),
        ("BIOS-e820: [mem 0x0000000000100000", "BIOS-e820: [mem 0x0000000000200000"),
        ("registered as rtc0\n", "registered as rtc0\n[    1.000000] rtc_cmos: too much\n"),
        ("Freeing initrd memory: ", "Freeing some memory: "),
    ],
)
def test_a_changed_line_would_be_seen(line, changed):
    log = soft_log()
    assert log.count(line) >= 1
    assert difference(log, log.replace(line, changed, 1))
    assert difference(log.replace(line, changed, 1), log)


def wrong(accel: str, smp: int) -> set[str]:
    """What the kernel has to complain about."""
    with boot(accel, "quiet", smp) as guest:
        guest.boot()
        assert guest.run("nproc") == str(smp)
        lines = messages(guest.run(f"dmesg -r | grep -E {WRONG}") + "\n")
    return {line for line in lines if not LATE.search(line)}


@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"no {QEMU}")
@pytest.mark.parametrize("smp", [1, 2])
def test_the_kernel_complains_of_nothing_that_it_does_not_on_qemu(smp):
    ours, theirs = wrong("kvm", smp), wrong(QEMU, smp)
    print(f"on QEMU only: {sorted(theirs - ours)}; on both: {sorted(ours & theirs)}")
    assert ours - theirs == set()


def main(file: Path) -> None:
    """Record the software CPU's log in `file`; without a kernel there will be none."""
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        guest = boot("soft", EVERYTHING)
    except pytest.skip.Exception as why:
        print(f"no log of the software CPU: {why}", file=sys.stderr)
        return
    with guest:
        file.write_text(guest.boot().replace("\r", ""))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
