"""A real gdb at a machine that runs, and at its first instruction."""

import os
import random
import re
import select
import stat
import subprocess
import threading

import pytest
from command import GUESTS, assert_one_line, vmexit
from gdb_client import Run, Wire, gdb
from qmp_client import Client

from vmexit import EventKind, Machine, RunState, StopReason, VmexitError
from vmexit.control import sink
from vmexit.control.gdb import GdbServer

# 16-bit: xor ax, ax; 2: inc ax; 3: mov [0x3000], ax; 6: mov bx, [0x3000]; a: out 0x10, al;
# c: cmp ax, 1000; f: jb 2; 11: hlt
COUNTER = bytes.fromhex("31c0 40 a30030 8b1e0030 e610 3de803 72f1 f4")
FOREVER = COUNTER[:-3] + bytes.fromhex("ebf1 f4")
# 16-bit: lidt [0x2000], which is empty; ud2
CRASH = bytes.fromhex("0f011e0020 0f0b")
# 32-bit: mov eax, 1; call 0xb; jmp $; b: inc eax; ret. And 64-bit: mov rax, 0x123456789a; the same.
IN_32 = bytes.fromhex("b801000000 e801000000 f4 40 c3")
IN_64 = bytes.fromhex("48b89a78563412000000 e801000000 f4 48ffc0 c3")


@pytest.fixture
def image(tmp_path):
    def write(code):
        path = tmp_path / "image.bin"
        path.write_bytes(code)
        return path

    return write


def flat(tmp_path, image, accel, *more):
    path = tmp_path / "gdb"
    place = ("--load-address", "0x1000", "--gdb", f"unix:{path}")
    return Run(path, image, *place, "--accel", accel, *more)


def test_from_the_first_instruction_on(accel, tmp_path, image):
    with flat(tmp_path, image(COUNTER), accel, "--paused") as run:
        assert stat.S_IMODE(run.path.stat().st_mode) == 0o600
        said = gdb(
            run.path,
            "info registers eip cs", "x/2i $pc",
            "stepi", "stepi", "print $ax",
            "break *0x1006", "continue", "print $ax", "print $bx",
            "x/2xb 0x3000", "set {unsigned short}0x3000 = 0x4433", "set $cx = 7",
            "stepi", "print/x $bx", "print $cx",
            "continue", "print $ax", "print $eflags", "info breakpoints",
            "delete", "continue",
        )  # fmt: skip
        assert run.finish()[0] == 0
    assert re.search(r"eip +0x1000 ", said) and re.search(r"cs +0x100 ", said), said
    assert "=> 0x1000:\txor    %ax,%ax\n   0x1002:\tinc    %ax\n" in said
    values = re.findall(r"^\$\d+ = (.*)$", said, re.MULTILINE)
    assert values == ["1", "1", "0", "0x4433", "7", "2", "[ CF ]"]
    assert said.count("Breakpoint 1, 0x00001006") == 2
    assert "0x3000:\t0x01\t0x00" in said
    assert "[Inferior 1 (Remote target) exited normally]" in said


@pytest.mark.parametrize(
    ("mode", "code"), [("protected", IN_32), ("long", IN_64)], ids=["protected", "long"]
)
def test_other_modes(accel, tmp_path, image, mode, code):
    with flat(tmp_path, image(code), accel, "--mode", mode, "--paused") as run:
        said = gdb(
            run.path,
            "set $sp = 0x8000", "show architecture",
            "stepi", "print/x $rax", "print/x $eax", "stepi", "print/x *(long*)$sp",
            "stepi", "print/x $eax", "print/x $cr0 & 1",
        )  # fmt: skip
    long = mode == "long"
    assert f'currently "{"i386:x86-64" if long else "i386"}")' in said
    assert ("= 0x123456789a" if long else "= void") in said
    assert "= 0x100f" in said if long else "= 0x100a" in said
    assert f"= {0x3456789B if long else 2:#x}" in said
    assert "$5 = 0x1" in said


