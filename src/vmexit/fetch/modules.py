"""Kernel modules: which files a module needs, and in which order they are loaded."""

import difflib
import lzma
import re
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import PurePosixPath

from vmexit.core.errors import ConfigError

# How modules are chosen: another name for each way, as what was made before is kept.
CHOICE = "depends, softdep with crypto, virtio_mmio for each virtio"

_SUFFIX = re.compile(r"\.ko(\.xz|\.gz|\.zst)?$")


def module_name(path: str) -> str | None:
    """The name of the module in the file `path`, None if it is none."""
    name = PurePosixPath(path).name
    found = _SUFFIX.search(name)
    return _canonical(name[: found.start()]) if found else None


def _canonical(name: str) -> str:
    return name.replace("-", "_")  # for the kernel both are the same


class Modules:
    """The modules of one kernel. `read` gives the content of a file in its package."""

    def __init__(
        self, paths: Iterable[str], builtin: Iterable[str], read: Callable[[str], bytes]
    ) -> None:
        """`paths` are the files there are, `builtin` what the kernel contains already."""
        self._paths = {name: path for path in paths if (name := module_name(path)) is not None}
        self._builtin = {name for path in builtin if (name := module_name(path)) is not None}
        self._read = read

    def in_order(self, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
        """`(name, content)` of the modules wanted and those they need, each after what it needs.

        Raises ConfigError for a module that the kernel does not have.
        """
        found: dict[str, bytes] = {}
        names = [_canonical(name) for name in wanted]
        if any("virtio" in name for name in names):  # virtiofs and 9pnet_virtio, too
            names.insert(0, "virtio_mmio")  # without which the others find no device
        for name in names:
            self._add(name, found, frozenset())
        return list(found.items())

    def _add(self, name: str, found: dict[str, bytes], above: frozenset[str]) -> None:
        if name in found or name in self._builtin or name in above:
            return
        if name not in self._paths:
            close = difflib.get_close_matches(name, self._paths, 3)
            hint = f"is it {' or '.join(close)}?" if close else "check the name"
            raise ConfigError(f"this kernel has no module {name!r}; {hint}")
        content = _unpacked(self._paths[name], self._read(self._paths[name]))
        needed, wished = dependencies(content)
        # crypto-crc32c is an algorithm, and its plain implementation crc32c_generic.
        names = [(w, f"{w.removeprefix('crypto_')}_generic") for w in wished]
        there = [name for pair in names for name in pair if name in self._paths]
        for other in needed + there:
            self._add(other, found, above | {name})
        found[name] = content


def _unpacked(path: str, content: bytes) -> bytes:
    # busybox's insmod takes plain files only.
    if path.endswith(".xz"):
        return lzma.decompress(content)
    if path.endswith(".gz"):
        import gzip

        return gzip.decompress(content)
    if path.endswith(".zst"):
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return content


def dependencies(module: bytes) -> tuple[list[str], list[str]]:
    """What this module needs, and what it wishes for before it: modules, or aliases of some.

    `depends=` and the part `pre:` of `softdep=` in its section .modinfo.
    """
    from elftools.elf.elffile import ELFFile

    section = ELFFile(BytesIO(module)).get_section_by_name(".modinfo")
    needed: list[str] = []
    wished: list[str] = []
    for line in section.data().split(b"\0") if section is not None else ():
        key, _, value = line.decode("ascii", "replace").partition("=")
        if key == "depends":
            needed += [_canonical(name) for name in value.split(",") if name]
        elif key == "softdep" and value.startswith("pre:"):
            before = value.removeprefix("pre:").partition("post:")[0]
            wished += [_canonical(name) for name in before.split()]
    return needed, wished
