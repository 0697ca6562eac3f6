"""A snapshot in a folder: what is plain data as text, memory and disks as files with holes.

- `state.json`: a line that says what it is, its version, and the SHA-256 of the rest; then an
  object. Bytes are `{"base64": …}`, a tuple is a list.
- `memory`, and `NAME.written` for a disk with snapshot=on: the bytes at their places, holes for
  zeros. The object lists the stretches that count: offset, size, CRC-32.
- with a parent, another such folder, `memory` has only the pages that differ from its: the object
  says where the parent is, seen from the folder around, and the SHA-256 in its `state.json`.
- `loaded`: what a program had put into memory, one piece behind the other. The object has their
  GPAs, sizes, CRC-32.

Nothing in there is believed: what the object says is checked as any configuration and state is.
"""

import base64
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vmexit.arch.x86.layout import ram_ranges
from vmexit.core.bus import State
from vmexit.core.disk_image import DiskImage
from vmexit.core.errors import ConfigError, HostError, VmexitError, quoted, shown
from vmexit.core.memory import MEMFD_FLAGS, set_size, write_at
from vmexit.core.memory_image import PIECE, MemoryImage, in_pieces, merged, stretches, unlike
from vmexit.machine.config import MachineConfig
from vmexit.machine.drive import Drive
from vmexit.machine.loaded import Loaded, Start
from vmexit.machine.machine_state import MachineState
from vmexit.machine.share import Share
from vmexit.machine.snapshot import Contents, Progress

_MAGIC, _VERSION = "vmexit snapshot", 2
_STATE, _MEMORY, _LOADED = "state.json", "memory", "loaded"
_MOST_TEXT = 256 << 20  # bytes of state.json
_MOST_DISK = 1 << 50
_MOST_PARENTS = 256
_LATEST = 1 << 33  # seconds since 1970: two centuries
_BASE64 = "base64"

Stretch = tuple[int, int, int]  # offset, size, CRC-32
_Tell = Callable[[int], None]  # so many bytes more are done


# Writing.


def require_new(path: str) -> None:
    """Raises ConfigError if something is at `path`."""
    if os.path.lexists(path):
        raise ConfigError(f"{shown(path)} exists already; use another path, or remove it")


def write(path: str, contents: Contents, progress: Progress, parent: str | None = None) -> None:
    """See `Snapshot.save()`.

    Each file is on the disk before `state.json` is, which has their checksums, and all of it
    before the folder gets its name: neither a kill nor a loss of power leaves half of one there.
    """
    around, name = os.path.split(os.path.abspath(path))  # noqa: PTH100 - the path stays as it is
    require_new(path)
    try:
        with ExitStack() as stack:
            below = None if parent is None else _Below.read(parent, around, contents, stack)
            made = tempfile.mkdtemp(prefix=f".{name}.", dir=around)
            try:
                _write_into(Path(made), contents, _telling(contents, below, progress), below)
                _sync(made)
                os.rename(made, path)  # noqa: PTH104
            except BaseException:
                shutil.rmtree(made, ignore_errors=True)
                raise
        _sync(around)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "a path has no NUL in it"
        raise HostError(f"cannot write {shown(path)}: {why}; use another path") from error


def _telling(contents: Contents, below: "_Below | None", progress: Progress) -> _Tell:
    """What adds up for `progress`, which is told at once that nothing is done yet."""
    ranges = _to_write(contents.memory.fd, contents.memory.size, below)
    for disk in contents.disks.values():
        ranges += _to_write(disk.fd, os.fstat(disk.fd).st_size)
    total = sum(end - first for first, end in ranges)
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    tell(0)
    return tell