def test_a_watchpoint(tmp_path, image):
    """On the software CPU; of KVM not each can, and the lab's is tried with Linux."""
    with flat(tmp_path, image(COUNTER), "soft", "--paused") as run:
        said = gdb(
            run.path,
            "watch *(unsigned short*)0x3000", "continue", "continue",
            "delete", "awatch *(char*)0x3001", "continue", "print/x $pc",
        )  # fmt: skip
    assert "Old value = 0\nNew value = 1\n" in said and "Old value = 1\nNew value = 2\n" in said
    assert "Hardware access (read/write) watchpoint" in said and "$1 = 0x100a" in said


def test_registers_of_x87_and_sse_are_written(tmp_path, image, accel):
    with flat(tmp_path, image(COUNTER), accel, "--paused") as run:
        said = gdb(
            run.path,
            "set $xmm3.uint128 = 0x2233445566778899", "set $mxcsr = 0x1f00",
            "set $st2 = 1.5", "stepi",
            "print/x $xmm3.uint128", "print/x $mxcsr", "print $st2",
        )  # fmt: skip
    assert re.findall(r"\$\d = (.*)", said) == [
        "0x2233445566778899",
        "0x1f00",
        "1.5",
    ]


def test_attach_interrupt_and_detach(accel, tmp_path, image):
    """The guest runs before, and after; two times."""
    with flat(tmp_path, image(FOREVER), accel) as run:
        for _ in range(2):
            said = gdb(run.path, "print $ax", "x/1i $pc", "stepi", "detach")
            assert "$1 = " in said and "Remote target) detached" in said
            assert run.process.poll() is None
        with Wire(run.path) as wire:
            assert wire.ask(b"?").startswith(b"T05")
            wire.send(b"vCont;c")
            wire.socket.sendall(b"\x03")
            assert wire.receive() == b"T02thread:1;"
            before = wire.ask(b"g")
            assert wire.ask(b"s") == b"T05thread:1;"
            assert wire.ask(b"g") != before
        said = gdb(run.path, "monitor info registers", "kill")
        assert "rip=" in said
        assert run.finish()[0] == 130


@pytest.mark.kvm
def test_one_who_attaches_as_another_one_leaves_is_told_of_no_stop(tmp_path, image):
    with flat(tmp_path, image(FOREVER), "kvm") as run:
        attached = 0
        while attached < 60:
            with Wire(run.path) as wire:
                try:
                    first = wire.ask(b"?")
                except BrokenPipeError:  # the one before is still there
                    continue
                if not first or first.startswith(b"E"):
                    continue
                assert first == b"T05thread:1;"
                assert [wire.ask(b"qAttached") for _ in range(3)] == [b"1"] * 3
                attached += 1


def test_the_end_and_a_crash_are_told(accel, tmp_path, image):
    with flat(tmp_path, GUESTS / "debug-exit.bin", accel, "--load-address", "0", "--paused") as run:
        assert "exited with code 0103" in gdb(run.path, "continue")
        assert run.finish()[0] == 67
    with flat(tmp_path, image(CRASH), accel, "--paused") as run:
        said = gdb(run.path, "continue", "print/x $pc", "continue")
        assert "vcpu 0: " in said and "received signal SIGSEGV" in said
        assert "$1 = 0x1005" in said
        assert "Program terminated with signal SIGSEGV" in said
        status, _, err = run.finish()
        assert status == 3 and "vcpu 0: " in err


@pytest.mark.parametrize("last", [b"s", b"c"])
def test_gdb_goes_at_any_moment_and_the_guest_goes_on(accel, tmp_path, image, last):
    """Also at the end of a step, or at a breakpoint, that nobody waits for any more."""
    with flat(tmp_path, image(FOREVER), accel) as run:
        chance, gone = random.Random(1), 0
        while gone < 40:
            with Wire(run.path) as wire:
                try:
                    if not wire.ask(b"?").startswith(b"T05"):
                        continue  # the one before is still there
                except BrokenPipeError:
                    continue
                assert wire.ask(b"Z0,1000,1") == b"OK"
                wire.send(last)
                select.select([wire.socket], [], [], chance.random() * 0.003)
                gone += 1
        assert "$1 = " in gdb(run.path, "print $ax", "detach")
        assert run.process.poll() is None


