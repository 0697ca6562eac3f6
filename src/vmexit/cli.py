"""The command: arguments → MachineConfig → Machine."""

import argparse
import gc
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from vmexit.arguments import parse
from vmexit.backends.wait import PATIENCE, never, write_all
from vmexit.core.errors import ConfigError, HostError, VmexitError, shown

if TYPE_CHECKING:
    from vmexit.control.qmp import QmpServer
    from vmexit.core.chrome_trace import ChromeTrace
    from vmexit.core.exit_stats import ExitStats
    from vmexit.core.trace import ExitObserver
    from vmexit.machine.config import MachineConfig
    from vmexit.machine.machine import Machine

_SOON = 1.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    # Until the guest runs, what is made stays: looking for garbage costs, and finds none.
    collects = gc.isenabled()
    gc.disable()
    _open_standard_descriptors()
    arguments = parse(sys.argv[1:] if argv is None else list(argv))
    end = _End()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Not what nohup and shells have others ignore.
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end)
    try:
        status = _COMMANDS[arguments.command](arguments)
    except VmexitError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return 128 + signal.SIGPIPE  # `vmexit run … | head`: quietly, as any filter
        _say(str(error))
        return error.exit_status
    except OSError as error:
        _say(f"{error}; this was not foreseen")
        return HostError.exit_status
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    finally:
        if collects:
            gc.enable()
        gc.freeze()  # or the interpreter's last collection would look through all of it
    return status


def _print(text: str) -> None:
    """For standard output. Raises HostError if it cannot be written."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain as it ends
        raise HostError(
            f"cannot write standard output: {error.strerror}; send it elsewhere"
        ) from error


def _open_standard_descriptors() -> None:
    """Where a standard descriptor is closed, what is opened next would take its place."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - print() would take stdout instead
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be anything


class _End:
    """Ends in order when a signal comes: files are written out, sockets removed.

    A second one soon after could break that in the middle, so it counts as the first. A later one
    is for what hangs.
    """

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if now - self._last < _SOON:
            return
        self._last = now
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def _say(text: str) -> None:
    _write_error(f"vmexit: {text}")


def _write_error(text: str) -> None:
    with suppress(OSError):  # the status tells, at least
        print(text, file=sys.stderr, flush=True)


def _version_or_help(arguments: argparse.Namespace) -> int:
    if arguments.version:
        from vmexit import __version__

        _print(f"vmexit {__version__}")
        return 0
    arguments.parser.print_help()
    return 2


def _run(arguments: argparse.Namespace) -> int:
    from vmexit.machine.machine import Machine

    if arguments.serial is None:
        taken = any(text.partition(",")[0] == "stdio" for text in arguments.console)
        arguments.serial = "null" if taken else "stdio"
    with ExitStack() as stack:
        stats = None
        if arguments.stats:
            from vmexit.core.exit_stats import ExitStats

            stats = ExitStats()
        config = None if arguments.restore is not None else _config(arguments)
        observer, outputs, chrome = _observer(arguments, stats, stack)
        if config is None:
            from vmexit.restore import restore

            vm = stack.enter_context(restore(arguments, observer))
        else:
            vm = stack.enter_context(Machine.from_config(config, observer))
        for output in outputs:
            output.start(lambda: vm.stopping)
        if chrome is not None:
            vm.begin_trace(chrome)
        if arguments.action:
            from vmexit.machine.actions import Actions

            vm.decide(Actions.parse(arguments.action).decide)
        if arguments.paused:
            vm.pause()
        served = _serve(arguments, vm, stats, stack)
        if arguments.accel == "auto" and config is not None:
            _say(f"accelerator {vm.accel}: {vm.accel_reason}")
        if vm.serial_where:
            _say(f"serial port at {vm.serial_where}")
        for text, where in zip(vm.config.consoles, vm.console_where, strict=True):
            if where:
                _say(f"{_console(text)} at {where}")
        if _is_mute(arguments):
            _say("without --append console=ttyS0 Linux says nothing on the serial port")
        gc.enable()
        try:
            stop = vm.run(arguments.timeout)
        finally:
            for server in served:
                server.tell_end()
            if stats is not None:
                _write_error(stats.table())
        if arguments.kernel is not None and vm.without_driver:
            names = ", ".join(vm.without_driver)
            _say(f"the guest had no driver for {names}; see vmexit fetch debian --modules")
        if stop.crashed:
            _say(f"{stop.summary()}\n{stop.dump}")
        elif stop.status == 124:
            _say(f"timeout: the guest still ran after {arguments.timeout:g} s")
        return stop.status & 0xFF


