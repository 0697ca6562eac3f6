"""A root file system for tests: Debian with systemd and a secure shell, in an ext4 image.

debootstrap makes it once, as root; it is kept in the cache. A test that cannot have one is skipped.
"""

import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from vmexit.fetch.debian import cache_folder

_PACKAGES = "systemd-sysv,udev,iproute2,openssh-server,netbase"
_NETWORK = "[Match]\nName=e*\n[Network]\nDHCP=yes\n"
_MIB = 1536
_VERSION = 1  # another one makes it anew


class Root(NamedTuple):
    """The image, and the key with which root may log in by ssh; at the console by password `x`."""

    image: Path
    key: Path


@cache
def debian_root() -> Root:
    """The one in the cache, which nobody may change."""
    folder = cache_folder() / "test" / f"debian-root-{_VERSION}"
    root = Root(folder / "root.img", folder / "key")
    if root.image.exists():
        return root
    for tool in ("debootstrap", "mkfs.ext4", "ssh-keygen"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}; apt-get install debootstrap e2fsprogs openssh-client")
    if os.geteuid() != 0:
        pytest.skip("debootstrap needs root")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        _make(new, Path(temporary) / "tree")
        new.rename(folder)
    return root


def _make(folder: Path, tree: Path) -> None:
    def run(*words: object, stdin: str = "") -> None:
        subprocess.run(
            list(map(str, words)), input=stdin, stdout=subprocess.DEVNULL, text=True, check=True
        )

    packages = f"--include={_PACKAGES}"
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", packages, "bookworm", tree],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"debootstrap fetched no Debian: {done.stderr[-300:] or done.stdout[-300:]}")
    run("chroot", tree, "chpasswd", stdin="root:x\n")
    (tree / "etc/systemd/network/20-all.network").write_text(_NETWORK)
    (tree / "etc/hostname").write_text("vmexit-guest\n")
    (tree / "etc/fstab").write_text("/dev/vda / ext4 rw 0 1\n")
    run("chroot", tree, "systemctl", "enable", "systemd-networkd", "ssh")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key")
    keys = tree / "root/.ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(folder / "key.pub", keys / "authorized_keys")
    for package in (tree / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    with (folder / "root.img").open("wb") as file:
        file.truncate(_MIB << 20)
    run("mkfs.ext4", "-q", "-d", tree, folder / "root.img")