def test_a_crash_that_gdb_has_seen_ends_the_run_when_it_goes(accel, tmp_path, image):
    for goes in (b"D", b""):
        with flat(tmp_path, image(CRASH), accel, "--paused") as run:
            with Wire(run.path) as wire:
                wire.send(b"c")
                while not (packet := wire.receive()).startswith(b"T"):
                    assert packet.startswith(b"O")
                assert packet.startswith(b"T0b")
                if goes:
                    assert wire.ask(goes) == b"OK"
            status, _, err = run.finish()
            assert status == 3 and "vcpu 0: " in err


def test_a_guest_that_is_held_at_its_end_does_not_go_on(accel, tmp_path, image):
    """It can be looked into, and reset."""
    options = ("--paused", "--action", "shutdown=pause")
    halts = image(bytes.fromhex("f4 ebfe"))  # hlt; jmp $
    with flat(tmp_path, halts, accel, *options) as run, Wire(run.path) as wire:
        assert wire.ask(b"c").startswith(b"T05")
        before = wire.ask(b"g")
        for more in (b"c", b"vCont;c", b"s"):
            assert wire.ask(more).startswith(b"E.the guest is at its end")
        assert wire.ask(b"g") == before


def test_a_library_user_has_it_too(tmp_path, accel):
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(COUNTER, at=0x1000)
        vm.on_pio(0x10, write=lambda access: None)
        seen = []
        vm.subscribe(lambda event: seen.append(event.kind))
        vm.pause()
        with GdbServer(vm, f"unix:{tmp_path / 'gdb'}"):
            vm.start(60)
            said = gdb(tmp_path / "gdb", "break *0x100a", "continue", "print $ax", "detach")
            assert "$1 = 1" in said
            assert vm.wait(60).reason is StopReason.HALT
        assert EventKind.DEBUG in seen and seen[-1] is EventKind.SHUTDOWN
        assert vm.state is RunState.SHUTDOWN
        assert not vm.breakpoints
        assert not (tmp_path / "gdb").exists()


def test_what_monitor_saves_ends_with_the_machine(tmp_path, accel, nothing_left, monkeypatch):
    monkeypatch.setattr(sink, "_PATIENCE", 1e9)
    os.mkfifo(tmp_path / "fifo")
    end = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with Machine(memory="1M", accel=accel) as vm:
        server = GdbServer(vm, f"unix:{tmp_path / 'gdb'}")
        closing = threading.Thread(target=server.close)
        with Wire(tmp_path / "gdb") as wire:
            wire.send(b"qRcmd," + f"memsave 0 0x80000 {tmp_path / 'fifo'}".encode().hex().encode())
            started = select.select([end], [], [], 60)[0]
            closing.start()
            closing.join(60)
            ended = not closing.is_alive()
            os.close(end)
            closing.join()
    assert started and ended


def test_a_server_is_not_closed_from_within_an_access(tmp_path, accel):
    """Its client may wait for that very vCPU."""
    with Machine(memory="1M", accel=accel) as vm:
        vm.load_bytes(FOREVER, at=0x1000)
        server = GdbServer(vm, f"unix:{tmp_path / 'gdb'}")
        refused = threading.Event()

        def close(access):
            with pytest.raises(VmexitError, match="from within an access"):
                server.close()
            refused.set()

        vm.on_pio(0x10, write=close)
        vm.start(60)
        with Wire(tmp_path / "gdb") as wire:
            assert wire.ask(b"?").startswith(b"T05")
            wire.send(b"c")
            assert refused.wait(60)
            server.close()
        vm.stop()
        vm.wait(60)


def test_what_is_no_address_is_refused(tmp_path):
    for where, words in (
        ("tcp:", "no address"),
        ("unix:", "no address"),
        ("tcp:127.0.0.1:1,arch=z80", "no architecture 'z80'"),
        ("tcp:127.0.0.1:1,servr=off", "there is no 'servr=off'"),
        (f"unix:{tmp_path}/no/such", "cannot listen"),
    ):
        done = vmexit("run", GUESTS / "hello.bin", "--accel", "soft", "--gdb", where)
        assert_one_line(done, 2, words)
    done = vmexit("run", GUESTS / "hello.bin", "--accel", "soft", "--paused")
    assert_one_line(done, 2, "--paused", "--gdb")


