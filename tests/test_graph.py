"""Tensors and their views, dimensions and live counts, and how a graph is put together.

Views are compared with numpy's own views of the same array. The graphs of whole models are in
tests/models/test_model_graph.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from engine.backends.reference import ReferenceBackend
from engine.formats.quants import F16, F32, I32, WEIGHT_TYPES
from engine.graph import (
    Capacity,
    Cost,
    Dim,
    Graph,
    Kind,
    Live,
    Op,
    ShapeError,
    Tensor,
    dim_name,
    match_shapes,
)

Array = np.ndarray[Any, Any]


def activation(*shape: int) -> Tensor:
    return Tensor("x", shape, F32, Kind.ACTIVATION)


def through(tensor: Tensor, base: Array) -> Array:
    """What a tensor shows of its base's contents."""
    assert base.shape == tensor.base.shape
    strides = [s * base.itemsize for s in tensor.strides]
    return as_strided(base.reshape(-1)[tensor.offset :], tensor.shape, strides)


def splits_of(n: int) -> list[tuple[int, ...]]:
    """Ways to write n as a product."""
    pairs = [(a, n // a) for a in range(1, n + 1) if n % a == 0]
    return [*pairs, (1, n, 1)]


def one_view(draw: st.DrawFn, t: Tensor, a: Array) -> tuple[Tensor, Array]:
    """The same random view of a tensor and of an array."""
    kind = draw(st.sampled_from(["slice", "select", "unflatten", "flatten", "permute", "expand"]))
    axis = draw(st.integers(0, a.ndim - 1))
    size = a.shape[axis]
    if kind == "slice":
        start = draw(st.integers(0, size))
        stop = draw(st.integers(start, size))
        return t.slice(axis, start, stop), a[(slice(None),) * axis + (slice(start, stop),)]
    if kind == "select" and size and a.ndim > 1:
        index = draw(st.integers(0, size - 1))
        return t.select(axis, index), a[(slice(None),) * axis + (index,)]
    if kind == "unflatten" and size:
        sizes = draw(st.sampled_from(splits_of(size)))
        return t.unflatten(axis, *sizes), a.reshape(*a.shape[:axis], *sizes, *a.shape[axis + 1 :])
    if kind == "flatten" and t.is_contiguous(axis):
        return t.flatten(axis), a.reshape(*a.shape[:axis], int(np.prod(a.shape[axis:])))
    if kind == "permute":
        axes = draw(st.permutations(range(a.ndim)))
        return t.permute(*axes), a.transpose(axes)
    if kind == "expand" and a.ndim < 6:
        copies = draw(st.integers(1, 3))
        return t.expand(axis, copies), np.repeat(np.expand_dims(a, axis), copies, axis)
    return t, a


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_views_show_what_numpys_views_show(data: st.DataObject) -> None:
    draw: Any = data.draw
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple))
    base = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    tensor, array = activation(*shape), base
    for _ in range(draw(st.integers(1, 6))):
        tensor, array = one_view(draw, tensor, array)
        assert tensor.shape == array.shape
        assert np.array_equal(through(tensor, base), array)
        assert tensor.base.view_of is None
        assert tensor.base.shape == shape
        for axis in range(array.ndim):
            inner = through(tensor, base)[(0,) * axis] if array.size else array[:0]
            assert not tensor.is_contiguous(axis) or inner.flags.c_contiguous


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_reference_backend_resolves_views_of_live_rows(data: st.DataObject) -> None:
    n_live = data.draw(st.integers(0, 4))
    base = Tensor("x", (Dim(4, "n_tokens"), 12), F32, Kind.ACTIVATION)
    values = np.arange(n_live * 12, dtype=np.float32).reshape(n_live, 12)
    backend = ReferenceBackend()
    backend.write(base, values)
    start = data.draw(st.integers(0, 8))
    view = base.slice(1, start, start + 4).unflatten(1, 2, 2)
    live = Live(n_live, 1, 1)
    assert np.array_equal(backend.array(base, live), values)
    want = values[:, start : start + 4].reshape(n_live, 2, 2)
    assert np.array_equal(backend.array(view, live), want)
    assert np.array_equal(backend.array(view.permute(0, 2, 1), live), want.transpose(0, 2, 1))


