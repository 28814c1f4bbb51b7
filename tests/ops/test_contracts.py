"""What ops refuse.

Every axis of every operand is made one longer: either it is one of those that an op leaves free, or
a ShapeError names op, node, operand and both shapes. What ops cost is in tests/ops/test_costs.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from engine.formats.quants import F32, I32, DType
from engine.graph import Capacity, Graph, Kind, Op, ShapeError, Tensor
from engine.ops import OPS
from engine.ops.mla_cache import MLA_CACHE
from engine.ops.mul_mat import mul_mat
from engine.ops.mul_mat_id import mul_mat_id
from engine.ops.qk_norm_rope import QK_NORM_ROPE
from engine.ops.router import ROUTER
from tests.support.cases import Case, Operand, single_node_graph
from tests.support.opcase import largest_case

# Which axes nothing else determines: counts of rows, slots and blocks, widths of tables.
FREE = {
    "ATTENTION": {("block_tables", 1)},
    "GATED_DELTA_NET": {("state", 0), ("snapshot_dst", 1)},
    "GET_ROWS": {("table", 0), ("table", 1), ("ids", 0)},
    "L2_NORM": {("x", 0), ("x", 1), ("x", 2)},
    "MLA_CACHE": {("q_pe", 1), ("k_cache", 0), ("k_cache", 2), ("block_tables", 1)},
    "MUL_MAT": {("x", 0), *((f"weight{i}", 0) for i in range(5))},
    "MUL_MAT_HEADS": {("weight", 2), ("tail", 2)},
    "MUL_MAT_ID": {("ids", 1), ("matrix0", 1), ("matrix1", 1)},
    "QK_NORM_ROPE": {("q", 1), ("block_tables", 1)},
    "ROUTER": {("logits", 0)},
    "SSM_CONV": {("state", 0), ("snapshot_dst", 1)},
}
# A decay of one axis less is another kind of decay, and a gate of one axis less is one for heads.
FREE_RANK = {("GATED_DELTA_NET", "g"), ("ATTENTION", "gate")}
# Operands whose heads, axis 1, may have gaps.
STRIDED_HEADS = {
    ("ATTENTION", "gate"),
    ("MLA_CACHE", "q_pe"),
    ("MUL_MAT_HEADS", "tail"),
    ("MUL_MAT_HEADS", "x"),
    ("QK_NORM_ROPE", "q"),
    ("SWIGLU", "gate"),
    ("SWIGLU", "up"),
}


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
            if not wrong or (wrong == shape[:-1] and (op.name, name) in FREE_RANK):
                continue
            with pytest.raises(ShapeError) as caught:
                build(op, {name: wrong})
            assert_names_everything(op, str(caught.value))


def test_a_shape_error_says_which_shape_was_wrong() -> None:
    with pytest.raises(ShapeError) as caught:
        build(OPS["SWIGLU"], {"up": (4, 5)})
    assert str(caught.value) == ("SWIGLU test.swiglu: operand up: expected [7, 3, 25], got [7, 5]")


def _gapped(tensor: Tensor, axis: int) -> Tensor:
    """A view of the same shape whose `axis` has gaps."""
    size = tensor.shape[axis]
    shape = (*tensor.shape[:axis], 2 * size, *tensor.shape[axis + 1 :])
    base = Tensor(tensor.name, shape, tensor.dtype, Kind.ACTIVATION)
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
    if axis == 1 and (op.name, operand) in STRIDED_HEADS:
        graph.add(op, "again", tensors, **case.attrs)
        return
    with pytest.raises(ShapeError, match=f"^{op.name} again: operand {operand}: .*strides"):
        graph.add(op, "again", tensors, **case.attrs)


def plain(name: str, *shape: int) -> Tensor:
    return Tensor(name, shape, F32, Kind.ACTIVATION)


def test_heads_must_be_multiples() -> None:
    q = operands_of(OPS["ATTENTION"])[1]["q"].values
    wrong: dict[str, tuple[int, ...]]
    wrong = {"q": (len(q), 5, q.shape[2]), "gate": (len(q), 5, q.shape[2])}
    with pytest.raises(ShapeError, match="operand q: expected a multiple of 2 heads, got 5"):
        build(OPS["ATTENTION"], wrong)
    operands = operands_of(OPS["GATED_DELTA_NET"])[1]
    shapes = {name: operands[name].values.shape for name in ("v", "g", "beta", "state")}
    wrong = {name: (shape[0], 5, *shape[2:]) for name, shape in shapes.items()}
    with pytest.raises(ShapeError, match="operand v: expected a multiple of 2 heads, got 5"):
        build(OPS["GATED_DELTA_NET"], wrong)


@pytest.mark.parametrize(
    ("op", "n_rot"),
    [(QK_NORM_ROPE, n) for n in (-2, 3, 258)] + [(MLA_CACHE, n) for n in (-2, 3, 66)],
    ids=lambda x: x.name if isinstance(x, Op) else str(x),
)
def test_a_rotation_that_does_not_fit_is_refused(op: Op, n_rot: int) -> None:
    case, operands = operands_of(op)
    case = replace(case, attrs=case.attrs | {"n_rot": n_rot})
    with pytest.raises(ShapeError, match=f"{op.name} .* n_rot: expected .*, got {n_rot}$"):
        single_node_graph(op, case, operands)


def test_a_lower_bound_of_decays_is_not_positive() -> None:
    gate = OPS["GDN_GATE"]
    case, operands = operands_of(gate)
    case = replace(case, attrs={"lower_bound": 0.5})
    with pytest.raises(ShapeError, match=r"lower_bound: expected 0 or less, got 0\.5$"):
        single_node_graph(gate, case, operands)


@pytest.mark.parametrize("limits", [(), (1.0,), (1.0, 2.0, 3.0), (0.0, -1.0)], ids=str)
def test_a_swiglu_has_a_limit_for_each_pair(limits: tuple[float, ...]) -> None:
    swiglu = OPS["SWIGLU"]
    case, operands = operands_of(swiglu)
    case = replace(case, attrs={"limits": limits})
    with pytest.raises(ShapeError, match="attribute limits: expected 2 numbers of at least 0, got"):
        single_node_graph(swiglu, case, operands)


def test_a_gate_of_heads_has_no_gaps() -> None:
    """Beside a gate of values, whose heads may have some."""
    case, operands = operands_of(OPS["ATTENTION"])
    gate = operands["gate"]
    operands = operands | {"gate": replace(gate, values=gate.values[:, :, 0])}
    graph, tensors = single_node_graph(OPS["ATTENTION"], case, operands)
    tensors = tensors | {"gate": _gapped(tensors["gate"], 1)}
    with pytest.raises(ShapeError, match=r"operand gate: .*strides"):
        graph.add(OPS["ATTENTION"], "again", tensors, **case.attrs)


@pytest.mark.parametrize(
    ("operand", "shape"), [("gate", (5, 1)), ("gate", (6, 2)), ("add", (5, 24)), ("add", (6, 23))]
)
def test_what_a_product_is_gated_with_and_added_to_must_fit(
    operand: str, shape: tuple[int, int]
) -> None:
    shapes = {"gate": (6, 1), "add": (6, 24)} | {operand: shape}
    graph, given = Graph(Capacity(0)), {n: plain(n, *s) for n, s in shapes.items()}
    message = f"^MUL_MAT y: operand {operand}: expected .* got .*{shape[0]}, {shape[1]}]$"
    with pytest.raises(ShapeError, match=message):
        mul_mat(graph, "y", plain("x", 6, 64), graph.weight("w", (24, 64), F32), **given)


@pytest.mark.parametrize("operand", ["gate", "add"])
def test_what_a_product_is_gated_with_and_added_to_has_no_gaps(operand: str) -> None:
    given = {"gate": plain("gate", 6, 1), "add": plain("add", 6, 24)}
    given[operand] = _gapped(given[operand], 1)
    graph = Graph(Capacity(0))
    with pytest.raises(ShapeError, match=f"^MUL_MAT y: operand {operand}: .*strides"):
        mul_mat(graph, "y", plain("x", 6, 64), graph.weight("w", (24, 64), F32), **given)


def test_only_a_single_product_is_gated_or_added_to() -> None:
    graph, add = Graph(Capacity(0)), plain("add", 6, 24)
    weights = [graph.weight(name, (24, 64), F32) for name in "ab"]
    with pytest.raises(ShapeError, match="operands gate, add: expected one weight, got 2"):
        mul_mat(graph, "y", plain("x", 6, 64), *weights, add=add)


# Six tokens of 64 values, two experts of eight for each, 24 values out.
EXPERTS = {"x": (6, 2, 64), "ids": (6, 2), "weights": (6, 2), "matrix": (8, 24, 64)}


def experts_node(dtype: DType = I32, gapped: str = "", **shapes: tuple[int, ...]) -> None:
    operands = {n: plain(n, *s) for n, s in (EXPERTS | shapes).items() if n != "matrix"}
    operands["ids"] = replace(operands["ids"], dtype=dtype)
    if gapped:
        operands[gapped] = _gapped(operands[gapped], 1)
    graph = Graph(Capacity(0))
    matrix = graph.weight("experts", (EXPERTS | shapes)["matrix"], F32)
    mul_mat_id(graph, "y", operands["x"], operands["ids"], matrix, weights=operands["weights"])


@pytest.mark.parametrize(
    ("operand", "shape"),
    [
        ("x", (6, 3, 64)),
        ("x", (5, 2, 64)),
        ("x", (6, 2, 63)),
        ("x", (64,)),
        ("x", (6, 1, 2, 64)),
        ("ids", (6, 3)),
        ("ids", (5, 2)),
        ("ids", (6,)),
        ("weights", (6, 1)),
        ("weights", (5, 2)),
        ("matrix", (24, 64)),
    ],
)
def test_rows_of_experts_must_fit(operand: str, shape: tuple[int, ...]) -> None:
    experts_node()
    with pytest.raises(ShapeError, match=r"^MUL_MAT_ID y: operand \w+: expected \[.*, got \["):
        experts_node(I32, "", **{operand: shape})


@pytest.mark.parametrize("operand", ["x", "ids", "weights"])
def test_rows_of_experts_have_no_gaps(operand: str) -> None:
    with pytest.raises(ShapeError, match=f"^MUL_MAT_ID y: operand {operand}: .*strides"):
        experts_node(gapped=operand)


def test_ids_of_experts_are_integers() -> None:
    with pytest.raises(ShapeError, match=r"^MUL_MAT_ID y: operand ids: expected I32, got F32$"):
        experts_node(F32)


@pytest.mark.parametrize(
    "attrs",
    [
        {"n_used": 0},
        {"n_used": 513},
        {"groups": (7, 1)},
        {"groups": (8, 9)},
        {"groups": (8, 0)},
        # A group is as good as its two best experts.
        {"groups": (512, 20)},
        # Three groups of 64 have fewer experts than are used.
        {"n_used": 193},
    ],
    ids=str,
)
def test_a_choice_that_cannot_be_made_is_refused(attrs: dict[str, Any]) -> None:
    case, operands = operands_of(ROUTER)
    assert (case.attrs["n_used"], case.attrs["groups"]) == (10, (8, 3))
    with pytest.raises(ShapeError, match=f"^ROUTER test.router: attribute {next(iter(attrs))}: "):
        single_node_graph(ROUTER, replace(case, attrs=case.attrs | attrs), operands)


def test_pairs_of_a_swiglu_have_as_many_tokens() -> None:
    with pytest.raises(ShapeError, match=r"operand gate1: expected \[T=7, …, F\], got \[8, 40\]"):
        build(OPS["SWIGLU"], {"gate1": (5, 40), "up1": (5, 40)})
