"""`vmexit run --restore DIR`: a machine that goes on from a snapshot, with ends on this host."""

import argparse
from typing import TYPE_CHECKING

from vmexit.arguments import parse
from vmexit.core.errors import ConfigError, shown
from vmexit.core.trace import ExitObserver
from vmexit.machine.snapshot import Snapshot

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine

# What the machine is, which the snapshot says.
_OF_THE_MACHINE = (
    "image", "kernel", "initrd", "append", "protocol", "machine", "memory", "cpu", "device", "rng",
    "balloon", "smp", "load_address", "entry", "mode", "firmware", "debugcon", "debug_exit",
    "symbols",
)  # fmt: skip


def restore(arguments: argparse.Namespace, observer: ExitObserver | None) -> "Machine":
    """Raises ConfigError for options that do not go with it, and for what is no snapshot."""
    usual = parse(["run"])
    for name in _OF_THE_MACHINE:
        if getattr(arguments, name) != getattr(usual, name):
            option = "an IMAGE" if name == "image" else "--" + name.replace("_", "-")
            raise ConfigError(f"the snapshot says what the machine is; leave out {option}")
    with Snapshot.load(arguments.restore) as snapshot:
        if arguments.accel not in ("auto", snapshot.accel):
            raise ConfigError(
                f"the snapshot {shown(arguments.restore)} is of a machine on {snapshot.accel}; "
                f"use --accel {snapshot.accel}"
            )
        vm = snapshot.clone(
            serial=arguments.serial,
            consoles=arguments.console or None,
            drives=arguments.drive or None,
            nets=arguments.net or None,
            shares=arguments.share or None,
            vsock=arguments.vsock,
            observer=observer,
            catch_up=arguments.catch_up,
        )
        if "vmgenid" in vm.config.devices:  # there may be any number of it
            vm.renew_generation()
        return vm
