"""Decode steps that sample: one captured graph from the tokens of one step to those of the next.

The specs of a step's samples are an input like the others, so one copy brings all that a step
needs. Its ids come back by a copy that is waited for when they are asked for. Where a grammar's
masks come later, the step's forward pass and its sampling are two captured graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import or_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.cuda.args import ARGS
from engine.backends.cuda.device import Fetched
from engine.backends.cuda.kernels import MAX_SEGMENTS, SAMPLE_SPEC_BYTES, SEGMENT, threads
from engine.backends.cuda.launches import Launch, Replays, Run, Sizes
from engine.backends.cuda.lower.common import cut
from engine.backends.cuda.memory import MemoryBackend
from engine.backends.cuda.program import prepare
from engine.backends.native.buffers import Scratch
from engine.formats.quants import I32
from engine.graph import Dim, Kind, Live, Tensor
from engine.sampling.spec import MAX_BANNED, MAX_TOP_K, SampleSpec

MAX_VOCAB = SEGMENT * MAX_SEGMENTS
# SampleSpec of sample.cu.
SPEC = np.dtype(
    [(name, "f4") for name in ("temperature", "top_p", "log_min_p", "uniform")]
    + [(name, "i4") for name in ("top_k", "feed", "n_banned", "is_masked")]
    + [("banned", "i4", MAX_BANNED)]
)
assert SPEC.itemsize == SAMPLE_SPEC_BYTES


def specs_input(n_rows: int) -> Tensor:
    """The INPUT with a SPEC for each row, [n_rows, words of a SPEC] int32."""
    return Tensor("sample_specs", (Dim(n_rows, "n_outputs"), SPEC.itemsize // 4), I32, Kind.INPUT)


def packed_specs(given: Sequence[SampleSpec | None], feed: Sequence[int]) -> NDArray[np.int32]:
    """The values of that input."""
    specs = [spec or SampleSpec() for spec in given]
    packed = np.zeros(len(specs), SPEC)
    for name in ("temperature", "top_p", "uniform", "top_k"):
        packed[name] = [getattr(spec, name) for spec in specs]
    packed["log_min_p"] = [math.log(s.min_p) if s.min_p > 0 else -math.inf for s in specs]
    packed["feed"], packed["n_banned"] = feed, [len(spec.banned) for spec in specs]
    packed["is_masked"] = [spec.is_masked for spec in specs]
    for row, spec in zip(packed, specs, strict=True):
        row["banned"][: len(spec.banned)] = spec.banned
    return packed.view(np.int32).reshape(len(specs), SPEC.itemsize // 4)


class CudaSampler:
    """See DeviceSampler; `decode` launches a step up to its logits."""

    def __init__(
        self, backend: MemoryBackend, decode: Run, inputs: Sequence[Tensor], logits: Tensor
    ) -> None:
        self._backend, self._decode, self._inputs = backend, decode, inputs
        specs = backend.sample_specs
        (tokens,) = (t for t in inputs if t.name == "tokens")
        n_rows, n_segments = int(specs.shape[0]), cut(int(logits.shape[1]), SEGMENT)
        assert n_segments <= MAX_SEGMENTS
        self._n_vocab, self._logits = int(logits.shape[1]), backend.fixed(logits)
        self._n_words = cut(self._n_vocab, 32)
        sampled = Scratch((n_rows,), I32)
        # Two words a key.
        best = Scratch((n_rows, 2 * MAX_SEGMENTS * MAX_TOP_K), I32)
        masks = Scratch((n_rows, self._n_words), I32)
        buffers = sampled, best, masks
        self._memory = [backend.device.allocate(buffer.nbytes) for buffer in buffers]
        addresses: dict[Any, int] = {t: backend.fixed(t) for t in (tokens, specs, logits)}
        addresses |= {b: m.address for b, m in zip(buffers, self._memory, strict=True)}

        def prepared(kernel: str, operands: Sequence[Any], grid: Sizes) -> _Prepared:
            launch = Launch(
                kernel=kernel, nodes=(), operands=operands, attrs=(n_segments,), grid=grid
            )
            return _Prepared(backend, launch, [addresses[ref] for ref in operands])

        n_fed = threads("feed_tokens")
        self._feed = prepared(
            "feed_tokens", (tokens, sampled, specs), lambda x: (cut(x.n_outputs, n_fed), 1, 1)
        )
        self._segments = prepared(
            "sample_segments", (best, logits, specs, masks), lambda x: (n_segments, x.n_outputs, 1)
        )
        self._rows = prepared("sample_rows", (sampled, best, specs), lambda x: (x.n_outputs, 1, 1))
        self._steps = Replays(backend.device, self._run)
        self._forwards = Replays(backend.device, self._run_forward)
        self._samplings = Replays(backend.device, self._run_sampling)

    def launch(
        self,
        inputs: Mapping[str, NDArray[np.int32]],
        live: Live,
        specs: Sequence[SampleSpec | None],
        feed: Sequence[int],
    ) -> CudaStepHandle:
        backend = self._backend
        for t in self._inputs:
            backend.write(t, inputs[t.name])
        backend.write(backend.sample_specs, packed_specs(specs, feed))
        backend.begin(live)
        by_host = [spec is None for spec in specs]
        masked = [spec is not None and spec.is_masked for spec in specs]
        if any(masked):
            self._forwards.run(live)
            return CudaStepHandle(self, live, by_host, masked, backend.device.mark())
        self._steps.run(live)
        return CudaStepHandle(self, live, by_host, masked, lambda: True, self.fetch(by_host))

    def sample(self, live: Live, masks: Sequence[NDArray[np.uint32] | None]) -> None:
        """Sample from the logits of the last step, whose live counts and specs are there."""
        row_bytes = 4 * self._n_words
        for i, mask in enumerate(masks):
            if mask is not None:
                address = self._memory[2].address + i * row_bytes
                self._backend.device.upload(address, mask[: self._n_words])
        self._samplings.run(live)

    def fetch(self, by_host: Sequence[bool]) -> Fetched:
        """The ids of a step, and the logits of the rows that the host samples."""
        row_bytes = 4 * self._n_vocab
        rows = [self._logits + i * row_bytes for i, is_wanted in enumerate(by_host) if is_wanted]
        # At least a word, so that a step without outputs can be waited for, too.
        ids = self._memory[0].address, 4 * max(1, len(by_host))
        return self._backend.device.fetch([ids, *((address, row_bytes) for address in rows)])

    def _run(self, live: Live) -> None:
        self._run_forward(live)
        self._run_sampling(live)

    def _run_forward(self, live: Live) -> None:
        if live.n_outputs:
            self._feed(live)
        self._decode(live)

    def _run_sampling(self, live: Live) -> None:
        if live.n_outputs:
            self._segments(live)
            self._rows(live)


@dataclass
class CudaStepHandle:
    """See StepHandle."""

    _sampler: CudaSampler
    _live: Live
    _by_host: list[bool]
    _masked: list[bool]
    has_logits: Callable[[], bool]
    _fetched: Fetched | None = None

    def sample(self, masks: Sequence[NDArray[np.uint32] | None]) -> None:
        self._sampler.sample(self._live, masks)
        late = (w and mask is None for w, mask in zip(self._masked, masks, strict=True))
        self._by_host = list(map(or_, self._by_host, late))
        self._fetched = self._sampler.fetch(self._by_host)

    def wait(self) -> tuple[list[int], NDArray[np.float32]]:
        assert self._fetched is not None
        n_ids, n_rows = len(self._by_host), sum(self._by_host)
        words = self._fetched().view(np.int32)
        logits = words[max(1, n_ids) :].view(np.float32)
        shape = n_rows, len(logits) // max(1, n_rows)
        return words[:n_ids].tolist(), logits.reshape(shape)


class _Prepared:
    """A launch with its arguments filled in."""

    def __init__(self, backend: MemoryBackend, launch: Launch, addresses: Sequence[int]) -> None:
        self._device, self._launch, self._args = backend.device, launch, np.zeros((), ARGS)
        self._function = prepare(backend, launch, self._args, addresses)

    def __call__(self, live: Live) -> None:
        address = self._args.ctypes.data
        self._device.launch(
            self._function, self._launch.grid(live), *self._launch.thread_block, address
        )
