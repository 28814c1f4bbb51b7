"""The contract of a backend, fulfilled by the example of docs/adding-a-backend.md.

What holds for every backend is tested on it: op cases, placement with reasons, a model split over
several backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from engine import Engine, backends
from engine.backends.base import BackendOptions
from engine.graph import Kind
from engine.placement.place import PlacementError
from engine.runtime.batch import Chunk
from tests.support.helpers import ROW_BY_ROW, nmse
from tests.support.opcase import OpCase, check_case, every_case, fresh_seed
from tests.support.toy_backend import REGISTRATION, ToyBackend
from tests.support.toy_backend.program import KERNELS

CASES = [c for c in every_case() if c.op.name in KERNELS]
OPTIONS: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "n_parallel": 2}


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


@pytest.fixture
def path(models: Callable[[str, str], Path]) -> Path:
    return models("tiny", "F32")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The toy comes before the CPU in the registry, and after CUDA, which needs a GPU."""
    cuda, *others = backends.REGISTRY
    with patch("engine.backends.REGISTRY", (cuda, REGISTRATION, *others)):
        backends.missing.cache_clear()
        yield
    backends.missing.cache_clear()


def engine_on(path: Path, backend: str, **options: Any) -> Engine:
    """An engine on a backend and those after it; the CPU without matrix units, so that it refuses
    the chunked delta rule, which the reference backend then takes."""
    isa = ROW_BY_ROW["cpu_isa"]
    return Engine.load(path, backend=backend, **OPTIONS, cpu_isa=isa, **options)


def toy_of(engine: Engine) -> ToyBackend:
    (toy,) = (b for b in engine.plan.backends if isinstance(b, ToyBackend))
    return toy


def test_it_is_asked_for_by_name_and_passed_by_by_auto() -> None:
    assert "toy" in backends.names()
    assert backends.traits("toy") == ToyBackend.traits
    names = [b.name for b in backends.create("toy", BackendOptions(n_threads=1))]
    assert names == ["toy", "cpu", "reference"]
    assert backends.create("auto")[0].name != "toy"
    assert "toy, cpu" in backends.describe()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("c", CASES, ids=[str(c) for c in CASES])
def test_op(c: OpCase, strided: bool, seed: int) -> None:
    check_case(ToyBackend(), c.op, c.case, seed, strided, c.limit)


def test_nodes_are_placed_with_reasons(path: Path) -> None:
    with engine_on(path, "toy", gdn="chunk") as engine:
        placed, loaded = engine.plan.placements, toy_of(engine).loaded
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
    own = [n for n, p in placed.items() if p.backend.name == "toy"]
    used = {t.name for n in own for t in n.inputs.values() if t.kind is Kind.WEIGHT}
    assert len(loaded) == len(set(loaded))
    assert set(loaded) == used


def test_strict_placement_names_its_refusal(path: Path) -> None:
    refusal = "expected backend toy .strict., got cpu: toy: no kernel for GET_ROWS"
    with pytest.raises(PlacementError, match=refusal), engine_on(path, "toy", strict_backend=True):
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
    with engine_on(path, "reference", gdn="chunk", type_k="f16", type_v="f16") as engine:
        want = logits(engine, seed)
    with engine_on(path, "toy", gdn="chunk") as engine:
        assert len(engine.plan.splits) > 10
        got = logits(engine, seed)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert nmse(a, b) < 1e-8, f"step {i}, seed {seed}"


def test_a_watch_sees_every_node_and_timings_every_instruction(path: Path) -> None:
    with engine_on(path, "toy", check=True) as engine:
        seq = engine.memory.create()
        assert np.isfinite(engine.step([Chunk(seq, [1, 2, 3])])).all()
        timings, _ = engine.run_timed([Chunk(seq, [4])])
    toys = [t for t in timings if t.backend == "toy" and t.instruction.nodes]
    n_nodes = sum(p.backend.name == "toy" for p in engine.plan.placements.values())
    assert len(toys) == n_nodes
    assert all(t.seconds >= 0 for t in toys)


def test_a_released_backend_holds_nothing(path: Path) -> None:
    with engine_on(path, "toy") as engine:
        engine.logits([1, 2, 3])
        toy = toy_of(engine)
        assert toy._values
    assert not toy._values
