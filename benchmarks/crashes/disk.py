"""A disk played back from a record of writes, and what may be left on it after a power cut at any record.

What is assumed of the disk and its file system, the worst that POSIX allows but for the last two lines:

- A file's data is on the disk once the file was synced. Of what was written after that, any part may be there, in any
  order: nothing, all, the first writes, any sectors of 512 bytes, or the new size with zeros in it.
- A name (made, renamed or removed) is on the disk once its folder was synced; a sync of the file itself is not enough.
- Of names not synced any subset may have changed (`any`), or the first ones in order, as journaling file systems do
  (`ordered`). A folder whose own name is lost is lost with all that is in it.
- A rename is there as a whole or not at all, and a sync of either of its two folders keeps it.
- A sector is never half written, and what was synced is never lost.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

HEAD = struct.Struct("<iiiiqqii")
KINDS = (
    "", "open", "write", "size", "allocate", "sync", "rename", "unlink", "mkdir", "rmdir", "close", "dup", "link",
    "symlink", "map",
)  # fmt: skip
# What a process can be killed or a machine cut between; the others change nothing.
CHANGES = ("open", "write", "size", "allocate", "sync", "rename", "unlink", "mkdir", "rmdir", "link")
NAME_CHANGES = ("sync", "rename", "unlink", "mkdir", "rmdir", "link")
SECTOR = 512
ORDERS = ("any", "ordered")
EXISTED, TRUNCATE, CREATE = 1, os.O_TRUNC, os.O_CREAT


class Record(NamedTuple):
    """One recorded call. `offset` is that of a write, the new size of a file, or for `open` whether the file existed;
    `inode` is that of an opened file."""

    kind: str
    pid: int
    fd: int
    flags: int
    offset: int
    paths: tuple[str, ...]
    data: bytes
    inode: int


def read_log(path: Path) -> list[Record]:
    """The records of a log in order; one cut short by a kill is left out."""
    raw, at, out = path.read_bytes() if path.exists() else b"", 0, []
    while at + HEAD.size <= len(raw):
        kind, pid, fd, flags, offset, length, paths, _ = HEAD.unpack_from(raw, at)
        at += HEAD.size
        name, at = raw[at : at + paths], at + paths
        size = length if KINDS[kind] == "write" else 0
        data, at = raw[at : at + size], at + size
        if at > len(raw):
            break
        names = tuple(os.fsdecode(part) for part in name.split(b"\0")) if paths else ()
        out.append(Record(KINDS[kind], pid, fd, flags, offset, names, data, length))
    return out


@dataclass(eq=False)
class Node:
    """A file or a folder: as programs see it (`data`, `names`), as it is on the disk (`synced`, `kept`), and the writes
    between (`pending`: an offset and bytes, or a new size and None)."""

    folder: bool
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    names: dict[str, Node] = field(default_factory=dict)
    kept: dict[str, tuple[int, Node | None]] = field(default_factory=dict)

    def change(self, offset: int, data: bytes | None) -> None:
        """Write at an offset, or give a new size."""
        self.pending.append((offset, data))
        write_into(self.data, offset, data)


class Naming(NamedTuple):
    """A change of one name, or of the two of a rename: folder, name, and what is there afterwards."""

    number: int
    changes: tuple[tuple[Node, str, Node | None], ...]


def write_into(target: bytearray, offset: int, data: bytes | None) -> None:
    """Write into a file's content as the system does: a hole is zeros."""
    end = offset + len(data or b"")
    if len(target) < end:
        target.extend(bytes(end - len(target)))
    if data is None:
        del target[offset:]
    else:
        target[offset:end] = data


