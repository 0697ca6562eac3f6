"""The command's words: options, what they mean, and how others spell them."""

import argparse
import math
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from vmexit.core.errors import shown

_DESCRIPTION = "A virtual machine monitor for x86-64: on KVM, or on an embedded software CPU."

_RUN_EPILOG = """\
examples:
  vmexit run guests/hello.bin                        a flat image: loaded at 0, started at 0x1000
  vmexit run boot.bin --load-address 0x7c00 --entry 0:0x7c00        a boot sector
  vmexit run kernel.bin --mode long --log-exits      start in 64-bit mode, one line an exit
  vmexit run --kernel vmlinuz --initrd initrd.gz --append console=ttyS0          Linux
  vmexit run --firmware bios-microvm.bin --debugcon 0x402 --timeout 10

exit status:
  0 the guest halted, powered off or reset; (value << 1) | 1 for a value written to the
  debug-exit port; 2 bad arguments, configuration or image; 3 the guest crashed (as for the
  value 1, so use others); 4 this host cannot run it; 124 --timeout ran out; 130 interrupted
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Finds the width out by itself: argparse would load `shutil` for it at every start."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size(1).columns
        except (OSError, ValueError):
            columns = 80
        super().__init__(prog, width=max(columns, 20) - 2)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        """One line, as for every other error."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What `words` ask for: `command` is the name of the command, or empty, and `parser` tells of
    all. Exits with status 2 and one line for what is not understood.
    """
    parser = _parser()
    _check_spelling(parser, words)
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        where = f"vmexit {words[0]}" if not words[0].startswith("-") else "vmexit"
        parser.exit(2, f"{where}: there is no {shown(unknown[0])}; see {where} --help\n")
    return arguments


# How QEMU's users say it. It has to be looked at first: -hda would be taken for -h.
_OF_QEMU = {
    "-drive": "--drive file=PATH", "-hda": "--drive file=PATH", "-hdb": "--drive file=PATH",
    "--disk": "--drive file=PATH", "-cdrom": "--drive file=PATH,readonly=on",
    "-snapshot": "--drive file=PATH,snapshot=on", "-nic": "--net user", "-netdev": "--net user",
    "-net": "--net user", "-virtfs": "--share TAG=DIR", "-fsdev": "--share TAG=DIR",
    "-kernel": "--kernel", "-initrd": "--initrd", "-append": "--append", "-smp": "--smp",
    "-cpu": "--cpu", "-accel": "--accel", "-enable-kvm": "--accel kvm", "-serial": "--serial",
    "-bios": "--firmware", "-device": "--drive, --net, --share, --rng, --console or --balloon",
    "-nographic": "nothing: there is no screen", "-debugcon": "--debugcon", "-M": "--machine",
    "-machine": "--machine", "-chardev": "--console", "-display": "nothing: there is no screen",
    "-qmp": "--qmp", "-S": "--paused", "-name": "--name", "-action": "--action",
    "-no-shutdown": "--action shutdown=pause", "-no-reboot": "nothing: a reboot ends it anyway",
    "-monitor": "--qmp, and human-monitor-command",
}  # fmt: skip


def _check_spelling(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    for word in words if words[:1] == ["run"] else ():
        if word in _OF_QEMU:
            parser.exit(2, f"vmexit run: there is no {word}; use {_OF_QEMU[word]}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vmexit", description=_DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(command="", parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_run(commands)
    doctor = commands.add_parser("doctor", help="tell whether this host can run guests, and how")
    doctor.add_argument(
        "--cpuid", action="store_true",
        help="show what processor a guest gets, by accelerator, and what it has not of this one",
    )  # fmt: skip
    doctor.set_defaults(command="doctor")
    inspect = commands.add_parser(
        "inspect", help="tell what an image is, and show its first instructions"
    )
    inspect.add_argument("image", metavar="IMAGE", help="the file to look at")
    _add_start(inspect)
    inspect.set_defaults(command="inspect")
    _add_fetch(commands)
    _add_symbols(commands)
    _add_report(commands)
    _add_top(commands)
    _add_snapshot(commands)
    return parser


def _add_fetch(commands: "argparse._SubParsersAction[_Parser]") -> None:
    fetch = commands.add_parser(
        "fetch",
        help="fetch a kernel, and make an initial RAM disk with a shell",
        description="Fetch a distribution's kernel into the cache, make an initial RAM disk of "
        "busybox for it, and print where they are. Needs apt, but not root.",
        epilog="example:\n  vmexit fetch debian --modules virtio_blk,ext4 --output build/debian\n",
    )
    fetch.add_argument("distribution", choices=("debian",), help="whose kernel")
    fetch.add_argument(
        "--flavour", choices=("cloud-amd64", "amd64"), default="cloud-amd64",
        help="which of its kernels (default cloud-amd64: the smaller one, for virtual machines)",
    )  # fmt: skip
    fetch.add_argument(
        "--modules", metavar="M,…", default="",
        help="kernel modules that the RAM disk loads, with those that they need",
    )  # fmt: skip
    fetch.add_argument(
        "--output", metavar="DIR", help="also put them into DIR, as vmlinuz and initrd.gz"
    )
    fetch.set_defaults(command="fetch")


def _add_symbols(commands: "argparse._SubParsersAction[_Parser]") -> None:
    symbols = commands.add_parser(
        "symbols",
        help="show the symbols of a kernel, or give it a symbol table for gdb",
        description="Print the symbols of a kernel as a System.map. They come from its symbol "
        "table, or from what Linux carries for itself, so a distribution's vmlinuz will do.",
        epilog="examples:\n"
        "  vmexit symbols vmlinuz | grep ' start_kernel$'\n"
        "  vmexit symbols vmlinuz --output vmlinux.elf && gdb vmlinux.elf\n",
    )
    symbols.add_argument(
        "kernel", metavar="KERNEL", help="vmlinuz, vmlinux, another ELF file, or a System.map"
    )
    symbols.add_argument(
        "-o", "--output", metavar="FILE",
        help="write the unpacked kernel with a symbol table to FILE, and print nothing",
    )  # fmt: skip
    symbols.set_defaults(command="symbols")


def _add_top(commands: "argparse._SubParsersAction[_Parser]") -> None:
    top = commands.add_parser(
        "top",
        help="watch a running machine: exits, vCPUs, devices and memory",
        description="Show what a running machine does, second by second, in a terminal: exits by "
        "reason and address, where vCPUs spend their time, devices and memory. The machine needs "
        "--qmp, and for exits and vCPUs --stats. q or Ctrl-C quits.",
        epilog="examples:\n"
        "  vmexit run --kernel vmlinuz … --stats --qmp unix:vm.sock      in another terminal\n"
        "  vmexit top vm.sock\n"
        "  vmexit top vm.sock --once --interval 5\n",
    )
    top.add_argument(
        "machine", metavar="QMP-SOCKET", help="what --qmp says: unix:PATH, tcp:HOST:PORT, or a PATH"
    )
    top.add_argument(
        "--interval", metavar="SECONDS", type=_seconds, default=1.0,
        help="how often to look (default 1)",
    )  # fmt: skip
    top.add_argument(
        "--once", action="store_true",
        help="print the table of one interval, and end; for scripts",
    )  # fmt: skip
    top.set_defaults(command="top")


def _add_snapshot(commands: "argparse._SubParsersAction[_Parser]") -> None:
    snapshot = commands.add_parser(
        "snapshot",
        help="save a running machine into a folder, to go on from there",
        description="Save all of a machine that runs with --qmp: memory, processors, devices.\n"
        "It stands still for a moment, and runs on while the folder is written. Nothing is left\n"
        "of a snapshot that fails, or that Ctrl-C ends.",
        epilog="examples:\n"
        "  vmexit run --kernel vmlinuz … --qmp unix:vm.sock\n"
        "  vmexit snapshot vm.sock booted               in another terminal; then, at any time:\n"
        "  vmexit run --restore booted\n"
        "  vmexit snapshot vm.sock moved --pause && cp -a --sparse=always moved /mnt/elsewhere\n",
    )
    snapshot.add_argument(
        "machine", metavar="QMP-SOCKET",
        help="what its --qmp says: unix:PATH, tcp:HOST:PORT, or a PATH",
    )  # fmt: skip
    snapshot.add_argument(
        "folder", metavar="DIR", help="the folder to make, on the host where the machine runs"
    )
    snapshot.add_argument(
        "--pause", action="store_true",
        help="leave the machine paused; it goes on by QMP's cont (default: it goes on if it ran)",
    )  # fmt: skip
    snapshot.set_defaults(command="snapshot")


def _add_report(commands: "argparse._SubParsersAction[_Parser]") -> None:
    report = commands.add_parser(
        "report",
        help="make an HTML page of a trace",
        description="Show what a trace says as one HTML page: exits over time, the hottest "
        "ports\nand addresses, and, of --trace-format chrome, where the time went, and memory.",
        epilog="example:\n  vmexit run guests/hello.bin --trace t.json --trace-format chrome\n"
        "  vmexit report t.json -o report.html\n",
    )
    report.add_argument("trace", metavar="TRACE", help="what vmexit run --trace has written")
    report.add_argument(
        "-o", "--output", metavar="FILE", default="report.html",
        help="the page (default report.html); it needs no other file and no network",
    )  # fmt: skip
    report.set_defaults(command="report")


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load-address", metavar="A", type=_number, default=None,
        help="guest physical address that a flat image is loaded at (default 0x0)",
    )  # fmt: skip
    parser.add_argument(
        "--entry", metavar="[CS:]A", type=_entry, default=(None, None),
        help="address of a flat image's first instruction (default 0x1000); in real mode it is "
        "the CS base, with IP 0, or give both: 0:0x7c00",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=("real", "protected", "long"), default="real",
        help="CPU mode that a flat image starts in (default real); protected: flat 4 GiB "
        "segments; long: ring 0, identity-mapped with 2 MiB pages",
    )  # fmt: skip


def _add_run(commands: "argparse._SubParsersAction[_Parser]") -> None:
    run = commands.add_parser(
        "run",
        help="run a guest",
        description="Run a kernel, a firmware ROM or a flat image until it halts.",
        epilog=_RUN_EPILOG,
    )
    run.add_argument("image", metavar="IMAGE", nargs="?", help="a flat image: code, no header")
    run.add_argument(
        "--kernel", metavar="F",
        help="a Linux kernel (vmlinuz, vmlinux), a multiboot 1 kernel, or another ELF file with a "
        "PVH entry; implies --machine microvm",
    )  # fmt: skip
    run.add_argument(
        "--initrd", metavar="F",
        help="the kernel's initial RAM disk; of a multiboot kernel the modules: 'F ARGS,F'",
    )  # fmt: skip
    run.add_argument("--append", metavar="S", default="", help="the kernel's command line")
    run.add_argument(
        "--protocol", choices=("auto", "pvh", "elf", "64", "32", "16"), default="auto",
        help="how to enter the kernel (default auto: the fastest that it offers)",
    )  # fmt: skip
    run.add_argument(
        "--accel", choices=("auto", "kvm", "soft"), default="auto",
        help="what executes the guest (default auto: kvm where it is usable, else soft)",
    )  # fmt: skip
    run.add_argument(
        "--machine", choices=("bare", "microvm"), default=None,
        help="the board. bare: no interrupt controller, so HLT ends the run; microvm: a PC without "
        "PCI (default: microvm for --kernel, else bare)",
    )  # fmt: skip
    run.add_argument(
        "-m", "--memory", metavar="SIZE", default="128M",
        help="guest RAM: 134217728, 128M, 1G (default 128M)",
    )  # fmt: skip
    run.add_argument(
        "--cpu", metavar="MODEL", default="host",
        help="host or max, which both are all that the accelerator has, with ,+feature or "
        ",-feature: host,-avx (see vmexit doctor --cpuid)",
    )  # fmt: skip
    run.add_argument(
        "--device", metavar="NAME", action="append", default=[],
        help="one more device: pvpanic, by which a guest tells that it panics: the run ends with "
        "status 3 (Linux: module pvpanic_mmio); vmgenid, which tells it that it is a copy, when it "
        "goes on from a snapshot; testdev, which test suites for KVM look for",
    )  # fmt: skip
    run.add_argument(
        "--drive", metavar="file=P", action="append", default=[],
        help="a disk, /dev/vda in Linux, the next one /dev/vdb: a raw image or a block device; "
        ",readonly=on keeps it as it is; ,serial=S gives it a serial number; ,snapshot=on forgets "
        "what the guest writes, ,overlay=FILE keeps it in FILE; ,direct=on goes past the host's "
        "page cache; ,queues=N; limits a second ,iops=100 ,bps=10M",
    )  # fmt: skip
    run.add_argument(
        "--net", metavar="user|tap=NAME", action="append", default=[],
        help="a network interface. user: out by the host's sockets, with no privileges (passt), "
        "and in by ,hostfwd=tcp:127.0.0.1:8080-:80; tap=NAME: an interface of the host, made if it "
        "is not there, with ,address=10.0.0.1/24 or ,bridge=br0; both with ,mac= ,mtu= and limits "
        "a second ,bps=10M ,pps=1000",
    )  # fmt: skip
    run.add_argument(
        "--share", metavar="TAG=DIR", action="append", default=[],
        help="a folder that Linux mounts: mount -t 9p -o trans=virtio TAG /mnt; ,readonly=on "
        "refuses changes; ,virtiofsd=PROGRAM has that serve it (mount -t virtiofs TAG /mnt)",
    )  # fmt: skip
    run.add_argument("--rng", action="store_true", help="a source of entropy, /dev/hwrng in Linux")
    run.add_argument(
        "--balloon", metavar="SIZE",
        help="a memory balloon, which takes SIZE (0 or 64M) from the guest, and gives back to the "
        "host what the guest does not use",
    )  # fmt: skip
    run.add_argument(
        "--vsock", metavar="cid=N,path=P",
        help="sockets between guest and host: a client of the Unix socket P that sends 'CONNECT "
        "PORT' reaches the guest's port, and the guest (CID N, default 3) reaches P_PORT at CID 2",
    )  # fmt: skip
    run.add_argument("--smp", metavar="N", type=_count, default=1, help="vCPUs (default 1)")
    _add_start(run)
    run.add_argument(
        "--firmware", metavar="F",
        help="a ROM: mapped read-only so that it ends at 4 GiB, its last 128 KiB below 1 MiB, "
        "too; the vCPU starts at the reset vector. With --kernel it boots that, by fw_cfg",
    )  # fmt: skip
    run.add_argument(
        "--serial", metavar="WHERE",
        help="a UART at port 0x3f8: stdio (default), null (with --console stdio), file:PATH, "
        "unix:PATH, tcp:HOST:PORT, pty",
    )  # fmt: skip
    run.add_argument(
        "--console", metavar="WHERE", action="append", default=[],
        help="a virtio console, hvc0 in Linux, the next one hvc1; WHERE as for --serial; with "
        ",name=NAME a plain port, /dev/virtio-ports/NAME",
    )  # fmt: skip
    run.add_argument(
        "--debugcon", metavar="PORT[=FILE]", type=_port_and_file,
        help="a debug console at PORT, written to FILE or standard output; firmware logs to 0x402",
    )  # fmt: skip
    run.add_argument(
        "--debug-exit", metavar="PORT", type=_port_or_none, default=0xF4,
        help="a write to PORT ends the run with status (value << 1) | 1 (default 0xf4; none: "
        "no such port)",
    )  # fmt: skip
    run.add_argument(
        "--restore", metavar="DIR",
        help="go on from what vmexit snapshot has saved, or a program (Snapshot.save), in place of "
        "an IMAGE; only with options about the host: --serial, --console, --drive, --net, --share, "
        "--vsock, and those below",
    )  # fmt: skip
    run.add_argument(
        "--catch-up", action="store_true",
        help="with --restore: the time since the snapshot has passed for the guest, too",
    )  # fmt: skip
    run.add_argument(
        "--symbols", metavar="F",
        help="names for addresses in the report of a crash: from an ELF file, a System.map, or a "
        "Linux kernel, which carries its own (default: from a --kernel that is an ELF file)",
    )  # fmt: skip
    run.add_argument(
        "--gdb", metavar="WHERE",
        help="wait for gdb at tcp:127.0.0.1:1234 or unix:PATH (in gdb: target remote :1234), the "
        "guest running meanwhile; ,arch=i386 or i8086 for a guest of 32 or 16 bits",
    )  # fmt: skip
    run.add_argument(
        "--metrics", metavar="WHERE",
        help="numbers of the running machine for Prometheus, at unix:PATH or tcp:127.0.0.1:9100: "
        "GET /metrics; exits are among them only with --stats, too, which costs",
    )  # fmt: skip
    run.add_argument("--log-exits", action="store_true", help="one line an exit on stderr")
    run.add_argument("--trace", metavar="F", help="write one JSON object an exit, one a line, to F")
    run.add_argument(
        "--trace-format", choices=("json", "chrome"), default="json",
        help="of --trace. json: those lines (default); chrome: how long each exit took, by vCPU "
        "and device, and which memory is written, for https://ui.perfetto.dev and vmexit report",
    )  # fmt: skip
    run.add_argument(
        "--stats", action="store_true",
        help="at the end a table of exits by reason and address, with their time on the host, and "
        "how much of its time each vCPU was in the guest",
    )  # fmt: skip
    run.add_argument(
        "--qmp", metavar="WHERE", action="append", default=[],
        help="let other programs steer the machine by QEMU's machine protocol (qmp-shell PATH): "
        "listen at unix:PATH or tcp:127.0.0.1:PORT, or with ,server=off connect to it. Who reaches "
        "it may do with the machine what you may",
    )  # fmt: skip
    run.add_argument("--name", metavar="NAME", default="", help="what QMP tells its clients")
    run.add_argument(
        "--paused", action="store_true",
        help="begin paused: nothing runs until somebody says so, by --gdb or --qmp",
    )  # fmt: skip
    run.add_argument(
        "--action", metavar="EVENT=WHAT", action="append", default=[],
        help="what comes after the guest's end: shutdown=, reboot= (default for the two: exit) and "
        "panic=, for any crash, each exit, pause (for --qmp to look at it) or reset (begin again)",
    )  # fmt: skip
    run.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, help="end the run after so long, status 124"
    )
    run.set_defaults(command="run")


def _number(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no address; use 4096 or 0x1000")
    return value


def _entry(text: str) -> tuple[int | None, int | None]:
    """The address, and CS if it is given."""
    segment, colon, offset = text.rpartition(":")
    if not colon:
        return _number(text), None
    cs = _number(segment)
    return (cs << 4) + _number(offset), cs


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number; use 1, 2, 4")
    return int(text)


def _port(text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 0xFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; use 0 to 0xffff")
    return value


def _port_or_none(text: str) -> int | None:
    return None if text == "none" else _port(text)


def _port_and_file(text: str) -> tuple[int, str]:
    port, equals, path = text.partition("=")
    if equals and not path:
        raise argparse.ArgumentTypeError(f"{text!r} names no file; use PORT or PORT=FILE")
    return _port(port), path


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; use a number of seconds above 0")
    return value
