"""A model's weights: what its file must have, and what is made of it without changing a value.

Shapes are compared without their ones: files differ in where they put them. Rows of a tensor can
be given another order or another name, which is exact for every stored type, since blocks never
cross rows; so a model has one set of names, whatever packing its file has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.formats.gguf import GGUFFile, TensorInfo
from engine.graph import Shape
from engine.models.hparams import ModelError

# How many tensors of a kind a message names; the others are counted.
_NAMED = 6
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class _Rows:
    """Some rows of a file's tensor, in some order."""

    source: str
    index: slice | NDArray[Any]


class Weights:
    """The tensors of a file that a model uses, in the shapes that it expects.

    Raises ModelError with everything that is missing, misshapen or unexpected. Tensors of the
    layers `skipped`, which are for multi-token prediction, are ignored.
    """

    def __init__(self, file: GGUFFile, expected: Mapping[str, Shape], skipped: range) -> None:
        self._file, self._rows = file, dict[str, _Rows]()
        _check(file, expected, skipped)
        self.tensors: dict[str, TensorInfo] = {
            name: replace(file.tensors[name], shape=shape) for name, shape in expected.items()
        }

    def reshape(self, name: str, shape: Shape) -> None:
        """Give a tensor another shape with rows of the same length."""
        self.tensors[name] = replace(self.tensors[name], shape=shape)

    def take_rows(self, name: str, source: str, index: slice | NDArray[Any], shape: Shape) -> None:
        """Make a tensor of rows of another one; a slice of them costs no memory."""
        info = self.tensors[source]
        nbytes = math.prod(shape[:-1]) * info.dtype.row_bytes(shape[-1])
        self.tensors[name] = replace(info, name=name, shape=shape, nbytes=nbytes)
        self._rows[name] = _Rows(source, index)

    def split(self, source: str, parts: Mapping[str, int]) -> None:
        """Make tensors of consecutive rows of another one; `parts`: name -> rows."""
        start, width = 0, self.tensors[source].shape[-1]
        for name, n in parts.items():
            self.take_rows(name, source, slice(start, start + n), (n, width))
            start += n

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's stored bytes, uint8 [nbytes]."""
        if name not in self._rows:
            return self._file.raw(name)
        rows, info = self._rows[name], self.tensors[name]
        table = self.raw(rows.source).reshape(-1, info.dtype.row_bytes(info.shape[-1]))
        return table[rows.index].reshape(-1)

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """Give back the memory that a tensor's bytes had from the file; they can be read again."""
        if name not in self._rows:
            return self._file.release(name, begin, end)
        rows, info = self._rows[name], self.tensors[name]
        if not isinstance(rows.index, slice):
            return self._file.release(rows.source)
        first = rows.index.start * info.dtype.row_bytes(info.shape[-1])
        stop = first + (info.nbytes if end is None else end)
        return self._file.release(rows.source, first + begin, stop)


def _check(file: GGUFFile, expected: Mapping[str, Shape], skipped: range) -> None:
    missing = [name for name in expected if name not in file.tensors]
    misshapen = [
        f"{name} (expected {list(map(int, shape))}, got {list(file.tensors[name].shape)})"
        for name, shape in expected.items()
        if name in file.tensors and _squeezed(file.tensors[name].shape) != _squeezed(shape)
    ]
    unexpected = [
        name for name in file.tensors if name not in expected and _layer_number(name) not in skipped
    ]
    problems = [
        f"{len(found)} {kind} tensor{'s' * (len(found) > 1)}: {_list(found)}"
        for kind, found in (
            ("missing", missing),
            ("misshapen", misshapen),
            ("unexpected", unexpected),
        )
        if found
    ]
    if problems:
        raise ModelError(f"{file.path}: {'; '.join(problems)}")


def _squeezed(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def _layer_number(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
