"""The contract of a backend, fulfilled by the example of docs/adding-a-backend.md.

What holds for every backend is tested on it: op cases, placement with reasons, a model split over
several backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from engine import Engine
from engine.backends.base import Backend
from engine.backends.cpu.backend import CpuBackend
from engine.backends.reference import ReferenceBackend
from engine.placement.place import PlacementError
from engine.runtime.batch import Chunk
from tests.support.helpers import ROW_BY_ROW, nmse
from tests.support.opcase import OpCase, check_case, every_case, fresh_seed
from tests.support.toy_backend import ToyBackend
from tests.support.toy_backend.program import KERNELS

CASES = [c for c in every_case() if c.op.name in KERNELS]
OPTIONS: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "n_parallel": 2}


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


@pytest.fixture
def path(models: Callable[[str, str], Path]) -> Path:
    return models("tiny", "F32")


@contextmanager
def engine_on(path: Path, backends: Sequence[Backend], **options: Any) -> Iterator[Engine]:
    """An engine that is given these backends."""
    with (
        patch("engine.backends.create", lambda *given: list(backends)),
        Engine.load(path, **OPTIONS, **options) as engine,
    ):
        yield engine


def split_backends() -> list[Backend]:
    """The toy, then the CPU without matrix units, which refuses the chunked delta rule."""
    return [ToyBackend(), CpuBackend(2, ROW_BY_ROW["cpu_isa"]), ReferenceBackend()]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("c", CASES, ids=[str(c) for c in CASES])
def test_op(c: OpCase, strided: bool, seed: int) -> None:
    check_case(ToyBackend(), c.op, c.case, seed, strided, c.limit)


def test_nodes_are_placed_with_reasons(path: Path) -> None:
    backends = split_backends()
    with engine_on(path, backends, gdn="chunk") as engine:
        placed = engine.plan.placements
    assert {p.backend.name for p in placed.values()} == {"toy", "cpu", "reference"}
    for node, (backend, reason) in ((n, (p.backend.name, p.reason)) for n, p in placed.items()):
        if node.op.name == "GATED_DELTA_NET":
            assert backend == "reference"
            assert "toy: no kernel for GATED_DELTA_NET" in reason
            assert "cpu: no matrix units" in reason
        elif node.name == "output":
            # The embedding is its weight, and the toy has no kernel for GET_ROWS.
            assert (backend, reason) == ("cpu", "holds token_embd.weight")
        elif node.op.name in KERNELS:
            wanted = "follows blk." if node.op.name == "SWIGLU" else "toy is first in order"
            assert (backend, reason[: len(wanted)]) == ("toy", wanted)
        else:
            assert backend == "cpu"
    toy = backends[0]
    assert isinstance(toy, ToyBackend)
    used = {t.name for n in placed if n.op.name in KERNELS for t in n.inputs.values()}
    assert toy.loaded
    assert set(toy.loaded) <= used


def test_strict_placement_names_its_refusal(path: Path) -> None:
    refusal = "expected backend toy .strict., got cpu: toy: no kernel for GET_ROWS"
    with (
        pytest.raises(PlacementError, match=refusal),
        engine_on(path, split_backends(), strict_backend=True),
    ):
        pass


def logits(engine: Engine, seed: int) -> list[np.ndarray[Any, Any]]:
    """Of a prompt, of two sequences in one step, and of a return to a checkpoint."""
    rng, memory = np.random.default_rng(seed), engine.memory
    ids = rng.integers(0, 300, 100).tolist()
    one, two = memory.create(), memory.create()
    out = [engine.step([Chunk(one, ids[:40])])]
    saved = memory.checkpoint(one)
    out.append(engine.step([Chunk(one, ids[40:41]), Chunk(two, ids[:30])]))
    memory.restore(two, saved)
    saved.release()
    out.append(engine.step([Chunk(one, ids[50:60]), Chunk(two, ids[40:41])]))
    return out


def test_a_model_split_over_three_backends_gives_the_logits_of_the_reference(
    path: Path, seed: int
) -> None:
    with engine_on(path, [ReferenceBackend()], gdn="chunk") as engine:
        want = logits(engine, seed)
    with engine_on(path, split_backends(), gdn="chunk") as engine:
        assert len(engine.plan.splits) > 10
        got = logits(engine, seed)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert nmse(a, b) < 1e-8, f"step {i}, seed {seed}"


def test_a_watch_sees_every_node_and_timings_every_instruction(path: Path) -> None:
    with engine_on(path, split_backends(), check=True) as engine:
        seq = engine.memory.create()
        assert np.isfinite(engine.step([Chunk(seq, [1, 2, 3])])).all()
        timings, _ = engine.run_timed([Chunk(seq, [4])])
    toys = [t for t in timings if t.backend == "toy" and t.instruction.nodes]
    n_nodes = sum(p.backend.name == "toy" for p in engine.plan.placements.values())
    assert len(toys) == n_nodes
    assert all(t.seconds >= 0 for t in toys)


def test_a_released_backend_holds_nothing(path: Path) -> None:
    backends = split_backends()
    with engine_on(path, backends) as engine:
        engine.logits([1, 2, 3])
    toy = backends[0]
    assert isinstance(toy, ToyBackend)
    assert not toy._values
