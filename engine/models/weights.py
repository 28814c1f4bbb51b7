"""A model's weights: the tensors that its file must have, and others made of their rows.

Shapes are compared without their ones, since files differ in where they put them. Taking rows of a
tensor is exact for every stored type, so a model has one set of names for every packing of a file.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.formats.gguf import GGUFFile, TensorInfo
from engine.formats.quants import F32, WEIGHT_TYPES
from engine.graph import Shape
from engine.models.hparams import ModelError

# How many tensors of a kind a message names; the others are counted.
_NAMED = 6
_LAYER = re.compile(r"blk\.(\d+)\.")
# Tensors that Ollama's files have beside the model's: vision tower, its projector, MTP layers.
_NOT_TEXT = ("v.", "mm.", "mtp.")
_log = logging.getLogger(__name__)


class Weights:
    """The tensors of a file that a model uses, in the shapes that it expects.

    Raises ModelError with all missing, misshapen or unexpected ones; layers `skipped` may be there.
    """

    def __init__(self, file: GGUFFile, expected: Mapping[str, Shape], skipped: range) -> None:
        self._file = file
        # Tensors made of rows: the file's tensor, and which rows of it.
        self._rows: dict[str, tuple[str, range | NDArray[Any]]] = {}
        _check(file, expected, skipped)
        self.tensors: dict[str, TensorInfo] = {
            name: replace(file.tensors[name], shape=shape) for name, shape in expected.items()
        }

    def reshape(self, name: str, shape: Shape) -> None:
        """Give a tensor another shape with rows of the same length."""
        self.tensors[name] = replace(self.tensors[name], shape=shape)

    def take_rows(self, name: str, source: str, index: range | NDArray[Any], shape: Shape) -> None:
        """Make a tensor of rows of another one; a range of them costs no memory."""
        info = self.tensors[source]
        nbytes = info.dtype.nbytes(shape)
        self.tensors[name] = replace(info, name=name, shape=shape, nbytes=nbytes)
        self._rows[name] = source, index

    def split(self, source: str, parts: Mapping[str, int]) -> None:
        """Make tensors of consecutive rows of another one; `parts`: name -> rows."""
        start, width = 0, self.tensors[source].shape[-1]
        for name, n in parts.items():
            self.take_rows(name, source, range(start, start + n), (n, width))
            start += n

    def raw(self, name: str, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """Bytes `begin` to `end` (None: to the last) of a tensor as stored, uint8: whole rows."""
        if name not in self._rows:
            return self._file.raw(name, begin, end)
        (source, index), info = self._rows[name], self.tensors[name]
        size = info.dtype.row_bytes(info.shape[-1])
        rows = np.asarray(index[begin // size : None if end is None else end // size])
        # Each run of rows that follow each other in the file is one read.
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        parts = [self._file.raw(source, size * r[0], size * (r[-1] + 1)) for r in runs]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def factors(self, name: str) -> NDArray[np.float32]:
        """The factors of a tensor's values: float32 [1], or [X] for a tensor of X matrices."""
        source = self._rows[name][0] if name in self._rows else name
        scale = source.removesuffix(".weight") + ".scale"
        if scale not in self._file.tensors:
            return np.ones(1, np.float32)
        return self._file.raw(scale).view(np.float32)


def _check(file: GGUFFile, expected: Mapping[str, Shape], skipped: range) -> None:
    found = file.tensors
    scales = {name: shape for name in found if (shape := expected.get(_weight_of(name)))}
    problems = {
        "missing": [name for name in expected if name not in found],
        "misshapen": [
            f"{name} (expected {list(map(int, shape))}, got {list(found[name].shape)})"
            for name, shape in expected.items()
            if name in found and _squeezed(found[name].shape) != _squeezed(shape)
        ],
        "unknown": [p for name, shape in scales.items() if (p := _unknown(name, shape, found))],
        "unexpected": [
            name
            for name in found
            if name not in expected
            and name not in scales
            and _layer_number(name) not in skipped
            and not name.startswith(_NOT_TEXT)
        ],
    }
    messages = [
        f"{len(names)} {kind} tensor{'s' * (len(names) > 1)}: {_list(names)}"
        for kind, names in problems.items()
        if names
    ]
    if n_other := sum(name.startswith(_NOT_TEXT) for name in found):
        _log.warning("%s: %d tensors for images and for drafts are skipped", file.path, n_other)
    if messages:
        raise ModelError(f"{file.path}: {'; '.join(messages)}")


def _weight_of(name: str) -> str:
    """The weight beside which a tensor may be as its scale; empty if it is none."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.weight" if suffix in ("scale", "input_scale") else ""


def _unknown(name: str, shape: Shape, found: Mapping[str, TensorInfo]) -> str:
    """Say what is wrong with a scale; empty if nothing is. A right one multiplies all values of an
    NVFP4 weight of this shape, or those of each expert. The engine has no use for scales of inputs,
    since its activations keep more than 4 bits."""
    scale, weight = found[name], found.get(_weight_of(name))
    if weight is None or name.endswith(".input_scale"):
        return ""
    n = shape[0] if len(shape) == 3 else 1
    is_right = scale.dtype is F32 and math.prod(scale.shape) in (1, n)
    if is_right and weight.dtype is WEIGHT_TYPES["NVFP4"]:
        return ""
    came = f"{scale.dtype} {list(scale.shape)} beside {weight.dtype}"
    return f"{name} (expected F32 [{n}] beside NVFP4, got {came})"


def _squeezed(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def _layer_number(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
