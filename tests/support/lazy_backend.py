"""A backend that samples as a device does: it runs launched steps in order, as late as possible.

It is the reference backend in float64. A launched step runs when it is waited for, or before
anything else reads or writes its memory. So an engine that relies on more than the order of work,
or reads too early, gets wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import Engine
from engine.backends.native.states import ArrayStates
from engine.backends.reference import ReferenceBackend, ReferenceProgram
from engine.graph import Live, Tensor
from engine.sampling import steps
from engine.sampling.spec import MAX_BANNED, MAX_TOP_K, SampleSpec
from engine.sampling.steps import Candidates
from tests.support.helpers import apply_sampler, engine_on

Array = NDArray[Any]


class LazyBackend(ReferenceBackend):
    """`made`: its sampler, which shows what was launched."""

    traits = replace(ReferenceBackend.traits, overlaps_steps=True)

    def __init__(self) -> None:
        super().__init__(np.float64)
        self.queue: list[tuple[LazyHandle, Callable[[], None]]] = []
        self.states = LazyStates(self)
        self.made: LazySampler | None = None

    def device_sampler(
        self, program: ReferenceProgram, inputs: Sequence[Tensor], logits: Tensor
    ) -> LazySampler:
        self.made = LazySampler(self, program, inputs, logits)
        return self.made

    def write(self, tensor: Tensor, values: Array) -> None:
        self.work()
        super().write(tensor, values)

    def work(self, until: LazyHandle | None = None) -> None:
        """Run everything that was launched, or up to one step."""
        while self.queue and (until is None or not until.is_done):
            handle, step = self.queue.pop(0)
            # The step's own writes call this too; they must not run the steps after it.
            later, self.queue = self.queue, []
            step()
            self.queue = later
            assert handle.is_done


class LazyStates(ArrayStates):
    """States whose reads and writes wait for the steps launched before."""

    def __init__(self, backend: LazyBackend) -> None:
        super().__init__()
        self._backend = backend

    def zero(self, dim: str, index: int) -> None:
        self._backend.work()
        super().zero(dim, index)

    def copy(self, dim: str, source: int, target: int) -> None:
        self._backend.work()
        super().copy(dim, source, target)

    def read(self, tensor: Tensor, indices: Sequence[int], buffer: Array) -> Array:
        self._backend.work()
        return super().read(tensor, indices, buffer)

    def write(self, tensor: Tensor, indices: Sequence[int], values: Array) -> None:
        self._backend.work()
        super().write(tensor, indices, values)

    def settle(self) -> None:
        """Run what was launched: see tests/support/states.py."""
        self._backend.work()


class LazyHandle:
    """What a step gave, once it has run; see StepHandle. `backend.work` runs it."""

    def __init__(self, backend: Any, specs: Sequence[SampleSpec | None] = ()) -> None:
        self._backend, self.is_done, self._specs = backend, False, list(specs)
        self._masks: Sequence[NDArray[np.uint32] | None] = [None] * len(specs)
        self._may_sample = not any(spec is not None and spec.is_masked for spec in specs)
        self._rows = np.empty((0, 0), np.float32)
        self.sampled: list[int] = []
        self.logits: list[NDArray[np.float32]] = []

    def has_logits(self) -> bool:
        return True

    def sample(self, masks: Sequence[NDArray[np.uint32] | None]) -> None:
        assert not self._may_sample
        self._masks, self._may_sample = [m if m is None else m.copy() for m in masks], True
        if self.is_done:
            self._sample_now()

    def take(self, rows: NDArray[np.float32]) -> None:
        """The step has run and has given logits."""
        self._rows, self.is_done = rows, True
        if self._may_sample:
            self._sample_now()

    def _sample_now(self) -> None:
        for row, spec, mask in zip(self._rows, self._specs, self._masks, strict=True):
            if spec is None or (spec.is_masked and mask is None):
                self.sampled.append(0)
                self.logits.append(row)
            else:
                self.sampled.append(sampled_token(row, spec, mask))

    def wait(self) -> tuple[list[int], NDArray[np.float32]]:
        self._backend.work(self)
        assert self._may_sample
        return self.sampled, np.array(self.logits)


class LazySampler:
    """Samples by the definitions of steps.py. `feeds`: the `feed` of every launch."""

    def __init__(
        self,
        backend: LazyBackend,
        program: ReferenceProgram,
        inputs: Sequence[Tensor],
        logits: Tensor,
    ) -> None:
        self._backend, self._program = backend, program
        self._inputs, self._logits = inputs, logits
        self._last = LazyHandle(backend)
        self.feeds: list[list[int]] = []

    def launch(
        self,
        inputs: Mapping[str, Array],
        live: Live,
        specs: Sequence[SampleSpec | None],
        feed: Sequence[int],
    ) -> LazyHandle:
        assert live.n_outputs == len(specs) == len(feed)
        # What is fed are the first rows, the only ones of their sequences.
        n_fed = max((i + 1 for i, source in enumerate(feed) if source >= 0), default=0)
        assert [length for _, length in live.chunks[:n_fed]] == [1] * n_fed
        assert inputs["output_rows"][:n_fed].tolist() == list(range(n_fed))
        before, handle = self._last, LazyHandle(self._backend, specs)
        given = {name: values.copy() for name, values in inputs.items()}
        self.feeds.append(list(feed))

        def step() -> None:
            for row, source in enumerate(feed):
                if source >= 0:
                    given["tokens"][row] = max(before.sampled[source], 0)
            for t in self._inputs:
                self._backend.write(t, given[t.name])
            self._program.run(live)
            handle.take(self._backend.read(self._logits).astype(np.float32))

        self._backend.queue.append((handle, step))
        self._last = handle
        return handle


def sampled_token(
    logits: NDArray[np.float32], spec: SampleSpec, mask: NDArray[np.uint32] | None = None
) -> int:
    """The token of a row by the definitions of the samplers; -1 if a logit is not finite, or none
    may come."""
    assert spec.top_k <= MAX_TOP_K
    assert len(spec.banned) <= MAX_BANNED
    assert 0 <= spec.uniform < 1
    if not np.isfinite(logits).all():
        return -1
    values = logits.astype(np.float64)
    values[list(spec.banned)] = -np.inf
    assert spec.is_masked == (mask is not None)
    if mask is not None:
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(values)]
        values[bits == 0] = -np.inf
    if values.max() == -np.inf:
        return -1
    c = Candidates(np.arange(len(values)), values)
    for name in ("top_k", "top_p", "min_p", "temperature"):
        c = apply_sampler(name, c, **{name: getattr(spec, name)})
    return int(c.ids[steps.sample(c, spec.uniform)])


def lazy_engine(path: Any, **options: Any) -> Engine:
    """An engine with overlapped decode steps, in float64."""
    return engine_on(LazyBackend(), path, **options)


def decoder_of(engine: Engine) -> LazySampler:
    """The sampler that its steps were launched on."""
    backend: Any = engine.plan.backends[0]
    return backend.made
