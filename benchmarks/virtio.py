"""Rows `virtio`: Linux on our disk and network, against QEMU's; and what a queue costs."""

import ctypes
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from console import MEMORY_SIZE, ended_output
from measure import Row, Unavailable, attempt, differences, interleave, ratios, spread
from native import library, program
from start import QEMU, command

from vmexit.abi import virtio as v
from vmexit.backends.passt import ADDRESS, GATEWAY, MTU, NETMASK
from vmexit.core.errors import VmexitError
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.queue import Chain, Queue
from vmexit.fetch import cpio
from vmexit.fetch.debian import Fetched, fetch

DISK = 64 << 20
PIECE = 128 << 10
TRIES = 6

# What the guest's lines are, with what is to be said of them: name, unit, factor of seconds.
_LINES = {
    "random": ("4 KiB random reads", "us", 1e6),
    "sequential": ("128 KiB sequential reads", "us", 1e6),
    "rtt": ("TCP round trip", "us", 1e6),
    "receive": ("TCP to the guest, per 128 KiB", "us", 1e6),
    "send": ("TCP from the guest, per 128 KiB", "us", 1e6),
}

# Runs in place of a shell.
_SCRIPT = b"""\
ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up
/root/bench
poweroff -f
"""


def rows(quick: bool) -> Iterator[Row]:
    """On the software CPU."""
    yield from attempt("virtio queue", _queue(3 if quick else 21))
    yield from attempt("virtio soft", against_qemu("soft", "tcg", 1 if quick else 5))


# The guests.


