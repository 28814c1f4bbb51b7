"""Attention and the delta rule on every device where the ops' own cases are small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.device import Device
from engine.formats.quants import F16, F32, numpy_dtype
from engine.graph import Kind, Op, Tensor
from engine.ops import OPS
from engine.placement.place import place
from engine.runtime.executor import Executable
from tests.ops.cases.attention import random_operands as attention_operands
from tests.ops.cases.gated_delta_net import random_operands as delta_operands
from tests.support.cases import (
    Case,
    Operand,
    blocks,
    live_counts,
    paged_operands,
    single_node_graph,
)
from tests.support.cuda_devices import ON_DEVICES, MakeDevice
from tests.support.cuda_emulator.device import EmulatedDevice
from tests.support.naive import NAIVE
from tests.support.opcase import RawWeights, assert_close, check_case, fresh_seed, nmse, run_case
from tests.support.states import load, save

Rng = np.random.Generator
ATTENTION, DELTA = OPS["ATTENTION"], OPS["GATED_DELTA_NET"]
FLOAT32_LIMIT, FLOAT16_LIMIT = 1e-10, 2e-6


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


# --- The delta rule


def gates(rng: Rng, strengths: list[float], **params: Any) -> dict[str, Operand]:
    """Operands with decays of very different strengths."""
    operands = delta_operands(rng, gate=-1.0, **params)
    g = operands["g"]
    values = g.values * rng.choice(strengths, g.values.shape)
    return operands | {"g": replace(g, values=values)}


def delta_case(algorithm: str, make: Any, head_map: str = "tiled") -> Case:
    attrs = {"head_map": head_map, "scale": 0.2, "algorithm": algorithm}
    return Case(f"{make.keywords} {attrs}".replace("'", ""), make, attrs)


# Rows for each kernel: steps, tiles of the scan, chunks; and numbers that fill none of them.
MANY = [1, 7, 8, 17, 127, 128, 3, 1, 193]
DELTA_CASES = [
    ("auto", {"lengths": MANY, "heads": (2, 4), "sizes": (32, 40), "fresh": (0, 2, 5)}),
    ("auto", {"lengths": [3, 200], "heads": (1, 2), "sizes": (100, 20), "n_snapshots": 2}),
    ("scan", {"lengths": MANY, "heads": (1, 2), "sizes": (24, 33), "n_snapshots": 3}),
    ("chunk", {"lengths": [1, 64, 65, 130, 2], "heads": (2, 2), "sizes": (48, 72)}),
    ("chunk", {"lengths": [5, 70], "heads": (1, 2), "sizes": (24, 33), "n_snapshots": 6}),
]


@ON_DEVICES
@pytest.mark.parametrize("kda", [False, True])
@pytest.mark.parametrize(("algorithm", "params"), DELTA_CASES, ids=str)
def test_ragged_deltas(
    make_device: MakeDevice, algorithm: str, params: dict[str, Any], kda: bool, seed: int
) -> None:
    make = partial(delta_operands, gate=-0.5, kda=kda, **params)
    limit = FLOAT32_LIMIT if algorithm == "scan" else FLOAT16_LIMIT
    for strided in (False, True):
        backend = CudaBackend(make_device(seed))
        check_case(backend, DELTA, delta_case(algorithm, make), seed, strided, limit)


@ON_DEVICES
@pytest.mark.parametrize("kda", [False, True])
@pytest.mark.parametrize("algorithm", ["scan", "chunk"])
def test_strong_gates(make_device: MakeDevice, algorithm: str, kda: bool, seed: int) -> None:
    strengths = [0.0, 1e-3, 0.1, 1.0, 100.0, 1e4]
    params: dict[str, Any] = {"lengths": [150, 9], "heads": (1, 2), "sizes": (32, 16), "kda": kda}
    make = partial(gates, strengths=strengths, **params)
    limit = FLOAT32_LIMIT if algorithm == "scan" else FLOAT16_LIMIT
    backend = CudaBackend(make_device(seed))
    check_case(backend, DELTA, delta_case(algorithm, make, "grouped"), seed, limit=limit)


@ON_DEVICES
def test_weak_gates_behind_a_strong_one(make_device: MakeDevice, seed: int) -> None:
    """Float32 would round a sum of -1e4 to multiples of 1e-3."""

    def make(rng: Rng) -> dict[str, Operand]:
        operands = delta_operands(rng, [64], (1, 1), (32, 16))
        g = np.full((64, 1), -0.02)
        g[0] = -1e4
        return operands | {"g": replace(operands["g"], values=g)}

    attrs = {"head_map": "tiled", "scale": 0.2, "algorithm": "chunk"}
    backend = CudaBackend(make_device(seed))
    check_case(backend, DELTA, Case("weak", make, attrs), seed, limit=FLOAT16_LIMIT)


@ON_DEVICES
@pytest.mark.parametrize("algorithm", ["auto", "scan"])
def test_deltas_do_not_depend_on_the_batch(
    make_device: MakeDevice, algorithm: str, seed: int
) -> None:
    """A sequence has the same bits alone and beside others."""
    lengths = [1, 9, 140, 2, 1]
    rng = np.random.default_rng(seed)
    operands = delta_operands(rng, lengths, (1, 2), (16, 16), n_snapshots=1)
    attrs = {"head_map": "tiled", "scale": 0.2, "algorithm": algorithm}
    together = run(DELTA, operands, attrs, make_device(seed))
    starts = np.cumsum([0, *lengths])
    for s in range(len(lengths)):
        rows = slice(starts[s], starts[s + 1])
        alone = {n: part(o, rows, s) for n, o in operands.items()}
        np.testing.assert_array_equal(run(DELTA, alone, attrs, make_device(seed)), together[rows])


@ON_DEVICES
def test_invariant_deltas_do_not_depend_on_cuts(make_device: MakeDevice, seed: int) -> None:
    """A sequence in one step, and in two, the second from the state that the first has left."""
    operands = delta_operands(np.random.default_rng(seed), [150], (1, 2), (16, 16))
    attrs = {"head_map": "tiled", "scale": 0.2, "algorithm": "auto"}
    backend = CudaBackend(make_device(seed), batch_invariant=True)
    whole = run(DELTA, operands, attrs, backend)
    pieces = []
    for rows in (slice(0, 128), slice(128, 150)):
        piece = {n: part(o, rows, 0) for n, o in operands.items()}
        backend = CudaBackend(make_device(seed), batch_invariant=True)
        pieces.append(run(DELTA, piece, attrs, backend))
        (state,) = save(backend.states, "n_slots", 1).values()
        operands["state"] = replace(operands["state"], values=np.stack([state, state]))
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_head_sizes_of_deltas() -> None:
    make = partial(delta_operands, lengths=[2], heads=(1, 1), sizes=(260, 16))
    assert reason(delta_case("auto", make)) == "head size 260 above 256"
    make = partial(delta_operands, lengths=[2], heads=(1, 1), sizes=(256, 16), kda=True)
    assert reason(delta_case("chunk", make), 99 << 10) == (
        "too little shared memory for chunks of heads of 256"
    )
    assert not reason(delta_case("auto", make), 99 << 10)


def reason(case: Case, shared_bytes: int = 227 << 10) -> str:
    """Why the delta rule's node isn't taken."""
    graph, _ = single_node_graph(DELTA, case, case.make(np.random.default_rng(0)))
    device = EmulatedDevice()
    device.shared_bytes = shared_bytes
    return CudaBackend(device).supports(graph.nodes[0]).reason


def part(operand: Operand, rows: slice, s: int) -> Operand:
    """What sequence s has of an operand."""
    values = operand.values
    match operand.dim:
        case "n_tokens":
            values = values[rows]
        case "n_seqs":
            values = values[s : s + 1]
        case "n_seqs + 1":
            values = np.array([0, rows.stop - rows.start], np.int32)
    return replace(operand, values=values)


def run(
    op: Op, operands: dict[str, Operand], attrs: Mapping[str, Any], on: Device | CudaBackend
) -> Any:
    """The output; operands as they are."""
    backend = on if isinstance(on, CudaBackend) else CudaBackend(on)
    case = Case("same", lambda _: operands, dict(attrs))
    graph, tensors = single_node_graph(op, case, operands)
    return execute(backend, graph, tensors, operands)


def execute(backend: CudaBackend, graph: Any, tensors: dict[str, Tensor], operands: Any) -> Any:
    """The output of a graph of one node."""
    executable = Executable(place(graph, [backend], strict=True), RawWeights({}))
    stored = {}
    for name, operand in operands.items():
        t = tensors[name]
        if operand.kind is Kind.ACTIVATION:
            backend.write(t, operand.values.astype(np.float32))
        elif operand.kind is Kind.STATE and t.base is t:
            stored[t] = operand.values.astype(numpy_dtype(t.dtype))
    (dim,) = {t.shape[0].name for t in stored}  # type: ignore[attr-defined]
    for i in range(len(next(iter(stored.values())))):
        load(backend.states, dim, i, {t.name: values[i] for t, values in stored.items()})
    inputs = {n: o.values for n, o in operands.items() if o.kind is Kind.INPUT}
    (out,) = executable.run(inputs, live_counts(operands)).values()
    return out


# --- Attention


def attention_case(**params: Any) -> Case:
    heads, sizes = params["heads"], params["sizes"]
    make = partial(attention_operands, **params)
    return Case(f"{heads} {sizes} {params}", make, {"scale": sizes[0] ** -0.5})


# The last positions of chunks and of tiles, and the first of the next; contexts whose chunks are of
# one, two and four units; many rows beside them, of which tiles end within a token's heads.
EDGES = [0, 15, 31, 63, 64, 65, 127, 1023, 1024, 1025]
ATTENTION_CASES = [
    {"heads": (2, 1), "sizes": (64, 64), "pasts": EDGES, "lengths": [1] * 10, "gate": "values"},
    {"heads": (2, 1), "sizes": (64, 64), "pasts": [4200], "lengths": [1], "gate": ""},
    {"heads": (3, 1), "sizes": (64, 64), "pasts": [30, 0, 7, 99], "lengths": [16, 130, 15, 1],
     "gate": "values"},
    {"heads": (6, 2), "sizes": (128, 128), "pasts": [70, 1], "lengths": [37, 2], "gate": ""},
    {"heads": (8, 1), "sizes": (256, 256), "pasts": [33, 80], "lengths": [21, 1], "gate": "values"},
    {"heads": (20, 1), "sizes": (64, 64), "pasts": [100], "lengths": [3], "gate": "heads"},
]  # fmt: skip


@ON_DEVICES
@pytest.mark.parametrize("params", ATTENTION_CASES, ids=str)
def test_attention(make_device: MakeDevice, params: dict[str, Any], seed: int) -> None:
    case = attention_case(caches=(F16, F16), **params)
    backend = CudaBackend(make_device(seed))
    check_case(backend, ATTENTION, case, seed, limit=FLOAT16_LIMIT)


@ON_DEVICES
@pytest.mark.parametrize("caches", [(F32, F32), (F16, F32), (F32, F16)], ids=str)
@pytest.mark.parametrize("sizes", [(24, 16), (64, 64), (256, 256), (576, 512)], ids=str)
def test_attention_in_float32(
    make_device: MakeDevice, sizes: tuple[int, int], caches: Any, seed: int
) -> None:
    params = {"heads": (2, 1), "pasts": [0, 60], "lengths": [3, 1], "gate": "values"}
    case = attention_case(sizes=sizes, caches=caches, **params)
    backend = CudaBackend(make_device(seed))
    check_case(backend, ATTENTION, case, seed, limit=FLOAT32_LIMIT)


@ON_DEVICES
@pytest.mark.parametrize(("pasts", "lengths"), [([0, 70, 129], [1, 2, 1]), ([40], [17])])
def test_latent_attention(
    make_device: MakeDevice,
    pasts: list[int],
    lengths: list[int],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values that are the first part of the keys, one key head for all queries."""
    rng = np.random.default_rng(seed)
    n_heads, n = 18, sum(lengths)
    paged, n_blocks = paged_operands(rng, pasts, lengths, 64)
    cache = rng.normal(size=(n_blocks, 1, 64, 576))
    operands = {
        "q": Operand(Kind.ACTIVATION, rng.normal(size=(n, n_heads, 576)) * 3, F32, "n_tokens"),
        "k_cache": blocks(cache),
        "v_cache": blocks(cache[..., :512]),
        **paged,
    }
    attrs = {"scale": 576**-0.5}
    graph, tensors = single_node_graph(
        ATTENTION, Case("latent", lambda _: operands, attrs), operands
    )
    tensors["v_cache"] = tensors["k_cache"].slice(3, 0, 512)
    copy = replace(graph, nodes=[], outputs={})
    (out,) = copy.add(ATTENTION, "test.attention", tensors, **attrs)
    copy.outputs = {"out": out}
    stored = cache.astype(np.float16).astype(np.float64)
    arrays = {name: o.values for name, o in operands.items()}
    arrays |= {"q": arrays["q"].astype(np.float32), "k_cache": stored, "v_cache": stored[..., :512]}
    (want,), _ = NAIVE["ATTENTION"](**arrays, **attrs)
    device = make_device(seed)
    # Small GPUs have room for the kernel of loose rows only.
    for shared_bytes in (device.shared_bytes, 99 << 10):
        monkeypatch.setattr(device, "shared_bytes", shared_bytes)
        got = execute(CudaBackend(device), copy, tensors, operands)
        assert_close(got, want, FLOAT16_LIMIT, f"{shared_bytes} bytes of shared memory")


