"""A Linux guest that QEMU's own client of QMP steers."""

import re
import select
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from kernels import busybox_initrd, debian_kernel, initrd_with
from linux_guest import ACCEL, BANNER, PROMPT, SECONDS, Guest
from qemu.qmp import ExecuteError
from qemu.qmp.legacy import QEMUMonitorProtocol
from qmp_client import Client

import vmexit

pytestmark = [pytest.mark.linux, pytest.mark.timeout(3 * SECONDS)]

FLAVOUR = "cloud-amd64"
MIB = 1 << 20


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "qmp.sock")


def linux(path, *more, modules=(), append=""):
    initrd = initrd_with(FLAVOUR, *modules) if modules else busybox_initrd()
    return Guest(debian_kernel(FLAVOUR), initrd, append, "--qmp", f"unix:{path}", *more,
                 accel=ACCEL)  # fmt: skip


def is_silent(guest) -> bool:
    """Whether nothing comes of it: what it has said before is read."""
    stream = guest.process.stdout
    while select.select([stream], [], [], 0.3)[0]:
        data = stream.read(1 << 16)
        assert data
        if len(data) < 1 << 16:
            break
    return not select.select([stream], [], [], 0.5)[0]


def test_it_stands_still_and_goes_on(path):
    with linux(path) as guest:
        guest.boot()
        with Client(path) as qmp:
            assert qmp.execute("query-status") == {"running": True, "status": "running"}
            guest.type("while true; do echo tick; done\n")
            guest.expect(b"tick\r\ntick\r\n")
            for _ in range(2):
                qmp.execute("stop")
                qmp.event("STOP")
                assert qmp.execute("query-status") == {"running": False, "status": "paused"}
                assert is_silent(guest)
                qmp.execute("cont")
                qmp.event("RESUME")
                guest.output = b""
                guest.expect(b"tick\r\ntick\r\n")
            qmp.execute("quit")
            assert qmp.event("SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}
        assert guest.status() == 0


def test_a_reset_boots_again(path):
    with linux(path) as guest:
        guest.boot()
        guest.type("echo here > /tmp/was; echo don''e\n")
        guest.expect(b"done")
        with Client(path) as qmp:
            qmp.execute("system_reset")
            assert qmp.event("RESET") == {"guest": False, "reason": "host-qmp-system-reset"}
            assert "Linux version" in guest.boot()
            assert "No such file" in guest.run("cat /tmp/was")
            guest.type("poweroff -f\n")
            assert qmp.event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
        assert guest.status() == 0


def test_the_power_button_is_a_key_of_the_guest(path):
    with linux(path, modules=("button", "evdev")) as guest:
        guest.boot()
        guest.type(
            "echo wai''ts; dd if=/dev/input/event0 bs=24 count=1 | hexdump -C; poweroff -f\n"
        )
        guest.expect(b"waits")
        with Client(path) as qmp:
            qmp.execute("system_powerdown")
            qmp.event("POWERDOWN")
            assert qmp.event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
        assert guest.status() == 0
        # struct input_event: EV_KEY 1, KEY_POWER 116 (Linux, input-event-codes.h).
        assert b"01 00 74 00 01 00 00 00" in guest.output


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One guest for all who leave it as it is."""
    path = str(tmp_path_factory.mktemp("qmp") / "qmp.sock")
    more = ("--smp", "2", "--name", "bob", "--balloon", "0", "-m", "256M", "--stats")
    with linux(path, *more, modules=("virtio_balloon",)) as guest:
        guest.boot()
        yield guest, path


def test_memory_is_saved_by_both_kinds_of_addresses(shared, tmp_path):
    guest, path = shared
    file = tmp_path / "memory"
    # The kernel may say something in between.
    told = re.search(r"(\w{16}) \w linux_banner", guest.run("grep linux_banner /proc/kallsyms"))
    banner = int(told[1], 16)
    with Client(path) as qmp:
        qmp.execute("memsave", val=banner, size=200, filename=str(file))
        assert file.read_bytes().startswith(b"Linux version ")
        assert len(file.read_bytes()) == 200
        assert file.stat().st_mode & 0o077 == 0
        # The same address as QEMU takes it: 64 bits with a sign.
        qmp.execute("memsave", val=banner - (1 << 64), size=5, filename=str(file), cpu_index=1)
        assert file.read_bytes() == b"Linux"
        qmp.execute("pmemsave", val=0xE0000, size=8, filename=str(file))
        assert file.read_bytes() == b"RSD PTR "
        gpa = int(qmp.monitor(f"gva2gpa {banner:#x}").split()[1], 16)
        qmp.execute("pmemsave", val=gpa, size=5000, filename=str(file))
        assert file.read_bytes().startswith(b"Linux version ")
        with pytest.raises(ExecuteError, match="Invalid addr"):
            qmp.execute("pmemsave", val=256 * MIB - 10, size=11, filename=str(file))
        with pytest.raises(ExecuteError, match="Could not open"):
            qmp.execute("pmemsave", val=0, size=11, filename="/nowhere/x")
        with pytest.raises(ExecuteError, match="CPU number"):
            qmp.execute("memsave", val=0, size=1, filename=str(file), cpu_index=2)


def test_a_core_file_is_what_debuggers_read(shared, tmp_path):
    _, path = shared
    file = tmp_path / "core"
    with Client(path) as qmp:
        qmp.execute("stop")
        registers = qmp.monitor("info registers -a")
        qmp.execute("dump-guest-memory", paging=False, protocol=f"file:{file}")
        done = qmp.event("DUMP_COMPLETED")["result"]
        assert done == {"status": "completed", "completed": 256 * MIB, "total": 256 * MIB}
        memory = tmp_path / "memory"
        qmp.execute("pmemsave", val=16 * MIB, size=MIB, filename=str(memory))
        qmp.execute("cont")
        with pytest.raises(ExecuteError, match="paging"):
            qmp.execute("dump-guest-memory", paging=True, protocol=f"file:{file}")
        with pytest.raises(ExecuteError, match="Invalid parameter 'protocol'"):
            qmp.execute("dump-guest-memory", paging=False, protocol="http:x")
    with open(file, "rb") as stream:
        elf = ELFFile(stream)
        assert (elf["e_type"], elf["e_machine"]) == ("ET_CORE", "EM_X86_64")
        (load,) = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        assert (load["p_paddr"], load["p_filesz"], load["p_memsz"]) == (0, 256 * MIB, 256 * MIB)
        stream.seek(load["p_offset"] + 16 * MIB)
        assert stream.read(MIB) == memory.read_bytes()
        (notes,) = [s for s in elf.iter_segments() if s["p_type"] == "PT_NOTE"]
        found = [(n["n_name"], n["n_type"], n["n_descsz"]) for n in notes.iter_notes()]
        assert found == [("CORE", "NT_PRSTATUS", 336)] * 2 + [("QEMU", 0, 432)] * 2
        stream.seek(notes["p_offset"])
        data = stream.read(notes["p_filesz"])
    ips = [int(ip, 16) for ip in re.findall(r"rip=(\w{16})", registers)]
    cr3s = [int(cr3, 16) for cr3 in re.findall(r"cr3=(\w+)", registers)]
    assert len(ips) == len(cr3s) == 2
    for number in range(2):
        prstatus = data[number * (20 + 336) + 20 :]
        assert struct.unpack_from("<Q", prstatus, 112 + 16 * 8) == (ips[number],)
        qemu = data[2 * (20 + 336) + number * (20 + 432) + 20 :]
        assert struct.unpack_from("<Q", qemu, 8 + 16 * 8) == (ips[number],)
        assert struct.unpack_from("<Q", qemu, 8 + 18 * 8 + 10 * 24 + 3 * 8) == (cr3s[number],)


def test_what_is_asked_is_told(shared):
    guest, path = shared
    with Client(path) as qmp:
        assert qmp.execute("query-name") == {"name": "bob"}
        assert qmp.execute("query-memory-size-summary")["base-memory"] == 256 * MIB
        assert qmp.execute("query-kvm")["enabled"] is (ACCEL == "kvm")
        cpus = qmp.execute("query-cpus-fast")
        assert [cpu["cpu-index"] for cpu in cpus] == [0, 1]
        threads = {int(entry.name) for entry in Path(f"/proc/{guest.process.pid}/task").iterdir()}
        assert {cpu["thread-id"] for cpu in cpus} <= threads
        (serial,) = qmp.execute("query-chardev")
        assert serial["label"] == "serial0" and serial["filename"] == "stdio"
        assert qmp.execute("query-block") == []
        mapped = qmp.monitor("info mem")
        assert "-rw" in mapped and "ffff8880" in mapped
        assert qmp.monitor("x/2i $rip").count("\n") >= 2
        assert qmp.monitor("info status") == "VM status: running\n"


def test_the_balloon(shared):
    _, path = shared
    with Client(path) as qmp:
        assert qmp.execute("query-balloon") == {"actual": 256 * MIB}
        qmp.execute("balloon", value=200 * MIB)
        while qmp.event("BALLOON_CHANGE")["actual"] != 200 * MIB:
            pass
        assert qmp.execute("query-balloon") == {"actual": 200 * MIB}
        qmp.execute("balloon", value=256 * MIB)
        while qmp.event("BALLOON_CHANGE")["actual"] != 256 * MIB:
            pass
        with pytest.raises(ExecuteError, match="expects a size"):
            qmp.execute("balloon", value=0)


def nmis(guest):
    """How many each of the two processors has had."""
    told = re.search(r"NMI:\s+(\d+)\s+(\d+)", guest.run("grep NMI: /proc/interrupts"))
    return int(told[1]), int(told[2])


def test_an_nmi_arrives(shared):
    guest, path = shared
    with Client(path) as qmp:
        before = nmis(guest)
        qmp.execute("inject-nmi")
        guest.run("true")
        assert nmis(guest) == (before[0] + 1, before[1] + 1)


def test_exits_are_told_if_somebody_counts_them(shared):
    _, path = shared
    with Client(path) as qmp:
        try:
            told = qmp.execute("x-query-exits")
        except ExecuteError as error:  # without snapshots
            pytest.skip(str(error))
        rows = {(row["reason"], row.get("address")): row for row in told["rows"]}
        assert rows["io out", 0x3F8]["exits"] > 100
        assert told["total"] == sum(row["exits"] for row in told["rows"])
        assert [times["cpu-index"] for times in told["vcpus"]] == [0, 1]


def qmp_shell(text, *words):
    done = subprocess.run(
        [Path(sys.executable).parent / "qmp-shell", *words],
        input=text,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


def test_the_shell_of_qemu(shared, tmp_path):
    _, path = shared
    file = tmp_path / "memory"
    told = qmp_shell(
        f"query-status\npmemsave val=917504 size=8 filename={file}\nfoo\n",
        path,
    )
    assert '"status": "running"' in told
    assert file.read_bytes() == b"RSD PTR "
    assert "has not been found" in told
    assert f"vmexit {vmexit.__version__}" in qmp_shell("info version\n", "-H", path)
    with Client(path) as qmp:  # and it still listens
        assert qmp.execute("query-status")["running"]


def test_it_connects_to_who_waits_for_it(path):
    """As QEMU's own tests do: they listen, and the machine begins paused."""
    server = QEMUMonitorProtocol(path, server=True)
    guest_socket = f"{path},server=off"
    with linux(guest_socket, "--paused", "--action", "shutdown=pause") as guest:
        assert "QMP" in (server.accept(timeout=SECONDS) or {})
        assert server.cmd("query-status") == {"running": False, "status": "prelaunch"}
        assert is_silent(guest)
        server.cmd("cont")
        guest.boot()
        guest.type("poweroff -f\n")
        while (event := server.pull_event(wait=float(SECONDS)))["event"] != "SHUTDOWN":
            pass
        assert event["data"] == {"guest": True, "reason": "guest-shutdown"}
        assert server.pull_event(wait=float(SECONDS))["event"] == "STOP"
        assert server.cmd("query-status") == {"running": False, "status": "shutdown"}
        with pytest.raises(ExecuteError, match="system_reset"):
            server.cmd("cont")
        server.cmd("system_reset")
        server.cmd("cont")
        guest.expect(BANNER)
        guest.expect(PROMPT)
        server.cmd("quit")
        assert guest.status() == 0
    with suppress(EOFError):  # it has gone first
        server.close()


def test_a_reboot_of_the_guest(path):
    with linux(path, "--action", "reboot=reset") as guest:
        guest.boot()
        with Client(path) as qmp:
            guest.type("reboot -f\n")
            assert qmp.event("RESET") == {"guest": True, "reason": "guest-reset"}
            guest.boot()
            assert qmp.execute("query-status")["status"] == "running"
            qmp.execute("quit")
        assert guest.status() == 0


@pytest.mark.parametrize("action", ["exit", "pause"])
def test_a_panic_is_told(path, action):
    more = ("--device", "pvpanic", "--action", f"panic={action}")
    with linux(path, *more, modules=("pvpanic_mmio",)) as guest:
        guest.boot()
        with Client(path) as qmp:
            guest.type("echo c > /proc/sysrq-trigger\n")
            if action == "exit":
                assert qmp.event("GUEST_PANICKED") == {"action": "poweroff"}
                assert qmp.event("SHUTDOWN") == {"guest": True, "reason": "guest-panic"}
                assert guest.status() == 3
            else:
                assert qmp.event("GUEST_PANICKED") == {"action": "pause"}
                qmp.event("STOP")
                assert qmp.execute("query-status")["status"] == "guest-panicked"
                assert "rip=" in qmp.monitor("info registers")
                qmp.execute("quit")
                assert guest.status() == 0


def test_two_clients_at_once(shared):
    _, path = shared
    errors = []

    def ask() -> None:
        try:
            with Client(path) as qmp:
                for _ in range(50):
                    qmp.monitor("info registers")
                    assert qmp.execute("query-status")["status"] in ("running", "paused")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
