"""Kernels of one launch where the ops' own cases are small: many rows, wide rows, ties, NaN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from engine.backends.cuda import kernels
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.lower import simple
from engine.backends.cuda.lower.simple import FEW_ROWS
from engine.formats.quants import F32
from engine.graph import Kind, Node, Tensor
from engine.ops import OPS
from tests.support.cases import Case, Operand, activation, recurrent_operands, slots, weight
from tests.support.cuda_emulator import device as emulated
from tests.support.cuda_emulator.device import EmulatedDevice
from tests.support.cuda_emulator.launching import launch
from tests.support.naive import NAIVE
from tests.support.opcase import check_case, fresh_seed, nmse, run_case

pytestmark = pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())
Rng = np.random.Generator
Make = Callable[[Rng], dict[str, Operand]]
LIMIT = 1e-10


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return fresh_seed(request.config.getoption("--seed", None))


def wide_rows(rng: Rng, n: int, residual: bool) -> dict[str, Operand]:
    operands = {"x": activation(rng.normal(size=(3, n))), "weight": weight(rng.normal(size=n))}
    return operands | ({"delta": activation(rng.normal(size=(3, n)))} if residual else {})


def wide_heads(rng: Rng, n: int) -> dict[str, Operand]:
    return {"x": activation(rng.normal(size=(11, 3, n)))}


def gated_heads(rng: Rng, n: int) -> dict[str, Operand]:
    x, gate = rng.normal(size=(2, 11, 3, n))
    return {"x": activation(x), "gate": activation(gate), "weight": weight(rng.normal(size=n))}


def ragged(rng: Rng, n_taps: int, n_channels: int, lengths: list[int]) -> dict[str, Operand]:
    fresh = rng.permutation(len(lengths))[: len(lengths) // 3].tolist()
    n, k = len(lengths), 2
    state = rng.normal(size=((2 + k) * n, n_taps - 1, n_channels))
    return {
        "x": activation(rng.normal(size=(sum(lengths), n_channels))),
        "weight": weight(rng.normal(size=(n_channels, n_taps))),
        "state": slots(state),
        **recurrent_operands(lengths, fresh, k),
    }


def heads(rng: Rng, n_rows: int, transposed: bool, sizes: tuple[int, int]) -> dict[str, Operand]:
    n_in, n_out = sizes
    shape = (3, n_in, n_out) if transposed else (3, n_out, n_in)
    return {
        "x": activation(rng.normal(size=(n_rows, 3, n_in))),
        "weight": weight(rng.normal(size=shape)),
        "tail": activation(rng.normal(size=(n_rows, 3, 5))),
    }


MANY = [1, 2, 3, 5, 1, 1, 2, 7, 3, 3, 2, 1, 90, 1, 1, 2, 130, 4, 3, 1, 200, 2, 1]
CASES: list[tuple[str, Make, dict[str, Any]]] = [
    ("ADD_RMS_NORM", partial(wide_rows, n=9001, residual=True), {"eps": 1e-6}),
    ("ADD_RMS_NORM", partial(wide_rows, n=8960, residual=True), {"eps": 1e-6}),
    ("ADD_RMS_NORM", partial(wide_rows, n=8960, residual=False), {"eps": 1e-6}),
    ("L2_NORM", partial(wide_heads, n=516), {"eps": 1e-6}),
    ("L2_NORM", partial(wide_heads, n=131), {"eps": 1e-6}),
    ("RMS_NORM_GATED", partial(gated_heads, n=300), {"eps": 1e-6, "act": "silu"}),
    ("MUL_MAT_HEADS", partial(heads, n_rows=140, transposed=False, sizes=(72, 70)), {}),
    ("MUL_MAT_HEADS", partial(heads, n_rows=140, transposed=True, sizes=(64, 136)), {}),
    ("MUL_MAT_HEADS", partial(heads, n_rows=FEW_ROWS, transposed=True, sizes=(33, 37)), {}),
]  # fmt: skip


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("op", "make", "attrs"), CASES)
def test_case(op: str, make: Make, attrs: dict[str, Any], strided: bool, seed: int) -> None:
    if op == "MUL_MAT_HEADS":
        attrs = {"transposed": make.keywords["transposed"]}  # type: ignore[attr-defined]
    backend = CudaBackend(EmulatedDevice(seed=seed))
    check_case(backend, OPS[op], Case(str(make), make, attrs), seed, strided, LIMIT)


@pytest.mark.parametrize("n_blocks", [1, 30, 100, 1000])
@pytest.mark.parametrize("n_taps", [4, 7])
@pytest.mark.parametrize("lengths", [MANY, [1] * 70])
def test_sequences_begin_anywhere_in_a_run_of_rows(
    lengths: list[int], n_taps: int, n_blocks: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simple, "CONV_BLOCKS", n_blocks)
    make = partial(ragged, n_taps=n_taps, n_channels=130, lengths=lengths)
    backend = CudaBackend(EmulatedDevice(seed=seed))
    check_case(backend, OPS["SSM_CONV"], Case("ragged", make, {}), seed, limit=LIMIT)


@pytest.mark.parametrize("transposed", [False, True])
def test_head_products_are_the_same_for_few_rows_and_many(rng: Rng, transposed: bool) -> None:
    n_rows, n_in, n_out = 20, 100, 40
    x = rng.normal(size=(n_rows, 2, n_in)).astype(np.float32)
    shape = (2, n_in, n_out) if transposed else (2, n_out, n_in)
    matrix = rng.normal(size=shape).astype(np.float32)
    got = []
    for kernel, threads, grid, shared in (
        ("mul_mat_heads_rows", 128, (2, 2, 3), 4 * 8 * 32 * 4),
        ("mul_mat_heads_tiles", 256, (1, 2, 1), 0),
    ):
        out = np.zeros((n_rows, 2, n_out), np.float32)
        launch(
            EmulatedDevice(), "mul_mat_heads", kernel, [out, x, matrix, None], [transposed],
            threads=threads, grid=grid, shared=shared,
        )  # fmt: skip
        got.append(out)
    assert (got[0] == got[1]).all()
    (want,), _ = NAIVE["MUL_MAT_HEADS"](x=x, weight=matrix, transposed=transposed)
    assert nmse(got[0], want) < LIMIT


def test_a_sequence_is_convolved_as_if_alone(
    rng: Rng, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same bits, wherever the runs of rows end."""
    monkeypatch.setattr(simple, "CONV_BLOCKS", 50)
    backend, taps = CudaBackend(EmulatedDevice(seed=seed)), weight(rng.normal(size=(40, 4)))
    x = rng.normal(size=(sum(MANY), 40))

    def convolved(rows: np.ndarray, lengths: list[int]) -> np.ndarray:
        every = range(len(lengths))
        operands = {
            "x": activation(rows),
            "weight": taps,
            "state": slots(np.zeros((2 * len(lengths), 3, 40))),
            **recurrent_operands(lengths, fresh=every),
        }
        case = Case("ragged", lambda _: dict(operands), {})
        (out,), _, _ = run_case(backend, OPS["SSM_CONV"], case, seed)
        return out

    together, ends = convolved(x, MANY), np.cumsum(MANY)
    for s in (2, 12, 16, 20, 22):
        rows = slice(ends[s] - MANY[s], ends[s])
        assert (convolved(x[rows], MANY[s : s + 1]) == together[rows]).all(), s