def test_a_view_is_metadata_of_its_base() -> None:
    base = activation(4, 6)
    view = base.slice(1, 2, 5).slice(1, 1, 3)
    assert (view.base, view.offset, view.strides) == (base, 3, (6, 1))
    assert view.view_of is base
    assert (view.name, view.dtype, view.kind) == (base.name, base.dtype, base.kind)
    assert base.base is base
    assert base != activation(4, 6)


def test_only_axes_without_gaps_are_flattened() -> None:
    gapped = activation(4, 6).slice(1, 0, 4).unflatten(1, 2, 2)
    assert gapped.flatten(1).shape == (4, 4)
    assert [gapped.is_contiguous(axis) for axis in range(3)] == [False, True, True]
    with pytest.raises(AssertionError):
        gapped.flatten(0)
    with pytest.raises(AssertionError):
        gapped.permute(0, 2, 1).flatten(1)
    with pytest.raises(AssertionError):
        gapped.slice(1, 1, 3)
    with pytest.raises(AssertionError):
        gapped.unflatten(1, 3, 1)


def test_bytes_are_those_of_whole_blocks() -> None:
    assert Tensor("w", (3, 64), WEIGHT_TYPES["Q4_0"], Kind.WEIGHT).nbytes == 3 * 2 * 18
    assert Tensor("w", (3, 5), F16, Kind.WEIGHT).nbytes == 30
    assert Tensor("w", (7,), F32, Kind.WEIGHT).nbytes == 28


def test_live_counts_replace_capacities() -> None:
    n_tokens, slots = Dim(512, "n_tokens"), Dim(9, "n_slots")
    assert (n_tokens, repr(n_tokens)) == (512, "n_tokens≤512")
    live = Live(n_tokens=3, n_seqs=2, n_outputs=0)
    counts = {"n_tokens": 3, "n_seqs": 2, "n_seqs + 1": 3, "n_outputs": 0}
    assert {name: live.dim(name) for name in counts} == counts
    # Memory has no live part: its slots and blocks are always all there.
    assert live.dim("n_slots") is live.dim("n_blocks") is None
    assert live.shape((n_tokens, 512, slots, Dim(8, "n_outputs"))) == (3, 512, 9, 0)
    assert (dim_name(Tensor("s", (slots, 4), F32, Kind.STATE)), dim_name(activation(3))) == (
        "n_slots",
        "",
    )


def test_views_of_inner_axes_keep_the_live_dimension() -> None:
    x = Tensor("x", (Dim(8, "n_tokens"), 12), F32, Kind.ACTIVATION)
    views = [
        x.slice(1, 2, 8),
        x.unflatten(1, 3, 4),
        x.unflatten(1, 3, 4).select(1, 0),
        x.unflatten(1, 3, 4).flatten(1),
        x.expand(1),
    ]
    assert [dim_name(view) for view in views] == ["n_tokens"] * len(views)
    assert dim_name(x.unflatten(1, 3, 4).permute(1, 0, 2).permute(1, 0, 2)) == "n_tokens"
    assert repr(views[0]) == "x[n_tokens≤8, 6]:F32"


def test_patterns_bind_and_check() -> None:
    inputs = {"q": activation(5, 2, 16), "k": activation(5, 2, 16), "one": activation(1, 2)}
    dims = match_shapes(inputs, q="T H D", k="T H D", one="1 H")
    assert (dims.T, dims.H, dims["D"]) == (5, 2, 16)
    assert match_shapes(inputs, {"H": 2}, one="1 H").H == 2
    wrong: tuple[tuple[Any, str], ...] = (
        ({"q": "T H D", "k": "H T D"}, r"operand k: expected \[H=2, T=5, D=16\], got \[5, 2, 16\]"),
        ({"q": "T H"}, r"operand q: expected \[T, H\], got \[5, 2, 16\]"),
        ({"one": "3 H"}, r"operand one: expected \[3, H\], got \[1, 2\]"),
    )
    for patterns, message in wrong:
        with pytest.raises(ShapeError, match=message):
            match_shapes(inputs, **patterns)