class _Below(NamedTuple):
    """The parent of a snapshot that is about to be written."""

    path: str
    sha256: str
    fd: int
    """What its memory holds."""

    @classmethod
    def read(cls, path: str, around: str, contents: Contents, stack: ExitStack) -> "_Below":
        """Raises ConfigError, if it is that of a machine with other memory, too."""
        state = _state_of(path)
        below = _contents(state, path)
        memory = below.memory
        stack.callback(memory.close)
        for disk in below.disks.values():
            stack.callback(disk.close)
        if memory.ranges != contents.memory.ranges:
            raise ConfigError(
                f"{shown(path)} is of a machine with {memory.size} bytes of memory, and this one "
                f"has {contents.memory.size}; use a parent of the same machine"
            )
        return cls(os.path.relpath(path, around), state.sha256, memory.fd)


def _write_into(folder: Path, contents: Contents, tell: _Tell, below: _Below | None) -> None:
    state, config = contents.state, contents.config._asdict()
    for key, value in config.items():
        if isinstance(value, os.PathLike):
            config[key] = os.fspath(value)
    pieces, start = contents.loaded
    entry, mode, image = start or (None, "real", range(0))
    data = {
        "config": config,
        **state._asdict(),
        "parent": None if below is None else {"path": below.path, "sha256": below.sha256},
        "memory": _write_sparse(
            folder / _MEMORY, contents.memory.fd, contents.memory.size, tell, below
        ),
        "disks": {
            name: {
                "size": os.fstat(disk.fd).st_size,
                "blocks": disk.blocks,
                "digest": disk.digest,
                "data": _write_sparse(
                    folder / f"{name}.written", disk.fd, os.fstat(disk.fd).st_size, tell
                ),
            }
            for name, disk in contents.disks.items()
        },
        "loaded": {
            "pieces": _write_pieces(folder / _LOADED, pieces),
            "entry": entry,
            "mode": mode,
            "image": [image.start, image.stop],
        },
        "taken": contents.taken,
    }
    text = json.dumps(data, default=_plain).encode()
    head = {"format": _MAGIC, "version": _VERSION, "sha256": hashlib.sha256(text).hexdigest()}
    with open(folder / _STATE, "xb") as file:
        file.write(json.dumps(head).encode() + b"\n" + text)
        file.flush()
        os.fsync(file.fileno())


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return {_BASE64: base64.b64encode(value).decode("ascii")}
    raise ConfigError(f"{quoted(value)} cannot be saved; use a text, a number or bytes")


def _write_sparse(
    path: Path, source: int, size: int, tell: _Tell, below: _Below | None = None
) -> list[Stretch]:
    found = []
    with open(path, "xb") as file:
        os.truncate(file.fileno(), size)
        for first, end in in_pieces(_to_write(source, size, below)):
            length = end - first
            data = os.pread(source, length, first)
            other = bytes(length) if below is None else os.pread(below.fd, length, first)
            for start, stop in unlike(data, other):
                written = memoryview(data)[start:stop]
                write_at(file.fileno(), written, first + start)
                found.append((first + start, len(written), zlib.crc32(written)))
            tell(length)
        os.fsync(file.fileno())
    return found


def _write_pieces(path: Path, pieces: list[tuple[int, bytes]]) -> list[Stretch]:
    with open(path, "xb") as file:
        for _, data in pieces:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return [(gpa, len(data), zlib.crc32(data)) for gpa, data in pieces]


def _to_write(fd: int, size: int, below: _Below | None = None) -> list[tuple[int, int]]:
    """What of a file may not be as below; as zeros, if there is nothing below."""
    found = list(stretches(fd, 0, size))
    return found if below is None else merged([*found, *stretches(below.fd, 0, size)])


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# Reading.


class _State(NamedTuple):
    """What `state.json` holds, and the digest of that."""

    data: dict[str, object]
    sha256: str


def read(path: str) -> Contents:
    """See `Snapshot.load()`."""
    return _contents(_state_of(path), path)


