"""Perplexity against transformers: the loss of its own models, of the tokens that are scored."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from engine.bench.perplexity import chunks, perplexity
from tests.parity import CASES
from tests.parity.common import Case, Golden, case_id, random_weights
from tests.parity.compare import load_engine

for package in ("torch", "transformers"):
    pytest.importorskip(package, reason=f"{package}: install the parity extra")

import torch  # noqa: E402

from tests.parity import live  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
# One case of each architecture.
FIRST = {case.arch: case for case in reversed(CASES)}.values()
IGNORED = -100  # a label that transformers leaves out


@pytest.mark.parametrize("case", FIRST, ids=case_id)
def test_the_loss_is_transformers(case: Case, tmp_path: Path) -> None:
    golden = Golden.load(case)
    weights = random_weights(case, golden.seed)
    model = live.build(case, weights)
    all_ids = golden.ids[:160]
    with load_engine(tmp_path / "model.gguf", case, weights) as engine:
        for n_ctx, stride in ((50, 0), (40, 25)):
            losses = []
            for chunk in chunks(len(all_ids), n_ctx, stride):
                ids = torch.tensor([all_ids[chunk.start : chunk.start + chunk.n_tokens]])
                labels = ids.clone()
                labels[:, : chunk.first] = IGNORED
                with torch.no_grad():
                    losses.append(float(model(ids, labels=labels, use_cache=False).loss))
            expected = sum(losses) / len(losses)
            *_, got = perplexity(engine, all_ids, n_ctx, stride)
            assert len(losses) > 2
            assert math.log(got.ppl) == pytest.approx(expected, rel=1e-5)
