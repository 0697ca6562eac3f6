"""A machine as it was at some moment: to go back to it, to clone it, to keep it in a folder."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from vmexit.core.disk_image import DiskImage
from vmexit.core.errors import ConfigError, VmexitError
from vmexit.core.memory_image import MemoryImage
from vmexit.core.threads import Workers
from vmexit.core.trace import ExitObserver
from vmexit.machine.builder import Parts, Restored
from vmexit.machine.config import MachineConfig
from vmexit.machine.loaded import Loaded
from vmexit.machine.machine_state import (
    MachineState,
    check,
    check_again,
    for_a_clone,
    put,
    require_own_disks,
    take,
)

if TYPE_CHECKING:
    from vmexit.machine.machine import Machine


# Told by `save()` how many bytes of how many are done. What it raises ends the saving.
Progress = Callable[[int, int], None]


def _tell_nobody(_done: int, _total: int) -> None:
    pass


class Contents(NamedTuple):
    """What a snapshot is made of; `taken` is when, in seconds since 1970."""

    config: MachineConfig
    state: MachineState
    memory: MemoryImage
    disks: dict[str, DiskImage]
    loaded: Loaded
    taken: float


class Snapshot:
    """Made by `Machine.snapshot()` or `Snapshot.load()`. It never changes.

    It holds descriptors until `close()`, which `with` calls; clones live on.
    """

    def __init__(self, contents: Contents) -> None:
        """It owns the descriptors in `contents`."""
        self._contents = contents
        self._usual: MachineConfig | None = None  # of a clone with which nothing was asked for
        self._closed = False
        self.workers = Workers(keep=True)
        """The threads of its clones: the next one has those of one that was closed."""

    @classmethod
    def capture(cls, config: MachineConfig, parts: Parts, loaded: Loaded) -> "Snapshot":
        """Of a machine none of whose vCPUs runs. Raises ConfigError, HostError."""
        state = take(parts)
        with ExitStack() as stack:
            disks = {}
            for name, overlay in parts.overlays.items():
                disks[name] = overlay.capture()
                stack.callback(disks[name].close)
            memory = parts.memory.capture()
            stack.pop_all()
        return cls(Contents(config, state, memory, disks, loaded, time.time()))

    @property
    def config(self) -> MachineConfig:
        """That of the machine."""
        return self._contents.config

    @property
    def taken(self) -> float:
        """When it was made, in seconds since 1970."""
        return self._contents.taken

    @property
    def loaded(self) -> Loaded:
        """What `Machine.load_bytes()` had put into it."""
        return self._contents.loaded

    @property
    def accel(self) -> str:
        """The accelerator that it can be restored on, `kvm` or `soft`."""
        return self._contents.state.accel

    def clone(
        self,
        *,
        serial: str = "null",
        consoles: Sequence[str] | None = None,
        drives: Sequence[str] | None = None,
        nets: Sequence[str] | None = None,
        shares: Sequence[str] | None = None,
        vsock: str | None = None,
        observer: ExitObserver | None = None,
        catch_up: bool = False,
    ) -> "Machine":
        """A new machine, paused where that one was; memory is shared until one of them writes.

        With `catch_up` the time since the snapshot was made has passed for the guest, too: its
        clocks show the time, and timers that would have been due are. Without, it has not.
        Its serial port and consoles lead nowhere unless told. The rest is as for `Machine`, and as
        it was by default; what the guest would have to itself wants another end here. Callbacks of
        `on_pio` and `on_mmio` are not part of a snapshot. Raises ConfigError for a disk that the
        guest writes to, unless it has snapshot=on or `drives` are given; else what a machine does.
        """
        from vmexit.machine.machine import Machine

        self.require_open()
        usual = serial == "null" and not any(
            end is not None for end in (consoles, drives, nets, shares, vsock)
        )
        config = self._usual if usual else None
        if config is None:
            if drives is None:
                require_own_disks(self.config)
            config = for_a_clone(
                self.config,
                self.accel,
                serial=serial,
                consoles=consoles,
                drives=drives,
                nets=nets,
                shares=shares,
                vsock=vsock,
            )
            if usual:
                self._usual = config
        ago = max(0, int((time.time() - self.taken) * 1e9)) if catch_up else 0
        return Machine.from_snapshot(self, config, observer, ago)

    def require_such(self, parts: Parts) -> None:
        """Raises ConfigError unless a machine of these parts could go on from here."""
        self.require_open()
        check(parts, self._contents.state)
        parts.memory.require_layout(self._contents.memory)
        for name, disk in self._contents.disks.items():
            if name not in parts.overlays and any(disk.blocks):
                raise ConfigError(
                    f"the snapshot has what the guest had written to {name}; use snapshot=on for it"
                )

    def require_still_such(self, parts: Parts) -> None:
        """As `require_such()`, for a machine of which it did not raise before."""
        self.require_open()
        check_again(parts, self._contents.state)

    def put_into(self, parts: Parts, ago: int = 0) -> None:
        """Have a machine of such parts, which does not run, go on from here, or so many ns later.

        Raises ConfigError, HostError; the machine is half of another one then.
        """
        parts.rewind.to(self._contents.memory)
        for name, overlay in parts.overlays.items():
            if name in self._contents.disks:
                overlay.restore(self._contents.disks[name])
            else:
                overlay.forget()
        put(parts, self._contents.state, ago)

    @property
    def restored(self) -> Restored:
        """What is to be known of it before a machine is made."""
        return Restored(self._contents.state.devices.keys(), self._contents.memory)

    def save(
        self,
        path: str | os.PathLike[str],
        progress: Progress = _tell_nobody,
        *,
        parent: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write all of it into a new folder at `path`, which appears whole or not at all.

        With `parent`, another such folder, only those pages of memory that differ from its: to
        load this one takes both, with the same way from one to the other.
        `progress(done, total)` is told in bytes. Raises ConfigError if something is there already,
        HostError if it cannot be written, VmexitErrors of `progress`; nothing is left then.
        """
        from vmexit.machine.snapshot_file import write

        self.require_open()
        below = None if parent is None else os.fspath(parent)
        write(os.fspath(path), self._contents, progress, below)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Snapshot":
        """What `save()` wrote, by this version of vmexit. Raises ConfigError."""
        from vmexit.machine.snapshot_file import read

        return cls(read(os.fspath(path)))

    def require_open(self) -> None:
        """Raises VmexitError once it is closed."""
        if self._closed:
            raise VmexitError("this snapshot is closed; make a new one")

    def close(self) -> None:
        """Free what it holds."""
        if not self._closed:
            self._closed = True
            self._contents.memory.close()
            for disk in self._contents.disks.values():
                disk.close()
            self.workers.close()  # last: a signal's handler may end the waiting

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
