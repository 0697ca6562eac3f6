"""A real gdb at Debian's kernel, with the names that it carries itself."""

import re

import pytest
from command import vmexit
from gdb_client import SECONDS, Wire, gdb
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, Guest

from vmexit.boot.symbols import load_symbols

pytestmark = pytest.mark.linux

FLAVOUR = "cloud-amd64"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The kernel with a symbol table, as `vmexit symbols` makes it."""
    path = tmp_path_factory.mktemp("kernel") / "vmlinux.elf"
    assert vmexit("symbols", debian_kernel(FLAVOUR), "-o", path).status == 0
    return path


def boot(where, *more, append="quiet nokaslr"):
    initrd = initrd_with(FLAVOUR)
    options = ("--gdb", f"unix:{where}", *more)
    guest = Guest(debian_kernel(FLAVOUR), initrd, append, *options, accel=ACCEL)
    guest.expect(b"gdb at ")
    return guest


def test_from_start_kernel_to_the_shell(tmp_path, kernel):
    with boot(tmp_path / "gdb", "--paused", append="") as guest:
        said = gdb(
            tmp_path / "gdb",
            "print/x $pc",
            "break start_kernel", "continue", "backtrace",
            "print/x $cr3", "print/x $cr0", "info registers rip",
            "stepi", "stepi", "x/1i $pc",
            "x/s (char*)&linux_banner", "set {char}&linux_banner = 'X'",
            "x/s (char*)&linux_banner",
            "delete", "hbreak kernel_init", "continue", "backtrace 2", "info threads",
            "delete", "detach",
            file=kernel,
        )  # fmt: skip
        assert re.search(r"\nBreakpoint 1, 0xffffffff8\w+ in start_kernel \(\)", said), said
        assert re.search(r"#0 .* in start_kernel \(\)\n#1 .* in secondary_startup_64", said), said
        cr3 = re.search(r"\$2 = (0x\w+)\n\$3 = (0x\w+)\n", said)
        assert cr3 and int(cr3[1], 16) and int(cr3[2], 16) & 0x8000_0001 == 0x8000_0001
        assert "<start_kernel>" in said
        assert '"Linux version' in said and '"Xinux version' in said
        assert re.search(r"Breakpoint 2, .* in kernel_init \(\)\n#0 ", said), said
        assert "vCPU 0 " in said
        assert "Xinux version" in guest.boot()
        guest.power_off()


def test_a_kernel_that_runs(tmp_path, kernel):
    """Attach to a shell that sleeps, stop at what it calls, change it, watch what it writes."""
    with boot(tmp_path / "gdb") as guest:
        guest.boot()
        guest.run("(while true; do cat /proc/version >/tmp/v; sleep 0.2; done) & true")
        said = gdb(
            tmp_path / "gdb",
            "info threads",
            "break version_proc_show", "continue", "backtrace 2",
            "finish",
            "delete", "watch *(long*)&jiffies", "continue", "continue", "backtrace 1",
            "delete", "detach",
            file=kernel,
        )  # fmt: skip
        assert re.search(r"Breakpoint 1, .* in version_proc_show \(\)", said), said
        assert re.search(r"#1 .* in seq_read_iter \(\)", said)
        # Not on each KVM: the lab's processor is emulated, and does not watch for its guests.
        if ACCEL == "soft" or "Could not insert hardware" not in said:
            assert said.count("Hardware watchpoint 2: *(long*)&jiffies") >= 3
            assert re.search(r"#0 .* in (do_timer|tick_\w+) \(\)", said), said
        assert guest.run("echo $((6*7))") == "42"
        guest.power_off()


def test_vcpus_are_threads(tmp_path, kernel):
    with boot(tmp_path / "gdb", "--smp", "2") as guest:
        guest.boot()
        guest.run("(while true; do :; done) & taskset -p 2 $!")
        said = gdb(
            tmp_path / "gdb",
            "info threads", "thread 2", "info registers cs",
            "stepi", "stepi", "thread 1", "break schedule", "continue", "detach",
            file=kernel,
        )  # fmt: skip
        assert "vCPU 0" in said and "vCPU 1" in said
        assert "[Switching to thread 2" in said
        assert re.search(r"Breakpoint 1, .* in schedule \(\)", said), said
        assert guest.run("nproc", SECONDS) == "2"
        guest.power_off()


def test_breakpoints_of_the_guest_itself(tmp_path, kernel):
    """A kprobe is an INT3 of the kernel's: while a debugger has breakpoints, too, it works."""
    table = load_symbols(kernel)
    probed, ours = table.address("version_proc_show"), table.address("panic")
    assert probed and ours
    with boot(tmp_path / "gdb") as guest:
        guest.boot()
        tracing = "/sys/kernel/tracing"
        guest.run(f"mount -t tracefs none {tracing}")
        guest.run(f"echo p:vmexit version_proc_show+5 >{tracing}/kprobe_events")
        with Wire(tmp_path / "gdb") as wire:
            assert wire.ask(b"Z0,%x,1" % ours) == b"OK"
            wire.send(b"vCont;c")
            guest.run(f"echo 1 >{tracing}/events/kprobes/vmexit/enable")
            guest.run("cat /proc/version; cat /proc/version")
            assert guest.run(f"grep -c vmexit: {tracing}/trace") == "2"
            wire.socket.sendall(b"\x03")
            assert wire.receive().startswith(b"T02")
            assert int(wire.ask(b"m%x,1" % ours), 16) != 0xCC
        assert guest.run("dmesg | grep -c Oops") == "0"
        guest.power_off()