def double(writes: tuple[str, ...] = ()) -> Op:
    """An op of two outputs."""
    return Op(
        "DOUBLE",
        ("x", "state"),
        lambda inputs, attrs: [(inputs["x"].shape, F32)] * 2,
        lambda x, **_: (x, x),
        lambda node, live: Cost(0, 0),
        n_outputs=2,
        attrs=("factor",),
        optional=("state",),
        writes=writes,
    )


def test_nodes_are_appended_with_their_outputs() -> None:
    graph = Graph(Capacity(4))
    first, second = graph.add(double(), "blk.0.double", {"x": activation(4, 3)}, factor=2)
    assert [t.name for t in (first, second)] == ["blk.0.double", "blk.0.double.1"]
    assert {t.kind for t in (first, second)} == {Kind.ACTIVATION}
    graph.add(double(), "later", {"x": second, "state": None}, factor=1)
    assert [node.name for node in graph.nodes] == ["blk.0.double", "later"]
    assert graph.nodes[0].attrs == {"factor": 2}
    assert graph.nodes[0].outputs == (first, second)


@pytest.mark.parametrize(
    ("operands", "attrs", "message"),
    [
        ({"x", "y"}, {"act": "silu"}, "SPLIT: operands"),
        ({"gate"}, {"act": "silu"}, "SPLIT: operands"),
        ({"x", "x1"}, {"act": "silu"}, "SPLIT: operands"),
        ({"x"}, {}, "SPLIT: attributes"),
        ({"x"}, {"act": "silu", "eps": 1}, "SPLIT: attributes"),
        ({"x"}, {"act": "gelu"}, "SPLIT: act is gelu"),
    ],
)
def test_names_that_an_op_does_not_declare_are_refused(
    operands: set[str], attrs: dict[str, Any], message: str
) -> None:
    op = Op(
        "SPLIT",
        ("x", "gate", "weight"),
        lambda inputs, attrs: [],
        lambda **_: (),
        lambda node, live: Cost(0, 0),
        attrs=("act",),
        choices={"act": ("silu", "sigmoid")},
        optional=("gate",),
        repeated=("weight",),
    )
    graph, x = Graph(Capacity(4)), activation(4, 3)
    graph.add(op, "ok", {"x": x, "gate": None, "weight": x, "weight12": x}, act="sigmoid")
    assert list(graph.nodes[0].inputs) == ["x", "weight", "weight12"]
    with pytest.raises(AssertionError, match=message):
        graph.add(op, "wrong", dict.fromkeys(operands, x), **attrs)


def test_a_node_says_what_state_it_writes() -> None:
    graph = Graph(Capacity(4))
    state = graph.state("blk.0.state", (Dim(3, "n_slots"), 2))
    graph.add(
        double(("state",)), "node", {"x": activation(4, 3), "state": state.slice(1, 0, 1)}, factor=1
    )
    assert graph.nodes[0].written == [state]
    with pytest.raises(AssertionError):
        graph.add(double(("x",)), "wrong", {"x": activation(4, 3)}, factor=1)


def test_weights_are_shared_by_name_and_the_rest_is_declared_once() -> None:
    graph = Graph(Capacity(4))
    embedding = graph.weight("token_embd.weight", (10, 4), F16)
    assert graph.weight("token_embd.weight", (10, 4), F16) is embedding
    ids = graph.input("tokens", (Dim(4, "n_tokens"),))
    assert (ids.kind, ids.dtype, graph.inputs) == (Kind.INPUT, I32, {"tokens": ids})
    state = graph.state("s", (Dim(3, "n_slots"), 2))
    cache = graph.state("c", (Dim(5, "n_blocks"), 7), F16)
    assert graph.states == {"s": state, "c": cache}
    assert graph.state_bytes() == (3 * 2 * 4, 5 * 7 * 2)
    for again in (lambda: graph.input("tokens", (1,)), lambda: graph.state("s", (1,))):
        with pytest.raises(AssertionError):
            again()
