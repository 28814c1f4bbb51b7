"""Every op: its reference against the naive definition, on its own and through a backend.

Seeds are fresh on every run and are part of each failure's message. tests/support/opcase.py runs
the cases on any backend; shape errors and costs are in tests/ops/test_contracts.py.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from engine.backends.reference import ReferenceBackend
from engine.formats.quants import F32, I32
from engine.graph import Kind, Op
from engine.ops import OPS
from tests.ops.cases import CASES as CASES_OF
from tests.support.cases import Case, live_counts, single_node_graph
from tests.support.naive import NAIVE
from tests.support.opcase import OpCase, assert_close, check_case, every_case, fresh_seed, nmse

CASES = every_case()
NAMES = [str(c) for c in CASES]
on_every_case = pytest.mark.parametrize("c", CASES, ids=NAMES)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


def float64_arrays(c: OpCase, seed: int) -> dict[str, np.ndarray]:
    """A case's operands without any rounding; what the op must not write is read-only."""
    rng = np.random.default_rng([seed, zlib.crc32(c.case.name.encode())])
    arrays = {name: np.array(o.values) for name, o in c.case.make(rng).items()}
    for name, array in arrays.items():
        array.flags.writeable = name in c.op.writes
    return arrays


def test_every_op_has_cases_with_names_of_their_own() -> None:
    assert set(OPS) == set(NAIVE) == {c.op.name for c in CASES}
    assert len(set(NAMES)) == len(NAMES)
    assert all(name == op.name for name, op in OPS.items())


@on_every_case
def test_reference_is_the_naive_definition(c: OpCase, seed: int) -> None:
    arrays = float64_arrays(c, seed)
    want_outputs, want_states = NAIVE[c.op.name](**arrays, **c.case.attrs)
    outputs = c.op.reference(**arrays, **c.case.attrs)
    assert len(outputs) == len(want_outputs)
    for i, (got, want) in enumerate(zip(outputs, want_outputs, strict=True)):
        assert got.dtype == want.dtype
        assert_close(got, want, 1e-24, f"{c}, output {i}, seed {seed}")
    assert want_states.keys() == set(c.op.writes)
    for name, want in want_states.items():
        assert_close(arrays[name], want, 1e-24, f"{c}, state {name}, seed {seed}")


@on_every_case
def test_shapes_are_inferred(c: OpCase, seed: int) -> None:
    operands = c.case.make(np.random.default_rng(seed))
    graph, _ = single_node_graph(c.op, c.case, operands, spare=4)
    live, (node,) = live_counts(operands), graph.nodes
    arrays = float64_arrays(c, seed)
    outputs = c.op.reference(**arrays, **c.case.attrs)
    assert len(outputs) == len(node.outputs)
    for tensor, values in zip(node.outputs, outputs, strict=True):
        assert tensor.kind is Kind.ACTIVATION
        assert tensor.dtype == (I32 if values.dtype.kind == "i" else F32)
        assert live.shape(tensor.shape) == values.shape
        assert tensor.shape == (len(values) + 4, *values.shape[1:])


@pytest.mark.parametrize("strided", [False, True])
@on_every_case
def test_reference_backend(c: OpCase, strided: bool, seed: int) -> None:
    check_case(ReferenceBackend(), c.op, c.case, seed, strided, c.limit)


@on_every_case
def test_reference_backend_in_float64(c: OpCase, seed: int) -> None:
    """What is left is the rounding of states to their stored type, which the limit allows for."""
    check_case(ReferenceBackend(np.float64), c.op, c.case, seed, limit=1e-13)


def _spoiled(op: Op, operand: str) -> Op:
    """An op that writes one state entry too much."""

    def reference(**arrays: object) -> tuple[np.ndarray, ...]:
        outputs = op.reference(**arrays)
        state = arrays[operand]
        assert isinstance(state, np.ndarray)
        state[..., 0] = 0
        return outputs

    return replace(op, reference=reference)


@pytest.mark.parametrize(
    ("name", "operand"),
    [("SSM_CONV", "state"), ("GATED_DELTA_NET", "state"), ("ATTENTION", "v_cache")],
)
def test_a_write_where_nothing_is_written_is_found(name: str, operand: str, seed: int) -> None:
    op = _spoiled(OPS[name], operand)
    case = next(iter(CASES_OF[op.name]()))
    with pytest.raises(AssertionError, match=f"seed {seed}.*changed where nothing is written"):
        check_case(ReferenceBackend(), op, case, seed)


def test_a_wrong_output_is_found(seed: int) -> None:
    op = OPS["SWIGLU"]
    wrong = replace(op, reference=lambda gate, up, limits: (up * gate,))
    case: Case = next(iter(CASES_OF[op.name]()))
    with pytest.raises(AssertionError, match=f"seed {seed}: output 0: NMSE"):
        check_case(ReferenceBackend(), wrong, case, seed)


def test_errors_are_measured_against_the_size_of_what_is_wanted() -> None:
    want = np.array([3.0, 4.0])
    assert nmse(want, want) == 0
    assert nmse(np.array([3.0, 4.5]), want) == pytest.approx(0.01)
    assert nmse(np.zeros(2), np.zeros(2)) == 0
    assert nmse(np.array([1.0, np.nan]), want) == float("inf")
    assert nmse(np.ones(2), np.zeros(2)) == nmse(np.ones((2, 1)), want) == float("inf")