@ON_DEVICES
def test_rows_do_not_depend_on_the_batch(
    make_device: MakeDevice, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that are joined later, and all chunks of a row at once, give the same bits."""
    pasts, lengths = [5, 64, 1024, 700, 1], [1, 2, 1, 1, 20]
    case = attention_case(
        heads=(4, 2), sizes=(64, 64), pasts=pasts, lengths=lengths, caches=(F16, F16), gate="values"
    )
    operands = case.make(np.random.default_rng(seed))
    together = run(ATTENTION, operands, case.attrs, make_device(seed))
    monkeypatch.setattr("engine.backends.cuda.lower.attention._PARTIALS_BYTES", 0)
    np.testing.assert_array_equal(run(ATTENTION, operands, case.attrs, make_device(seed)), together)
    monkeypatch.undo()
    starts = np.cumsum([0, *lengths])
    for s in range(len(lengths)):
        rows = slice(starts[s], starts[s + 1])
        alone = {n: part(o, rows, s) for n, o in operands.items()}
        np.testing.assert_array_equal(
            run(ATTENTION, alone, case.attrs, make_device(seed)), together[rows]
        )


@ON_DEVICES
def test_invariant_rows_do_not_depend_on_cuts(make_device: MakeDevice, seed: int) -> None:
    """A prompt in one step, and in two."""
    params = {"heads": (2, 1), "sizes": (64, 64), "caches": (F16, F16), "gate": ""}
    case = attention_case(pasts=[70], lengths=[30], **params)
    operands = case.make(np.random.default_rng(seed))
    parts = []
    for rows in (slice(0, 30), slice(0, 20), slice(20, 30)):
        piece = {n: part(o, rows, 0) for n, o in operands.items()}
        backend = CudaBackend(make_device(seed), batch_invariant=True)
        parts.append(run(ATTENTION, piece, case.attrs, backend))
    np.testing.assert_array_equal(np.concatenate(parts[1:]), parts[0])


@ON_DEVICES
def test_large_scores(make_device: MakeDevice, seed: int) -> None:
    """Weights from 1 down to 0, and no overflow."""
    case = attention_case(
        heads=(2, 1), sizes=(64, 64), pasts=[200], lengths=[18], caches=(F16, F16), gate=""
    )

    def make(rng: Rng) -> dict[str, Operand]:
        operands = case.make(rng)
        q = operands["q"]
        return operands | {"q": replace(q, values=q.values * 100)}

    outputs, _, _ = run_case(
        CudaBackend(make_device(seed)), ATTENTION, replace(case, make=make), seed
    )
    assert np.isfinite(outputs[0]).all()
    # The largest score wins alone in nearly all rows: values come out as they are stored.
    assert nmse(outputs[0], outputs[0].astype(np.float16)) < 1e-4
