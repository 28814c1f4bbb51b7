"""Contents of states, by state tensor name: tests put them into a store and read them from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from engine.backends.cuda.memory import DeviceStates
from engine.formats.quants import numpy_dtype
from engine.graph import Tensor, dim_name

Array = np.ndarray[Any, Any]


def save(store: Any, dim: str, index: int) -> dict[str, Array]:
    """Copies of a slot's or block's contents; `dim` is "n_slots" or "n_blocks"."""
    if not isinstance(store, DeviceStates):
        return {t.name: array[index].copy() for t, array in _arrays(store, dim)}
    saved = {}
    for t, address in _addresses(store, dim, index):
        saved[t.name] = np.empty(t.shape[1:], numpy_dtype(t.dtype))
        store._device.download(address, saved[t.name])
    return saved


def load(store: Any, dim: str, index: int, contents: Mapping[str, Array]) -> None:
    """The reverse of `save`."""
    if not isinstance(store, DeviceStates):
        for t, array in _arrays(store, dim):
            array[index] = contents[t.name]
        return
    for t, address in _addresses(store, dim, index):
        values = np.ascontiguousarray(contents[t.name], numpy_dtype(t.dtype))
        assert values.shape == t.shape[1:], t
        store._device.upload(address, values)


def _arrays(store: Any, dim: str) -> list[tuple[Tensor, Array]]:
    # Of a backend whose steps wait: when they have run.
    getattr(store, "settle", lambda: None)()
    return [(t, array) for t, array in store.arrays.items() if dim_name(t) == dim]


def _addresses(store: DeviceStates, dim: str, index: int) -> Iterator[tuple[Tensor, int]]:
    for t in store._memory:
        if dim_name(t) == dim:
            yield t, store.address(t) + index * (t.nbytes // int(t.shape[0]))
