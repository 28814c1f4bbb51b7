"""Reader of GGUF files: metadata and tensor table, with the tensor data left on disk.

A tensor's bytes are read when a backend asks for them. Files are untrusted: every count, length and
offset is checked against the file's size before it is used. Versions 2 and 3, little-endian; split
files (`-00001-of-0000N.gguf`) are joined. Format: ggml's docs/gguf.md.
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import checks
from engine.errors import EngineError
from engine.formats import ollama
from engine.formats.files import File
from engine.formats.quants import BY_GGML_ID, WEIGHT_TYPES, DType, names

MAGIC = b"GGUF"
_CONVERTER = "llama.cpp's convert_hf_to_gguf.py"
MAX_DIMS = 4
# The longest names, so that a message may quote several: of tensors as in ggml.
MAX_KEY, MAX_NAME = 256, 63
# Bytes of the header that are read at a time.
_CHUNK = 1 << 20
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
# numpy's types by the format's value type number.
_SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
# The shortest entries: a key of length 0, its type, one byte; a name of length 0, no dims, …
_MIN_KV_BYTES, _MIN_TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8
_SPLIT_NAME = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


class GGUFError(EngineError):
    """The file is not a GGUF that this engine can read."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's row-major `shape`, its type, and where its bytes are in file `file_index`."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    offset: int
    nbytes: int
    file_index: int = 0


class Strings:
    """Texts as the file stores them, each decoded when it is asked for: a text in memory takes up
    to nine times what it takes in the file. What is no UTF-8 is its bytes."""

    def __init__(self, data: bytes, n: int) -> None:
        self._data, self._n = data, n

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[str | bytes]:
        data, end, unpack = self._data, 0, _U64.unpack_from
        for _ in range(self._n):
            begin = end + 8
            end = begin + unpack(data, end)[0]
            text = data[begin:end]
            try:
                yield text.decode()
            except UnicodeDecodeError:
                yield text