class Disk:
    """The files below `root` as a record of writes leaves them, beginning with those that are there now, all synced."""

    def __init__(self, root: Path) -> None:
        self.path, self.root = str(root), Node(folder=True)
        self.open: dict[tuple[int, int], Node] = {}
        self.inodes: dict[int, Node] = {}
        self.pending: list[Naming] = []
        self.number = 0
        self.maps = 0  # writable shared maps: writes through them are not recorded
        self._load(root, self.root)

    def _load(self, path: Path, node: Node) -> None:
        for child in sorted(path.iterdir()):
            new = Node(folder=child.is_dir())
            node.names[child.name], node.kept[child.name] = new, (0, new)
            if new.folder:
                self._load(child, new)
            else:
                new.synced = child.read_bytes()
                new.data = bytearray(new.synced)

    def find(self, path: str) -> tuple[Node, str]:
        """The folder that a path is in, and its last name; KeyError where there is no such folder."""
        parts = PurePosixPath(os.path.relpath(path, self.path)).parts
        node = self.root
        for part in parts[:-1]:
            node = node.names[part]
        return node, parts[-1] if parts else "."

    def at(self, path: str) -> Node:
        """The file or folder of a path."""
        folder, name = self.find(path)
        return folder if name == "." else folder.names[name]

    def play(self, record: Record) -> None:
        """Apply one record."""
        key = (record.pid, record.fd)
        if record.kind in ("write", "size", "allocate"):
            node = self.open[key]
            if record.kind == "write":
                node.change(record.offset, record.data)
            elif record.kind == "size" or (record.offset > len(node.data) and not record.flags):
                node.change(record.offset, None)
        elif record.kind == "open":
            self._open(record)
        elif record.kind == "close":
            self.open.pop(key, None)
        elif record.kind == "dup":
            self.open[record.pid, record.flags] = self.open[key]
        elif record.kind == "sync":
            self._sync(self.open[key])
        elif record.kind == "map":
            self.maps += 1
        elif record.kind in ("rename", "link"):
            self._move(record)
        elif record.kind in ("unlink", "rmdir", "mkdir"):
            folder, name = self.find(record.paths[0])
            self._name((folder, name, Node(folder=True) if record.kind == "mkdir" else None))

    def _open(self, record: Record) -> None:
        folder, name = self.find(record.paths[0])
        if not record.offset and record.flags & CREATE and name not in folder.names:
            self._name((folder, name, Node(folder=False)))
        elif name not in folder.names and name != ".":
            self._name(*self._rename_unseen(self.inodes[record.inode]), (folder, name, self.inodes[record.inode]))
        node = self.at(record.paths[0])
        self.inodes[record.inode] = node
        if record.flags & TRUNCATE and node.data:
            node.change(0, None)
        self.open[record.pid, record.fd] = node

    def _rename_unseen(self, node: Node) -> Iterator[tuple[Node, str, None]]:
        """The name that a file had which was renamed without libc, as one to remove."""
        folders = [self.root]
        for folder in folders:
            folders += [child for child in folder.names.values() if child.folder]
            yield from [(folder, name, None) for name, child in folder.names.items() if child is node]

    def _move(self, record: Record) -> None:
        (one, old), (other, new) = map(self.find, record.paths)
        node = one.names[old]
        gone = () if record.kind == "link" else ((one, old, None),)
        self._name(*gone, (other, new, node))

    def _name(self, *changes: tuple[Node, str, Node | None]) -> None:
        self.number += 1
        self.pending.append(Naming(self.number, changes))
        for folder, name, node in changes:
            if node is None:
                folder.names.pop(name, None)
            else:
                folder.names[name] = node

    def _sync(self, node: Node) -> None:
        if not node.folder:
            node.synced, node.pending = bytes(node.data), []
            return
        left = []
        for naming in self.pending:
            if any(folder is node for folder, _, _ in naming.changes):
                for folder, name, what in naming.changes:
                    keep(folder.kept, naming.number, name, what)
            else:
                left.append(naming)
        self.pending = left

    def names_unseen(self, out: Path) -> Iterator[Record]:
        """Records for files of the real folder that have a name here unknown: a rename without libc gave it to them."""
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            folder, name = self.find(str(path))
            if name not in folder.names and path.stat().st_ino in self.inodes:
                yield Record("open", 0, -1, 0, EXISTED, (str(path),), b"", path.stat().st_ino)

    # What is left.

    def write_live(self, out: Path) -> None:
        """Write the files as programs see them: what a kill of the process leaves."""
        write_tree(self.root, out, lambda node: node.names, lambda node: bytes(node.data))

    def write_part(self, path: str, out: Path) -> list[Path]:
        """Write one file or folder as programs see it; the files."""
        node = self.at(path)
        if node.folder:
            write_tree(node, out, lambda node: node.names, lambda node: bytes(node.data))
            return [path for path in out.rglob("*") if path.is_file()]
        out.write_bytes(node.data)
        return [out]

    def write_cut(self, out: Path, order: str, draw: random.Random) -> None:
        """Write files as a power cut may leave them; `order` is one of ORDERS."""
        if order == "ordered":
            lasting = self.pending[: draw.randint(0, len(self.pending))]
        else:
            share = draw.choice((0.0, 0.5, 1.0))
            lasting = [naming for naming in self.pending if draw.random() < share]
        names: dict[int, dict[str, tuple[int, Node | None]]] = {}

        def on_disk(node: Node) -> dict[str, tuple[int, Node | None]]:
            return names.setdefault(id(node), dict(node.kept))

        for naming in lasting:
            for folder, name, what in naming.changes:
                keep(on_disk(folder), naming.number, name, what)
        write_tree(
            self.root,
            out,
            lambda node: {name: what for name, (_, what) in on_disk(node).items() if what is not None},
            lambda node: cut_content(node, draw),
        )


def keep(names: dict[str, tuple[int, Node | None]], number: int, name: str, what: Node | None) -> None:
    """Note what a name stands for, unless a later change of it is already noted."""
    if names.get(name, (-1, None))[0] <= number:
        names[name] = (number, what)


def cut_content(node: Node, draw: random.Random) -> bytes:
    """What of a file's data a power cut may leave."""
    out = bytearray(node.synced)
    how = draw.choice(("nothing", "all", "first", "sectors", "size"))
    if how == "nothing" or not node.pending:
        return bytes(out)
    if how == "size":
        write_into(out, max(len(out), len(node.data)), b"")
        return bytes(out)
    count = draw.randint(0, len(node.pending)) if how == "first" else len(node.pending)
    for offset, data in node.pending[:count]:
        if data is None:
            if how != "sectors" or draw.random() < 0.5:
                write_into(out, offset, None)
            continue
        for start, part in sectors(offset, data) if how == "sectors" else [(offset, data)]:
            if how != "sectors" or draw.random() < 0.5:
                write_into(out, start, part)
    return bytes(out)


def sectors(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """A write as pieces that end where sectors of the disk do."""
    at = 0
    while at < len(data):
        end = min(len(data), ((offset + at) // SECTOR + 1) * SECTOR - offset)
        yield offset + at, data[at:end]
        at = end


def write_tree(
    node: Node, out: Path, names: Callable[[Node], dict[str, Node]], content: Callable[[Node], bytes]
) -> None:
    """Write a folder with all that `names(folder)` and `content(file)` say is in it."""
    out.mkdir(exist_ok=True)
    for name, child in names(node).items():
        if child.folder:
            write_tree(child, out / name, names, content)
        else:
            (out / name).write_bytes(content(child))