def _config(arguments: argparse.Namespace) -> "MachineConfig":
    from vmexit.arch.x86.layout import FLAT_ENTRY, FLAT_LOAD_ADDRESS
    from vmexit.machine.config import MachineConfig, parse_size

    if arguments.catch_up:
        raise ConfigError("--catch-up is about a snapshot; give one with --restore DIR")
    if arguments.image is None and arguments.firmware is None and arguments.kernel is None:
        raise ConfigError(
            "nothing to run; give an IMAGE, --kernel F or --firmware F, or --restore DIR"
        )
    entry, segment = arguments.entry
    other = "firmware knows" if arguments.firmware is not None else "a kernel knows"
    if (arguments.firmware is not None or arguments.kernel is not None) and (
        arguments.load_address is not None or entry is not None or arguments.mode != "real"
    ):
        raise ConfigError(f"{other} where it starts; leave out --load-address, --entry and --mode")
    return MachineConfig(
        memory=parse_size(arguments.memory),
        accel=arguments.accel,
        image=arguments.image,
        load_address=_or(arguments.load_address, FLAT_LOAD_ADDRESS),
        entry=_or(entry, FLAT_ENTRY),
        segment=segment,
        mode=arguments.mode,
        firmware=arguments.firmware,
        serial=arguments.serial,
        debugcon=arguments.debugcon,
        debug_exit=arguments.debug_exit,
        machine=arguments.machine or ("microvm" if arguments.kernel is not None else "bare"),
        smp=arguments.smp,
        kernel=arguments.kernel,
        initrd=arguments.initrd,
        append=arguments.append,
        protocol=arguments.protocol,
        cpu=arguments.cpu,
        devices=tuple(arguments.device),
        drives=tuple(arguments.drive),
        nets=tuple(arguments.net),
        shares=tuple(arguments.share),
        rng=arguments.rng,
        balloon=None if arguments.balloon is None else parse_size(arguments.balloon),
        vsock=arguments.vsock,
        consoles=tuple(arguments.console),
        symbols=arguments.symbols,
    )


def _serve(
    arguments: argparse.Namespace, vm: "Machine", stats: "ExitStats | None", stack: ExitStack
) -> "list[QmpServer]":
    """Who steers the machine, and looks at it, from outside, from now until all is closed."""
    if arguments.paused and not arguments.qmp and arguments.gdb is None:
        raise ConfigError("--paused waits for somebody who lets it run; give --qmp or --gdb, too")
    if arguments.metrics is not None:
        from vmexit.control.metrics import MetricsServer

        _say(f"metrics at {stack.enter_context(MetricsServer(vm, arguments.metrics, stats)).where}")
    served = []
    for address in arguments.qmp:
        from vmexit.control.qmp import QmpServer

        server = stack.enter_context(QmpServer(vm, address, name=arguments.name, exits=stats))
        if address.startswith("tcp:"):
            _say(f"QMP at {server.where}")
        served.append(server)
    if arguments.gdb is not None:
        from vmexit.control.gdb import GdbServer

        _say(f"gdb at {stack.enter_context(GdbServer(vm, arguments.gdb)).where}")
    return served


