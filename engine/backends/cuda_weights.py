"""Weights on the GPU: in panels, as on the CPU, or decoded to float32.

Threads pack on the host while what is ready travels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from engine.backends.cpu_library import Library, n_cores
from engine.backends.cuda_device import Device, Memory
from engine.backends.lowering import PACKED
from engine.backends.panels import Panels
from engine.graph import Tensor
from engine.planner import WeightSource
from engine.quants import dequantize

Array = NDArray[Any]
# Of packed weights that wait for their turn on the bus.
_AHEAD_BYTES = 256 << 20
_SECONDS_BEFORE_BAR = 1


@dataclass(frozen=True)
class Packed:
    """A matrix [out, in], or matrices [X, out, in], in panels of 16 rows on the device."""

    memory: Memory
    layout: int
    matrix_bytes: int
    panel_bytes: int


class CudaWeights:
    """Packs weights, uploads and keeps them, by tensor."""

    def __init__(self, device: Device, library: Library) -> None:
        self._device, self._panels = device, Panels(library)
        self._packed: dict[Tensor, Packed] = {}
        self._plain: dict[Tensor, Memory] = {}

    def load(self, packed: Sequence[Tensor], plain: Sequence[Tensor], source: WeightSource) -> None:
        """Read, convert and upload weights; shows progress when it takes long."""
        for tensor in (t for t in plain if t not in self._plain):
            values = dequantize(tensor.dtype, source.raw(tensor.name), tensor.shape)
            self._plain[tensor] = self._upload(values)
        todo = [t for t in packed if t not in self._packed]
        self._panels.warn_of_rounding(todo)
        with (
            tqdm(total=sum(t.nbytes for t in todo), unit="B", unit_scale=True, leave=False,
                 desc="loading weights", disable=None, delay=_SECONDS_BEFORE_BAR) as bar,
            ThreadPoolExecutor(n_cores()) as pool,
        ):  # fmt: skip
            pending: deque[tuple[Tensor, Array, list[Future[None]]]] = deque()
            for tensor in todo:
                data = np.empty(self._panels.packed_bytes(tensor), np.uint8)
                pending.append((tensor, data, self._panels.pack(tensor, source, data, pool)))
                ahead = sum(len(data) for _, data, _ in pending)
                while pending and (tensor is todo[-1] or ahead > _AHEAD_BYTES):
                    ready, data, tasks = pending.popleft()
                    for task in tasks:
                        task.result()
                    self._keep(ready, self._upload(data))
                    ahead -= len(data)
                    bar.update(ready.nbytes)

    def _keep(self, tensor: Tensor, memory: Memory) -> None:
        panel, matrix = self._panels.matrix_bytes(tensor)
        self._packed[tensor] = Packed(memory, self._panels.layout(tensor.dtype), matrix, panel)

    def _upload(self, values: Array) -> Memory:
        memory = self._device.allocate(values.nbytes)
        self._device.upload(memory.address, values)
        return memory

    def packed_bytes(self, tensor: Tensor) -> int:
        """Bytes of a weight when it is packed."""
        return self._panels.packed_bytes(tensor)

    def plain_bytes(self, tensor: Tensor) -> int:
        """Bytes of a weight when it is decoded to float32."""
        return math.prod(tensor.shape) * 4

    def packed(self, tensor: Tensor) -> Packed:
        """A packed weight."""
        return self._packed[tensor.base]

    def packed_strides(self, tensor: Tensor) -> tuple[int, list[int], int, int]:
        """A packed weight's address, strides in bytes (of matrices and panels), dtype, layout."""
        p = self._packed[tensor.base]
        strides = [p.panel_bytes] if len(tensor.shape) == 2 else [p.matrix_bytes, p.panel_bytes]
        return p.memory.address, strides, PACKED, p.layout

    def plain_or_zero(self, tensor: Tensor) -> int:
        """The address of a weight decoded to float32; 0 if it is only packed."""
        return self._plain[tensor.base].address if tensor.base in self._plain else 0

    def bf16(self, tensor: Tensor) -> int:
        """The address of a weight's copy [out, in] in bfloat16."""
        raise NotImplementedError
