"""The prefix cache on disk: states of long prefixes that leave memory, found again later.

Each file has the last states of a path with its KV blocks, is named by a hash of its tokens and
model, and never changes, so that processes may share a directory. The oldest files go when there
are too many bytes; a file that is used is new again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine import threads
from engine.errors import EngineError, NotEnoughMemoryError
from engine.kvcache.entries import Entry, Text, entry_of
from engine.kvcache.policy import Kind
from engine.kvcache.pool import MemoryFullError
from engine.kvcache.prefix import ID_BYTES, Node, PrefixTree, characters
from engine.kvcache.store import Reader, StoreError, n_bytes_of, write
from engine.runtime.files import Call, Held, NoRoomError, Said, StateFiles, inside

_log = logging.getLogger(__name__)
LEAST = 512  # Tokens. Shorter prefixes are processed sooner than they are read.
_MOST = 16 << 30  # Bytes, unless more are asked for.
_NAME = re.compile(r"[0-9a-f]{64}\.prefix")
_LEFT = re.compile(_NAME.pattern + r"\.tmp")


@dataclass(frozen=True)
class _Index:
    """An index of the files of a directory. It never changes, so any thread may read it."""

    entries: PrefixTree[Path]
    texts: PrefixTree[Text]
    known: Mapping[str, tuple[bytes, Said]]


class DiskCache:
    """A directory of files, of at most `budget` bytes. Its methods are called inside the door,
    but `match_text`."""

    def __init__(self, folder: Path, budget: int | None, files: StateFiles) -> None:
        """budget: in MiB; None: a quarter of what is free. Raises StoreError for a directory that
        can't be made or read, and where there is no prefix cache."""
        self._folder, self._files = folder, files
        if not files.cache.room.budget:
            raise StoreError("cache_dir: expected a prefix cache in memory, got none (cache_ram)")
        self._index = _Index(PrefixTree(), PrefixTree(), {})
        self._seen = -1
        # Inodes of files, by name, that are not of this engine, or that can't be used.
        self._refused: dict[str, int] = {}
        self._is_usable = True
        # Of the names of files. Here, not within a step: it reads the model's file.
        self._of = files.model().encode() + files.signature
        self._writer: threading.Thread | None = None
        self._held: Held | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._refresh()
            most = min(_MOST, shutil.disk_usage(folder).free // 4)
            self._budget = most if budget is None else budget << 20
        except (OSError, ValueError) as error:  # ValueError: the name holds a NUL.
            why = getattr(error, "strerror", None) or error
            raise StoreError(f"{folder}: can't be used: {why}") from None

    def match_text(self, key: str) -> tuple[int, Text | None]:
        """See PrefixCache.match_text."""
        node = self._index.texts.match(characters(key)).node
        return (0, None) if node is None else (node.end, node.kept)

    def load(self, ids: bytes, n_kept: int) -> bool:
        """Read the longest prefix of a prompt into the cache, if it is LEAST longer than `n_kept`;
        whether what is there may have changed."""
        with contextlib.suppress(OSError):
            self._refresh()
        node = self._index.entries.match(ids).node
        if node is None or node.kept is None or node.end < n_kept + LEAST:
            return False
        path = node.kept
        try:
            self._files.read(*self._files.opened(path, inside), inside)
            with contextlib.suppress(OSError):  # Another process may have removed it meanwhile.
                os.utime(path)
        except (MemoryFullError, NoRoomError, MemoryError):
            pass  # What runs has the memory.
        except EngineError as error:
            if os.path.exists(path):  # Else another process has removed it.
                _log.warning("%s", error)
            self._refuse(path)
        return True

    def _refuse(self, path: Path) -> None:
        """Don't use a file any more, unless another one comes in its place."""
        with contextlib.suppress(OSError):
            self._refused[path.name] = os.stat(path).st_ino
        self._index = self._made({k: v for k, v in self._index.known.items() if k != path.name})

    def keep(self, node: Node[Entry]) -> None:
        """Write an entry that leaves memory, if it is long and ends its path. Those on the way into
        a prompt are not written: each file would have its blocks again."""
        if node.end < LEAST or node.children or entry_of(node).kind is Kind.DISTANCE:
            return
        if self._is_writing() or not self._is_usable:
            return
        with contextlib.suppress(OSError):
            self._refresh()
        known = self._index.entries.match(node.path).node
        if known is not None and known.kept is not None and known.end == node.end:
            with contextlib.suppress(OSError):  # It was in use till now.
                os.utime(known.kept)
            return
        ids = self._files.cache.ids_of(node)
        path = self._folder / self._name(ids)
        with contextlib.suppress(MemoryError, NotEnoughMemoryError):
            self._start(path, self._files.hold(node, ids))

    def _start(self, path: Path, held: Held) -> None:
        self._held = held
        writer = threading.Thread(target=self._write, args=(path, held), daemon=True)
        threads.start(writer, "a thread that writes the prefix cache")
        self._writer = writer

    def let_go(self) -> None:
        """Free the memory of what is being written."""
        if self._held is not None:
            self._files.drop(self._held)
            self._held = None

    def _name(self, ids: bytes) -> str:
        """Of the file of some tokens."""
        return f"{hashlib.sha256(self._of + ids).hexdigest()}.prefix"

    def close(self) -> None:
        """Write what is in memory, and wait until it is written; what is worth most comes last, and
        so stays longest. Called outside the door, which the writer needs."""
        for node in self._files.call(self._files.cache.ranked):
            self._wait()
            self._files.call(partial(self.keep, node))
        self._wait()

    def _is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()

    def _write(self, path: Path, held: Held, call: Call | None = None) -> None:
        try:
            info, parts = self._files.contents(held, call)
            with _locked(self._folder):
                n_bytes = n_bytes_of(info, parts)
                if n_bytes <= self._budget:
                    self._make_room(n_bytes)
                    write(path, info, parts)
        except (EngineError, OSError) as error:
            if held.is_dropped:
                return
            why = error.strerror if isinstance(error, OSError) else error
            _log.warning("%s: the cache on disk is off: %s", self._folder, why)
            self._is_usable = False
        finally:
            with contextlib.suppress(EngineError):  # It may be closed meanwhile.
                (self._files.call if call is None else call)(self.let_go)

    def _make_room(self, n_bytes: int) -> None:
        """Remove the oldest files until so many bytes more are within the budget, and what killed
        processes have left of files."""
        found = []
        for entry in self._listed(_LEFT):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry)
        for entry in self._listed():
            with contextlib.suppress(FileNotFoundError):
                found.append((entry.stat(), entry))
        left = sum(stat.st_size for stat, _ in found) + n_bytes - self._budget
        for stat, entry in sorted(found, key=lambda pair: pair[0].st_mtime_ns):
            if left <= 0:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry)
            left -= stat.st_size

    def _listed(self, names: re.Pattern[str] = _NAME) -> list[os.DirEntry[str]]:
        """Its files, whosever process wrote them; others in the directory are left alone."""
        with os.scandir(self._folder) as entries:
            named = [entry for entry in entries if names.fullmatch(entry.name)]
        return [entry for entry in named if entry.is_file(follow_symlinks=False)]

    def _refresh(self) -> None:
        """Look at files that came or went since it was done last."""
        changed = os.stat(self._folder).st_mtime_ns
        if changed == self._seen:
            return
        self._seen = changed
        known = dict[str, tuple[bytes, Said]]()
        for entry in self._listed():
            if entry.name in self._index.known:
                known[entry.name] = self._index.known[entry.name]
            elif self._refused.get(entry.name) != entry.inode():
                found = self._looked_at(Path(entry.path))
                if found is None:
                    self._refused[entry.name] = entry.inode()
                else:
                    known[entry.name] = found
        self._index = self._made(known)

    def _looked_at(self, path: Path) -> tuple[bytes, Said] | None:
        """What a file has; None if it went, or is of another model or types."""
        with contextlib.suppress(EngineError):
            reader = Reader(path)
            said = Said.of(reader)
            ids = reader.first().tobytes()
            # Its tokens are not hashed alone, but its name is their hash.
            if path.name == self._name(ids):
                return ids, said
        return None

    def _made(self, known: Mapping[str, tuple[bytes, Said]]) -> _Index:
        entries, texts = PrefixTree[Path](), PrefixTree[Text]()
        for name, (ids, said) in known.items():
            for n, _ in said.states:
                entries.put(ids[: ID_BYTES * n], self._folder / name)
            for key, n_ids, ends in said.texts:
                texts.put(characters(key), Text(ids[: ID_BYTES * n_ids], ends))
        return _Index(entries, texts, known)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time changes a directory."""
    number = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(number, fcntl.LOCK_UN)  # A process forked meanwhile has it, too.
        os.close(number)