def _contents(state: _State, path: str) -> Contents:
    with ExitStack() as stack:
        try:
            contents = _unpack(state.data, Path(path), path, stack)
        except VmexitError:
            raise
        except OSError as error:
            raise HostError(
                f"cannot read the snapshot {shown(path)}: {error.strerror}; use another copy of it"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
            raise _damaged(path, _STATE) from error
        stack.pop_all()
    return contents


def _state_of(path: str) -> _State:
    """Raises ConfigError for what is no snapshot, and a damaged one."""
    try:
        return _read_state(Path(path), path)
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or f"its {_STATE} is damaged"
        raise ConfigError(
            f"{shown(path)} cannot be read as a snapshot: {why}; give a folder that was saved"
        ) from error


def _damaged(path: str, what: str) -> ConfigError:
    return ConfigError(
        f"the snapshot {shown(path)} is damaged: {what} is not what was written; "
        "use another copy of it"
    )


def named_digest(folder: str) -> str:
    """The SHA-256 that a snapshot says to have: by that it is known from others.

    Raises OSError; ValueError, LookupError for what is none.
    """
    with _open_state(Path(folder)) as file:
        return str(_head(file)["sha256"])


def _open_state(folder: Path) -> BinaryIO:
    # No FIFO waits.
    return open(os.open(folder / _STATE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")


def _head(file: BinaryIO) -> dict[str, object]:
    head = json.loads(file.readline(1024))
    return head if isinstance(head, dict) else {}


def _read_state(folder: Path, path: str) -> _State:
    with _open_state(folder) as file:
        head, text = _head(file), file.read(_MOST_TEXT + 1)
    if head.get("format") != _MAGIC:
        raise ConfigError(f"{shown(path)} is no snapshot of vmexit; give a folder that was saved")
    version = head.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise ConfigError(
            f"the snapshot {shown(path)} has version {version}, and this vmexit knows {_VERSION}; "
            "use a newer vmexit"
        )
    if isinstance(version, int) and 0 < version < _VERSION:
        raise ConfigError(
            f"the snapshot {shown(path)} was saved by an older vmexit (version {version} of "
            f"{_VERSION}); load it with that one, or save it anew"
        )
    sha256 = hashlib.sha256(text).hexdigest()
    if version != _VERSION or head.get("sha256") != sha256:
        raise _damaged(path, _STATE)
    data = json.loads(text, object_hook=_bytes)
    if not isinstance(data, dict):
        raise _damaged(path, _STATE)
    return _State(data, sha256)


def _bytes(found: dict[str, object]) -> object:
    text = found.get(_BASE64)
    if len(found) == 1 and isinstance(text, str):
        return base64.b64decode(text, validate=True)
    return found


def _unpack(data: dict[str, object], folder: Path, path: str, stack: ExitStack) -> Contents:
    """Raises anything for what was not written by `_write_into()`."""
    config = _config(_dict(data["config"]))
    state = MachineState(
        _text(data["accel"]),
        _dict(data["vm"]),
        [_dict(vcpu) for vcpu in _list(data["vcpus"])],
        {name: _dict(state) for name, state in _dict(data["devices"]).items()},
        {gpa: _text(digest) for gpa, digest in _dict(data["roms"]).items()},
    )
    ranges = tuple(ram_ranges(config.memory))
    fd = _memfd(sum(size for _, size in ranges))
    memory = MemoryImage(fd, ranges)
    stack.callback(memory.close)
    _fill(fd, memory.size, data, path)
    memory.seal()
    disks = {}
    for name, found in _dict(data["disks"]).items():
        if "/" in name or name not in state.devices:
            raise ValueError(name)
        disks[name] = _disk(folder / f"{name}.written", _dict(found), path, stack)
    taken = data["taken"]
    if not isinstance(taken, int | float) or not 0 <= taken < _LATEST:
        raise ValueError(taken)
    return Contents(
        config,
        state,
        memory,
        disks,
        _loaded(folder / _LOADED, path, _dict(data["loaded"]), config.memory),
        float(taken),
    )


def _fill(fd: int, size: int, data: dict[str, object], path: str) -> None:
    """Give `fd` what the snapshot's memory holds: its parents' first, then what it has itself."""
    chain = [(path, data)]
    while (parent := chain[-1][1].get("parent")) is not None:
        child = chain[-1][0]
        if len(chain) > _MOST_PARENTS:
            raise ConfigError(
                f"{shown(path)} has more than {_MOST_PARENTS} parents; use another copy of it"
            )
        around = os.path.dirname(os.path.abspath(child))  # noqa: PTH100, PTH120
        below = os.path.join(around, _text(_dict(parent)["path"]))  # noqa: PTH118
        try:
            found = _state_of(below)
        except ConfigError as error:
            raise ConfigError(
                f"the snapshot {shown(child)} needs its parent {shown(below)}, and {error}"
            ) from error
        if found.sha256 != _dict(parent)["sha256"]:
            raise ConfigError(
                f"{shown(below)} is not the parent that {shown(child)} was saved with; put that "
                "one there"
            )
        chain.append((below, found.data))
    for at, its in reversed(chain):
        _read_sparse(Path(at) / _MEMORY, fd, size, _list(its["memory"]), at)


def _config(fields: dict[str, object]) -> MachineConfig:
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    make: Callable[..., MachineConfig] = MachineConfig
    config = make(**values)
    for name in ("image", "kernel", "initrd", "firmware"):
        if not isinstance(getattr(config, name), str | None):
            raise TypeError(name)
    _require_no_programs(config)
    return config


def _require_no_programs(config: MachineConfig) -> None:
    """No machine with such a device can be saved; and nobody's folder is to start a program."""
    shares = [share for share in map(Share.parse, config.shares) if share.virtiofsd]
    drives = [drive for drive in map(Drive.parse, config.drives) if drive.socket]
    if shares or drives:
        raise ValueError("a device that is another program's")


def _loaded(file: Path, path: str, found: dict[str, object], most: int) -> Loaded:
    pieces = []
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        offset = 0
        end = os.fstat(fd).st_size
        for piece in _list(found["pieces"]):
            gpa, size, crc = map(_number, _list(piece))
            if not 0 < size <= min(end - offset, most):
                raise _damaged(path, _LOADED)
            data = _read(fd, size, offset)
            if len(data) != size or zlib.crc32(data) != crc:
                raise _damaged(path, _LOADED)
            pieces.append((gpa, data))
            offset += size
    finally:
        os.close(fd)
    entry, (first, last) = found["entry"], _list(found["image"])
    image, mode = range(_number(first), _number(last)), _text(found["mode"])
    return Loaded(pieces, None if entry is None else Start(_number(entry), mode, image))


def _disk(file: Path, found: dict[str, object], path: str, stack: ExitStack) -> DiskImage:
    size, blocks, digest = _number(found["size"]), found["blocks"], found["digest"]
    if not isinstance(blocks, bytes) or not isinstance(digest, bytes) or size > _MOST_DISK:
        raise TypeError(found)
    with tempfile.TemporaryFile() as temporary:
        disk = DiskImage(os.dup(temporary.fileno()), blocks, digest)
    stack.callback(disk.close)
    os.truncate(disk.fd, size)
    _read_sparse(file, disk.fd, size, _list(found["data"]), path)
    return disk


def _memfd(size: int) -> int:
    fd = os.memfd_create("vmexit-image", MEMFD_FLAGS)
    try:
        set_size(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read_sparse(file: Path, to: int, size: int, found: list[object], path: str) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for one in found:
            offset, length, crc = map(_number, _list(one))
            if not 0 <= offset <= offset + length <= size or not 0 < length <= PIECE:
                raise ValueError(one)
            data = os.pread(fd, length, offset)
            if len(data) != length or zlib.crc32(data) != crc:
                raise _damaged(path, shown(file.name))
            write_at(to, memoryview(data), offset)
    finally:
        os.close(fd)


def _read(fd: int, size: int, offset: int) -> bytes:
    """As many of these bytes as there are: one call gives less than 2 GiB."""
    parts = []
    while size > 0 and (data := os.pread(fd, min(size, 1 << 30), offset)):
        parts.append(data)
        size, offset = size - len(data), offset + len(data)
    return b"".join(parts)


def _dict(value: object) -> State:
    if not isinstance(value, dict):
        raise TypeError(value)
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(value)
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(value)
    return value
