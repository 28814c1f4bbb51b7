"""The router's rules that random numbers don't meet: ties, groups, batches, sums of almost nothing.

Its formulas are in tests/ops/test_ops.py, what it refuses in tests/ops/test_contracts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.ops.router import ROUTER
from tests.support.naive import NAIVE

Array = NDArray[Any]
Route = tuple[list[list[int]], Array]


def route(
    logits: Sequence[Sequence[float]] | Array, bias: Sequence[float] | None = None, **attrs: Any
) -> Route:
    """(ids, weights) of both definitions, which must agree."""
    operands: dict[str, Any] = {"logits": np.asarray(logits, np.float64)}
    if bias is not None:
        operands["bias"] = np.asarray(bias, np.float64)
    defaults: dict[str, Any] = {"n_used": 2, "gating": "sigmoid", "scale": 1.0, "eps": 0.0}
    attrs = defaults | {"groups": (1, 1), "normalized": True} | attrs
    ids, weights = ROUTER.reference(**operands, **attrs)
    (naive_ids, naive_weights), _ = NAIVE["ROUTER"](**operands, **attrs)
    assert np.array_equal(ids, naive_ids)
    np.testing.assert_allclose(weights, naive_weights, rtol=1e-12)
    return ids.tolist(), weights


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_of_equal_experts_the_first_are_chosen(gating: str) -> None:
    ids, weights = route([[1, 1, 1, 1], [0, 2, 1, 2], [3, 0, 5, 3]], gating=gating)
    assert ids == [[0, 1], [1, 3], [2, 0]]
    assert weights[:2].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_of_equal_groups_the_first_are_chosen() -> None:
    # Groups (0, 1), (2, 3) and (4, 5): 0.5 + 0.5 each.
    assert route(np.zeros((1, 6)), groups=(3, 1))[0] == [[0, 1]]
    assert route(np.zeros((1, 6)), [0, 0, 0, 0, 0, 0.1], groups=(3, 1))[0] == [[5, 4]]
    assert route(np.zeros((1, 6)), [0, 0, 0, 0, 0, 0.1], groups=(3, 2))[0] == [[5, 0]]


def test_a_group_is_as_good_as_its_two_best() -> None:
    """Neither the best expert nor the most good ones decide."""
    best_alone, many, pair = [9, -9, -9, -9], [0, 0, 0, 0], [1, 1, -9, -9]
    assert route([[*best_alone, *many, *pair]], groups=(3, 1))[0] == [[8, 9]]


def test_the_bias_decides_but_does_not_weigh() -> None:
    ids, weights = route([[0, 0, 2, -2]], [0, 5, 0, 9])
    assert ids == [[3, 1]]
    p = 1 / (1 + np.exp([2.0, 0.0]))
    np.testing.assert_allclose(weights[0], p / p.sum())


def test_a_negative_bias_may_put_every_expert_below_zero() -> None:
    """Experts outside of the chosen groups stay outside, however low the others are."""
    assert route(np.zeros((1, 4)), [-7, -9, -2, -30], groups=(2, 1))[0] == [[0, 1]]


def test_weights_sum_to_the_scale() -> None:
    rng = np.random.default_rng(0)
    _, weights = route(rng.normal(size=(20, 16)), n_used=5, scale=2.446, eps=1e-20)
    np.testing.assert_allclose(weights.sum(axis=1), 2.446)


def test_weights_that_are_not_normalized_are_probabilities_times_the_scale() -> None:
    ids, weights = route([[0, 3, -1]], scale=2.5, normalized=False)
    assert ids == [[1, 0]]
    np.testing.assert_allclose(weights[0], [2.5 / (1 + np.exp(-3)), 1.25])


def test_sums_of_almost_nothing_stay_finite() -> None:
    _, weights = route([[-60, -61, -62]], eps=1e-20)
    assert np.isfinite(weights).all()
    ids, weights = route([[800, -800, 200]], gating="softmax")
    assert ids == [[0, 2]]
    np.testing.assert_allclose(weights, [[1, np.exp(-600)]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_a_token_has_the_experts_that_it_has_alone(dtype: type, gating: str) -> None:
    logits: Any = np.random.default_rng(0).normal(size=(33, 64)).astype(dtype)
    attrs: dict[str, Any] = {"n_used": 6, "gating": gating, "scale": 1.0, "eps": 0.0}
    attrs |= {"groups": (8, 4), "normalized": True}
    ids, weights = ROUTER.reference(logits, **attrs)
    for t in range(len(logits)):
        alone = ROUTER.reference(logits[t : t + 1], **attrs)
        assert np.array_equal(alone[0][0], ids[t])
        assert np.array_equal(alone[1][0], weights[t])
