"""The engine and the golden files against the transformers that is installed.

Weights are fresh in every run; a failure names the seed, and putting it in place of `fresh_seeds`
repeats the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.parity import CASES
from tests.parity.common import MAX_ERROR, Case, Golden, case_id, random_weights, relative_error
from tests.parity.compare import load_engine, logits_problem, tokens_problem

for package in ("torch", "transformers"):
    pytest.importorskip(package, reason=f"{package}: install the parity extra")

from tests.parity import live  # noqa: E402  (needs what is checked above)

# Warnings of torch and transformers are not ours to fix.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
MAX_TRIES = 64  # at least an eighth of all seeds make a fair test


def fresh_seeds() -> Iterator[int]:
    yield from np.random.SeedSequence().generate_state(MAX_TRIES).tolist()


@pytest.fixture(params=CASES, ids=case_id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_engine_matches_transformers(case: Case, tmp_path: Path) -> None:
    expected = live.first_fair(case, fresh_seeds())
    with load_engine(tmp_path / "model.gguf", case, expected.weights) as engine:
        problems = [check(engine, expected.golden) for check in (logits_problem, tokens_problem)]
    assert not any(problems), f"{case_id(case)}, seed {expected.golden.seed}: {problems}"


def test_golden_file_is_current(case: Case) -> None:
    golden = Golden.load(case)
    model = live.build(case, random_weights(case, golden.seed))
    assert relative_error(live.logits(model, golden.ids), golden.logits) <= MAX_ERROR / 2
    # One pass over the whole greedy run: row i predicts token i + 1.
    rows = live.logits(model, golden.prompt + golden.greedy[:-1])[len(golden.prompt) - 1 :]
    assert rows.argmax(axis=1).tolist() == golden.greedy
