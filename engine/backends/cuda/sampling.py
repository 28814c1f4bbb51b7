"""Decode steps with drawing: one captured graph from the tokens drawn last to those drawn next.

The draws are an input like the others, so one copy brings all that a step needs; its ids come back
by a copy that only whoever asks for them waits for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda.args import ARGS
from engine.backends.cuda.device import Device, Fetched
from engine.backends.cuda.launches import Kernel, Replays, fill_view
from engine.backends.cuda.weights import CudaWeights
from engine.backends.native.buffers import Scratch
from engine.formats.quants import I32
from engine.graph import Dim, Kind, Live, Tensor
from engine.sampling.spec import MAX_BANNED, MAX_TOP_K, SampleSpec

# As in sample.cu.
_SEGMENT, _MAX_SEGMENTS = 4096, 64
_THREADS, _FEED_THREADS = 256, 64
MAX_VOCAB = _SEGMENT * _MAX_SEGMENTS
DRAW = np.dtype(
    [
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("log_min_p", "f4"),
        ("uniform", "f4"),
        ("top_k", "i4"),
        ("feed", "i4"),
        ("n_banned", "i4"),
        ("unused", "i4"),
        ("banned", "i4", MAX_BANNED),
    ]
)


def draws_input(n_rows: int) -> Tensor:
    """The INPUT with a record of DRAW for each row."""
    return Tensor("draws", (Dim(n_rows, "n_outputs"), DRAW.itemsize // 4), I32, Kind.INPUT)


def records(draws: Sequence[SampleSpec], feed: Sequence[int]) -> NDArray[np.int32]:
    """What that input gets."""
    made = np.zeros(len(draws), DRAW)
    for name in ("temperature", "top_p", "uniform", "top_k"):
        made[name] = [getattr(draw, name) for draw in draws]
    made["log_min_p"] = [math.log(d.min_p) if d.min_p > 0 else -math.inf for d in draws]
    made["feed"] = feed
    for record, draw in zip(made, draws, strict=True):
        if draw.banned:
            record["n_banned"] = len(draw.banned)
            record["banned"][: len(draw.banned)] = draw.banned
    return made.view(np.int32).reshape(len(draws), -1)


class Host(Protocol):
    """The part of a CudaBackend that steps need; `draws`: its `draws_input`."""

    device: Device
    weights: CudaWeights
    draws: Tensor

    @property
    def live_address(self) -> int:
        """Where the live counts lie."""

    def fixed(self, tensor: Tensor) -> int:
        """The address of a tensor that outlives programs."""

    def write(self, tensor: Tensor, values: NDArray[Any]) -> None:
        """Set the live rows of an input."""

    def begin(self, live: Live) -> None:
        """Bring inputs and live counts to the device."""


class Launches(Protocol):
    """A program's part."""

    def launch(self, live: Live) -> None:
        """Launch all of it, one after the other."""


class CudaSampler:
    """See DeviceSampler."""

    def __init__(
        self, backend: Host, program: Launches, inputs: Sequence[Tensor], logits: Tensor
    ) -> None:
        self._backend, self._program, self._inputs = backend, program, inputs
        self._draws = backend.draws
        (tokens,) = (t for t in inputs if t.name == "tokens")
        n_rows, n_vocab = int(self._draws.shape[0]), int(logits.shape[1])
        n_segments = -(-n_vocab // _SEGMENT)
        assert n_segments <= _MAX_SEGMENTS
        drawn = Scratch((n_rows,), I32)
        # Two words a key.
        best = Scratch((n_rows, 2 * _MAX_SEGMENTS * MAX_TOP_K), I32)
        self._memory = [backend.device.allocate(buffer.nbytes) for buffer in (drawn, best)]
        addresses = (memory.address for memory in self._memory)
        places: dict[Any, int] = dict(zip((drawn, best), addresses, strict=True))
        places |= {t: backend.fixed(t) for t in (tokens, self._draws, logits)}

        def kernel(name: str, operands: Sequence[Any], threads: int, grid: Any) -> _Launch:
            step = Kernel("sample", name, (), operands, (n_segments,), threads, grid)
            return _Launch(backend, step, [places[ref] for ref in operands])

        self._feed = kernel(
            "feed_tokens",
            (tokens, drawn, self._draws),
            _FEED_THREADS,
            lambda live: (-(-live.n_outputs // _FEED_THREADS), 1, 1),
        )
        self._segments = kernel(
            "sample_segments",
            (best, logits, self._draws),
            _THREADS,
            lambda live: (n_segments, live.n_outputs, 1),
        )
        self._rows = kernel(
            "sample_rows", (drawn, best, self._draws), _THREADS, lambda live: (live.n_outputs, 1, 1)
        )
        self._replays = Replays(backend.device, self._run)

    def launch(
        self,
        inputs: Mapping[str, NDArray[np.int32]],
        live: Live,
        specs: Sequence[SampleSpec],
        feed: Sequence[int],
    ) -> CudaStepHandle:
        """Bring the inputs, run, and have the ids brought back."""
        backend = self._backend
        for t in self._inputs:
            backend.write(t, inputs[t.name])
        backend.write(self._draws, records(specs, feed))
        backend.begin(live)
        self._replays.run(live)
        n_bytes = 4 * len(specs)
        return CudaStepHandle(backend.device.fetch(self._memory[0].address, n_bytes))

    def _run(self, live: Live) -> None:
        self._feed(live)
        self._program.launch(live)
        self._segments(live)
        self._rows(live)


@dataclass(frozen=True)
class CudaStepHandle:
    """See StepHandle."""

    _fetched: Fetched

    def ids(self) -> list[int]:
        """Waits for the copy."""
        ids: list[int] = self._fetched.values().view(np.int32).tolist()
        return ids


class _Launch:
    """A kernel with its parameter filled in."""

    def __init__(self, backend: Host, step: Kernel, addresses: Sequence[int]) -> None:
        self._device: Device = backend.device
        self._step, self._args = step, np.zeros((), ARGS)
        self._function = self._device.function(step.source, step.name)
        for i, (ref, address) in enumerate(zip(step.operands, addresses, strict=True)):
            fill_view(self._args["v"][i], ref, step, address, backend.weights)
        self._args["attr"][: len(step.attrs)] = step.attrs
        self._args["live"] = backend.live_address

    def __call__(self, live: Live) -> None:
        grid, address = self._step.grid(live), self._args.ctypes.data
        self._device.launch(self._function, grid, self._step.threads, 0, address)
