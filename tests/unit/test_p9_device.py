"""Shared folders: how a user names them, and the device that carries messages."""

import os
import resource
from pathlib import Path

import pytest
from p9_client import Client, make_tree, message, number, text
from virtio_driver import Driver

from vmexit.abi import p9
from vmexit.abi import virtio as v
from vmexit.backends.p9.server import Server
from vmexit.core.errors import ConfigError
from vmexit.core.memory import GuestMemory
from vmexit.devices.virtio.p9 import P9
from vmexit.machine.config import MachineConfig
from vmexit.machine.share import Share, descriptors_for_each


@pytest.fixture
def folder(tmp_path):
    return make_tree(tmp_path)


def test_options():
    assert Share.parse("src=/a/b") == Share("src", "/a/b")
    assert Share.parse("s,,t=a=b,,c,readonly=on") == Share("s,t", "a=b,c", True)
    assert Share.parse("x=.,readonly=off") == Share("x", ".")
    assert Share.parse("x=.,virtiofsd=/a") == Share("x", ".", False, "/a")


@pytest.mark.parametrize(
    "text",
    [
        "", "src", "=x", "src=", "readonly=on,src=x", "src=x,", "src=x,readonly", "src=x,ro=on",
        "src=x,readonly=yes", "src=x,readonly=on,readonly=on", "a\nb=x", "x" * 256 + "=x",
        "src=x,readonly=on,virtiofsd=/a", "x" * 37 + "=x,virtiofsd=/a",
    ],
)  # fmt: skip
def test_options_that_cannot_be(text):
    with pytest.raises(ConfigError, match=r"share"):
        MachineConfig(machine="microvm", shares=(text,))


def test_shares_of_a_machine():
    config = MachineConfig(machine="microvm", shares=("a=.", "b=."), rng=True)
    assert config.virtio_devices == 3
    with pytest.raises(ConfigError, match=r"two shares have the tag 'a'; "):
        MachineConfig(machine="microvm", shares=("a=x", "a=y"))
    with pytest.raises(ConfigError, match=r"no virtio devices; "):
        MachineConfig(shares=("a=x",))


@pytest.mark.parametrize("limit", [256, 1024, 1 << 20, resource.RLIM_INFINITY])
def test_shares_leave_descriptors_to_the_rest(monkeypatch, limit):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    for shares in (1, 2, 13):
        each = descriptors_for_each(shares)
        assert 0 < each <= 1024 and (limit < 0 or shares * each <= limit / 2)


def test_what_cannot_be_shared(folder, tmp_path):
    for path in (folder / "file", folder / "no", "a\0b"):
        with pytest.raises(ConfigError, match=r"cannot share .*; "):
            Server(str(path))
    os.symlink(folder, tmp_path / "link")
    server = Server(str(tmp_path / "link"))  # what the user says is followed
    Client(server).attach()
    before = len(os.listdir("/proc/self/fd"))
    server.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_a_device_carries_messages(folder):
    memory = GuestMemory([(0, 1 << 20)])
    server = Server(str(folder))
    driver = Driver(P9(server, "täg"), memory)
    driver.start()
    config = bytes(driver.registers.read(0x100 + at, 1) for at in range(7))
    assert config == b"\4\0t\xc3\xa4g\0" and driver.get(v.MMIO_DEVICE_ID) == 9
    assert driver.features() & 1 << v.P9_MOUNT_TAG
    ring = driver.rings[0]
    request = message(p9.TVERSION, number(8192) + text(p9.VERSION), p9.NOTAG)
    memory.write(0x8_0000, request)
    parts = [(0x8_0000, 5), (0x8_0005, len(request) - 5)]
    ring.offer(ring.chain(parts, [(0x9_0000, 9), (0xA_0000, 100)]))
    driver.kick()
    assert ring.done() == [(0, 21)]
    assert memory.read(0x9_0000, 9) + memory.read(0xA_0000, 12) == (
        message(p9.TVERSION + 1, number(8192) + text(p9.VERSION), p9.NOTAG)
    )
    memory.write(0x8_0000, message(p9.TATTACH, number(0) + number(0) + text(b"") * 2 + number(0)))
    ring.offer(ring.chain([(0x8_0000, 23)], [(0x9_0000, 100)]))
    driver.kick()
    assert ring.done() == [(0, 20)] and server._fids
    with pytest.raises(ConfigError, match="mounted; unmount it first"):
        driver.registers.state()
    driver.set(v.MMIO_STATUS, 0)
    assert not server._fids
    driver.start()
    driver.registers.restore(driver.registers.state())
    ring = driver.rings[0]
    ring.offer(ring.chain([], [(0x9_0000, 11)]))  # no message is one that ends early
    driver.kick()
    assert ring.done() == [(0, 11)] and memory.read_u8(0x9_0004) == p9.RLERROR
    assert not driver.broken
    ring.offer(ring.chain([(0x8_0000, 23)], [(0x9_0000, 10)]))
    driver.kick()
    assert driver.broken
    server.close()
    memory.close()


def test_what_is_mounted_in_the_folder_has_qids_of_its_own():
    """The file systems below /proc's have the same inode numbers as others."""
    if (
        not Path("/dev/shm").is_dir()
        or Path("/dev/shm").stat().st_dev == Path("/dev").stat().st_dev
    ):
        pytest.skip("/dev/shm is not mounted")
    server = Server("/dev", readonly=True)
    client = Client(server)
    client.attach()
    assert client.attributes(0)["path"] == Path("/dev").stat().st_ino
    assert client.attributes(client.at("shm"))["path"] != Path("/dev/shm").stat().st_ino
    server.close()
