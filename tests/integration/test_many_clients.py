"""Two QMP clients and a debugger at once, at random: the guest is of use afterwards."""

import random
import re
import threading

import pytest
from gdb_client import Wire
from kernels import debian_kernel, initrd_with
from linux_guest import ACCEL, SECONDS, Guest
from qmp_client import Client

from vmexit.boot.symbols import load_symbols

FLAVOUR = "cloud-amd64"
COMMANDS = 1000


class Qmp(Client):
    """QEMU's own client."""

    def play(self, dice):
        command = dice.choice(
            ["stop", "cont", "cont", "query-status", "query-cpus-fast", "block", "registers", "x"]
        )
        if command == "registers":
            self.monitor("info registers")
        elif command == "x":
            self.monitor("xp /4xw 0x1000")
        elif command == "block":
            self.execute("query-block")
        else:
            self.execute(command)


class Debugger(Wire):
    """gdb, as fast as it goes."""

    def __init__(self, path, places) -> None:
        super().__init__(path)
        self.places = places
        self.set: list[int] = []

    def wait(self) -> bytes:
        while True:
            answer = self.receive()
            if answer[:1] in (b"T", b"W", b"X") or not answer:
                return answer

    def play(self, dice):
        command = dice.choice(["step", "continue", "break", "clear", "registers", "memory"])
        if command == "step":
            self.send(b"vCont;s:1;c")
            assert self.wait()
        elif command == "continue":
            self.send(b"vCont;c")
            if not self.set or dice.random() < 0.5:
                self.socket.sendall(b"\x03")
            self.socket.settimeout(0.3)
            try:
                assert self.wait()
            except TimeoutError:
                self.socket.settimeout(SECONDS)
                self.socket.sendall(b"\x03")
                assert self.wait()
            self.socket.settimeout(SECONDS)
        elif command == "break":
            place = dice.choice(self.places)
            assert self.answer(b"Z0,%x,1" % place) == b"OK"
            self.set.append(place)
        elif command == "clear" and self.set:
            assert self.answer(b"z0,%x,1" % self.set.pop()) == b"OK"
        elif command == "registers":
            self.answer(b"g")
        elif command == "memory":
            self.answer(b"m%x,40" % dice.choice(self.places))

    def answer(self, request) -> bytes:
        """Its answer; the guest may have been let run and have stopped by others meanwhile."""
        self.send(request)
        while (answer := self.receive())[:1] in (b"T", b"O") and answer != b"OK":
            continue
        return answer


@pytest.mark.linux
@pytest.mark.timeout(900)
def test_1000_commands_of_three_clients_leave_a_guest_of_use(tmp_path):
    table = load_symbols(debian_kernel(FLAVOUR))
    places = [table.address(name) for name in ("schedule", "do_timer", "vfs_read", "panic")]
    options = ("--qmp", f"unix:{tmp_path / 'qmp'}", "--gdb", f"unix:{tmp_path / 'gdb'}")
    options += ("--timeout", str(10 * SECONDS))
    kernel, initrd = debian_kernel(FLAVOUR), initrd_with(FLAVOUR)
    with Guest(kernel, initrd, "quiet", *options, "--smp", "2", accel=ACCEL) as guest:
        guest.boot()
        guest.type("while true; do echo -n; done & sum=0\n")
        clients = [Qmp(str(tmp_path / "qmp")), Qmp(str(tmp_path / "qmp"))]
        clients.append(Debugger(tmp_path / "gdb", places))
        errors = []
        count = threading.Semaphore(COMMANDS)

        def play(number):
            dice = random.Random(number)
            try:
                while count.acquire(blocking=False):
                    clients[number].play(dice)
            except BaseException as error:
                errors.append((number, error))

        threads = [threading.Thread(target=play, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
        ended = guest.process.poll()
        assert not errors and ended is None, (
            errors,
            ended,
            ended is None or guest.status(),
            guest.output,
        )
        assert not any(thread.is_alive() for thread in threads)
        clients[2].socket.close()
        clients[0].execute("cont")
        assert clients[1].execute("query-status")["status"] == "running"
        guest.type("\n")
        assert guest.run("echo $((6*7)); kill %1; nproc").split()[-1] == "2"
        said = guest.run("dmesg | grep -iE 'oops|BUG:|panic' | wc -l")
        assert re.search(r"\b0$", said), said
        for _ in range(3):
            clients[0].execute("system_reset")
        clients[0].execute("stop")
        clients[1].execute("cont")
        guest.output = b""
        guest.boot()
        guest.power_off()
