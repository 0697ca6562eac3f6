"""Real kernels for tests: Debian's, and an initrd with its busybox.

They come from `$VMEXIT_TEST_KERNEL_DIR` (`vmlinuz-*` and `busybox`, also in its subfolders), or
once from the Debian mirror into `~/.cache/vmexit/test`. A test that cannot have one is skipped.
"""

import gzip
import hashlib
import os
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

_ENVIRONMENT = "VMEXIT_TEST_KERNEL_DIR"
_DOWNLOAD_SECONDS = 300

READY = "vmexit-guest-ready"

# cttyhack gives the shell the console as controlling terminal, without which it has no job control.
_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ TERM=linux
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
echo {READY}
setsid cttyhack sh
poweroff -f
"""


def debian_kernel(flavour: str) -> Path:
    """The newest bzImage of Debian's `flavour`: "cloud-amd64" or "amd64"; skips without one."""
    name = re.compile(rf"vmlinuz-\d[\w.+~]*(-\d+)?-{re.escape(flavour)}")
    return _find(name) or _fetch(_kernel_package(flavour), name)


def busybox_initrd() -> Path:
    """A gzipped cpio: busybox, and an /init that says READY and runs a shell on the console.

    The guest powers off when the shell ends.
    """
    name = re.compile("busybox")
    busybox = (_find(name) or _fetch("busybox-static", name)).read_bytes()
    archive = initrd_archive(
        {"bin/busybox": (0o100755, busybox), "init": (0o100755, _INIT.encode())}
    )
    digest = hashlib.sha256(archive).hexdigest()[:16]
    path = _cache() / f"initrd-{digest}.cpio.gz"
    if not path.exists():
        _put(path, gzip.compress(archive, 6, mtime=0))
    return path


def initrd_archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio of the format newc: folders, /dev/console, and `files` by path: (mode, content)."""
    folders = ("bin", "dev", "proc", "sys", "tmp", "root")
    entries = [_cpio_entry(folder, 0o040755, b"") for folder in folders]
    # The kernel opens it for init before init can mount anything.
    entries.append(_cpio_entry("dev/console", 0o020600, b"", device=(5, 1)))
    entries += [_cpio_entry(path, mode, content) for path, (mode, content) in files.items()]
    entries.append(_cpio_entry("TRAILER!!!", 0, b""))
    return b"".join(entries)


def _cpio_entry(name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    # Linux, Documentation/driver-api/early-userspace/buffer-format.rst: magic, then c_ino, c_mode,
    # c_uid, c_gid, c_nlink, c_mtime, c_filesize, c_maj, c_min, c_rmaj, c_rmin, c_namesize,
    # c_chksum.
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "vmexit" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _find(name: re.Pattern[str]) -> Path | None:
    given = os.environ.get(_ENVIRONMENT)
    for folder in (Path(given) if given else None, _cache()):
        if folder is not None:
            found = [p for p in folder.rglob("*") if name.fullmatch(p.name) and p.is_file()]
            if found:
                return max(found, key=_version)
    return None


def _kernel_package(flavour: str) -> str:
    """The package that the meta package `linux-image-<flavour>` stands for."""
    meta = f"linux-image-{flavour}"
    out = _run("apt-cache", "depends", "--important", meta)
    found = re.search(r"Depends: (linux-image-\d\S+)", out)
    if found is None:
        pytest.skip(f"apt knows no package {meta}; run apt-get update or set {_ENVIRONMENT}")
    return found[1]


def _fetch(package: str, name: re.Pattern[str]) -> Path:
    """Download `package`, and keep its one file called `name` in the cache."""
    with tempfile.TemporaryDirectory(dir=_cache(), prefix="fetch-") as folder:
        _run("apt-get", "download", "-q", package, cwd=folder)
        (package_file,) = Path(folder).glob("*.deb")
        # Only that file: a kernel package has hundreds of MB of modules.
        with (
            subprocess.Popen(
                ["dpkg-deb", "--fsys-tarfile", package_file], stdout=subprocess.PIPE
            ) as unpack,
            tarfile.open(mode="r|", fileobj=unpack.stdout) as archive,
        ):
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and name.fullmatch(Path(member.name).name):
                    path = _cache() / Path(member.name).name
                    _put(path, content.read())
                    unpack.kill()
                    return path
    pytest.skip(f"the package {package} has no file {name.pattern}; set {_ENVIRONMENT}")


def _put(path: Path, content: bytes) -> None:
    """Write `path` so that another test process sees all of it or nothing."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.rename(file.name, path)


def _run(*command: str, cwd: str | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no Debian kernel: {error}; set {_ENVIRONMENT}")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        pytest.skip(f"no Debian kernel: {' '.join(command)}: {last[0]}; set {_ENVIRONMENT}")
    return done.stdout
