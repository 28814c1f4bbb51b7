"""The decomposed delta rule is the fused node: one layer against the naive definition, and a model.

The decomposed form shares no arithmetic with the fused node's reference, so that each checks the
other; it also has its own nodes for reading and writing slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine
from engine.backends.reference import ReferenceBackend
from engine.formats.quants import F32
from engine.graph import Capacity, Dim, Graph, Kind, Live, Tensor
from engine.ops.decomposed import delta_net_decomposed
from engine.placement.place import place
from engine.runtime.batch import Chunk, Logits
from engine.runtime.executor import Executable
from tests.support.naive import gated_delta_net as naive
from tests.support.opcase import RawWeights, assert_close, fresh_seed
from tests.support.states import load, save
from tools.synth import write_model

Array = np.ndarray[Any, Any]
# Float32 rounding through four layers; a wrong sign or decay is far above it.
LOGITS_LIMIT = 1e-10


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


def random_layer(
    seed: int, lengths: tuple[int, ...], n_heads: tuple[int, int], gate: float, kda: bool
) -> dict[str, Array]:
    """Operands of the delta rule; keys of 24, values of 16. Sequence 0 starts from zeros."""
    rng, n, n_seqs = np.random.default_rng(seed), sum(lengths), len(lengths)
    n_k, n_v = n_heads
    q, k = rng.normal(size=(2, n, n_k, 24))
    arrays = {
        "q": q / np.linalg.norm(q, axis=-1, keepdims=True),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(n, n_v, 16)),
        "g": gate * rng.uniform(0.1, 2, (n, n_v, 24) if kda else (n, n_v)),
        "beta": rng.uniform(0, 1, (n, n_v)),
    }
    return arrays | {
        "state": rng.normal(size=(2 * n_seqs + 1, n_v, 16, 24)).astype(np.float32).astype(float),
        "seq_starts": np.cumsum([0, *lengths]),
        "state_src": np.array([-1, *range(2, 2 * n_seqs, 2)]),
        "state_dst": np.arange(1, 2 * n_seqs, 2),
        "snapshot_dst": np.empty((n_seqs, 0), int),
    }


def run_decomposed(
    arrays: dict[str, Array], capacity: Capacity, head_map: str
) -> tuple[Graph, Array, Array]:
    """(graph, outputs, states after), in float64 but for the stored states."""
    graph = Graph(capacity)
    n_tokens, n_seqs = Dim(capacity.n_tokens, "n_tokens"), Dim(capacity.n_seqs, "n_seqs")
    operands = {
        name: Tensor(name, (n_tokens, *arrays[name].shape[1:]), F32, Kind.ACTIVATION)
        for name in ("q", "k", "v", "g", "beta")
    }
    n_slots = Dim(len(arrays["state"]), "n_slots")
    state = graph.state("state", (n_slots, *arrays["state"].shape[1:]))
    batch = {
        "seq_starts": graph.input("seq_starts", (Dim(capacity.n_seqs + 1, "n_seqs + 1"),)),
        "state_src": graph.input("state_src", (n_seqs,)),
        "state_dst": graph.input("state_dst", (n_seqs,)),
        "snapshot_dst": graph.input("snapshot_dst", (n_seqs, 0)),
    }
    given = {**operands, "state": state, **batch}
    scale = operands["q"].shape[-1] ** -0.5
    out = delta_net_decomposed(graph, "rule", given, head_map=head_map, scale=scale)
    graph.outputs["out"] = out
    backend = ReferenceBackend(np.float64)
    executable = Executable(place(graph, [backend]), RawWeights({}))
    for name, tensor in operands.items():
        backend.write(tensor, arrays[name])
    for slot, contents in enumerate(arrays["state"]):
        load(backend.states, "n_slots", slot, {"state": contents})
    live = Live(len(arrays["q"]), len(arrays["state_src"]), 0)
    result = executable.run({name: arrays[name] for name in graph.inputs}, live)["out"]
    saved = [save(backend.states, "n_slots", i)["state"] for i in range(int(n_slots))]
    return graph, result, np.stack(saved)


@pytest.mark.parametrize("kda", [False, True], ids=["gda", "kda"])
@pytest.mark.parametrize("gate", [0.0, -0.1, -5.0, -100.0])
@pytest.mark.parametrize(
    ("lengths", "n_tokens"),
    # One token a batch; less than a chunk; up to the capacity; two sequences, ragged.
    [((1,), 1), ((1,), 80), ((64,), 64), ((130,), 130), ((70, 1), 100), ((3, 17, 65), 90)],
)
@pytest.mark.parametrize(("n_heads", "head_map"), [((2, 4), "tiled"), ((2, 4), "grouped")])
def test_one_layer_is_the_naive_definition(
    lengths: tuple[int, ...],
    n_tokens: int,
    n_heads: tuple[int, int],
    head_map: str,
    gate: float,
    kda: bool,
    seed: int,
) -> None:
    arrays: dict[str, Any] = random_layer(seed, lengths, n_heads, gate, kda)
    capacity = Capacity(n_tokens, n_seqs=1 if n_tokens == 1 else len(lengths) + 1)
    graph, out, states = run_decomposed(arrays, capacity, head_map)
    (want,), want_states = naive(**arrays, head_map=head_map, scale=24**-0.5)
    assert_close(out, want, 1e-24, f"outputs, seed {seed}")
    assert_close(states, want_states["state"], 1e-13, f"states, seed {seed}")
    kept = [slot for slot in range(len(states)) if slot not in arrays["state_dst"]]
    assert np.array_equal(states[kept], arrays["state"][kept])
    ops = {node.op.name for node in graph.nodes}
    assert ("SOLVE_TRI" in ops) == (n_tokens > 1)
    assert "GATED_DELTA_NET" not in ops


def test_as_many_key_heads_as_value_heads_need_no_repeat(seed: int) -> None:
    arrays: dict[str, Any] = random_layer(seed, (20,), (3, 3), -0.5, False)
    graph, out, _ = run_decomposed(arrays, Capacity(20), "tiled")
    (want,), _ = naive(**arrays, head_map="tiled", scale=24**-0.5)
    assert_close(out, want, 1e-24, f"seed {seed}")
    assert "REPEAT_HEADS" not in {node.op.name for node in graph.nodes}


def test_slots_that_are_not_read_may_hold_nan(seed: int) -> None:
    arrays: dict[str, Any] = random_layer(seed, (70, 5), (2, 4), -0.1, False)
    (want,), _ = naive(**arrays, head_map="tiled", scale=24**-0.5)
    arrays["state"][[0, 1, 3, 4]] = np.nan
    _, out, states = run_decomposed(arrays, Capacity(80, n_seqs=2), "tiled")
    assert_close(out, want, 1e-24, f"seed {seed}")
    assert np.isfinite(states[[1, 2, 3]]).all()
    assert np.isnan(states[[0, 4]]).all()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return write_model(out, "tiny-untied", dtype="F32", std=0.1)


@pytest.fixture(scope="module")
def scanned(path: Path) -> Iterator[Engine]:
    """The standard: the fused node, token by token."""
    with Engine.load(path, backend="reference", n_ctx=512, gdn="scan") as engine:
        yield engine


def random_ids(rng: np.random.Generator, n: int) -> list[int]:
    return rng.integers(0, 300, n).tolist()


@pytest.mark.parametrize(
    ("gdn", "n_ubatch", "n_ids"),
    [
        ("auto", 512, 150),
        ("chunk", 512, 150),
        ("decomposed", 1, 70),
        ("decomposed", 64, 150),
        ("decomposed", 100, 150),
        ("decomposed", 200, 210),
    ],
)
def test_a_model_gives_the_same_logits(
    scanned: Engine, path: Path, gdn: str, n_ubatch: int, n_ids: int, seed: int
) -> None:
    ids = random_ids(np.random.default_rng(seed), n_ids)
    with Engine.load(path, backend="reference", n_ctx=256, gdn=gdn, n_ubatch=n_ubatch) as engine:
        logits = engine.logits(ids)
        ops = {node.op.name for node in engine.plan.graph.nodes}
    assert_close(logits, scanned.logits(ids), LOGITS_LIMIT, f"seed {seed}")
    assert ("GATED_DELTA_NET" in ops) == (gdn != "decomposed")
    assert ("MAT_MUL" in ops) == (gdn == "decomposed" and n_ubatch > 1)


def test_ragged_batches_of_a_decomposed_model(scanned: Engine, path: Path, seed: int) -> None:
    """Two sequences in one batch: prefill together, then one decodes while the other goes on."""
    rng = np.random.default_rng(seed)
    prompts = [random_ids(rng, 60), random_ids(rng, 140)]
    cuts = [(0, 37, 38, 60), (0, 90, 139, 140)]
    want = [scanned.logits(ids) for ids in prompts]
    options: dict[str, Any] = {"gdn": "decomposed", "n_ubatch": 128, "n_parallel": 2}
    with Engine.load(path, backend="reference", n_ctx=256, **options) as engine:
        seqs = [engine.memory.create() for _ in prompts]
        for spans in zip(*map(itertools.pairwise, cuts), strict=True):
            parts = list(zip(seqs, prompts, spans, strict=True))
            chunks = [Chunk(seq, ids[a:b], Logits.ALL) for seq, ids, (a, b) in parts]
            logits = engine.step(chunks)
            right = np.concatenate([want[i][a:b] for i, (a, b) in enumerate(spans)])
            assert_close(logits, right, LOGITS_LIMIT, f"{spans}, seed {seed}")
