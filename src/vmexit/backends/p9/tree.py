"""What is known of a shared folder's tree: files by name and parent, some with a descriptor.

A file is reached from the folder itself, one name after the other, and no symbolic link is ever
followed; so a name leads out of the folder only if the host has mounted something there. Parents
are remembered and not looked up, as `..` of a folder that was moved away would lead out.
"""

import errno
import os
from collections import OrderedDict
from typing import NamedTuple

from vmexit.backends.p9.files import name_file

MOST_NODES = 1 << 16
_NAME_MAX = 255


class Key(NamedTuple):
    """Which file it is."""

    device: int
    inode: int


class Node:
    """A file that the guest knows, or a folder above one."""

    __slots__ = ("children", "fd", "key", "name", "parent", "uses")

    def __init__(self, parent: "Node | None", name: bytes, key: Key, fd: int) -> None:
        self.parent = parent
        """None: the shared folder, or what is not where it was."""
        self.name = name
        self.key = key
        self.fd = fd
        """Names the file (O_PATH), -1 if it has to be looked up again."""
        self.children: dict[bytes, Node] = {}
        self.uses = 1


def check_name(name: bytes) -> None:
    """Raises OSError for what cannot be the name of a file in a folder."""
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, "no name of a file")
    if len(name) > _NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "a name is too long")


class Tree:
    """Nodes, each for as long as it is used. One call at a time. Any call may raise OSError."""

    def __init__(self, root: int, most_fds: int) -> None:
        """`root` names the shared folder; it is the tree's from now on. `most_fds` are kept from
        one message to the next.
        """
        self.root = Node(None, b"", _key(root), root)
        self._most_fds = most_fds
        self._named: OrderedDict[Node, None] = OrderedDict()  # those with a descriptor, by last use
        self.nodes = 1

    def close(self) -> None:
        while self._named:
            os.close(self._named.popitem()[0].fd)
        os.close(self.root.fd)

    def trim(self) -> None:
        """Close descriptors that have not been used for long. Numbers got before are void."""
        while len(self._named) > self._most_fds:
            node, _ = self._named.popitem(last=False)
            os.close(node.fd)
            node.fd = -1

    def fd(self, node: Node) -> int:
        """A descriptor that names it, good until `trim()` or `drop()`."""
        if node.fd < 0:
            self._adopt(node, self._find(node))
        elif node is not self.root:
            self._named.move_to_end(node)
        return node.fd

    def _adopt(self, node: Node, fd: int) -> None:
        node.fd = fd
        self._named[node] = None

    def _find(self, node: Node) -> int:
        """Name `node` again, from the closest folder above of which there is a descriptor."""
        path = []
        while node.fd < 0:
            path.append(node)
            if node.parent is None:
                raise OSError(errno.ESTALE, "it has lost its name")
            node = node.parent
        at = node.fd
        for below in reversed(path):
            try:
                found = name_file(at, below.name)
            finally:
                if at != node.fd:
                    os.close(at)
            if _key(found) != below.key:
                os.close(found)
                raise OSError(errno.ESTALE, "another file has its name")
            at = found
        return at

    # Nodes in use.

    def hold(self, node: Node) -> Node:
        node.uses += 1
        return node

    def drop(self, node: Node) -> None:
        """Not used any more; and so for the folders above."""
        while True:
            node.uses -= 1
            if node.uses or node is self.root:
                return
            self.nodes -= 1
            if node.fd >= 0:
                del self._named[node]
                os.close(node.fd)
                node.fd = -1
            parent = node.parent
            if parent is None:
                return
            del parent.children[node.name]
            node = parent

    def lookup(self, folder: Node, name: bytes) -> Node:
        """What is called so in `folder`, or above it for `..`; to be dropped."""
        if name == b"..":
            if folder is not self.root and folder.parent is None:
                raise OSError(errno.ESTALE, "it has lost its name")
            return self.hold(folder.parent or folder)
        check_name(name)
        fd = name_file(self.fd(folder), name)
        key = _key(fd)
        node = self.known(folder, name)
        if node is not None and node.key == key:
            if node.fd < 0:
                self._adopt(node, fd)
            else:
                os.close(fd)
            return self.hold(node)
        if self.nodes >= MOST_NODES:
            os.close(fd)
            raise OSError(errno.ENFILE, "too many files are known")
        if node is not None:
            self._detach(node)
        node = folder.children[name] = Node(self.hold(folder), name, key, -1)
        self._adopt(node, fd)
        self.nodes += 1
        return node

    def _detach(self, node: Node) -> None:
        """Its name is not its own any more. What has a descriptor can be used as long as it has."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.name]
        node.parent = None
        self.drop(parent)

    def known(self, folder: Node, name: bytes) -> Node | None:
        """What is called so, if the guest knows it already."""
        return folder.children.get(name)

    def check(self, node: Node) -> None:
        """Raises OSError if it has lost its name to another file behind our back."""
        if node is self.root:
            return
        parent, name = self.place(node)
        status = os.stat(name, dir_fd=self.fd(parent), follow_symlinks=False)
        if Key(status.st_dev, status.st_ino) != node.key:
            raise OSError(errno.ESTALE, "another file has its name")

    # Changes of names.

    def place(self, node: Node) -> tuple[Node, bytes]:
        """The folder it is in, and its name there."""
        if node.parent is None:
            raise OSError(errno.EBUSY if node is self.root else errno.ESTALE, "it has no name")
        return node.parent, node.name

    def remove(self, folder: Node, name: bytes, *, is_folder: bool) -> None:
        check_name(name)
        if (node := self.known(folder, name)) is not None:
            self.check(node)
        (os.rmdir if is_folder else os.unlink)(name, dir_fd=self.fd(folder))
        if node is not None:
            self._detach(node)

    def rename(self, folder: Node, name: bytes, to: Node, new: bytes) -> None:
        """What is below moves along."""
        check_name(name)
        check_name(new)
        if (node := self.known(folder, name)) is not None:
            self.check(node)
        above: Node | None = to
        while above is not None:  # else the tree could become a ring, if the host has moved folders
            if above is node:
                raise OSError(errno.EINVAL, "a folder cannot go into itself")
            above = above.parent
        os.rename(name, new, src_dir_fd=self.fd(folder), dst_dir_fd=self.fd(to))
        if node is None or (folder is to and name == new):
            return
        if (other := self.known(to, new)) is not None:
            if other.key == node.key:
                return  # two names of one file, and both stay (rename(2))
            self._detach(other)
        del folder.children[name]
        to.children[new] = node
        node.parent, node.name = self.hold(to), new
        self.drop(folder)


def _key(fd: int) -> Key:
    """Which file `fd` names; where that cannot be said it is closed, and raises OSError."""
    try:
        status = os.fstat(fd)
    except OSError:
        os.close(fd)
        raise
    return Key(status.st_dev, status.st_ino)
