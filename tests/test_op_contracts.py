"""What ops refuse, and what they say they cost.

Every axis of every operand is made one longer: either it is one of those that an op leaves free, or
a ShapeError names op, node, operand and both shapes. Costs are counted by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from engine.graph import Capacity, Cost, Dim, Graph, Kind, Live, Op, ShapeError, Tensor
from engine.ops import OPS
from engine.ops.attention import attention
from engine.ops.cases import Case, Operand, live_counts, paged_operands, single_node_graph
from engine.ops.gated_delta_net import gated_delta_net
from engine.ops.get_rows import get_rows
from engine.ops.mul_mat import mul_mat
from engine.ops.qk_norm_rope import QK_NORM_ROPE
from engine.quants import F16, F32, WEIGHT_TYPES, DType

# Which axes nothing else determines: counts of rows, slots and blocks, widths of tables.
FREE = {
    "ATTENTION": {("block_tables", 1)},
    "GATED_DELTA_NET": {("state", 0), ("snapshot_dst", 1)},
    "GET_ROWS": {("table", 0), ("table", 1), ("ids", 0)},
    "L2_NORM": {("x", 0), ("x", 1), ("x", 2)},
    "MUL_MAT": {("x", 0), *((f"weight{i}", 0) for i in range(5))},
    "QK_NORM_ROPE": {("q", 1), ("block_tables", 1)},
    "SSM_CONV": {("x", 0), ("state", 0), ("snapshot_dst", 1)},
}
# A decay of one axis less is another kind of decay.
FREE_RANK = {("GATED_DELTA_NET", "g")}


def largest_case(op: Op) -> Case:
    """The case with the most operands, and among those the most elements: sizes that differ."""

    def size(case: Case) -> tuple[int, int]:
        operands = case.make(np.random.default_rng(0)).values()
        return len(operands), sum(o.values.size for o in operands)

    return max(op.cases(), key=size)


@cache
def operands_of(op: Op) -> tuple[Case, dict[str, Operand]]:
    case = largest_case(op)
    return case, case.make(np.random.default_rng(0))


def build(op: Op, changed: dict[str, tuple[int, ...]] | None = None) -> None:
    """A graph of the op's case with some operands' shapes changed."""
    case, operands = operands_of(op)
    for name, shape in (changed or {}).items():
        values = np.empty(shape, operands[name].values.dtype)
        operands = operands | {name: replace(operands[name], values=values)}
    single_node_graph(op, case, operands)


def axes() -> Iterator[tuple[Op, str, int]]:
    for op in OPS.values():
        for name, operand in operands_of(op)[1].items():
            yield from ((op, name, axis) for axis in range(operand.values.ndim))


@pytest.mark.parametrize(
    ("op", "operand", "axis"), list(axes()), ids=lambda x: x.name if isinstance(x, Op) else str(x)
)
def test_a_longer_axis_is_refused_unless_it_is_free(op: Op, operand: str, axis: int) -> None:
    shape = list(operands_of(op)[1][operand].values.shape)
    shape[axis] += 1
    if (operand, axis) in FREE.get(op.name, ()):
        build(op, {operand: tuple(shape)})
        return
    with pytest.raises(ShapeError) as caught:
        build(op, {operand: tuple(shape)})
    assert_names_everything(op, str(caught.value))


def assert_names_everything(op: Op, message: str) -> None:
    """Op, node, an operand of it, what was expected and what came."""
    pattern = rf"{op.name} test\.{op.name.lower()}: operand (\w+): expected (.+), got (.+)"
    match = re.fullmatch(pattern, message)
    assert match, message
    assert match[1] in operands_of(op)[1]
    assert match[2] != match[3]


@pytest.mark.parametrize("op", list(OPS.values()), ids=list(OPS))
def test_another_rank_is_refused(op: Op) -> None:
    for name, operand in operands_of(op)[1].items():
        shape = operand.values.shape
        for wrong in ((*shape, 1), shape[:-1]):
            if not wrong or (op.name, name) in FREE_RANK:
                continue
            with pytest.raises(ShapeError) as caught:
                build(op, {name: wrong})
            assert_names_everything(op, str(caught.value))


def test_a_shape_error_says_which_shape_was_wrong() -> None:
    with pytest.raises(ShapeError) as caught:
        build(OPS["SWIGLU"], {"up": (4, 5)})
    assert str(caught.value) == (
        "SWIGLU test.swiglu: operand up: expected [T=7, F=3584], got [7, 5]"
    )


def _gapped(tensor: Tensor, axis: int) -> Tensor:
    """A view of the same shape whose `axis` has gaps."""
    size = tensor.shape[axis]
    shape = (*tensor.shape[:axis], 2 * size, *tensor.shape[axis + 1 :])
    base = Tensor(tensor.name, shape, F32, Kind.ACTIVATION)
    return base.unflatten(axis, size, 2).select(axis + 1, 1)


def activation_axes() -> Iterator[tuple[Op, str, int]]:
    for op, name, axis in axes():
        if axis > 0 and operands_of(op)[1][name].kind is Kind.ACTIVATION:
            yield op, name, axis


@pytest.mark.parametrize(
    ("op", "operand", "axis"),
    list(activation_axes()),
    ids=lambda x: x.name if isinstance(x, Op) else str(x),
)
def test_rows_with_gaps_are_refused_unless_heads_may_have_them(
    op: Op, operand: str, axis: int
) -> None:
    case, operands = operands_of(op)
    graph, tensors = single_node_graph(op, case, operands)
    tensors = tensors | {operand: _gapped(tensors[operand], axis)}
    if axis == 1 and (op.name, operand) in {("QK_NORM_ROPE", "q"), ("ATTENTION", "gate")}:
        graph.add(op, "again", tensors, **case.attrs)
        return
    with pytest.raises(ShapeError, match=f"^{op.name} again: operand {operand}: .*strides"):
        graph.add(op, "again", tensors, **case.attrs)


def test_heads_must_be_multiples() -> None:
    q = operands_of(OPS["ATTENTION"])[1]["q"].values
    wrong = {"q": (len(q), 5, q.shape[2]), "gate": (len(q), 5, q.shape[2])}
    with pytest.raises(ShapeError, match="operand q: expected a multiple of 2 heads, got 5"):
        build(OPS["ATTENTION"], wrong)
    with pytest.raises(ShapeError, match="operand v: expected a multiple of 2 heads, got 5"):
        delta_net_node(n_heads=(2, 5))


@pytest.mark.parametrize("n_rot", [-2, 3, 258])
def test_a_rotation_that_does_not_fit_is_refused(n_rot: int) -> None:
    case, operands = operands_of(QK_NORM_ROPE)
    case = replace(case, attrs=case.attrs | {"n_rot": n_rot})
    with pytest.raises(ShapeError, match=f"QK_NORM_ROPE .* n_rot: expected .*, got {n_rot}$"):
        single_node_graph(QK_NORM_ROPE, case, operands)


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


def test_cost_of_get_rows() -> None:
    graph = Graph(Capacity(8))
    table = graph.weight("table", (1000, 64), WEIGHT_TYPES["Q8_0"])
    get_rows(graph, "rows", table, graph.input("ids", (Dim(8, "n_tokens"),)))
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
    operands = (rows("q", n_k, 16), rows("k", n_k, 16), rows("v", n_v, 8), g, rows("beta", n_v))
    state = graph.state("state", (Dim(9, "n_slots"), n_v, 8, 16))
    gated_delta_net(graph, "delta", *operands, state, batch, head_map="tiled")
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
    caches = (
        graph.state("k", (n_blocks, 2, 64, 16), cache_type),
        graph.state("v", (n_blocks, 2, 64, 24), cache_type),
    )
    batch = {
        "positions": graph.input("positions", (Dim(8, "n_tokens"),)),
        "seq_starts": graph.input("seq_starts", (Dim(5, "n_seqs + 1"),)),
        "block_tables": graph.input("block_tables", (n_seqs, 6)),
    }
    attention(graph, "attention", rows("q", 4, 16), caches, rows("gate", 4, 24), batch, scale=1)
    # Positions 4 and 5 of one sequence, 0 of another: 5 + 6 + 1 pairs, 6 + 1 cached rows.
    flops = 12 * 4 * (2 * 16 + 2 * 24)
    operands = 4 * (3 * 4 * 16 + 3 * 4 * 24 + 3 * 4 * 24)
    places = 4 * (3 + 3 + 2 * 6)
    cached = 7 * 2 * (16 + 24) * (2 if cache_type is F16 else 4)
    assert cost(graph, LIVE) == Cost(flops, operands + places + cached)


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
    case, operands = operands_of(op)
    few, many = Live(2, 1, 2, 8, 9), Live(4, 2, 4, 20, 30)
    counts = []
    for spare in (0, 100):
        graph, _ = single_node_graph(op, case, operands, spare=spare)
        counts.append([cost(graph, live) for live in (few, many)])
    assert counts[0] == counts[1]
    (small, large), _ = counts
    assert small.bytes < large.bytes
    assert small.flops < large.flops or op.name == "GET_ROWS"
