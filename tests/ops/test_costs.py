"""What ops say they cost, counted by hand, and that it follows the live rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.formats.quants import F16, F32, I32, WEIGHT_TYPES, DType
from engine.graph import Capacity, Cost, Dim, Graph, Kind, Live, Op, Tensor
from engine.ops import OPS
from engine.ops.attention import ATTENTION
from engine.ops.gated_delta_net import GATED_DELTA_NET
from engine.ops.get_rows import GET_ROWS
from engine.ops.mla_cache import MLA_CACHE
from engine.ops.mul_mat import mul_mat
from engine.ops.mul_mat_id import mul_mat_id
from engine.ops.rope import RopeScaling
from tests.support.cases import live_counts, paged_operands, single_node_graph
from tests.support.opcase import largest_case

# Three live rows of two sequences, out of a capacity of eight and four.
LIVE = Live(n_tokens=3, n_seqs=2, n_outputs=1, kv_rows=7, kv_pairs=12)


def rows(name: str, *shape: int) -> Tensor:
    return Tensor(name, (Dim(8, "n_tokens"), *shape), F32, Kind.ACTIVATION)


def test_cost_of_mul_mat() -> None:
    graph = Graph(Capacity(8))
    x = rows("x", 100).slice(1, 4, 68)
    mul_mat(
        graph,
        "product",
        x,
        graph.weight("a", (10, 64), WEIGHT_TYPES["Q8_0"]),
        graph.weight("b", (5, 64), F32),
    )
    n_bytes = 3 * 64 * 4 + 10 * (2 * 34) + 5 * 64 * 4 + 3 * 10 * 4 + 3 * 5 * 4
    assert cost(graph, LIVE) == Cost(2 * 3 * 64 * (10 + 5), n_bytes)


def test_a_mul_mat_of_no_rows_costs_nothing() -> None:
    graph = Graph(Capacity(8))
    x = Tensor("x", (Dim(8, "n_outputs"), 64), F32, Kind.ACTIVATION)
    mul_mat(graph, "head", x, graph.weight("w", (1000, 64), F16))
    assert cost(graph, Live(3, 2, 0)) == Cost(0, 0)


def test_cost_of_a_gated_mul_mat() -> None:
    graph = Graph(Capacity(8))
    given = {"gate": rows("gate", 1), "add": rows("add", 10)}
    mul_mat(graph, "y", rows("x", 64), graph.weight("w", (10, 64), F32), **given)
    n_bytes = 4 * (3 * 64 + 10 * 64 + 3 * 1 + 2 * 3 * 10)
    assert cost(graph, LIVE) == Cost(2 * 3 * 64 * 10, n_bytes)


# Three tokens with two experts each touch six of many, or all four.
@pytest.mark.parametrize(("n_experts", "n_touched"), [(8, 6), (6, 6), (4, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_cost_of_mul_mat_id(n_experts: int, n_touched: int, weighted: bool) -> None:
    graph = Graph(Capacity(8))
    ids = replace(rows("ids", 2), dtype=I32)
    a = graph.weight("a", (n_experts, 10, 64), WEIGHT_TYPES["Q8_0"])
    b = graph.weight("b", (n_experts, 5, 64), F32)
    if weighted:
        mul_mat_id(graph, "y", rows("x", 2, 64), ids, a, b, weights=rows("weights", 2))
    else:
        mul_mat_id(graph, "y", rows("x", 64), ids, a, b)
    x, weights, out = (6 * 64, 6, 3 * 15) if weighted else (3 * 64, 0, 6 * 15)
    experts = n_touched * (10 * (2 * 34) + 5 * 64 * 4)
    assert cost(graph, LIVE) == Cost(2 * 6 * 64 * 15, experts + 4 * (x + 6 + weights + out))


def test_cost_of_get_rows() -> None:
    graph = Graph(Capacity(8))
    table = graph.weight("table", (1000, 64), WEIGHT_TYPES["Q8_0"])
    ids = graph.input("ids", (Dim(8, "n_tokens"),))
    graph.add(GET_ROWS, "rows", {"table": table, "ids": ids})
    assert cost(graph, LIVE) == Cost(0, 3 * 68 + 3 * 4 + 3 * 64 * 4)


def delta_net_node(n_heads: tuple[int, int] = (1, 2), kda: bool = False) -> Graph:
    """Key and value heads of 16 and 8, two snapshots a sequence."""
    graph, (n_k, n_v), n_seqs = Graph(Capacity(8)), n_heads, Dim(4, "n_seqs")
    batch = {
        "seq_starts": graph.input("seq_starts", (Dim(5, "n_seqs + 1"),)),
        "state_src": graph.input("state_src", (n_seqs,)),
        "state_dst": graph.input("state_dst", (n_seqs,)),
        "snapshot_dst": graph.input("snapshot_dst", (n_seqs, 2)),
    }
    g = rows("g", n_v, 16) if kda else rows("g", n_v)
    operands = {"q": rows("q", n_k, 16), "k": rows("k", n_k, 16), "v": rows("v", n_v, 8), "g": g}
    operands |= {"beta": rows("beta", n_v), **batch}
    state = graph.state("state", (Dim(9, "n_slots"), n_v, 8, 16))
    attrs = {"head_map": "tiled", "scale": 1, "algorithm": "auto"}
    graph.add(GATED_DELTA_NET, "delta", operands | {"state": state}, **attrs)
    return graph


@pytest.mark.parametrize("kda", [False, True])
def test_cost_of_gated_delta_net(kda: bool) -> None:
    # An entry of the state: decayed (1), times k summed (2), updated (2), times q summed (2).
    flops = 3 * 2 * (16 * 8) * 7
    decays = 3 * 2 * (16 if kda else 1)
    operands = 2 * (3 * 1 * 16) + 3 * 2 * 8 + decays + 3 * 2
    places, out = 3 + 2 + 2 + 2 * 2, 3 * 2 * 8
    # Each of two states is read once and written once, whatever the number of tokens.
    states = 2 * 2 * (2 * 8 * 16)
    n_bytes = 4 * (operands + places + out + states)
    assert cost(delta_net_node(kda=kda), LIVE) == Cost(flops, n_bytes)


@pytest.mark.parametrize("cache_type", [F16, F32])
def test_cost_of_attention(cache_type: DType) -> None:
    graph = Graph(Capacity(8))
    n_seqs, n_blocks = Dim(4, "n_seqs"), Dim(20, "n_blocks")
    caches = {
        "k_cache": graph.state("k", (n_blocks, 2, 64, 16), cache_type),
        "v_cache": graph.state("v", (n_blocks, 2, 64, 24), cache_type),
    }
    batch = {
        "positions": graph.input("positions", (Dim(8, "n_tokens"),)),
        "seq_starts": graph.input("seq_starts", (Dim(5, "n_seqs + 1"),)),
        "block_tables": graph.input("block_tables", (n_seqs, 6)),
    }
    operands = {"q": rows("q", 4, 16), "gate": rows("gate", 4, 24), **caches, **batch}
    graph.add(ATTENTION, "attention", operands, scale=1)
    # Positions 4 and 5 of one sequence, 0 of another: 5 + 6 + 1 pairs, 6 + 1 cached rows.
    flops = 12 * 4 * (2 * 16 + 2 * 24)
    moved = 4 * (3 * 4 * 16 + 3 * 4 * 24 + 3 * 4 * 24)
    places = 4 * (3 + 3 + 2 * 6)
    cached = 7 * 2 * (16 + 24) * (2 if cache_type is F16 else 4)
    assert cost(graph, LIVE) == Cost(flops, moved + places + cached)


@pytest.mark.parametrize("cache_type", [F16, F32])
def test_cost_of_latent_attention(cache_type: DType) -> None:
    """Both ops of MLA: a row of 16 + 8 is written per token, and read once, as key and value."""
    graph = Graph(Capacity(8))
    cache = graph.state("k", (Dim(20, "n_blocks"), 1, 64, 24), cache_type)
    batch = {
        "positions": graph.input("positions", (Dim(8, "n_tokens"),)),
        "seq_starts": graph.input("seq_starts", (Dim(5, "n_seqs + 1"),)),
        "block_tables": graph.input("block_tables", (Dim(4, "n_seqs"), 6)),
    }
    places, size = 4 * (3 + 3 + 2 * 6), 2 if cache_type is F16 else 4
    latents = {"kv": rows("kv", 24), "norm": graph.weight("norm", (16,), F32)}
    rope = {"n_rot": 0, "rope_base": 1.0, "rope_scaling": RopeScaling()}
    graph.add(MLA_CACHE, "write", {**latents, "k_cache": cache, **batch}, eps=1e-6, **rope)
    caches = {"k_cache": cache, "v_cache": cache.slice(3, 0, 16)}
    graph.add(ATTENTION, "attention", {"q": rows("q", 4, 24), **caches, **batch}, scale=1)
    write, read = (node.op.cost(node, LIVE) for node in graph.nodes)
    assert write == Cost(4 * 3 * 24, 4 * (3 * 24 + 16) + places + 3 * 24 * size)
    operands = 4 * (3 * 4 * 24 + 3 * 4 * 16)
    assert read == Cost(12 * 4 * (2 * 24 + 2 * 16), operands + places + 7 * 24 * size)


def cost(graph: Graph, live: Live) -> Cost:
    (node,) = graph.nodes
    return node.op.cost(node, live)


def test_a_case_counts_what_its_sequences_see() -> None:
    # After 5 and 0 positions, 2 and 3 new ones: 6 + 7 and 1 + 2 + 3 pairs, 7 + 3 cached rows.
    rng = np.random.default_rng(0)
    operands, _ = paged_operands(rng, [5, 0], [2, 3], 16)
    assert live_counts(operands) == Live(5, 2, 0, kv_rows=10, kv_pairs=19)


@pytest.mark.parametrize("op", list(OPS.values()), ids=list(OPS))
def test_costs_grow_with_the_live_rows_not_with_the_capacity(op: Op) -> None:
    case = largest_case(op)
    operands = case.make(np.random.default_rng(0))
    few, many = Live(2, 1, 2, 8, 9), Live(4, 2, 4, 20, 30)
    counts = []
    for spare in (0, 100):
        graph, _ = single_node_graph(op, case, operands, spare=spare)
        counts.append([cost(graph, live) for live in (few, many)])
    assert counts[0] == counts[1]
    (small, large), _ = counts
    assert small.bytes < large.bytes
    assert small.flops < large.flops or op.name == "GET_ROWS"