def route(logits: np.ndarray, n_used: int, groups: tuple[int, int] = (1, 1)) -> Any:
    n_rows = len(logits)
    ids = np.full((n_rows, n_used), -1, np.int32)
    weights = np.zeros((n_rows, n_used), np.float32)
    launch(
        EmulatedDevice(), "router", "router", [ids, weights, logits.astype(np.float32), None],
        [n_used, 0, 1.0, 0.0, *groups, 1.0], threads=kernels.threads("router"),
        grid=(-(-n_rows // 8), 1, 1),
    )  # fmt: skip
    return ids, weights


def test_of_equal_experts_the_lower_index_is_chosen(rng: Rng) -> None:
    logits = rng.integers(0, 3, (20, 300)).astype(float)
    ids, weights = route(logits, 12)
    assert (ids == np.argsort(-logits, axis=1, kind="stable")[:, :12]).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    # Of eight equal groups the first three.
    ids, _ = route(np.zeros((1, 512)), 10, (8, 3))
    assert ids.tolist() == [list(range(10))]


def test_choices_among_nan_are_experts() -> None:
    ids, weights = route(np.full((1, 40), np.nan), 8)
    assert sorted(set(ids[0].tolist())) == ids[0].tolist()
    assert ids.min() >= 0
    assert ids.max() < 40
    assert np.isnan(weights).all()


@pytest.mark.parametrize("n", [7, 1032, 2500])
def test_rows_of_a_table(rng: Rng, n: int) -> None:
    table = rng.normal(size=(9, n)).astype(np.float32)
    ids, out = np.array([8, 0, 8, 3], np.int32), np.zeros((4, n), np.float32)
    launch(
        EmulatedDevice(), "get_rows", "get_rows", [out, table, ids],
        threads=kernels.threads("get_rows"), grid=(4, -(-n // 1024), 1),
    )  # fmt: skip
    assert (out == table[ids]).all()


@pytest.mark.parametrize(
    ("op", "shapes", "attrs", "reason"),
    [
        ("ROUTER", {"logits": (3, 513)}, {"n_used": 8}, "513 experts, more than 512"),
        ("ROUTER", {"logits": (3, 512)}, {"n_used": 33}, "33 used experts, more than 32"),
        ("SSM_CONV", {"weight": (8, 17)}, {}, "17 taps, more than 16"),
        ("QK_NORM_ROPE", {}, {"n_rot": 514}, "514 rotated entries, more than 512"),
        ("MLA_CACHE", {}, {"n_rot": 514}, "514 rotated entries, more than 512"),
    ],
)
def test_what_no_kernel_takes_is_refused(
    op: str, shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any], reason: str
) -> None:
    inputs = {name: Tensor(name, shape, F32, Kind.WEIGHT) for name, shape in shapes.items()}
    node = Node(OPS[op], "test", inputs, (), attrs)
    support = CudaBackend(EmulatedDevice()).supports(node)
    assert (support.ok, support.reason) == (False, reason)
