"""An engine whose model is a hash: steps take microseconds, and nothing wrong goes unseen.

A sequence's state is a hash of its tokens, its KV blocks hold the tokens themselves, and logits
follow from both. So a token too few or too many, a state or a block of somebody else's, or one that
was freed too early, gives other tokens from there on. Launched steps run as late as they may. What
is given back to the system is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from engine import Engine
from engine.graph import Live
from engine.sampling.spec import SampleSpec
from tests.support.lazy_backend import LazyHandle

_MASK = 2**61 - 1


class HashExecutable:
    """In place of an Executable. `overlaps`: whether it samples as a device does."""

    def __init__(self, plan: Any, extra: Mapping[str, int], overlaps: bool) -> None:
        self.plan, self._overlaps, self.queue = plan, overlaps, list[HashStep]()
        capacity = plan.graph.capacity
        n_slots = capacity.n_slots + extra["n_slots"]
        n_blocks = capacity.n_blocks + extra["n_blocks"]
        self._n_vocab = int(plan.graph.outputs["logits"].shape[1])
        # What nobody has written is found in nobody's history.
        self._states = [-1] * n_slots
        self._blocks = [[-(10**9)] * capacity.block_size for _ in range(n_blocks)]
        self._last: HashStep | None = None

    @property
    def stores(self) -> list[HashExecutable]:
        return [self]

    def zero(self, dim: str, index: int) -> None:
        self.work()
        if dim == "n_slots":
            self._states[index] = 0
        else:
            self._blocks[index] = [0] * len(self._blocks[index])

    def copy(self, dim: str, source: int, target: int) -> None:
        self.work()
        assert dim == "n_blocks"
        self._blocks[target] = list(self._blocks[source])

    def give_back(self, dim: str, indices: Sequence[int]) -> None:
        for index in indices:
            if dim == "n_slots":
                self._states[index] = -1
            else:
                self._blocks[index] = [-(10**9)] * len(self._blocks[index])

    def run(self, inputs: Mapping[str, Any], live: Live, watch: Any = None) -> dict[str, Any]:
        self.work()
        return {"logits": self.compute(inputs)}

    def work(self, until: HashStep | None = None) -> None:
        """Run everything that was launched, or up to one step."""
        while self.queue and (until is None or not until.is_done):
            self.queue.pop(0).run()

    def compute(self, inputs: Mapping[str, Any]) -> NDArray[np.float32]:
        given = {name: values.tolist() for name, values in inputs.items()}
        starts, hashes = given["seq_starts"], list[tuple[int, int]]()
        for s, (source, target) in enumerate(
            zip(given["state_src"], given["state_dst"], strict=True)
        ):
            state = self._states[source] if source >= 0 else 1
            table = given["block_tables"][s]
            for i in range(starts[s], starts[s + 1]):
                token, position = given["tokens"][i], given["positions"][i]
                block = self._blocks[table[position // 64]]
                block[position % 64] = token
                state = (state * 1_000_003 + token + 7) % _MASK
                seen = (self._blocks[b] for b in table[: position // 64 + 1])
                kv = hash(tuple(t for row in seen for t in row)[: position + 1]) % _MASK
                hashes.append((state, kv))
            self._states[target] = state
        rows = [self._logits(*hashes[i]) for i in given["output_rows"]]
        return np.array(rows, np.float32).reshape(len(rows), self._n_vocab)

    def _logits(self, state: int, kv: int) -> NDArray[np.float64]:
        x = np.arange(1, self._n_vocab + 1)
        return np.asarray(4 * np.sin(x * (1 + state % 9973) + kv % 9967))

    def device_sampler(self) -> HashExecutable | None:
        return self if self._overlaps else None

    def launch(
        self,
        inputs: Mapping[str, NDArray[np.int32]],
        live: Live,
        specs: Sequence[SampleSpec | None],
        feed: Sequence[int],
    ) -> HashStep:
        given = {name: values.copy() for name, values in inputs.items()}
        self._last = HashStep(self, given, specs, feed, self._last)
        self.queue.append(self._last)
        return self._last

    def enter_thread(self) -> None:
        """Any thread may use it."""

    def after_fork(self) -> None:
        """There is nothing of the parent's in it."""


class HashStep(LazyHandle):
    """A launched step."""

    def __init__(
        self,
        on: HashExecutable,
        inputs: dict[str, NDArray[np.int32]],
        specs: Sequence[SampleSpec | None],
        feed: Sequence[int],
        before: HashStep | None,
    ) -> None:
        super().__init__(on, specs)
        self._on, self._inputs, self._feed, self._before = on, inputs, feed, before

    def run(self) -> None:
        for row, source in enumerate(self._feed):
            if source >= 0:
                assert self._before is not None
                self._inputs["tokens"][row] = self._before.sampled[source]
        self.take(self._on.compute(self._inputs))
        self._before = None


def hash_engine(path: Path, overlaps: bool, **options: Any) -> Engine:
    """An engine whose steps a HashExecutable runs; the file gives vocabulary and sizes. Its prefix
    cache has 1 MiB, some dozens of states, so that some are given up."""

    def make(plan: Any, source: Any, extra: Mapping[str, int]) -> HashExecutable:
        return HashExecutable(plan, extra, overlaps)

    made: Callable[..., Any] = make
    with patch("engine.engine.Executable", made):
        return Engine.load(
            path, backend="reference", **{"n_checkpoints": 4, "cache_ram": 1, **options}
        )
