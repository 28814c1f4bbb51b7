"""A model spread over several backends computes what it does on one, bit for bit.

All backends are the reference backend, so that copies, states and weights are all that could
differ. Whatever a plan looks like, its splits and copies must hold together.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from engine import Engine
from engine.graph import Kind, Node
from engine.placement.place import Plan
from engine.planning import plan_only
from engine.runtime.batch import Chunk, Logits
from tests.support.opcase import fresh_seed
from tests.support.picky import Picky, Refusal, refuse_names, refuse_ops
from tests.support.presets import WITH_LATENTS

Array = np.ndarray[Any, Any]
Backends = list[Picky]


@pytest.fixture(scope="module")
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


Models = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def path(models: Models) -> Path:
    return models("tiny", "F32")


def names(path: Path) -> list[str]:
    """The nodes in execution order."""
    return [node.name for node in plan_only(path, 128, "fused", backend="reference").graph.nodes]


@contextmanager
def engine_on(path: Path, backends: Sequence[Picky], **options: Any) -> Iterator[Engine]:
    """An engine that is given these backends."""
    with (
        patch("engine.backends.create", lambda *options: list(backends)),
        Engine.load(path, n_ctx=256, n_ubatch=128, n_parallel=3, **options) as engine,
    ):
        yield engine


def walk(engine: Engine, seed: int) -> list[Array]:
    """The logits of some steps: a prompt, two sequences at once, a checkpoint and its return."""
    rng, memory = np.random.default_rng(seed), engine.memory

    def step(*parts: tuple[int, int]) -> Array:
        chunks = [Chunk(seq, rng.integers(0, 300, n).tolist(), Logits.ALL) for seq, n in parts]
        return engine.step(chunks)

    one, two, three = (memory.create() for _ in range(3))
    logits = [step((one, 70)), step((one, 1), (two, 20))]
    # 71 positions: the last block is shared by the checkpoint and copied at the next write.
    saved = memory.checkpoint(one)
    logits += [step((two, 1), (one, 30)), step((one, 1))]
    memory.restore(one, saved)
    memory.restore(three, saved)
    saved.release()
    logits += [step((three, 5), (one, 2), (two, 1)), step((one, 1), (three, 1))]
    return logits


@cache
def alone(path: Path, seed: int, **options: Any) -> list[Array]:
    """The standard: the same walk on one backend."""
    with engine_on(path, [Picky("only")], **options) as engine:
        return walk(engine, seed)


def random_refusals(seed: int, share: float) -> Refusal:
    """Refuse a random share of the nodes."""

    def refuses(node: Node) -> str:
        drawn = zlib.crc32(f"{seed} {node.name}".encode()) / 2**32
        return "drawn" if drawn < share else ""

    return refuses


def alternating(names: list[str]) -> Backends:
    """Every other node on the other backend, but for those with a state in common."""
    even, odd = refuse_names("even", *names[::2]), refuse_names("odd", *names[1::2])
    return [Picky("a", even), Picky("b", odd), Picky("c")]


def elsewhere(*ops: str) -> Callable[[list[str]], Backends]:
    """These ops on the second backend."""
    return lambda _: [Picky("a", refuse_ops("no", *ops)), Picky("b")]


Patterns = dict[str, Callable[[list[str]], Backends]]
PATTERNS: Patterns = {
    "products elsewhere": elsewhere("MUL_MAT"),
    "delta nets elsewhere": elsewhere("GATED_DELTA_NET"),
    "attention elsewhere": elsewhere("ATTENTION"),
    "convolution elsewhere": elsewhere("SSM_CONV"),
    "embedding elsewhere": elsewhere("GET_ROWS"),
    "head elsewhere": lambda _: [Picky("a", refuse_names("no", "output")), Picky("b")],
    "half and half": lambda n: [Picky("a", refuse_names("no", *n[len(n) // 2 :])), Picky("b")],
    "first layer elsewhere": lambda n: [Picky("a", refuse_names("no", *n[:12])), Picky("b")],
    "alternating": alternating,
}
EXPERT_PATTERNS: Patterns = {
    "experts elsewhere": elsewhere("MUL_MAT_ID"),
    "router elsewhere": elsewhere("ROUTER"),
    # Ids cross twice: the router's to the experts' backend, whose results come back.
    "router and activation elsewhere": elsewhere("ROUTER", "SWIGLU"),
    "half and half": PATTERNS["half and half"],
    "alternating": alternating,
}
LATENT_PATTERNS: Patterns = {
    "latent attention elsewhere": elsewhere("MLA_CACHE", "ATTENTION"),
    # Their common state takes the other one along.
    "latents elsewhere": elsewhere("MLA_CACHE"),
    "scores elsewhere": elsewhere("ATTENTION"),
    "projections per head elsewhere": elsewhere("MUL_MAT_HEADS"),
    "delta nets elsewhere": elsewhere("GATED_DELTA_NET", "GDN_GATE"),
}
SPREAD = [
    (preset, name, make)
    for preset, patterns in (
        ("tiny", PATTERNS),
        ("tiny-moe", EXPERT_PATTERNS),
        ("tiny-next", {"experts elsewhere": EXPERT_PATTERNS["experts elsewhere"]}),
        *((preset, EXPERT_PATTERNS | LATENT_PATTERNS) for preset in WITH_LATENTS),
    )
    for name, make in patterns.items()
]


@pytest.mark.parametrize(
    ("preset", "make"), [(p, make) for p, _, make in SPREAD], ids=[f"{p}-{n}" for p, n, _ in SPREAD]
)
def test_a_spread_model_gives_the_same_logits(
    preset: str, make: Callable[[list[str]], Backends], models: Models, seed: int
) -> None:
    path = models(preset, "F32")
    backends = make(names(path))
    with engine_on(path, backends) as engine:
        assert len(engine.plan.backends) > 1
        check_plan(engine.plan, backends)
        assert_same(walk(engine, seed), alone(path, seed), f"seed {seed}")
        check_contents(engine)


def test_nodes_of_a_latent_cache_stay_together(models: Models) -> None:
    with engine_on(models("tiny-kimi", "F32"), elsewhere("MLA_CACHE")([])) as engine:
        at = {node.name: p.backend.name for node, p in engine.plan.placements.items()}
    for layer in ("blk.2", "blk.4"):
        assert at[f"{layer}.mla_cache"] == at[f"{layer}.attention"] == "b"
        assert at[f"{layer}.attn_k_b"] == at[f"{layer}.attn_v_b"] == "a"


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("options", [{}, {"gdn": "decomposed"}], ids=["fused", "decomposed"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-moe", *WITH_LATENTS])
def test_random_refusals_give_the_same_logits(
    share: float, options: dict[str, Any], preset: str, models: Models, seed: int
) -> None:
    path = models(preset, "F32")
    refusals = [random_refusals(seed + i, share) for i in range(2)]
    backends = [Picky("a", refusals[0]), Picky("b", refusals[1]), Picky("c")]
    with engine_on(path, backends, **options) as engine:
        check_plan(engine.plan, backends)
        expected = alone(path, seed, **options)
        assert_same(walk(engine, seed), expected, f"share {share}, seed {seed}")
        check_contents(engine)


def assert_same(got: list[Array], want: list[Array], what: str) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert np.isfinite(b).all()
        assert np.array_equal(a, b), f"step {i} of {what}"


def check_plan(plan: Plan, backends: Backends) -> None:
    """What holds for every plan, worked out from the graph and the placements alone."""
    at = {node: placement.backend for node, placement in plan.placements.items()}
    assert [node for split in plan.splits for node in split.nodes] == plan.graph.nodes
    assert all(at[node].supports(node).ok for node in plan.graph.nodes)
    for before, after in zip(plan.splits, plan.splits[1:], strict=False):
        assert before.backend is not after.backend
    index = {node: i for i, split in enumerate(plan.splits) for node in split.nodes}
    made = {t: index[node] for node in plan.graph.nodes for t in node.outputs}
    read = {(index[n], t.base) for n in plan.graph.nodes for t in n.inputs.values()}
    for i, split in enumerate(plan.splits):
        assert all(at[node] is split.backend for node in split.nodes)
        foreign = {t for j, t in read if j == i and t in made}
        foreign = {t for t in foreign if plan.splits[made[t]].backend is not split.backend}
        assert set(split.copies) == foreign
        later = {t for j, t in read if t in made and made[t] == i < j}
        later |= {t.base for t in plan.graph.outputs.values() if made[t.base] == i}
        assert set(split.keeps) == later
        assert len(split.keeps) + len(split.copies) == len(later) + len(foreign)
    for state in plan.graph.states.values():
        assert sum(state in plan.tensors_of(b, Kind.STATE) for b in backends) == 1


def check_contents(engine: Engine) -> None:
    """Backends hold the weights and states that their nodes use, and no dead activation."""
    plan = engine.plan
    for backend in plan.backends:
        assert isinstance(backend, Picky)
        nodes = [node for node, p in plan.placements.items() if p.backend is backend]
        used = {t.base for node in nodes for t in node.inputs.values()}
        assert len(backend.loaded) == len(set(backend.loaded))
        assert set(backend.loaded) == {t.name for t in used if t.kind is Kind.WEIGHT}
        assert set(backend.states.arrays) == {t for t in used if t.kind is Kind.STATE}
        keeps = {t for s in plan.splits if s.backend is backend for t in s.keeps}
        assert set(backend.held()) <= keeps
    pickies: list[Any] = plan.backends
    loaded = {name for backend in pickies for name in backend.loaded}
    assert loaded == plan.graph.weights.keys()


def test_one_backend_holds_few_activations_at_a_time(path: Path, seed: int) -> None:
    backend = Picky("only")
    with engine_on(path, [backend]) as engine:
        walk(engine, seed)
        n_outputs = sum(len(node.outputs) for node in engine.plan.graph.nodes)
        assert backend.held() == [engine.plan.graph.outputs["logits"]]
    # The widest place is GDN_GATE: the residual, z, convolved and normalised rows, two operands and
    # two outputs; and the last step's logits.
    assert backend.most_held <= 9 < n_outputs


def test_a_cache_of_no_bytes_only_decodes_more_often(path: Path, seed: int) -> None:
    with engine_on(path, [Picky("forgetful", cache_bytes=0)]) as engine:
        assert_same(walk(engine, seed), alone(path, seed), f"seed {seed}")


def test_a_backend_without_nodes_is_given_nothing(path: Path) -> None:
    idle = Picky("idle", lambda node: "no")
    with engine_on(path, [idle, Picky("busy")]) as engine:
        assert [b.name for b in engine.plan.backends] == ["busy"]
        assert (idle.loaded, idle.states.arrays) == ([], {})
