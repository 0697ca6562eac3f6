"""Debian's kernels and busybox, through apt's own client, as any user.

apt-get checks the signatures of the package lists and the checksums of the packages. Where the
system's lists do not know the packages, lists of our own are kept in the cache.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vmexit.core.errors import ConfigError, HostError, shown
from vmexit.fetch.initramfs import DHCP, MOTD, SHRC, init_script, initramfs
from vmexit.fetch.modules import CHOICE, Modules, module_name

FLAVOURS = ("cloud-amd64", "amd64")
_BUSYBOX = "busybox-static"

# Folders for a package while it is unpacked; a day, in seconds.
_PACKAGE, _LONG_AGO = ".package-", 86400

_OWN = "pass a kernel of your own: vmexit run --kernel vmlinuz --initrd initrd.gz"

Progress = Callable[[str, float], None]
"""Told what is being done, and how much of it: 0 to 1."""


class Fetched(NamedTuple):
    """Where the kernel and its initial RAM disk are."""

    kernel: Path
    initrd: Path

    def copied_to(self, directory: str) -> "Fetched":
        """Copies in `directory`, with names that stay. Raises ConfigError."""
        kernel, initrd = Path(directory) / "vmlinuz", Path(directory) / "initrd.gz"
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            _put(kernel, self.kernel.read_bytes())
            _put(initrd, self.initrd.read_bytes())
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot write to {shown(directory)}: {why}; use another --output"
            ) from error
        return Fetched(kernel, initrd)


def cache_folder() -> Path:
    """Where vmexit keeps what it has fetched (XDG Base Directory Specification)."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home.startswith("/") else Path.home() / ".cache") / "vmexit"


def fetch(
    flavour: str, modules: Iterable[str], progress: Progress, cache: Path | None = None
) -> Fetched:
    """Debian's kernel of `flavour`, and an initial RAM disk of busybox and `modules`.

    What is in the cache is not fetched again. Raises HostError without apt or a network,
    ConfigError for a module or a flavour that there is not.
    """
    if flavour not in FLAVOURS:
        raise ConfigError(f"there is no kernel {flavour!r}; use {' or '.join(FLAVOURS)}")
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise HostError(f"{tool} is not here, as on Debian it would be; {_OWN}")
    cache = cache if cache is not None else cache_folder()
    folder = cache / "debian"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        apt = _Apt(cache / "apt", progress)
        return _make(apt, apt.kernel(flavour), sorted(set(modules)), folder, progress)
    except OSError as error:
        name = shown(str(error.filename or folder))
        raise HostError(f"cannot write {name}: {error.strerror}; free some space") from error


def _make(
    apt: "_Apt", package: str, modules: list[str], folder: Path, progress: Progress
) -> Fetched:
    label = package.removeprefix("linux-image-")
    # What the files are made from is in their names, so that nothing stale is taken for new.
    version = apt.version(package)
    made_from = "\n".join(
        (version, apt.version(_BUSYBOX), init_script(), SHRC, DHCP, MOTD, CHOICE, *modules)
    )
    digest = hashlib.sha256(made_from.encode()).hexdigest()[:12]
    kernel, initrd = folder / f"vmlinuz-{label}_{version}", folder / f"initrd-{label}-{digest}.gz"
    if kernel.exists() and initrd.exists():
        return Fetched(kernel, initrd)
    with apt.package(package, folder) as contents:
        _put(kernel, contents.find("boot/vmlinuz-*"))
        builtin = contents.find("*lib/modules/*/modules.builtin") if modules else b""
        names = contents.names() if modules else []
        known = Modules(names, builtin.decode("ascii", "replace").split(), contents.read)
        loaded = known.in_order(modules)
    with apt.package(_BUSYBOX, folder) as contents:
        _put(initrd, initramfs(contents.find("*bin/busybox"), loaded))
    return Fetched(kernel, initrd)


