"""Real kernels for tests: Debian's, and an initial RAM disk with a shell, as `fetch` makes them.

They come from `$VMEXIT_TEST_KERNEL_DIR` (`vmlinuz-*` and `initrd*.gz` in it), or by `vmexit fetch
debian` into the user's cache. A test that cannot have one is skipped.
"""

import os
import tempfile
from functools import cache
from pathlib import Path

import pytest

from vmexit.boot import bzimage
from vmexit.core.errors import VmexitError
from vmexit.fetch.debian import Fetched, cache_folder, fetch

_ENVIRONMENT = "VMEXIT_TEST_KERNEL_DIR"


@cache
def _fetched(flavour: str, modules: tuple[str, ...] = ()) -> Fetched | str:
    try:
        return fetch(flavour, modules, lambda what, done: None)
    except VmexitError as error:
        return f"no Debian kernel: {error}; set {_ENVIRONMENT}"


def _files(flavour: str) -> Fetched:
    if given := os.environ.get(_ENVIRONMENT):
        kernels = sorted(Path(given).glob(f"vmlinuz-*[0-9]-{flavour}"))
        initrds = sorted(Path(given).glob("initrd*.gz"))
        if not kernels or not initrds:
            pytest.skip(f"{given} has no vmlinuz-*-{flavour} with an initrd*.gz")
        return Fetched(kernels[-1], initrds[-1])
    found = _fetched(flavour)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def debian_kernel(flavour: str) -> Path:
    """The bzImage of Debian's `flavour`: "cloud-amd64" or "amd64"; skips without one."""
    return _files(flavour).kernel


def busybox_initrd() -> Path:
    """A gzipped cpio of busybox, whose /init runs a shell on the console."""
    return _files("cloud-amd64").initrd


def initrd_with(flavour: str, *modules: str) -> Path:
    """The same, with modules of Debian's kernel `flavour` that it loads; skips without them."""
    found = _fetched(flavour, modules)
    if isinstance(found, str):
        pytest.skip(found)
    return found.initrd


def vmlinux(flavour: str) -> Path:
    """The ELF file that is packed in the bzImage."""
    kernel = debian_kernel(flavour)
    path = cache_folder() / "test" / kernel.name.replace("vmlinuz", "vmlinux")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        data = kernel.read_bytes()
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(bzimage.unpack(data, bzimage.parse(data)))
        Path(file.name).rename(path)
    return path


# For who has no network later: what the tests of devices have in their initial RAM disks.
PREPARED = (
    ("cloud-amd64",),
    ("cloud-amd64", "virtio_mmio", "virtio_blk", "virtio_rng", "ext4"),
    ("cloud-amd64", "virtio_blk", "ext4"),
    ("cloud-amd64", "virtio_net"),
    ("cloud-amd64", "virtio_blk", "ext4", "virtio_net", "virtio_rng"),
    ("cloud-amd64", "virtio_balloon"),
    ("cloud-amd64", "virtio_console"),
    ("cloud-amd64", "pvpanic_mmio"),
    ("cloud-amd64", "button", "evdev"),
    ("cloud-amd64", "vmw_vsock_virtio_transport"),
    ("amd64", "9p", "9pnet_virtio", "virtiofs"),
)

if __name__ == "__main__":
    for flavour, *modules in PREPARED:
        print(initrd_with(flavour, *modules))
