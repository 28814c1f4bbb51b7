"""A backend with a decoder that works as a device does: in order, and no sooner than it must.

It is the reference backend in float64. A launched step runs when its ids are asked for, or before
anything else touches what it works on; so a host that relies on more than the order of work, or
looks too early, gets wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from engine import Engine
from engine.backends.native.states import ArrayStates
from engine.backends.reference import ReferenceBackend, ReferenceProgram
from engine.graph import Live, Tensor
from engine.sampling import steps as samplers
from engine.sampling.spec import MAX_BANNED, MAX_TOP_K, SampleSpec
from engine.sampling.steps import Candidates

Array = NDArray[Any]


class LazyBackend(ReferenceBackend):
    """Its `made` decoder shows what was launched."""

    traits = replace(ReferenceBackend.traits, overlaps_steps=True)

    def __init__(self) -> None:
        super().__init__(np.float64)
        self.queue: list[tuple[LazyTicket, Callable[[], None]]] = []
        self.states = LazyStates(self)
        self.made: LazyDecoder | None = None

    def device_sampler(
        self, program: ReferenceProgram, inputs: Sequence[Tensor], logits: Tensor
    ) -> LazyDecoder:
        self.made = LazyDecoder(self, program, inputs, logits)
        return self.made

    def write(self, tensor: Tensor, values: Array) -> None:
        self.work()
        super().write(tensor, values)

    def work(self, until: LazyTicket | None = None) -> None:
        """Run what was launched, or as far as to one ticket."""
        while self.queue and (until is None or not until.drawn):
            ticket, step = self.queue.pop(0)
            # What a step writes is no more waiting.
            held, self.queue = self.queue, []
            step()
            self.queue = held
            assert ticket.drawn


class LazyStates(ArrayStates):
    """States that are as they were asked to be, in order."""

    def __init__(self, backend: LazyBackend) -> None:
        super().__init__()
        self._backend = backend

    def zero(self, dim: str, index: int) -> None:
        self._backend.work()
        super().zero(dim, index)

    def copy(self, dim: str, source: int, target: int) -> None:
        self._backend.work()
        super().copy(dim, source, target)

    def save(self, dim: str, index: int) -> dict[str, Array]:
        self._backend.work()
        return super().save(dim, index)

    def load(self, dim: str, index: int, contents: Mapping[str, Array]) -> None:
        self._backend.work()
        super().load(dim, index, contents)


class LazyTicket:
    """Ids once they were drawn."""

    def __init__(self, backend: LazyBackend) -> None:
        self._backend, self.drawn = backend, list[int]()

    def ids(self) -> list[int]:
        self._backend.work(self)
        return self.drawn


class LazyDecoder:
    """Draws with the steps of samplers.py. `feeds`: those of all launches."""

    def __init__(
        self,
        backend: LazyBackend,
        program: ReferenceProgram,
        inputs: Sequence[Tensor],
        logits: Tensor,
    ) -> None:
        self._backend, self._program = backend, program
        self._inputs, self._logits = inputs, logits
        self._last = LazyTicket(backend)
        self.feeds: list[list[int]] = []

    def launch(
        self,
        inputs: Mapping[str, Array],
        live: Live,
        specs: Sequence[SampleSpec],
        feed: Sequence[int],
    ) -> LazyTicket:
        assert live.n_tokens == live.n_seqs == live.n_outputs == len(specs) == len(feed)
        before, ticket = self._last, LazyTicket(self._backend)
        given = {name: values.copy() for name, values in inputs.items()}
        self.feeds.append(list(feed))

        def step() -> None:
            for row, source in enumerate(feed):
                if source >= 0:
                    given["tokens"][row] = max(before.drawn[source], 0)
            for t in self._inputs:
                self._backend.write(t, given[t.name])
            self._program.run(live)
            rows = self._backend.read(self._logits).astype(np.float32)
            ticket.drawn = [drawn(row, draw) for row, draw in zip(rows, specs, strict=True)]

        self._backend.queue.append((ticket, step))
        self._last = ticket
        return ticket


def drawn(logits: NDArray[np.float32], draw: SampleSpec) -> int:
    """The token of a row, by definition."""
    assert draw.top_k <= MAX_TOP_K
    assert len(draw.banned) <= MAX_BANNED
    assert 0 <= draw.uniform < 1
    if not np.isfinite(logits).all():
        return -1
    values = logits.astype(np.float64)
    values[list(draw.banned)] = -np.inf
    c = samplers.top_k(Candidates(np.arange(len(values)), values), draw.top_k)
    c = samplers.min_p(samplers.top_p(c, draw.top_p), draw.min_p)
    c = samplers.temperature(c, draw.temperature)
    return int(c.ids[samplers.draw(c, draw.uniform)])


def lazy_engine(path: Any, **options: Any) -> Engine:
    """An engine whose decode steps run ahead, in float64."""
    with patch("engine.backends.create", lambda *options: [LazyBackend()]):
        engine = Engine.load(path, **options)
    store: Any = engine.plan.backends[0].states
    arrays = store.arrays
    for tensor, array in arrays.items():
        arrays[tensor] = array.astype(np.float64)
    return engine


def decoder_of(engine: Engine) -> LazyDecoder:
    """What its steps were launched on."""
    backend: Any = engine.plan.backends[0]
    return backend.made
