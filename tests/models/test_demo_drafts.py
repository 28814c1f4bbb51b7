"""Golden drafts of the demo model's layer for multi-token prediction, which PyTorch computed.

tools/train_demo/golden.py wrote them, in float64, from the file's own weights. Here the layer is
computed once more, in numpy, row after row; the trunk's logits are the reference backend's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine import Engine
from engine.engine import DEMO_MODEL
from engine.formats.gguf import GGUFFile
from tests.parity.common import GOLDEN_DIR
from tests.support.numpy_mtp import NumpyMtp, draft

PATH = GOLDEN_DIR / "demo-mtp.npz"
N_PROMPTS, N_DRAFTS, N_BEST, N_WHOLE = 20, 3, 32, 3


@pytest.fixture(scope="module")
def golden() -> list[dict[str, Any]]:
    """What the file has of each prompt."""
    with np.load(PATH) as file:
        found: list[dict[str, Any]] = [{} for _ in range(N_PROMPTS)]
        for name in file.files:
            key, _, i = name.rpartition("_")
            found[int(i)][key] = file[name]
    return found


def test_prompts_are_short_and_long(golden: list[dict[str, Any]]) -> None:
    lengths = [len(one["ids"]) for one in golden]
    assert min(lengths) < 16
    assert sum(n >= 100 for n in lengths) >= 2
    assert sum("all_h" in one for one in golden) == N_WHOLE


def test_drafts_are_those_of_a_loop_in_numpy(golden: list[dict[str, Any]]) -> None:
    mtp = NumpyMtp(GGUFFile(DEMO_MODEL))
    for one in golden:
        if "all_h" not in one:
            continue
        h = one["all_h"].astype(np.float64)
        assert np.array_equal(one["all_h"][-2:], one["h"])
        ids = [*one["ids"].tolist(), int(one["next"])]
        tokens, states, logits = draft(mtp, ids, h, N_DRAFTS)
        assert tokens == one["drafts"].tolist()
        # Golden values are stored in float32.
        assert np.allclose(states, one["states"], rtol=1e-6, atol=1e-5)
        trunk = mtp.logits(h[-1])
        for values, best, stored in zip([trunk, *logits], one["best"], one["logits"], strict=True):
            assert best[:1] == values.argmax()
            assert np.allclose(values[best], stored, rtol=1e-6, atol=1e-5)
            assert np.allclose(np.sort(values)[-N_BEST:][::-1], stored, rtol=1e-6, atol=1e-5)


def test_logits_of_the_trunk_are_the_engines(golden: list[dict[str, Any]]) -> None:
    with Engine.load(backend="reference", n_ctx=128) as engine:
        for one in golden:
            logits = engine.logits(one["ids"].tolist())[-1]
            assert logits.argmax() == one["next"] == one["best"][0, 0]
            scale = np.abs(one["logits"][0]).max()
            assert np.allclose(logits[one["best"][0]], one["logits"][0], rtol=0, atol=1e-4 * scale)
