"""A shell as a function: on a machine that boots, on clones of it, on the software CPU or KVM."""

import pytest
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, SECONDS

from vmexit import Machine, RunState, StopReason
from vmexit.machine.terminal import ConsoleError

pytestmark = [pytest.mark.linux, pytest.mark.usefixtures("nothing_left")]

FLAVOUR = "cloud-amd64"


@pytest.mark.parametrize("where", ["serial", "virtio"])
def test_commands_on_a_machine_and_its_clones(where):
    virtio = where == "virtio"
    modules = ("virtio_console",) if virtio else ()
    console = {"serial": None, "consoles": ["null"]} if virtio else {"serial": "null"}
    with Machine(
        "256M", ACCEL, kernel=debian_kernel(FLAVOUR), initrd=initrd_with(FLAVOUR, *modules),
        append=f"console={'hvc0' if virtio else 'ttyS0'} quiet", **console,
    ) as vm:  # fmt: skip
        vm.console.expect("/root # ", SECONDS)
        assert vm.shell("uname -s", SECONDS) == "Linux"
        assert vm.shell("seq 3; echo; echo end", SECONDS) == "1\n2\n3\n\nend"
        assert vm.shell("true") == ""
        with pytest.raises(
            ConsoleError, match="'ls /none' ended with status 1: ls: /none: No such"
        ):
            vm.shell("ls /none", SECONDS)
        vm.shell("echo before >/tmp/a", SECONDS)
        assert vm.state is RunState.PAUSED
        with vm.snapshot() as snap:
            for n in range(3):
                with snap.clone() as twin:
                    assert twin.shell(f"cat /tmp/a; echo {n} >>/tmp/a", SECONDS) == "before"
            vm.shell("echo more >>/tmp/a", SECONDS)
            vm.reset_to(snap)
            assert vm.shell("cat /tmp/a", SECONDS) == "before"
        vm.console.send("poweroff -f\n")
        assert vm.run(SECONDS).reason is StopReason.POWEROFF


def test_a_copy_renews_its_entropy_when_it_is_told():
    with Machine(
        "256M", ACCEL, kernel=debian_kernel("amd64"), initrd=initrd_with("amd64"),
        append="console=ttyS0 quiet", serial="null", devices=("vmgenid",),
    ) as vm:  # fmt: skip
        vm.console.expect("/root # ", SECONDS)
        fork = "dmesg | grep -c 'virtual machine fork' || true"
        assert vm.shell("ls /sys/bus/acpi/drivers/vmgenid | grep -c VMXT", SECONDS) == "1"
        with vm.snapshot() as snap, snap.clone() as twin:
            assert twin.shell(fork, SECONDS) == "0"
            twin.renew_generation()
            assert twin.shell(fork, SECONDS) == "1"
            assert twin.shell("dmesg | grep 'virtual machine fork'", SECONDS).endswith("fork")