def _console(text: str) -> str:
    from vmexit.machine.console import ConsoleOptions

    name = ConsoleOptions.parse(text).name
    return f"port {shown(name)}" if name else "console"


def _is_mute(arguments: argparse.Namespace) -> bool:
    """Whether it is Linux that runs, and nobody will see anything of it."""
    if arguments.kernel is None or arguments.serial == "null":
        return False
    from vmexit.boot.image import detect

    with open(arguments.kernel, "rb") as file:
        kind = detect(file.read(4096))
    return kind.name == "bzimage" and not any(
        option in arguments.append for option in ("console=", "earlyprintk=", "earlycon")
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _observer(
    arguments: argparse.Namespace, stats: "ExitStats | None", stack: ExitStack
) -> "tuple[ExitObserver | None, list[_Output], ChromeTrace | None]":
    """Who is told of exits, where they write, and who of them wants to know of the machine."""
    from vmexit.core.trace import JsonTrace, Tee, TextLog

    observers: list[ExitObserver] = []
    outputs: list[_Output] = []
    chrome = None
    if arguments.trace is None and arguments.trace_format != "json":
        raise ConfigError("--trace-format says how to write a trace; give --trace FILE, too")
    if arguments.trace is not None:
        for path in (arguments.image, arguments.firmware, arguments.kernel, arguments.initrd):
            if path is not None and _same(path, arguments.trace):
                raise ConfigError(f"--trace {shown(path)} is what is to run; use another file")
        outputs.append(stack.enter_context(_Output.to_file(arguments.trace)))
        if arguments.trace_format == "chrome":
            from vmexit.core.chrome_trace import ChromeTrace

            chrome = ChromeTrace(outputs[-1])
            stack.callback(chrome.close)  # once the machine is closed, and the file is not
            observers.append(chrome)
        else:
            observers.append(JsonTrace(outputs[-1]))
    if arguments.log_exits:
        outputs.append(stack.enter_context(_Output(2, "standard error", 1)))
        observers.append(TextLog(outputs[-1]))
    if stats is not None:
        observers.append(stats)
    if len(observers) == 1:
        return observers[0], outputs, chrome
    return (Tee(observers) if observers else None), outputs, chrome


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samestat(os.stat(one), os.stat(other))  # noqa: PTH116
    except (OSError, ValueError):
        return False


class _Output:
    """Where exits are written: a trace, or standard error. Text waits until there is a lot of it.

    A reader that does not read is waited for, but not beyond the end of the run: `ending()`.
    """

    def __init__(self, fd: int, name: str, piece: int, *, replaces: bool = False) -> None:
        self._fd = fd
        self._replaces = replaces
        self._name = name
        self._piece = piece  # so many characters are written at once
        self._text: list[str] = []
        self._size = 0
        self.ending: Callable[[], bool] = never
        self._lock = threading.RLock()  # several vCPUs write

    @classmethod
    def to_file(cls, path: str) -> "_Output":
        """Raises ConfigError if it cannot be made."""
        from vmexit.backends.files import open_output

        descriptor, replaces = open_output(path)
        return cls(descriptor, path, 1 << 15, replaces=replaces)

    def start(self, ending: Callable[[], bool]) -> None:
        """The run begins: only now is what the file had before given up."""
        self.ending = ending
        if self._replaces:
            with suppress(OSError):  # EINVAL: a pipe has no length
                os.ftruncate(self._fd, 0)

    def write(self, text: str) -> None:
        with self._lock:
            self._text.append(text)
            self._size += len(text)
            if self._size >= self._piece:
                self.flush(math.inf)

    def flush(self, patience: float) -> None:
        """Write what there is. Raises HostError if that fails."""
        with self._lock:
            data = "".join(self._text).encode("utf-8", "backslashreplace")
            self._text.clear()
            self._size = 0
            try:
                write_all(self._fd, data, patience, self.ending)
            except OSError as error:
                raise HostError(
                    f"cannot write {shown(self._name)}: {error.strerror}; use another path"
                ) from error

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *exc: object) -> None:
        self.ending = never
        try:
            self.flush(PATIENCE)
        finally:
            if self._fd > 2:  # not a standard one
                os.close(self._fd)


