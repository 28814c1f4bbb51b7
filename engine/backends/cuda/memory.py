"""The memory of a CudaBackend, which programs and samplers use."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from engine.backends.base import Array
from engine.backends.cuda.args import ARGS
from engine.backends.cuda.device import Device, Memory
from engine.backends.cuda.kernels import threads
from engine.backends.cuda.weights import CudaWeights
from engine.backends.native import library as cpu_library
from engine.backends.native.backend import NativeBackend
from engine.backends.native.states import rows_in, runs
from engine.backends.native.views import DIMS, write_view
from engine.formats.quants import numpy_dtype
from engine.graph import Kind, Live, Tensor, dim_name

_LIVE_BYTES = 256
_PIECE_BYTES = 32 << 10  # That a thread block copies.


class DeviceStates:
    """State tensors in device memory; see StateStore."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: dict[Tensor, Memory] = {}
        self._list: Memory | None = None
        self._known_parts: dict[str, Array] = {}

    def allocate(self, states: Sequence[Tensor], extra: Mapping[str, int]) -> None:
        """Allocate states, as zeros."""
        for t in states:
            n_rows = int(t.shape[0])
            n_bytes = t.nbytes // n_rows * (n_rows + extra.get(dim_name(t), 0))
            self._memory[t] = self._device.allocate(n_bytes)
            self._device.fill(self._memory[t].address, n_bytes, 0)

    def address(self, tensor: Tensor) -> int:
        return self._memory[tensor].address

    def _of(self, dim: str) -> list[tuple[int, int]]:
        """(a state's address, bytes of one slot or block)."""
        states = ((t, m) for t, m in self._memory.items() if dim_name(t) == dim)
        return [(m.address, t.nbytes // int(t.shape[0])) for t, m in states]

    def zero(self, dim: str, index: int) -> None:
        for address, n in self._of(dim):
            self._device.fill(address + index * n, n, 0)

    def copy(self, dim: str, source: int, target: int) -> None:
        for address, n in self._of(dim):
            self._device.copy(address + target * n, address + source * n, n)

    def read(self, tensor: Tensor, indices: Sequence[int], buffer: Array) -> Array:
        values = rows_in(buffer, len(indices), tensor.shape[1:], numpy_dtype(tensor.dtype))
        for address, part in self._runs(tensor, indices, values):
            self._device.download(address, part)
        return values

    def write(self, tensor: Tensor, indices: Sequence[int], values: Array) -> None:
        for address, part in self._runs(tensor, indices, values):
            self._device.upload(address, part)

    def _runs(
        self, tensor: Tensor, indices: Sequence[int], values: Array
    ) -> Iterator[tuple[int, Array]]:
        """(address, rows of `values`) of every run of consecutive indices."""
        n_bytes, at = tensor.nbytes // int(tensor.shape[0]), 0
        for first, last in runs(indices):
            n = last + 1 - first
            yield self._memory[tensor].address + first * n_bytes, values[at : at + n]
            at += n

    def row_bytes(self, dim: str) -> int:
        return sum(n for _, n in self._of(dim))

    def allocate_host(self, n_bytes: int) -> Memory:
        return self._device.allocate_host(n_bytes)

    def move(self, rows: Sequence[tuple[str, int, int]], to_host: bool) -> None:
        pieces = np.concatenate([self._pieces(dim, rows) for dim in ("n_slots", "n_blocks")])
        if not to_host:
            pieces[:, [0, 1]] = pieces[:, [1, 0]]
        if self._list is None or self._list.nbytes < pieces.nbytes:
            self._list = self._device.allocate(2 * pieces.nbytes)
        self._device.upload(self._list.address, pieces)
        args = np.zeros((), ARGS)
        write_view(args["v"][0], self._list.address, pieces.shape, (3, 1), 0)
        function = self._device.function("copy_pieces", "copy_pieces")
        n_threads = threads("copy_pieces")
        self._device.launch(function, (len(pieces), 1, 1), n_threads, 0, args.ctypes.data)

    def rows(self, dim: str, addresses: Sequence[int]) -> dict[Tensor, Array]:
        self._device.synchronize()
        n_bytes, found, at = self.row_bytes(dim), dict[Tensor, Array](), 0
        raw = [np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(a)) for a in addresses]
        whole = np.stack(raw) if raw else np.empty((0, n_bytes), np.uint8)
        for t in self._memory:
            if dim_name(t) == dim:
                n = t.nbytes // int(t.shape[0])
                part = np.ascontiguousarray(whole[:, at : at + n]).view(numpy_dtype(t.dtype))
                found[t], at = part.reshape(-1, *t.shape[1:]), at + n
        return found

    def _pieces(self, dim: str, rows: Sequence[tuple[str, int, int]]) -> Array:
        """[n, 3] uint64: (address on the host, the device's, bytes) of the rows' parts."""
        index, host = np.array([r[1:] for r in rows if r[0] == dim], np.uint64).reshape(-1, 2).T
        at, first, stride, n_bytes = self._parts(dim)
        pieces = np.empty((len(index), len(at), 3), np.uint64)
        pieces[..., 0] = host[:, None] + at
        pieces[..., 1] = index[:, None] * stride + first
        pieces[..., 2] = n_bytes
        return pieces.reshape(-1, 3)

    def _parts(self, dim: str) -> Array:
        """[4, n] uint64, of the parts of a row on the host: where they begin there, where that of
        row 0 begins on the device, bytes from one row to the next there, bytes."""
        if dim not in self._known_parts:
            parts, at = [], 0
            for address, n_row in self._of(dim):
                for begin in range(0, n_row, _PIECE_BYTES):
                    n = min(_PIECE_BYTES, n_row - begin)
                    parts.append((at + begin, address + begin, n_row, n))
                at += n_row
            self._known_parts[dim] = np.array(parts, np.uint64).reshape(-1, 4).T
        return self._known_parts[dim]

    def give_back(self, dim: str, indices: Sequence[int]) -> None:
        """Nothing: the device's memory is taken at once."""


class InputRegion:
    """Live counts and INPUT tensors side by side on the device, and their image on the host."""

    def __init__(self, device: Device, inputs: Sequence[Tensor] = ()) -> None:
        self._device, offset = device, _LIVE_BYTES
        self._offsets: dict[Tensor, int] = {}
        # The largest last: the copy ends at the last byte that was written.
        for t in sorted(inputs, key=lambda t: t.nbytes):
            self._offsets[t] = offset
            offset += -(-t.nbytes // 64) * 64
        self._image = np.zeros(offset, np.uint8)
        self._memory = device.allocate(offset)
        self.live_address = self._memory.address
        self._end = 0

    def address(self, tensor: Tensor) -> int:
        return self.live_address + self._offsets[tensor]

    def write(self, tensor: Tensor, values: Array) -> None:
        begin = self._offsets[tensor]
        end = begin + values.nbytes
        self._image[begin:end] = np.ravel(values).view(np.uint8)
        self._end = max(self._end, end)

    def flush(self, live: Live) -> None:
        """Upload the inputs that were written, and the live counts."""
        counts = np.array([live.dim(name) or 0 for name in DIMS], np.int32)
        self._image[: counts.nbytes] = counts.view(np.uint8)
        end = max(self._end, counts.nbytes)
        self._device.upload(self.live_address, self._image[:end])
        self._end = 0


class MemoryBackend(NativeBackend):
    """The part of a CudaBackend that holds memory. `sample_specs`: the INPUT that
    `sampling.specs_input` describes."""

    states: DeviceStates
    weights: CudaWeights
    sample_specs: Tensor

    def __init__(self, device: Device, batch_invariant: bool) -> None:
        self.device, self.batch_invariant = device, batch_invariant
        self._live: Live | None = None
        self._hold_nothing()

    def _hold_nothing(self) -> None:
        device = self.device
        self.states, self.weights = DeviceStates(device), CudaWeights(device, cpu_library.load())
        self.inputs = InputRegion(device)
        self._fixed: dict[Tensor, Memory] = {}

    def write(self, tensor: Tensor, values: Array) -> None:
        """Set the live rows of a tensor; those of an input are uploaded when a program runs."""
        values = np.ascontiguousarray(values, numpy_dtype(tensor.dtype))
        if tensor.kind is Kind.INPUT:
            self.inputs.write(tensor, values)
        else:
            self.device.upload(self.fixed(tensor), values)

    def read(self, tensor: Tensor) -> Array:
        assert self._live is not None
        values = np.empty(self._live.shape(tensor.shape), numpy_dtype(tensor.dtype))
        self.device.download(self.fixed(tensor), values)
        return values

    def fixed(self, tensor: Tensor) -> int:
        """Activations are allocated at their first use."""
        if tensor.kind is Kind.INPUT:
            return self.inputs.address(tensor)
        if tensor.kind is Kind.STATE:
            return self.states.address(tensor)
        if tensor not in self._fixed:
            self._fixed[tensor] = self.device.allocate(tensor.nbytes)
        return self._fixed[tensor].address

    def begin(self, live: Live) -> None:
        """Bring inputs and live counts to the device."""
        self._live = live
        self.inputs.flush(live)

    def release(self) -> None:
        self.device.synchronize()
        self._hold_nothing()