def _put(path: Path, content: bytes) -> None:
    """Write `path` so that others see all of it or nothing."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).rename(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _remove_old(folder: Path) -> None:
    """Remove what a fetch has left that was killed, and no fetch can be at any more."""
    for path in folder.glob(f"{_PACKAGE}*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _LONG_AGO:
                shutil.rmtree(path)


class _Package:
    """A package, unpacked in a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        """The paths of all files that are modules."""
        found = (path for path in self._root.rglob("*.ko*") if path.is_file())
        return [str(p.relative_to(self._root)) for p in found if module_name(p.name) is not None]

    def read(self, path: str) -> bytes:
        """The content of the file at `path`."""
        return (self._root / path).read_bytes()

    def find(self, pattern: str) -> bytes:
        """The content of the file that `pattern` (with * and ?) names. Raises HostError."""
        for path in self._root.glob(pattern):
            return path.read_bytes()
        raise HostError(f"the package has no file {pattern}; {_OWN}")


def _why(errors: str, status: int) -> str:
    """What apt says went wrong: its first line that is an error."""
    lines = [line for line in errors.splitlines() if line.startswith("E:")]
    return lines[0].removeprefix("E: ") if lines else f"status {status}"


class _Apt:
    """apt's command-line clients, with the system's package lists or lists of our own."""

    def __init__(self, state: Path, progress: Progress) -> None:
        self._state = state
        self._progress = progress
        self._options: list[str] = []

    def _run(self, *command: str, folder: Path | None = None) -> str:
        tool, *arguments = command
        done = subprocess.run(
            [tool, *self._options, *arguments],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            why = _why(done.stderr, done.returncode)
            raise HostError(f"{tool} failed: {why}; {_OWN}")
        return done.stdout

    def kernel(self, flavour: str) -> str:
        """The newest kernel of `flavour`: what its meta package depends on."""
        meta = f"linux-image-{flavour}"
        found = self._depends(meta)
        if found is None:
            self._update()
            found = self._depends(meta)
        if found is None:
            raise HostError(f"apt knows no package {meta}: this is not Debian; {_OWN}")
        return found

    def _depends(self, meta: str) -> str | None:
        try:
            text = self._run("apt-cache", "depends", "--important", meta)
        except HostError:  # it is not known
            return None
        found = re.search(r"Depends: (linux-image-\d\S+)", text)
        return found[1] if found else None

    def version(self, package: str) -> str:
        """The version of `package` that would be fetched."""
        found = re.search(r"^Version: (\S+)", self._run("apt-cache", "show", package), re.MULTILINE)
        if found is None:
            raise HostError(f"apt knows no package {package}; {_OWN}")
        return found[1]

    def _update(self) -> None:
        """Fetch package lists into a folder of our own, which needs no root."""
        self._progress("fetching package lists", 0)
        lists = self._state / "lists"
        for folder in (lists / "partial", self._state / "cache" / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        self._options = [
            "-o", f"Dir::State::lists={lists}",
            "-o", f"Dir::Cache={self._state / 'cache'}",
        ]  # fmt: skip
        self._run("apt-get", "update", "-q", "-o", "Acquire::Languages=none")

    @contextlib.contextmanager
    def package(self, name: str, folder: Path) -> Iterator[_Package]:
        """Download and unpack package `name`; all of it is removed in the end."""
        _remove_old(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_PACKAGE) as temporary:
            self._download(name, Path(temporary))
            (deb,) = Path(temporary).glob("*.deb")
            root = Path(temporary) / "root"
            self._progress(f"unpacking {name}", 1)
            done = subprocess.run(["dpkg-deb", "-x", deb, root], capture_output=True, check=False)
            if done.returncode:
                raise HostError(f"dpkg-deb cannot unpack {deb.name}; free some space in {folder}")
            yield _Package(root)

    def _download(self, name: str, folder: Path) -> None:
        """apt-get download, with what it tells of its progress."""
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        command = ["apt-get", *self._options, "-q", "-o", f"APT::Status-Fd={writer}"]
        with subprocess.Popen(
            [*command, "download", name],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=(writer,),
        ) as process:
            os.close(writer)
            try:
                # dlstatus:item:percent:text (apt's README.progress-reporting)
                with open(reader, encoding="utf-8", errors="replace") as status:
                    for line in status:
                        parts = line.split(":")
                        if parts[0] == "dlstatus" and len(parts) > 2:
                            with contextlib.suppress(ValueError):
                                self._progress(f"fetching {name}", float(parts[2]) / 100)
                assert process.stderr is not None
                errors = process.stderr.read()
            except BaseException:  # a signal that ends this, too
                process.terminate()
                raise
        if process.returncode:
            why = _why(errors, process.returncode)
            raise HostError(f"cannot fetch {name}: {why}; check the network, or {_OWN}")
