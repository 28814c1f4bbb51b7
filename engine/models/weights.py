"""The tensors that a model must have, compared with those that its file has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from engine.gguf import GGUFFile
from engine.graph import Shape
from engine.models.hparams import ModelError

# How many tensors of a kind a message names; the others are counted.
_NAMED = 6
_LAYER = re.compile(r"blk\.(\d+)\.")


def check_weights(file: GGUFFile, expected: Mapping[str, Shape], skipped: range) -> None:
    """Raise ModelError with everything that is missing, misshapen or unexpected.

    Tensors of the layers `skipped`, which are for multi-token prediction, are ignored.
    """
    missing = [name for name in expected if name not in file.tensors]
    misshapen = [
        f"{name} (expected {list(map(int, shape))}, got {list(file.tensors[name].shape)})"
        for name, shape in expected.items()
        if name in file.tensors and file.tensors[name].shape != shape
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


def _layer_number(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
