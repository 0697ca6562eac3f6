"""System calls on a file that is known by a descriptor which only names it (O_PATH, open(2)).

Such a file is opened, or changed, by its name in /proc/self/fd, which leads to this file and no
other, whatever has become of its own name since. Nothing here follows a symbolic link.
"""

import ctypes
import errno
import os
import stat
from functools import cache

_AT_FDCWD = -100
_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2  # linux/stat.h
_NANO = 10**9
_ALWAYS = os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_long))


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
    libc.getdents64.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    libc.getdents64.restype = ctypes.c_ssize_t
    return libc


def _failed() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def proc_path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def name_file(folder: int, name: bytes) -> int:
    """A descriptor that names what `name` is in `folder`, and opens nothing."""
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def reopen(fd: int, flags: int) -> int:
    """Open the regular file or folder `fd`. Raises OSError for all else, which may have effects."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        if flags != os.O_RDONLY:
            raise OSError(errno.EISDIR, "a folder is read only")
        flags |= os.O_DIRECTORY
    elif stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "a symbolic link is not opened")
    elif not stat.S_ISREG(mode):
        raise OSError(errno.EPERM, "a special file is not opened")
    return os.open(proc_path(fd), flags | _ALWAYS)


def create(folder: int, name: bytes, flags: int, mode: int) -> int:
    """Make a regular file and open it. Raises FileExistsError for any that there is already."""
    flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | _ALWAYS
    return os.open(name, flags, mode & 0o777, dir_fd=folder)


def change_mode(fd: int, mode: int) -> None:
    """Set the permissions of what is no symbolic link, which has none."""
    now = os.fstat(fd).st_mode
    if stat.S_ISLNK(now):
        raise OSError(errno.EOPNOTSUPP, "a symbolic link has no permissions")
    os.chmod(proc_path(fd), mode)  # noqa: PTH101 - as all the others here


def truncate(fd: int, size: int) -> None:
    """Set the size of a regular file."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "no regular file")
    os.truncate(proc_path(fd), size)


Time = int | tuple[int, int] | None
"""Seconds and nanoseconds; NOW; or None, to leave it."""
NOW = 0


def set_times(fd: int, access: Time, change: Time) -> None:
    """utimensat(2): Python's own has neither "now" nor "not" for one of them alone."""
    specs = (_Timespec * 2)(_timespec(access), _timespec(change))
    if _libc().utimensat(_AT_FDCWD, proc_path(fd).encode(), specs, 0):
        raise _failed()


def _timespec(time: Time) -> _Timespec:
    if time is None:
        return _Timespec(0, _UTIME_OMIT)
    if isinstance(time, int):
        return _Timespec(0, _UTIME_NOW)
    if time[1] >= _NANO:
        raise OSError(errno.EINVAL, "more nanoseconds than a second has")
    return _Timespec(*time)


def entries(folder: int, offset: int, size: int) -> bytes:
    """getdents64(2) from `offset` on, which is 0 or was in an entry; at most `size` bytes."""
    os.lseek(folder, offset, os.SEEK_SET)
    buffer = ctypes.create_string_buffer(size)
    done = _libc().getdents64(folder, buffer, size)
    if done < 0:
        raise _failed()
    return buffer.raw[:done]