def _fetch(arguments: argparse.Namespace) -> int:
    from vmexit.fetch.debian import fetch

    modules = [name for part in arguments.modules.split(",") if (name := part.strip())]
    with _progress() as progress:
        found = fetch(arguments.flavour, modules, progress)
    if arguments.output is not None:
        found = found.copied_to(arguments.output)
    _print(f"kernel {found.kernel}\ninitrd {found.initrd}")
    _say(
        f"run it: vmexit run --kernel {_quoted(found.kernel)} "
        f"--initrd {_quoted(found.initrd)} --append 'console=ttyS0 panic=-1'"
    )
    return 0


def _quoted(path: object) -> str:
    import shlex

    return shlex.quote(str(path))


@contextmanager
def _progress(*, quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A bar on standard error if it is a terminal, else a line for each new thing, or nothing."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda text, done: bar.update(task, description=text, completed=done)
        return
    last = ""

    def tell(text: str, _done: float) -> None:
        nonlocal last
        if text != last and not quiet:
            _say(text)
            last = text

    yield tell


def _doctor(arguments: argparse.Namespace) -> int:
    from vmexit.doctor import examine, examine_cpuid

    if arguments.cpuid:
        for line in examine_cpuid():
            _print(line)
        return 0

    usable = False
    for finding in examine():
        _print(finding.line())
        usable |= finding.accelerator and finding.ok
    return 0 if usable else 4


def _inspect(arguments: argparse.Namespace) -> int:
    from vmexit.inspect import describe

    address, segment = arguments.entry
    _print(describe(arguments.image, arguments.load_address, address, segment, arguments.mode))
    return 0


def _symbols(arguments: argparse.Namespace) -> int:
    from vmexit.boot.symbols import load_symbols, system_map, with_symbols

    if arguments.output is None:
        _print(system_map(load_symbols(arguments.kernel)))
        return 0
    if _same(arguments.kernel, arguments.output):
        raise ConfigError(f"--output {shown(arguments.output)} is the kernel; use another file")
    _write(arguments.output, with_symbols(arguments.kernel))
    return 0


def _write(path: str, data: bytes) -> None:
    """Make the file at `path`. Raises HostError if it cannot be written."""
    try:
        with open(path, "wb") as file:
            file.write(data)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        why = error.strerror if isinstance(error, OSError) else error
        raise HostError(f"cannot write {shown(path)}: {why}; use another path") from error


def _report(arguments: argparse.Namespace) -> int:
    from vmexit.report.write import write_report

    exits = write_report(arguments.trace, arguments.output).exits
    _print(f"{exits} exits: {shown(arguments.output)}")
    return 0


def _top(arguments: argparse.Namespace) -> int:
    from vmexit import top
    from vmexit.control.qmp_client import GoneError

    if not arguments.once:
        if said := top.watch(arguments.machine, arguments.interval):
            _say(said)
        return 0
    try:
        _print(top.once(arguments.machine, arguments.interval))
    except GoneError as error:
        _say(str(error))
    return 0


def _snapshot(arguments: argparse.Namespace) -> int:
    from vmexit.save import save

    with _progress(quiet=True) as progress:
        path = save(arguments.machine, arguments.folder, progress, pause=arguments.pause)
    _print(shown(path))
    _say(f"go on from there: vmexit run --restore {_quoted(path)}")
    return 0


_COMMANDS = {
    "": _version_or_help,
    "run": _run,
    "doctor": _doctor,
    "inspect": _inspect,
    "fetch": _fetch,
    "symbols": _symbols,
    "report": _report,
    "top": _top,
    "snapshot": _snapshot,
}
