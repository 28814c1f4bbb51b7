"""The engine against golden files that transformers made; needs neither torch nor a network.

tests/golden/<arch>-<case>.npz holds a seed, logits and greedy tokens (tools/make_golden.py); the
weights are drawn again from the seed and written as GGUF.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import Engine
from tests.parity import CASES
from tests.parity.common import (
    GOLDEN_DIR,
    MIN_CHOICE_MARGIN,
    MIN_MARGIN,
    Case,
    Golden,
    case_id,
    eos_id,
    golden_path,
    random_ids,
    random_weights,
)
from tests.parity.compare import load_engine, logits_problem, tokens_problem


@pytest.fixture(params=CASES, ids=case_id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def golden(case: Case) -> Golden:
    return Golden.load(case)


@pytest.fixture
def engine(case: Case, golden: Golden, tmp_path: Path) -> Iterator[Engine]:
    weights = random_weights(case, golden.seed)
    with load_engine(tmp_path / "model.gguf", case, weights) as engine:
        yield engine


def test_logits(engine: Engine, golden: Golden) -> None:
    assert not (problem := logits_problem(engine, golden)), problem


def test_greedy_tokens(engine: Engine, golden: Golden) -> None:
    assert not (problem := tokens_problem(engine, golden)), problem


def test_golden_file_is_a_fair_test(case: Case, golden: Golden) -> None:
    assert golden.margin >= MIN_MARGIN
    assert golden.choice_margin >= MIN_CHOICE_MARGIN
    assert np.isfinite(golden.choice_margin) == (case.routing is not None)
    assert eos_id(case) not in golden.greedy
    assert (golden.ids, golden.prompt) == random_ids(case, golden.seed)


def test_every_golden_file_has_its_case() -> None:
    files = {path for path in GOLDEN_DIR.glob("*.npz") if not path.name.startswith("demo-")}
    assert files == {golden_path(case) for case in CASES}
