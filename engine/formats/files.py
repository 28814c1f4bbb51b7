"""A file that is read at any offset, and that must not change meanwhile.

It is never mapped: to touch a map behind the end of a file that was cut kills the process.
"""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError, NotEnoughMemoryError

# What is refused: a path that names no regular file.
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


class File:
    """A regular file that is open for reading, from any thread; `size`: its bytes.

    `what` describes it for errors, whose class is `error`; NotEnoughMemoryError is the other one.
    """

    def __init__(
        self, error: type[EngineError], path: Path, what: str, is_hashed: bool = False
    ) -> None:
        """is_hashed: its reader sees a change by its hash, and others may renew its time."""
        self._error, self._path, self._is_hashed = error, path, is_hashed
        try:
            # To open a FIFO waits for its writer, and devices may never end.
            if kind := _KINDS.get(stat.S_IFMT(path.stat().st_mode)):
                raise error(f"{path}: expected {what}, got {kind}")
            self._number = os.open(path, os.O_RDONLY)
        except (OSError, ValueError) as failed:  # ValueError: the name holds a NUL.
            raise self._refusal(failed) from None
        weakref.finalize(self, os.close, self._number)
        self._opened = os.fstat(self._number)
        self.size = self._opened.st_size

    def read(self, begin: int, end: int, what: str) -> NDArray[np.uint8]:
        """Bytes `begin` to `end`, uint8, of `what`; an error if the file was cut or changed."""
        try:
            data = np.empty(end - begin, np.uint8)
        except MemoryError:
            needed = (end - begin) / 2**20
            raise NotEnoughMemoryError(
                f"{self._path}: out of memory: {what} needs {needed:.1f} MiB"
            ) from None
        self.read_into(data, begin, what)
        return data

    def read_into(self, data: NDArray[np.uint8], begin: int, what: str) -> None:
        """As `read`, into [n] uint8."""
        n_read = 0
        try:
            while n_read < len(data):
                n = os.preadv(self._number, [data.data[n_read:]], begin + n_read)
                if n == 0:
                    break
                n_read += n
            now = os.fstat(self._number)
        except OSError as failed:
            raise self._refusal(failed) from None
        if n_read < len(data):
            lacks = f"{what} needs {len(data)} bytes at offset {begin}, the file has {now.st_size}"
            raise self._error(f"{self._path}: cut while it was read: {lacks}")
        is_same = self._is_hashed or now.st_mtime_ns == self._opened.st_mtime_ns
        if now.st_size != self.size or not is_same:
            raise self._error(f"{self._path}: changed while it was read: load it again")

    def expect(self, begin: int, n_bytes: int) -> None:
        """Have the system read some bytes ahead."""
        os.posix_fadvise(self._number, begin, n_bytes, os.POSIX_FADV_WILLNEED)

    def _refusal(self, failed: OSError | ValueError) -> EngineError:
        return self._error(f"{self._path}: {getattr(failed, 'strerror', None) or failed}")
