"""Log probabilities and logits processors, against numpy in float64 on the model's own logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import Engine, GenerationError, SamplingParams
from engine.sampling.logprobs import logprobs
from tests.support.hash_model import hash_engine
from tests.support.helpers import N_VOCAB, ROW_BY_ROW, assert_all_free, random_ids

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(
    temperature=2.0, seed=5, max_tokens=12, repeat_penalty=1.4, logit_bias={7: 3.0}, ignore_eos=True
)
Load = Callable[[], Engine]


@pytest.fixture(params=["one by one", "overlapped", "cpu"])
def loaded(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Engine]:
    if request.param == "cpu":
        engine = Engine.load(tiny, n_ctx=256, n_parallel=3, **ROW_BY_ROW)
    else:
        overlaps = request.param == "overlapped"
        engine = hash_engine(tiny, overlaps, n_ctx=256, n_ubatch=64, n_parallel=3)
    with engine:
        yield engine
        assert_all_free(engine)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    x = logits.astype(np.longdouble)
    return np.asarray(x - x.max() - np.log(np.exp(x - x.max()).sum()), np.float64)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("n_top", [0, 1, 5, N_VOCAB, N_VOCAB + 9])
def test_logprobs_are_those_of_the_logits(
    loaded: Engine, rng: np.random.Generator, params: SamplingParams, n_top: int
) -> None:
    ids = random_ids(rng, 9)
    plain = loaded.generate(ids, params).wait()
    asked, beside = loaded.generate_batch([ids, ids], [replace(params, logprobs=n_top), params])
    assert asked.tokens == beside.tokens == plain.tokens
    assert (beside.logprobs, plain.logprobs) == ([], [])
    assert len(asked.logprobs) == len(asked.tokens)
    assert [t.logprobs for t in asked] == asked.logprobs
    rows = loaded.logits(ids + asked.tokens)[len(ids) - 1 :]
    for token, got, row in zip(asked.tokens, asked.logprobs, rows, strict=False):
        want = log_softmax(row)
        assert got.logprob == pytest.approx(want[token], abs=1e-9)
        order = np.argsort(-row, kind="stable")[:n_top]
        assert [i for i, _ in got.top] == order.tolist()
        assert [p for _, p in got.top] == pytest.approx(want[order], abs=1e-9)


def test_of_equal_ones_the_lower_id_comes_first() -> None:
    got = logprobs(np.array([1, 3, 3, -np.inf, 3], np.float32), 0, 2)
    assert [i for i, _ in got.top] == [1, 2]
    assert np.isneginf(logprobs(np.array([0, -np.inf], np.float32), 1, 2).top[1][1])
    extreme = np.array([3e38, -3e38, 3e38], np.float32)
    assert logprobs(extreme, 0, 1).logprob == pytest.approx(-np.log(2))


def test_a_processor_gets_tokens_and_logits(loaded: Engine, rng: np.random.Generator) -> None:
    ids, seen = random_ids(rng, 70), list[tuple[list[int], NDArray[np.float32]]]()

    def watch(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append((list(tokens), logits))
        return logits

    plain = loaded.generate(ids, GREEDY).wait()
    watched = loaded.generate(ids, replace(GREEDY, logits_processors=watch)).wait()
    assert watched.tokens == plain.tokens
    rows = loaded.logits(ids + plain.tokens)
    for i, (tokens, logits) in enumerate(seen):
        assert tokens == ids + plain.tokens[:i]
        assert logits.dtype == np.float32
        assert np.array_equal(logits, rows[len(ids) - 1 + i])


def test_processors_decide(loaded: Engine, rng: np.random.Generator) -> None:
    """Only even tokens, then not the token before; what the model said is what logprobs tell."""
    ids = random_ids(rng, 9)

    def even(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        logits[1::2] = -np.inf
        return logits

    def other(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float64]:
        assert np.isneginf(logits[1::2]).all()
        out = logits.astype(np.float64)
        out[tokens[-1]] = -np.inf
        return out

    params = replace(DRAWN, logits_processors=[even, other], logprobs=0, repeat_penalty=1.0)
    got = loaded.generate(ids, params).wait()
    assert all(t % 2 == 0 for t in got.tokens)
    assert all(a != b for a, b in zip([ids[-1], *got.tokens], got.tokens, strict=False))
    rows = loaded.logits(ids + got.tokens)[len(ids) - 1 :]
    want = [log_softmax(row)[t] for row, t in zip(rows, got.tokens, strict=False)]
    assert [found.logprob for found in got.logprobs] == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda x: x[1:], r"expected numbers \[320\] back, got float32 \[319\]"),
        (lambda x: None, "expected numbers .* back, got object"),
        (lambda x: x * np.nan, "expected numbers back, got NaN"),
        (lambda x: x - np.inf, "expected a finite number as the highest, got -inf"),
        (lambda x: x.astype(np.float64) * 1e300, "expected a finite number as the highest"),
        (lambda x: x + np.inf, "expected a finite number as the highest, got inf"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_bad_processor_ends_its_own_completion(
    loaded: Engine, make: Callable[[Any], Any], said: str
) -> None:
    def hook(tokens: Sequence[int], logits: NDArray[np.float32]) -> Any:
        return make(logits) if len(tokens) == 3 else logits

    alone = loaded.generate([5], GREEDY).wait().tokens
    with np.errstate(invalid="ignore"):
        bad, good = loaded.generate_batch(
            [[1], [5]], [replace(GREEDY, logits_processors=(hook,)), GREEDY]
        )
    assert (bad.finish_reason, len(bad.tokens)) == ("error", 2)
    assert good.tokens == alone
    with pytest.raises(GenerationError, match=said):
        list(bad)