def test_a_second_debugger_is_refused_and_the_first_goes_on(tmp_path, image):
    with flat(tmp_path, image(FOREVER), "soft") as run, Wire(run.path) as first:
        assert first.ask(b"qC") == b"QC1"
        with Wire(run.path) as second:
            assert b"another debugger" in second.receive()
            assert second.receive() == b""
        said = gdb(run.path, "print 1")
        assert "another debugger" in said or "Remote" in said
        assert first.ask(b"qC") == b"QC1"


NONSENSE = [
    b"$" + b"A" * (64 << 20),
    b"$g#00",
    b"$" + b"}" * 5000 + b"#00",
    bytes(range(256)) * 100,
    b"\x03" * 1000,
    b"$$$$$$#00#00$",
    b"+-" * 1000,
]
ODD = [
    b"", b"m", b"m,", b"mzz,1", b"m0,ffffffffffffffff", b"mffffffffffffffff,ffff", b"M0,1:zz",
    b"X0,ffff:", b"Z0", b"Z0,zz,1", b"Z9,0,1", b"Z2,0,ffffffff", b"Z0,-1,1", b"z0,0,0", b"p",
    b"pffff", b"p-1", b"P0", b"Pffff=00", b"P0=zz", b"G", b"Gzz", b"G00", b"Hg0", b"Hgffff", b"H",
    b"Hc-1", b"T0", b"Tffff", b"vCont", b"vCont;", b"vCont;x", b"vCont;c:ffff", b"vCont;s:0",
    b"qXfer:features:read:target.xml:0,fff", b"qXfer:features:read:target.xml:ffffffff,1",
    b"qXfer:features:read:/etc/passwd:0,fff", b"qXfer:a", b"qRcmd,zz", b"qRcmd,", b"qRcmd,ff",
    b"qThreadExtraInfo,zz", b"qSupported:" + b"a;" * 1000, b"vFile:open:2f,0,0", b"\xff\xfe",
    b"s0zz", b"czz",
]  # fmt: skip


@pytest.mark.parametrize("junk", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_in_the_stream_hurts_nobody(tmp_path, image, junk):
    with flat(tmp_path, image(FOREVER), "soft") as run:
        with Wire(run.path) as wire:
            wire.socket.sendall(junk)
            wire.socket.sendall(b"#00")
            wire.send(b"qC")
            for _ in range(20_000):
                answer = wire.receive()
                if answer == b"QC1":
                    break
            assert answer == b"QC1"
        resident = int(
            subprocess.check_output(["ps", "-o", "rss=", "-p", str(run.process.pid)], text=True)
        )
        assert resident < 400 << 10
        assert "$1 = " in gdb(run.path, "print $ax", "kill")


def test_odd_requests_get_an_error_or_nothing(tmp_path, image, accel):
    with flat(tmp_path, image(FOREVER), accel, "--paused") as run:
        with Wire(run.path) as wire:
            for request in ODD:
                wire.send(request)
                answer = wire.receive()
                if answer[:1] == b"T" and request[:1] in b"vscT":
                    continue
                while answer[:1] == b"O" and answer != b"OK":
                    answer = wire.receive()
                if answer == b"" and request[:1] in b"cv":
                    continue
                assert wire.ask(b"qC").startswith(b"QC"), request
        assert "$1 = " in gdb(run.path, "print $ax", "kill")


def test_what_others_do_is_no_answer_to_gdb(tmp_path, image):
    """A stop that gdb has not asked for would be taken for the answer to its next request."""
    qmp = tmp_path / "qmp"
    with (
        flat(tmp_path, image(FOREVER), "soft", "--qmp", f"unix:{qmp}") as run,
        Wire(run.path) as gdb,
    ):
        assert gdb.ask(b"qC") == b"QC1"
        with Client(str(qmp)) as other:
            other.execute("cont")
            other.execute("stop")
            other.execute("cont")
        assert gdb.ask(b"qC") == b"QC1"
        assert gdb.ask(b"s") == b"T05thread:1;"
        assert gdb.ask(b"D") == b"OK"
