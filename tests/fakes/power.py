"""What a power cut leaves: a log of file operations, replayed by the rules of POSIX and of journaling file systems.

A file's bytes are safe once the file was synced, a name once its directory was. Everything else may be there or not, so
each moment leaves several trees. Modes and times are not looked at.
"""

import os
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fakes.disk import Operations

Call = tuple[str, tuple[Any, ...]]  # an operation and its paths (relative to the root), bytes and offsets


class Recorder(Operations):
    """The changes below `root`, in order; those of several threads wait for each other."""

    def __init__(self, root: Path) -> None:
        super().__init__(lambda name, args: None, lambda: None)
        self.root, self.calls = root.resolve(), list[Call]()
        self._turn = threading.RLock()

    def _around(self, name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            with self._turn:
                told = self._told(name, args, options)
                result = real(*args, **options)
                if told is not None:
                    self.calls.append(told)
                return result

        return call

    def _told(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Call | None:
        if name in ("pwrite", "write", "fsync", "fdatasync", "ftruncate"):
            path = self._inside(Path(f"/proc/self/fd/{args[0]}").readlink())
            more = {"pwrite": lambda: (bytes(args[1]), args[2]), "write": lambda: (bytes(args[1]), None)}
            rest = more[name]() if name in more else args[1:]
            return path and (name, (path, *rest))
        paths = [self._inside(self._at(args[0], options.get("dir_fd", options.get("src_dir_fd"))))]
        if name == "rename":
            paths.append(self._inside(self._at(args[1], options.get("dst_dir_fd"))))
        return (name, tuple(paths)) if all(paths) else None

    @staticmethod
    def _at(path: Any, directory: int | None) -> Path:
        base = Path(f"/proc/self/fd/{directory}").readlink() if directory is not None else Path.cwd()
        return base / os.fspath(path)

    def _inside(self, path: Path) -> str | None:
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else None


@dataclass
class Node:
    """A directory (`names`) or a file (`data`), as programs see it now and as it is safe."""

    names: dict[str, int] | None = None
    safe_names: dict[str, int] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    safe_data: bytes = b""


Tree = dict[str, bytes | None]  # None: a directory
RULES = ("nothing else", "names, and files as long as they are", "names", "all")


class Disk:
    """A tree that was all safe, and what happens to it."""

    def __init__(self, root: Path) -> None:
        self.nodes: list[Node] = [Node({})]
        for path in sorted(root.rglob("*")):
            self._add(path.relative_to(root).as_posix(), path.is_dir())
            if path.is_file():
                self._node(path.relative_to(root).as_posix()).data[:] = path.read_bytes()
        for node in self.nodes:
            node.safe_data = bytes(node.data)
            node.safe_names = dict(node.names or {})

    def _parent(self, path: str) -> tuple[dict[str, int], str]:
        *folders, name = path.split("/")
        at = 0
        for folder in folders:
            at = self._names(at)[folder]
        return self._names(at), name

    def _names(self, at: int) -> dict[str, int]:
        names = self.nodes[at].names
        assert names is not None
        return names

    def _node(self, path: str) -> Node:
        if path == ".":
            return self.nodes[0]
        names, name = self._parent(path)
        return self.nodes[names[name]]

    def _add(self, path: str, folder: bool) -> None:
        names, name = self._parent(path)
        names[name] = len(self.nodes)
        self.nodes.append(Node({} if folder else None))

    def take(self, call: Call) -> None:
        name, (path, *rest) = call
        if name == "mkdir" or (name == "open" and not self._exists(path)):
            self._add(path, name == "mkdir")
        elif name in ("pwrite", "write"):
            node, (data, offset) = self._node(path), rest
            offset = len(node.data) if offset is None else offset
            node.data.extend(bytes(max(0, offset - len(node.data))))
            node.data[offset : offset + len(data)] = data
        elif name == "ftruncate":
            del self._node(path).data[rest[0] :]
        elif name in ("fsync", "fdatasync"):
            node = self._node(path)
            node.safe_data, node.safe_names = bytes(node.data), dict(node.names or {})
        elif name in ("unlink", "rmdir", "rename"):
            names, old = self._parent(path)
            moved = names.pop(old)
            if name == "rename":
                target, new = self._parent(rest[0])
                target[new] = moved

    def _exists(self, path: str) -> bool:
        names, name = self._parent(path)
        return name in names

    def left(self, rule: str, names_of: "Disk | None" = None) -> Tree:
        """`names_of`: a moment before, whose names are the last that came onto the disk."""
        found: Tree = {}
        self._walk(0, "", rule, names_of or self, found)
        return found

    def _walk(self, at: int, prefix: str, rule: str, namer: "Disk", found: Tree) -> None:
        node = namer.nodes[at]
        for name, inner in (node.safe_names if rule == RULES[0] else node.names or {}).items():
            child, path = self.nodes[inner], prefix + name
            if child.names is not None:
                found[path] = None
                self._walk(inner, path + "/", rule, namer, found)
            elif rule == "all":
                found[path] = bytes(child.data)
            elif rule == RULES[1]:
                found[path] = child.safe_data + bytes(max(0, len(child.data) - len(child.safe_data)))
            else:
                found[path] = child.safe_data


def cuts(before: Path, calls: list[Call]) -> Iterator[tuple[str, Tree, Tree]]:
    """Every tree that a cut at any moment of `calls` may leave of `before`, each once: what led to it, the tree, and
    how programs saw it."""
    disk, seen = Disk(before), set[int]()
    older = deepcopy(disk)
    for n, call in enumerate([None, *calls]):
        if call is not None:
            disk.take(call)
        for rule in RULES:
            for namer in (None, older) if rule in RULES[1:3] else (None,):
                tree = disk.left(rule, namer)
                key = hash(tuple(sorted(tree.items(), key=lambda item: item[0])))
                if key not in seen:
                    seen.add(key)
                    what = f"{call[0]} {call[1][0]}" if call else "the start"
                    yield f"cut after {n}, {what}: safe and {rule}", tree, disk.left("all")
        if call is not None and call[0] in ("fsync", "fdatasync"):
            older = deepcopy(disk)  # a journal is written with the next sync of anything


def make(tree: Tree, root: Path) -> None:
    for path, data in sorted(tree.items()):
        if data is None:
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)


def killer(at: int, torn: bool) -> Operations:
    """kill -9 at the operation with this number, from 1; `torn`: in the middle of a write."""
    return _Killer(at, torn)


class _Killer(Operations):
    def __init__(self, at: int, torn: bool) -> None:
        super().__init__(lambda name, args: None, lambda: None)
        self.at, self.torn, self.count = at, torn, 0
        self._turn = threading.Lock()

    def _around(self, name: str, real: Callable[..., Any]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **options)
            with self._turn:
                self.count += 1
                here = self.count == self.at
            if here:
                if self.torn and name in ("write", "pwrite"):
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), 9)
            return real(*args, **options)

        return call
