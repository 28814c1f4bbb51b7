"""The rope of a file: speeds of pairs and factors of cos and sin, and the keys that are refused.

YaRN's formula is written down here a second time, pair by pair. Transformers computes the same in
the golden files of the cases `yarn` and `linear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine
from engine.formats.gguf import GGUFFile
from engine.models import load_model
from engine.models.attention import AttentionShape
from engine.ops.qk_norm_rope import rotate
from engine.ops.rope import RopeScaling
from tests.support.helpers import ROW_BY_ROW, Refused
from tools.synth import write_model

A = "qwen35."
FIRST_POSITIONS, FAR = np.arange(3), np.array([4095, 32768, 262143])
Shape = Callable[[dict[str, Any]], AttentionShape]
YARN = {"type": "yarn", "factor": 4.0}


def keys(scaling: dict[str, Any], prefix: str = A) -> dict[str, Any]:
    """Overrides of a file; names without a dot are of rope.scaling."""
    return {prefix + (k if "." in k else f"rope.scaling.{k}"): v for k, v in scaling.items()}


@pytest.fixture
def shape(tmp_path: Path) -> Shape:
    """Of the attention layer of a file with these keys."""

    def of(scaling: dict[str, Any]) -> AttentionShape:
        model: Any = load_model(GGUFFile(write_model(tmp_path / "m", "tiny", "F32",
                                                     overrides=keys(scaling))))  # fmt: skip
        return model.attention[3]

    return of


def turns(s: AttentionShape, positions: Any) -> Any:
    """What the op multiplies pairs with: complex [positions, pairs]."""
    x = np.zeros((len(positions), 1, s.d_head))
    x[..., : s.n_rot // 2] = 1
    y = rotate(x, positions, s.n_rot, s.rope_base, s.rope_scaling)[:, 0]
    return y[:, : s.n_rot // 2] + 1j * y[:, s.n_rot // 2 : s.n_rot]


def yarn_turn(
    i: int, position: int, n_rot: int, base: float, *, factor: float, n_orig: int,
    fast: float = 32, slow: float = 1, ext: float = 1, attn: float = 1,
) -> complex:  # fmt: skip
    theta = position * base ** (-2 * i / n_rot)
    ends = [
        n_rot * math.log(n_orig / (beta * 2 * math.pi)) / (2 * math.log(base))
        for beta in (fast, slow)
    ]
    low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), n_rot - 1)
    r = ext * (1 - min(max((i - low) / max(0.001, high - low), 0), 1))
    theta = theta / factor * (1 - r) + theta * r
    magnitude = attn * (1 + 0.1 * math.log(factor))
    return magnitude * complex(math.cos(theta), math.sin(theta))


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ({}, {"factor": 4, "n_orig": 4096}),
        ({"original_context_length": 512}, {"factor": 4, "n_orig": 512}),
        ({"factor": 2.5, "original_context_length": 262144}, {"factor": 2.5, "n_orig": 262144}),
        ({"rope.freq_base": 1e7, "attn_factor": 0.7}, {"factor": 4, "n_orig": 4096, "attn": 0.7}),
        ({"yarn_beta_fast": 8.0, "yarn_beta_slow": 0.5},
         {"factor": 4, "n_orig": 4096, "fast": 8, "slow": 0.5}),
        ({"yarn_ext_factor": 0.25}, {"factor": 4, "n_orig": 4096, "ext": 0.25}),
        # Ends that lie before the first pair, and after the last one.
        ({"original_context_length": 3}, {"factor": 4, "n_orig": 3}),
        ({"original_context_length": 2**40}, {"factor": 4, "n_orig": 2**40}),
        ({"rope.freq_base": 1.001}, {"factor": 4, "n_orig": 4096}),
        # The band turned round.
        ({"yarn_beta_fast": 0.5, "yarn_beta_slow": 64.0},
         {"factor": 4, "n_orig": 4096, "fast": 0.5, "slow": 64}),
        # What llama.cpp does not use.
        ({"yarn_attn_factor": 3.0, "finetuned": True, "yarn_log_multiplier": 0.0},
         {"factor": 4, "n_orig": 4096}),
        ({"factor": None, "rope.scale_linear": 8.0}, {"factor": 8, "n_orig": 4096}),
        ({"rope.scale_linear": 8.0}, {"factor": 4, "n_orig": 4096}),
    ],
    ids=str,
)  # fmt: skip
def test_yarn_is_its_formula(shape: Shape, file: dict[str, Any], wanted: dict[str, Any]) -> None:
    s, positions = shape(YARN | file), np.concatenate([FIRST_POSITIONS, FAR])
    # Files have float32.
    wanted = {k: v if k == "n_orig" else float(np.float32(v)) for k, v in wanted.items()}
    base = float(np.float32(file.get("rope.freq_base", 1e7)))
    expected = [
        [yarn_turn(i, p, s.n_rot, base, **wanted) for i in range(s.n_rot // 2)]
        for p in positions.tolist()
    ]
    assert np.allclose(turns(s, positions), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 3.0},
        {"factor": 3.0},
        {"rope.scale_linear": 3.0},
        {"type": "linear", "rope.scale_linear": 3.0},
        {"factor": 3.0, "rope.scale_linear": 5.0},
        # As in llama.cpp, YaRN without its extrapolation is linear scaling.
        {"type": "yarn", "factor": 3.0, "yarn_ext_factor": 0.0},
    ],
    ids=str,
)
def test_linear_scaling_divides_positions(shape: Shape, scaling: dict[str, Any]) -> None:
    plain, got = shape({}), turns(shape(scaling), 3 * FAR)
    assert np.allclose(got, turns(plain, FAR), rtol=0, atol=1e-9)
    scaled = turns(shape(scaling | {"attn_factor": 0.5}), 3 * FAR)
    assert np.allclose(scaled, got / 2, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "none", "factor": 4.0},
        {"type": "linear", "factor": 1.0},
        {"type": "yarn", "factor": 1.0, "original_context_length": 64},
        {"type": "yarn", "rope.scale_linear": 1.0},
        {"factor": 1.0},
        {"factor": 0.0},
        {"rope.scale_linear": 0.0},
        {"original_context_length": 64, "yarn_log_multiplier": 0.0, "finetuned": False},
    ],
    ids=str,
)
def test_what_changes_nothing(shape: Shape, scaling: dict[str, Any]) -> None:
    """Not a bit: the op gets the attributes that it gets without scaling."""
    assert shape(scaling).rope_scaling == RopeScaling()


def test_kimi_turns_nothing(tmp_path: Path) -> None:
    """So its file may say of rope what it will, as in llama.cpp."""
    logits: list[Any] = []
    for scaling in ({}, YARN | {"alpha": 1.0, "rope.freq_base": 0.5}):
        overrides = keys(scaling, "kimi-linear.")
        path = write_model(tmp_path / str(len(logits)), "tiny-kimi", "F32", overrides=overrides)
        with Engine.load(path, **ROW_BY_ROW) as engine:
            logits.append(engine.logits([1, 2, 3]))
    assert (logits[0] == logits[1]).all()


def test_a_base_of_one_turns_all_pairs_alike(shape: Shape) -> None:
    assert np.allclose(turns(shape({"rope.freq_base": 1.0}), np.array([2])), np.exp(2j))


@pytest.mark.parametrize(
    ("scaling", "line"),
    [
        ({"type": "longrope"}, "rope.scaling.type: expected none, linear or yarn, got 'longrope'"),
        ({"type": "YARN"}, "rope.scaling.type: expected none, linear or yarn, got 'YARN'"),
        ({"type": "yarn"}, "rope.scaling.factor is missing"),
        ({"type": "linear"}, "rope.scaling.factor is missing"),
        (YARN | {"factor": 0.0}, "rope.scaling.factor: expected at least 1, got 0.0"),
        ({"type": "linear", "factor": -2.0}, "rope.scaling.factor: expected at least 1, got -2.0"),
        ({"factor": 0.5}, "rope.scaling.factor: expected at least 1, got 0.5"),
        ({"rope.scale_linear": -1.0}, "rope.scale_linear: expected at least 1, got -1.0"),
        (YARN | {"factor": np.float32("nan")}, "rope.scaling.factor: expected a number, got nan"),
        (YARN | {"factor": "4"}, "rope.scaling.factor: expected a number, got '4'"),
        (YARN | {"alpha": 1000.0}, "rope.scaling.alpha: expected none (not implemented), got 1000"),
        ({"alpha": 1000.0}, "rope.scaling.alpha: expected none (not implemented), got 1000.0"),
        ({"type": "none", "mscale": 1.0}, "rope.scaling.mscale: expected none (not implemented)"),
        (YARN | {"yarn_log_multiplier": 0.125},
         "rope.scaling.yarn_log_multiplier: expected 0 (not implemented), got 0.125"),
        (YARN | {"original_context_length": 0},
         "rope.scaling.original_context_length: expected at least 1, got 0"),
        (YARN | {"attn_factor": 0.0}, "rope.scaling.attn_factor: expected a positive number"),
        (YARN | {"yarn_ext_factor": -1.0}, "rope.scaling.yarn_ext_factor: expected at least 0"),
        (YARN | {"yarn_ext_factor": 1.5}, "rope.scaling.yarn_ext_factor: expected at most 1"),
        (YARN | {"yarn_beta_fast": 0.0}, "rope.scaling.yarn_beta_fast: expected a positive number"),
        (YARN | {"yarn_beta_slow": np.inf}, "rope.scaling.yarn_beta_slow: expected a number"),
        ({"rope.freq_base": 0.5}, "rope.freq_base: expected at least 1, got 0.5"),
        (YARN | {"rope.freq_base": 1.0}, "rope.freq_base: expected more than 1 with yarn, got 1.0"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(refused: Refused, scaling: dict[str, Any], line: str) -> None:
    assert A + line in refused(keys(scaling))