class GGUFFile:
    """A GGUF file (or the set of files that it is split into).

    `metadata`: key -> bool, int, float, str, Strings, or a 1-D numpy array.
    `tensors`: name -> TensorInfo, in file order. `integer`, `number` (finite), `string` and
    `boolean` read a value of the metadata; without `default` a missing key is an error.
    Raises GGUFError for anything that is not a readable GGUF file.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        name = checks.path(GGUFError, "model", path)
        in_store = name.startswith(ollama.PREFIX)
        self.path = ollama.find(name.removeprefix(ollama.PREFIX)) if in_store else Path(name)
        first = _Parser(self.path, 0)
        self.metadata: dict[str, Any] = first.metadata
        self.tensors: dict[str, TensorInfo] = first.tensors
        self._files = [first.file]
        n_split = self.integer("split.count", 0)
        if n_split > 1:
            self._join_splits(n_split)
        self.size = sum(file.size for file in self._files)

    def _join_splits(self, n_split: int) -> None:
        match = _SPLIT_NAME.match(self.path.name)
        if match is None or int(match[3]) != n_split:
            raise GGUFError(
                f"{self.path}: one of {n_split} split files, so its name must end in "
                f"-00001-of-{n_split:05d}.gguf"
            )
        if (number := self.integer("split.no", 0)) != 0 or int(match[2]) != 1:
            raise GGUFError(
                f"{self.path}: split file {number + 1} of {n_split}; open the first one"
            )
        for i in range(1, n_split):
            path = self.path.with_name(f"{match[1]}-{i + 1:05d}-of-{n_split:05d}.gguf")
            part = _Parser(path, i)
            for key, expected in (("split.no", i), ("split.count", n_split)):
                came = part.metadata.get(key)
                if not isinstance(came, int) or came != expected:
                    raise GGUFError(f"{path}: expected {key} = {expected}, got {shown(came)}")
            if doubled := self.tensors.keys() & part.tensors.keys():
                raise GGUFError(f"{path}: tensor {min(doubled)} is in another split file too")
            self.tensors.update(part.tensors)
            self._files.append(part.file)
        expected = self.integer("split.tensors.count", len(self.tensors))
        if len(self.tensors) != expected:
            raise GGUFError(
                f"{self.path}: expected {expected} tensors in {n_split} split files, "
                f"got {len(self.tensors)}"
            )

    def raw(self, name: str, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """Bytes `begin` to `end` (None: to the last) of a tensor as stored, uint8, read now.

        Raises GGUFError if the file was cut or changed since it was opened.
        """
        info = self.tensors[name]
        end = info.nbytes if end is None else end
        file = self._files[info.file_index]
        return file.read(info.offset + begin, info.offset + end, f"tensor {name}")

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._value(key, default, "an integer", int))

    def number(self, key: str, default: float | None = None) -> float:
        value = float(self._value(key, default, "a number", int, float))
        if not math.isfinite(value):
            raise self._unfit(key, "a number", value)
        return value

    def string(self, key: str, default: str | None = None) -> str:
        return str(self._value(key, default, "a string", str))

    def boolean(self, key: str, default: bool | None = None) -> bool:
        return bool(self._value(key, default, "true or false", bool))

    def _value(self, key: str, default: Any, expected: str, *types: type) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise GGUFError(f"{self.path}: metadata {key} is missing")
        if type(value) not in types:
            raise self._unfit(key, expected, value)
        return value

    def _unfit(self, key: str, expected: str, value: Any) -> GGUFError:
        return GGUFError(f"{self.path}: metadata {key}: expected {expected}, got {shown(value)}")


class _Parser:
    """One pass over one file's header; afterwards `metadata`, `tensors` and `file` are set."""

    def __init__(self, path: Path, file_index: int) -> None:
        self.path, self.file_index = path, file_index
        self.file = _open(path)
        # The beginning of the file, as far as it was needed.
        self._data, self.pos = bytearray(), 0
        n_tensors, n_kv = self._header()
        self.metadata = self._metadata(n_kv)
        self.tensors = self._tensor_table(n_tensors)

    def _fail(self, message: str) -> GGUFError:
        return GGUFError(f"{self.path}: {message}")

    def _need(self, nbytes: int, what: str) -> int:
        """Have `nbytes` more bytes of the file at hand; returns how many there are in all."""
        end, left = self.pos + nbytes, self.file.size - self.pos
        if nbytes > left:
            raise self._fail(
                f"truncated: {what} needs {nbytes} bytes at offset {self.pos}, {left} are left"
            )
        if end > (n_read := len(self._data)):
            more = min(max(end, n_read + _CHUNK), self.file.size)
            self._data.extend(self.file.read(n_read, more, what).data)
        return len(self._data)

    def _uint(self, nbytes: int, what: str) -> int:
        self._need(nbytes, what)
        self.pos += nbytes
        return int.from_bytes(self._data[self.pos - nbytes : self.pos], "little")

    def _string(self, what: str) -> str | bytes:
        """A string; its bytes if they are no UTF-8, which no reader of strings takes."""
        length = self._uint(8, what)
        self._need(length, f"a string of {what}")
        self.pos += length
        with memoryview(self._data) as data, data[self.pos - length : self.pos] as text:
            try:
                return str(text, "utf-8")
            except UnicodeDecodeError:
                return bytes(text)

    def _strings(self, n: int, what: str) -> Strings:
        self._need(8 * n, what)
        begin = end = self.pos
        data, unpack, n_read = self._data, _U64.unpack_from, len(self._data)
        for _ in range(n):
            if end + 8 > n_read:
                self.pos = end
                n_read = self._need(8, what)
            (length,) = unpack(data, end)
            end += 8 + length
            if end > n_read:
                self.pos = end - length
                n_read = self._need(length, f"a string of {what}")
        self.pos = end
        return Strings(bytes(memoryview(data)[begin:end]), n)

    def _name(self, what: str, longest: int) -> str:
        """A key or a tensor's name: short and printable, so that every message may quote it."""
        name = self._string(what)
        if isinstance(name, bytes):
            raise self._fail(f"{what}: expected UTF-8, got {name[:16]!r}")
        if len(name) > longest or not name.isprintable():
            raise self._fail(
                f"{what}: expected at most {longest} printable characters, got {shown(name)}"
            )
        return name

    def _header(self) -> tuple[int, int]:
        self._need(min(9, self.file.size), "the header")
        magic = bytes(self._data[:4])
        if magic != MAGIC[: len(magic)]:
            # A safetensors file begins with the length of its JSON.
            is_other = self._data[8:9] == b"{" or magic[:2] == b"PK"
            hint = f"; {_CONVERTER} converts safetensors and PyTorch's files" * is_other
            raise self._fail(f"not a GGUF file: expected magic {MAGIC!r}, got {magic!r}{hint}")
        self.pos = 4
        version = self._uint(4, "the version")
        if version not in (2, 3):
            if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
                raise self._fail("a big-endian GGUF file; only little-endian ones can be read")
            raise self._fail(f"GGUF version {version}; expected 2 or 3")
        n_tensors, n_kv = self._uint(8, "the tensor count"), self._uint(8, "the metadata count")
        left = self.file.size - self.pos
        for n, each, what in (
            (n_tensors, _MIN_TENSOR_BYTES, "tensors"),
            (n_kv, _MIN_KV_BYTES, "metadata entries"),
        ):
            if n * each > left:
                raise self._fail(f"{n} {what} cannot fit in the {left} bytes that follow")
        return n_tensors, n_kv

    def _metadata(self, n_kv: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(n_kv):
            key = self._name(f"the key of metadata entry {i}", MAX_KEY)
            if key in metadata:
                raise self._fail(f"metadata key {key} appears twice")
            metadata[key] = self._metadata_value(self._uint(4, key), key)
        return metadata

    def _metadata_value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            return self._numbers(kind, 1, key)[0].item()
        kind, n = self._uint(4, key), self._uint(8, key)
        return self._strings(n, key) if kind == _STRING else self._numbers(kind, n, key)

    def _numbers(self, kind: int, n: int, key: str) -> NDArray[Any]:
        if kind not in _SCALARS:
            raise self._fail(f"metadata {key}: unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        self._need(n * dtype.itemsize, f"metadata {key}")
        values = np.frombuffer(self._data, dtype, count=n, offset=self.pos).copy()
        if dtype.kind == "b":
            values = values.view(np.uint8) != 0
        self.pos += n * dtype.itemsize
        return values

    def _tensor_table(self, n_tensors: int) -> dict[str, TensorInfo]:
        alignment = self.metadata.get("general.alignment", 32)
        is_power = type(alignment) is int and alignment > 0 and not alignment & (alignment - 1)
        if not is_power:
            came = shown(alignment)
            raise self._fail(f"general.alignment: expected a power of two, got {came}")
        entries = [self._tensor_entry(i) for i in range(n_tensors)]
        base = -(-self.pos // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, dtype, offset in entries:
            if name in tensors:
                raise self._fail(f"tensor {name} appears twice")
            nbytes = dtype.nbytes(shape)
            if offset % alignment:
                raise self._fail(f"tensor {name}: offset {offset} is no multiple of {alignment}")
            if base + offset + nbytes > self.file.size:
                raise self._fail(
                    f"truncated: tensor {name} needs {nbytes} bytes at offset {base + offset}, "
                    f"the file has {self.file.size}"
                )
            tensors[name] = TensorInfo(name, shape, dtype, base + offset, nbytes, self.file_index)
        self._check_apart(tensors)
        return tensors

    def _check_apart(self, tensors: dict[str, TensorInfo]) -> None:
        """Tensors that share bytes would let a small file take much memory; ggml has none."""
        for a, b in pairwise(sorted(tensors.values(), key=lambda t: t.offset)):
            if b.offset < (end := a.offset + a.nbytes):
                raise self._fail(
                    f"tensor {b.name} overlaps tensor {a.name}: expected an offset in the file of "
                    f"at least {end}, got {b.offset}"
                )

    def _tensor_entry(self, i: int) -> tuple[str, tuple[int, ...], DType, int]:
        name = self._name(f"the name of tensor {i}", MAX_NAME)
        what = f"tensor {name}"
        n_dims = self._uint(4, what)
        if not 1 <= n_dims <= MAX_DIMS:
            raise self._fail(f"{what}: expected 1 to {MAX_DIMS} dimensions, got {n_dims}")
        # ggml lists dimensions innermost first; ours are row-major from here on.
        shape = tuple(self._uint(8, what) for _ in range(n_dims))[::-1]
        if 0 in shape:
            raise self._fail(f"{what}: shape {shape} has no elements")
        type_id = self._uint(4, what)
        dtype = BY_GGML_ID.get(type_id)
        if dtype is None:
            known = names(WEIGHT_TYPES.values())
            raise self._fail(f"{what}: unknown tensor type {type_id}; known are {known}")
        if shape[-1] % dtype.block_elems:
            raise self._fail(
                f"{what}: rows of {shape[-1]} are no whole {dtype.name} blocks of "
                f"{dtype.block_elems}"
            )
        return name, shape, dtype, self._uint(8, what)


def shown(value: Any) -> str:
    """A metadata value as an error's text shows it: short, and in one line."""
    if isinstance(value, Strings):
        return f"an array of {len(value)} strings"
    if isinstance(value, np.ndarray):
        return f"an array of {len(value)} {value.dtype}"
    return "nothing" if value is None else checks.shown(value)


def _open(path: Path) -> File:
    if path.is_dir():
        is_model = any(path.glob("*.safetensors")) or (path / "config.json").exists()
        hint = f"; {_CONVERTER} converts a model's directory" * is_model
        raise GGUFError(f"{path}: expected a GGUF file, got a directory{hint}")
    file = File(GGUFError, path, "a GGUF file")
    if file.size == 0:
        raise GGUFError(f"{path}: expected a GGUF file, got an empty file")
    return file