def against_qemu(
    accel: str, theirs: str, rounds: int, timeout: float = 60, part: int = 1
) -> Iterator[Row]:
    """Rows for an accelerator of ours, and one of QEMU's; `timeout` seconds for all that one guest
    does. With `part` it does only that fraction of it: 2 is half. Raises Unavailable.
    """
    for tool in (QEMU, "passt"):
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is not installed")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        (folder / "net").mkdir()
        (folder / "net").chmod(0o777)  # where root's passt, which is nobody then, may listen
        disk = folder / "disk"
        disk.write_bytes(os.urandom(DISK))
        files = _files(folder)
        port = stack.enter_context(Server(DISK // part)).port
        append = f"console=ttyS0 quiet bench.port={port} bench.part={part}"
        ours = _ours(accel, files, disk, append)
        sides = (
            lambda: _patiently(lambda: _measure(ours, timeout)),
            lambda: _patiently(lambda: _theirs(theirs, files, disk, append, folder, timeout)),
        )
        for side in sides:
            side()  # the host's page cache, byte code
        mine, other = interleave(rounds, sides)
    for line, (name, unit, factor) in _LINES.items():
        a, b = ([round_[line] * factor for round_ in side] for side in (mine, other))
        ratio = ratios(a, b)
        yield Row(
            f"virtio {accel}, {name}",
            f"`vmexit run --accel {accel}` against `{QEMU} -M microvm -accel {theirs}`, Debian's "
            "cloud kernel: virtio-mmio, a raw file in the page cache, O_DIRECT in the guest, passt",
            rounds,
            f"{spread(a).median:.0f} {unit}",
            f"{spread(b).median:.0f} {unit}",
            ratio.text("x"),
            figures={"vmexit_us": spread(a), "qemu_us": spread(b), "ratio": ratio},
        )


def prepare() -> tuple[Fetched, Path]:
    """Debian's kernel and RAM disk, and our program for a guest. Raises Unavailable."""
    try:
        fetched = fetch("cloud-amd64", ("virtio_blk", "virtio_net"), lambda what, done: None)
    except VmexitError as error:
        raise Unavailable(str(error)) from error
    return fetched, program("virtio_guest", "-static")


def _files(folder: Path) -> Fetched:
    """The kernel, and its RAM disk with our program in it."""
    fetched, bench = prepare()
    ours = [
        cpio.executable("root/bench", bench.read_bytes()),
        cpio.file("etc/shrc", _SCRIPT),
    ]
    initrd = folder / "initrd"
    initrd.write_bytes(fetched.initrd.read_bytes() + cpio.archive(ours))
    return Fetched(fetched.kernel, initrd)


def _ours(accel: str, files: Fetched, disk: Path, append: str) -> list[str]:
    return [
        *command(), "run", "--accel", accel, "-m", MEMORY_SIZE, "--kernel", str(files.kernel),
        "--initrd", str(files.initrd), "--append", append,
        "--drive", f"file={disk},readonly=on", "--net", "user",
    ]  # fmt: skip


def _theirs(
    accel: str, files: Fetched, disk: Path, append: str, folder: Path, timeout: float
) -> dict[str, float]:
    at = folder / "net" / "passt"
    at.unlink(missing_ok=True)
    passt = [
        "passt", "--foreground", "--quiet", "--one-off", "--socket", str(at), "--mtu", str(MTU),
        "--address", ADDRESS, "--netmask", NETMASK, "--gateway", GATEWAY,
    ]  # fmt: skip
    with subprocess.Popen(passt, stderr=subprocess.DEVNULL) as process:
        try:
            while not at.exists():
                if process.poll() is not None:
                    raise Unavailable("passt does not start")
                time.sleep(0.01)
            return _measure(
                [
                    QEMU, *(["-M", "microvm,rtc=on", "-cpu", "host"] if accel == "kvm" else
                            ["-M", "microvm"]), "-accel", accel, "-m", MEMORY_SIZE,
                    "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                    "-serial", "stdio", "-global", "virtio-mmio.force-legacy=false",
                    "-kernel", str(files.kernel), "-initrd", str(files.initrd),
                    "-append", append,
                    "-drive", f"if=none,id=d,format=raw,readonly=on,file={disk}",
                    "-device", "virtio-blk-device,drive=d",
                    "-netdev", f"stream,id=n,server=off,addr.type=unix,addr.path={at}",
                    "-device", f"virtio-net-device,netdev=n,host_mtu={MTU}",
                ],
                timeout,
            )  # fmt: skip
        finally:
            process.terminate()


def _patiently(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """QEMU's guest now and then fails to calibrate its TSC, and hangs: that is repeated."""
    for _ in range(TRIES - 1):
        try:
            return measure()
        except Unavailable as why:
            print(f"again: {why}", file=sys.stderr, flush=True)
    return measure()


def _measure(words: list[str], timeout: float) -> dict[str, float]:
    """Seconds for each of the guest's lines."""
    begin = time.perf_counter()
    said = ended_output(words, b"BENCH done", timeout)
    found = {name: float(value) for name, value in re.findall(r"BENCH (\w+) ([0-9.]+)", said)}
    if missing := set(_LINES) - set(found):
        raise Unavailable(f"{Path(words[0]).name}: no {', '.join(missing)} in {said[-300:]!r}")
    figures = ", ".join(f"{name} {found[name] * 1e6:.0f} us" for name in _LINES)
    took = time.perf_counter() - begin
    print(f"{Path(words[0]).name}: {took:.0f} s: {figures}", file=sys.stderr, flush=True)
    return found


class Server:
    """What the guest talks to: echoes, sends or takes `size` bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _main(self) -> None:
        try:
            while True:
                client, _ = self._socket.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with client:
                    self._serve(client)
        except OSError:
            return

    def _serve(self, client: socket.socket) -> None:
        what, left = client.recv(1), self._size
        try:
            if what == b"e":
                while data := client.recv(PIECE):
                    client.sendall(data)
            elif what == b"s":
                client.sendall(bytes(self._size))
            elif what == b"r":
                while left > 0 and (data := client.recv(PIECE)):
                    left -= len(data)
                client.sendall(b"x")
        except ConnectionError:
            return


# The queue.

_ENTRIES, _REQUESTS = 256, 128
_DESC, _AVAIL, _USED, _BUFFERS = 0x1_0000, 0x2_0000, 0x3_0000, 0x8_0000


def _queue(rounds: int) -> Iterator[Row]:
    """Requests of two parts, as of a disk that is read: CPU time of each, without the disk."""
    serve = library("queue").serve
    serve.restype = ctypes.c_long
    serve.argtypes = [ctypes.c_void_p, *[ctypes.c_uint64] * 4, ctypes.c_uint16, ctypes.c_void_p]
    memory = GuestMemory([(0, 1 << 20)])
    try:
        ours = _Offered(memory)
        queue = Queue(memory, _ENTRIES, lambda: None, lambda when: None)
        queue.desc, queue.driver, queue.device = _DESC, _AVAIL, _USED
        queue.enable(event_idx=True)

        def mine() -> float:
            return _cpu(ours.offer, lambda: queue.serve(_do))

        other_memory = GuestMemory([(0, 1 << 20)])
        theirs = _Offered(other_memory)
        at = ctypes.c_uint16(0)

        def in_c() -> float:
            hva, size = other_memory.hva(0), 1 << 20

            def run() -> None:
                done = serve(hva, size, _DESC, _AVAIL, _USED, _ENTRIES, ctypes.byref(at))
                assert done == _REQUESTS

            return _cpu(theirs.offer, run)

        a, b = interleave(rounds, (mine, in_c))
        other_memory.close()
    finally:
        memory.close()
    ratio = ratios(a, b)
    yield Row(
        "virtio queue",
        f"`Queue.serve()` with a device that does nothing, against a C loop that checks and walks "
        f"the same chains: CPU time for one of {_REQUESTS} requests of three descriptors",
        rounds,
        f"{spread(a).median:.2f} us",
        f"{spread(b).median:.3f} us",
        differences(a, b).text(" us", sign="+"),
        figures={"vmexit_us": spread(a), "c_us": spread(b), "ratio": ratio},
    )


def _do(chain: Chain) -> int:
    return chain.writable_size()


def _cpu(prepare: Callable[[], object], run: Callable[[], object]) -> float:
    """Microseconds of CPU time for a request; the best of some, as others disturb."""
    best = float("inf")
    for _ in range(20):
        prepare()
        start = time.thread_time_ns()
        run()
        best = min(best, (time.thread_time_ns() - start) / _REQUESTS / 1e3)
    return best


class _Offered:
    """The driver's half: the same requests again and again."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._index = 0
        for number in range(0, 3 * (_ENTRIES // 3), 3):
            at = _BUFFERS + 0x200 * number
            parts = ((at, 16, v.DESC_F_NEXT), (at + 16, 400, v.DESC_F_WRITE | v.DESC_F_NEXT))
            for offset, (gpa, size, flags) in enumerate((*parts, (at + 416, 1, v.DESC_F_WRITE))):
                place = _DESC + 16 * (number + offset)
                memory.write(place, struct.pack("<QIHH", gpa, size, flags, number + offset + 1))

    def offer(self) -> None:
        for _ in range(_REQUESTS):
            head = 3 * (self._index % (_ENTRIES // 3))
            self._memory.write_u16(_AVAIL + 4 + 2 * (self._index % _ENTRIES), head)
            self._index = self._index + 1 & 0xFFFF
        self._memory.write_u16(_AVAIL + 2, self._index)
