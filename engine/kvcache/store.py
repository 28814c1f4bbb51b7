"""Files of what memory holds of a sequence: safetensors, with hashes as last tensor.

    header   {"__metadata__": {"format": …, "version": …, "info": JSON}, "tokens": …, …}
    data     tokens, rows of every state, hashes of the header and of the tensors before

A file is written beside its place, brought to the disk, and renamed: whoever reads it at its place
reads all of it. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from engine import checks, threads
from engine.errors import EngineError
from engine.formats.files import File

FORMAT, VERSION = "gdn-engine session", 1
Array = NDArray[Any]
Shape = tuple[np.dtype[Any], tuple[int, ...]]
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4", "U8": "|u1"}
_NAMES = {np.dtype(numpy): name for name, numpy in _DTYPES.items()}
_HASH = "sha256"
_N_HASH = hashlib.new(_HASH).digest_size
_MOST_HEADER = 100 << 20  # The format's own limit.
_MOST_DIMS = 8
_WHOLE = "a whole session"
PIECE = 8 << 20  # Bytes that are read or written at a time.
_FLUSHED = 64 << 20  # Bytes that are brought to the disk at a time.


class StoreError(EngineError):
    """A file that can't be written, or is not what was expected."""


@dataclass(frozen=True)
class Part:
    """A tensor of a file. `pieces` gives it in order, each until the next one is asked for."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Array]]

    @classmethod
    def of(cls, name: str, array: Array) -> Part:
        return cls(name, array.dtype, array.shape, lambda: [array])

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


_HASHES = Part.of(_HASH, np.empty((2, _N_HASH), np.uint8))  # Of the header, and of the tensors.


def write(path: Path, info: Mapping[str, Any], parts: Sequence[Part]) -> int:
    """Write a file, in place of what may be there; returns its bytes. `info`: what JSON has. Raises
    StoreError, and leaves what was there."""
    header, digest = _header(path, info, parts), hashlib.new(_HASH)
    if len(header) > _MOST_HEADER:
        most = f"{_MOST_HEADER >> 20} MiB of texts and data"
        raise StoreError(f"{path}: expected at most {most}, got {len(header) / 2**20:.1f}")
    try:
        # To hash takes as long as to write, and so does the disk.
        with _replaced(_place(path)) as file, threads.pool("threads that write a file", 2) as pool:
            file.write(header)
            flushed, n_flushed = pool.submit(lambda: None), 0
            for data in (_bytes(piece) for part in parts for piece in part.pieces()):
                hashed = pool.submit(digest.update, data)
                while data:
                    data = data[file.write(data) :]
                hashed.result()
                if (end := file.tell()) - n_flushed >= _FLUSHED:
                    flushed.result()
                    flushed, n_flushed = pool.submit(_flush, file.fileno(), end), end
            flushed.result()
            file.write(hashlib.new(_HASH, header).digest() + digest.digest())
            n_bytes = int(file.tell())
            assert n_bytes == len(header) + sum(p.n_bytes for p in (*parts, _HASHES))
            return n_bytes
    except OSError as error:
        raise StoreError(f"{path}: can't be written: {error.strerror or error}") from None


def n_bytes_of(info: Mapping[str, Any], parts: Sequence[Part]) -> int:
    """Bytes of a file."""
    return len(_header(Path(), info, parts)) + sum(part.n_bytes for part in (*parts, _HASHES))


def _place(path: Path) -> Path:
    """Where a file is or will be. Raises OSError where something else is, such as a device: it
    would be replaced."""
    try:
        place = Path(os.path.realpath(path))
    except ValueError as error:  # The name holds a NUL.
        raise OSError(str(error)) from None
    if place.exists() and not place.is_file():
        raise OSError("something other than a file is there")
    return place


def _flush(number: int, end: int) -> None:
    """Bring a file to the disk up to a place, and give its pages back: to find others for the rest
    can take longer than to write it."""
    os.fdatasync(number)
    os.posix_fadvise(number, 0, end, os.POSIX_FADV_DONTNEED)


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _header(path: Path, info: Mapping[str, Any], parts: Sequence[Part]) -> bytes:
    try:
        said = {"format": FORMAT, "version": str(VERSION), "info": json.dumps(info)}
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: data: expected what JSON has: {error}") from None
    entries: dict[str, Any] = {"__metadata__": said}
    end = 0
    for part in (*parts, _HASHES):
        begin, end = end, end + part.n_bytes
        entry = {"dtype": _NAMES[part.dtype], "shape": part.shape, "data_offsets": (begin, end)}
        entries[part.name] = entry
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # So that tensors are aligned.
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Any]:
    """A file that takes a place when it is whole. One process at a time writes there."""
    beside = path.with_name(path.name + ".tmp")
    with _locked(path, beside) as file:
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
    # The name must be on the disk, too, as far as the file system brings it there.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _locked(path: Path, beside: Path) -> IO[bytes]:
    """A file beside a place, which nobody else writes until it is closed."""
    while True:
        # Nothing that is there is lost before it is locked.
        file = os.fdopen(
            os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0
        )
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(beside)):
                    return file
            file.close()  # Another process has just given it its place.
        except BaseException as error:
            file.close()
            if isinstance(error, BlockingIOError):
                raise StoreError(f"{path}: another process writes it") from None
            raise


class Reader:
    """A file whose header is whole, to be read once: `info` is what its writer said, `shapes` has
    (dtype, shape) of its tensors. Raises StoreError.

    It is not mapped: to touch a map behind the end of a file that is cut kills the process.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, File(StoreError, path, "a session", is_hashed=True)
        n_header = int.from_bytes(self._bytes(0, 8), "little")
        self._begin = 8 + n_header
        self._end = self._file.size - _HASHES.n_bytes
        if not 0 < n_header <= min(_MOST_HEADER, self._end - 8):
            raise StoreError(f"{path}: expected a session, got no safetensors file")
        header = self._bytes(0, self._begin)
        if FORMAT.encode() not in header[:64]:
            raise StoreError(f"{path}: expected a session, got another file")
        hashes = self._bytes(self._end, self._file.size)
        self._hash = hashes[_N_HASH:]
        if hashlib.new(_HASH, header).digest() != hashes[:_N_HASH]:
            raise self.refused(_WHOLE)
        try:
            entries = json.loads(header[8:])
            said = entries.pop("__metadata__")
            if said["version"] != str(VERSION):
                came = f"of the format, got {checks.shown(said['version'])}"
                raise StoreError(f"{path}: expected version {VERSION} {came}")
            self.info = json.loads(said["info"])
            self.shapes = _shapes(entries, self._file.size - self._begin)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise self.refused("a session") from None

    def pieces(self, n_bytes: int = PIECE) -> Iterator[tuple[str, int, Array]]:
        """Its tensors in order, as (name, first row, rows), each until the next one is asked for.
        Raises StoreError at the end if they are not what was written: what was read must not be
        used then. n_bytes: of a piece, unless a row has more."""
        rows = [dtype.itemsize * math.prod(shape[1:]) for dtype, shape in self.shapes.values()]
        buffer = np.empty(max([n_bytes, *rows]), np.uint8)
        at, digest = self._begin, hashlib.new(_HASH)
        with threads.pool("a thread that hashes", 1) as hashing:
            for name, (dtype, shape) in self.shapes.items():
                n_row = math.prod(shape[1:]) * dtype.itemsize
                n_rows = max(1, len(buffer) // max(1, n_row))
                n_all = math.prod(shape[:1]) if n_row else 0
                for first in range(0, n_all, n_rows):
                    n = min(n_rows, n_all - first)
                    data = buffer[: n * n_row]
                    self._file.read_into(data, at, name)
                    self._file.expect(at + len(data), _FLUSHED)
                    at += len(data)
                    hashed = hashing.submit(digest.update, data.data)
                    yield name, first, data.view(dtype).reshape(n, *shape[1:])
                    hashed.result()
        if digest.digest() != self._hash:
            raise self.refused(_WHOLE)

    def first(self) -> Array:
        """Its first tensor, not checked yet."""
        name, (dtype, shape) = next(iter(self.shapes.items()))
        n_bytes = math.prod(shape) * dtype.itemsize
        return self._file.read(self._begin, self._begin + n_bytes, name).view(dtype).reshape(shape)

    def _bytes(self, begin: int, end: int) -> bytes:
        """Fewer if the file ends before."""
        return self._file.read(begin, max(begin, min(end, self._file.size)), "the header").tobytes()

    def refused(self, expected: str) -> StoreError:
        """The error for a file that is not what was expected."""
        came = "one that was cut or changed" if expected == _WHOLE else "what no session has"
        return StoreError(f"{self.path}: expected {expected}, got {came}")


def _shapes(entries: Mapping[str, Any], n_bytes: int) -> dict[str, Shape]:
    """(dtype, shape) of a header's entries: one after the other they fill `n_bytes`, and the hashes
    are the last. Raises any of what Reader.__init__ expects for other ones."""
    shapes, at = dict[str, Shape](), 0
    for name, entry in entries.items():
        dtype, shape, offsets = (entry[key] for key in ("dtype", "shape", "data_offsets"))
        is_list = isinstance(shape, list) and len(shape) <= _MOST_DIMS and len(entry) == 3
        if not is_list or not all(checks.is_integer(n) and 0 <= n < 2**48 for n in shape):
            raise ValueError
        if math.prod(n or 1 for n in shape) >= 2**48:  # More than numpy may count.
            raise ValueError
        shapes[name] = np.dtype(_DTYPES[dtype]), tuple(shape)
        begin, at = at, at + math.prod(shape) * shapes[name][0].itemsize
        if offsets != [begin, at] or not all(map(checks.is_integer, offsets)):
            raise ValueError
    if at != n_bytes or list(shapes)[-1:] != [_HASH]:
        raise ValueError
    if shapes.pop(_HASH) != (_HASHES.dtype, _HASHES.shape):
        raise ValueError
    return shapes
