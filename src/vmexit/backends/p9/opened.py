"""Files that the guest has opened, with not many more than so many descriptors of the host.

Linux with `cache=loose` keeps a file open for each one that it has written to. So what has not
been used for long is closed, if it can be opened again by its name, and opened again when needed.
"""

import errno
import os
from collections import OrderedDict

from vmexit.backends.p9 import files
from vmexit.backends.p9.tree import Node, Tree


class Fid:
    """A number of the guest's for a file, which may be open."""

    __slots__ = ("file", "flags", "node")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.flags: int | None = None
        """How it was opened, None if it was not."""
        self.file = -1
        """Its descriptor, -1 if there is none at the moment."""

    @property
    def is_open(self) -> bool:
        return self.flags is not None

    @property
    def writable(self) -> bool:
        return self.flags is not None and self.flags & os.O_ACCMODE != os.O_RDONLY


class OpenFiles:
    """One call at a time. Any call may raise OSError."""

    def __init__(self, tree: Tree, most: int) -> None:
        self._tree = tree
        self._most = max(most, 1)
        self._open: OrderedDict[Fid, None] = OrderedDict()  # those with a descriptor, by last use
        self._parked: dict[Node, set[Fid]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def make_room(self) -> None:
        """For one more. Raises OSError (ENFILE)."""
        for _ in range(len(self._open)):
            if len(self._open) < self._most:
                return
            fid, _ = self._open.popitem(last=False)
            if not self._park(fid):
                self._open[fid] = None
        if len(self._open) >= self._most:
            raise OSError(errno.ENFILE, "too many files are open")

    def _park(self, fid: Fid) -> bool:
        """Close its file, if it is sure to be found again."""
        try:
            os.close(self._reopen(fid))
        except OSError:  # it has no name any more, or must not be opened now
            return False
        os.close(fid.file)
        fid.file = -1
        self._parked.setdefault(fid.node, set()).add(fid)
        return True

    def _reopen(self, fid: Fid) -> int:
        assert fid.flags is not None
        self._tree.check(fid.node)
        return files.reopen(self._tree.fd(fid.node), fid.flags & ~os.O_TRUNC)

    def add(self, fid: Fid, file: int, flags: int) -> None:
        """`fid` is open now. `make_room()` went before."""
        fid.file, fid.flags = file, flags
        self._open[fid] = None

    def fd(self, fid: Fid) -> int:
        """Its descriptor, good until the next one is asked for. EBADF if it is not open."""
        if not fid.is_open:
            raise OSError(errno.EBADF, "the fid is not open")
        if fid.file < 0:
            self.make_room()
            fid.file = self._reopen(fid)
            self._unpark(fid)
            self._open[fid] = None
        else:
            self._open.move_to_end(fid)
        return fid.file

    def _unpark(self, fid: Fid) -> None:
        parked = self._parked[fid.node]
        parked.discard(fid)
        if not parked:
            del self._parked[fid.node]

    def hold(self, node: Node | None) -> None:
        """`node` is about to lose its name: have descriptors of all its open files."""
        if node is not None:
            for fid in list(self._parked.get(node, ())):
                self.fd(fid)
            if node in self._parked:
                raise OSError(errno.ENFILE, "too many files are open")

    def close(self, fid: Fid) -> None:
        if fid.file >= 0:
            del self._open[fid]
            os.close(fid.file)
        elif fid.is_open:
            self._unpark(fid)
        fid.file, fid.flags = -1, None
