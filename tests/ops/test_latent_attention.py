"""MLA's two ops over their common cache: values are the front of the keys, which no op case has.

`check` runs on any backend: rows are normalised, written and read in one graph of two nodes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.backends.reference import ReferenceBackend
from engine.formats.quants import F16, F32, DType
from engine.graph import Capacity, Dim, Graph, Kind, Tensor
from engine.ops.attention import ATTENTION
from engine.ops.mla_cache import MLA_CACHE
from engine.ops.rope import RopeScaling
from engine.placement.place import place
from engine.runtime.executor import Executable
from tests.support import naive
from tests.support.cases import live_counts, paged_operands
from tests.support.opcase import F16_LIMIT, OpCase, RawWeights, assert_close, fresh_seed
from tests.support.states import load, save

Array = np.ndarray[Any, Any]
N_HEADS, RANK, N_PE, BLOCK_SIZE, EPS, SCALE = 4, 48, 16, 16, 1e-6, 0.2
NO_ROPE: dict[str, Any] = {"n_rot": 0, "rope_base": 1.0, "rope_scaling": RopeScaling()}
PASTS, LENGTHS = [0, 37, 200], [3, 1, 20]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


def visible_rows(batch: dict[str, Array], n_blocks: int) -> Array:
    """Which rows of the cache hold the past: bool [n_blocks, block_size]."""
    seen = np.zeros((n_blocks, BLOCK_SIZE), bool)
    for table, past in zip(batch["block_tables"], PASTS, strict=True):
        for p in range(past):
            seen[table[p // BLOCK_SIZE], p % BLOCK_SIZE] = True
    return seen


def check(backend: Any, cache_type: DType, seed: int, limit: float) -> None:
    """Fail unless a backend agrees with the naive definition of both ops."""
    rng, n, width = np.random.default_rng(seed), sum(LENGTHS), RANK + N_PE
    operands, n_blocks = paged_operands(rng, PASTS, LENGTHS, BLOCK_SIZE)
    batch = {name: operand.values for name, operand in operands.items()}
    kv = rng.normal(size=(n, width)).astype(np.float32)
    q = (rng.normal(size=(n, N_HEADS, width)) * 3).astype(np.float32)
    norm = rng.normal(size=RANK).astype(np.float32)
    kept = np.float16 if cache_type is F16 else np.float32
    cached = rng.normal(size=(n_blocks, 1, BLOCK_SIZE, width)).astype(kept)
    cached[~visible_rows(batch, n_blocks)[:, np.newaxis]] = np.nan

    # A capacity above the live counts.
    graph, n_tokens, n_seqs = Graph(Capacity(n + 3)), Dim(n + 3, "n_tokens"), len(LENGTHS) + 2
    inputs = {
        "positions": graph.input("positions", (n_tokens,)),
        "seq_starts": graph.input("seq_starts", (Dim(n_seqs + 1, "n_seqs + 1"),)),
        "block_tables": graph.input(
            "block_tables", (Dim(n_seqs, "n_seqs"), batch["block_tables"].shape[1])
        ),
    }
    shape = (Dim(n_blocks, "n_blocks"), *cached.shape[1:])
    cache = graph.state("blk.0.k_cache", shape, cache_type)
    rows = Tensor("kv", (n_tokens, width), F32, Kind.ACTIVATION)
    queries = Tensor("q", (n_tokens, N_HEADS, width), F32, Kind.ACTIVATION)
    latents = {"kv": rows, "norm": graph.weight("norm", (RANK,), F32)}
    graph.add(MLA_CACHE, "write", {**latents, "k_cache": cache, **inputs}, eps=EPS, **NO_ROPE)
    read = {"q": queries, "k_cache": cache, "v_cache": cache.slice(3, 0, RANK), **inputs}
    (graph.outputs["out"],) = graph.add(ATTENTION, "read", read, scale=SCALE)

    executable = Executable(place(graph, [backend]), RawWeights({"norm": norm.view(np.uint8)}))
    for i, contents in enumerate(cached):
        load(backend.states, "n_blocks", i, {cache.name: contents})
    backend.write(rows, kv)
    backend.write(queries, q)
    live = replace(live_counts(operands), chunks=tuple(zip(PASTS, LENGTHS, strict=True)))
    out = executable.run(batch, live)["out"]
    after = np.stack([save(backend.states, "n_blocks", i)[cache.name] for i in range(n_blocks)])

    exact = (x.astype(np.float64) for x in (kv, norm, cached))
    given = dict(zip(("kv", "norm", "k_cache"), exact, strict=True)) | batch
    _, states = naive.NAIVE["MLA_CACHE"](**given, eps=EPS, **NO_ROPE)
    stored = states["k_cache"].astype(kept).astype(np.float64)
    (want,), _ = naive.attention(
        q.astype(np.float64), stored, stored[..., :RANK], **batch, scale=SCALE
    )
    where = f"{backend.name}, {cache_type.name}, seed {seed}"
    # A row rounded the other way to float16 shows in the result too.
    limit = max(limit, F16_LIMIT) if cache_type is F16 else limit
    assert_close(out, want, limit, f"output on {where}")
    written = ~np.isnan(stored)
    assert np.array_equal(np.isnan(after), ~written), where
    assert_close(after[written], stored[written], limit, f"cache on {where}")


@pytest.mark.parametrize("cache_type", [F32, F16], ids=lambda t: t.name)
def test_values_are_the_front_of_the_keys(cache_type: DType, seed: int) -> None:
    check(ReferenceBackend(), cache_type, seed, OpCase.limit)
    check(ReferenceBackend(np.float64), cache_type, seed, 1e-13)
