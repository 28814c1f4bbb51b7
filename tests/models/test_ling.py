"""Ling 3.0: its own keys and tensors, clamps, and what its files may not have.

What it computes without clamps is compared with transformers in tests/models/test_golden.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine
from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library
from engine.formats.gguf import GGUFFile
from engine.models import load_model
from tests.parity import bailingmoe3
from tests.parity.bailingmoe3 import Case
from tests.parity.common import (
    MAX_ERROR,
    MIN_CHOICE_MARGIN,
    Golden,
    case_id,
    random_ids,
    random_weights,
    relative_error,
    write_case,
)
from tests.parity.compare import load_engine, logits_problem, tokens_problem
from tests.support.cuda_devices import engine_on
from tests.support.helpers import STD, Refused
from tests.support.numpy_ling import NumpyLing
from tools.presets import PRESETS, tensors
from tools.synth import write_model

A = "bailingmoe3."
TINY: Any = PRESETS["tiny-ling"]
IDS = list(range(40))
BY_NAME = {case.name: case for case in bailingmoe3.CASES}
CLAMPED = BY_NAME["clamps"]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(preset, overrides, arrays): a file of a preset in F32, with A before the keys."""
    names = iter(range(100))

    def run(
        preset: Any = TINY, overrides: dict[str, Any] | None = None, arrays: Any = None
    ) -> Path:
        keys = {A + key: value for key, value in (overrides or {}).items()}
        path = tmp_path / f"{next(names)}.gguf"
        return write_model(path, preset, std=STD, overrides=keys, arrays=arrays)

    return run


def logits(path: Path) -> np.ndarray[Any, Any]:
    with Engine.load(path, backend="reference", n_ctx=64) as engine:
        return engine.logits(IDS)


# The oracle of clamps, and the engine against it.


@pytest.mark.parametrize(
    "case", [c for c in bailingmoe3.CASES if c.yarn_factor == 1 and not c.clamps], ids=case_id
)
def test_the_oracle_agrees_with_transformers(case: Case) -> None:
    golden = Golden.load(case)
    model = NumpyLing(case, random_weights(case, golden.seed))
    assert relative_error(model.logits(golden.ids), golden.logits) < MAX_ERROR / 3


@pytest.mark.parametrize("isa", cpu_library.usable())
@pytest.mark.parametrize("case", bailingmoe3.CASES, ids=case_id)
def test_the_cpu_agrees_with_the_golden_files(case: Case, isa: str, tmp_path: Path) -> None:
    """Whose decays come near to their bound; matrix units, which round to bfloat16, are off."""
    golden, path = Golden.load(case), tmp_path / "m.gguf"
    write_case(path, case, random_weights(case, golden.seed))
    with engine_on(path, [CpuBackend(2, isa, matrix=False)], type_k="f32", type_v="f32") as engine:
        assert {b.name for b in engine.plan.backends} == {"cpu"}
        assert not (problem := logits_problem(engine, golden)), problem
        assert not (problem := tokens_problem(engine, golden)), problem


def clear_weights(case: Case) -> Iterator[Any]:
    """(seed, ids, model) of fresh weights whose choices of experts are clear."""
    for seed in np.random.SeedSequence().generate_state(64).tolist():
        ids, _ = random_ids(case, seed)
        model = NumpyLing(case, random_weights(case, seed))
        if model.choice_margin(ids[:65]) >= MIN_CHOICE_MARGIN:
            yield seed, ids[:65], model


def test_clamps_of_fresh_weights(tmp_path: Path) -> None:
    seed, ids, model = next(clear_weights(CLAMPED))
    want, weights = model.logits(ids), random_weights(CLAMPED, seed)
    with load_engine(tmp_path / "m.gguf", CLAMPED, weights) as engine:
        assert relative_error(engine.logits(ids), want) < MAX_ERROR, seed


def test_each_clamp_shows_in_the_logits() -> None:
    """Otherwise nothing would be compared above: of each layer, of routed experts and shared."""
    seed, ids, model = next(clear_weights(CLAMPED))
    want, weights = model.logits(ids), random_weights(CLAMPED, seed)
    for layer, limits in enumerate(CLAMPED.clamps):
        for part, limit in enumerate(limits):
            if not limit:
                continue
            without = list(CLAMPED.clamps)
            without[layer] = (0, limits[1]) if part == 0 else (limits[0], 0)
            case = replace(CLAMPED, clamps=tuple(without))
            other = NumpyLing(case, weights).logits(ids)
            assert relative_error(other, want) > 10 * MAX_ERROR, (seed, layer, part)


def test_a_clamp_of_all_layers_may_be_one_number(write: Write) -> None:
    one = write(overrides={"swiglu_clamp_exp": 0.05, "swiglu_clamp_shexp": None})
    each = np.full(5, 0.05, np.float32)
    same = write(overrides={"swiglu_clamp_exp": each, "swiglu_clamp_shexp": None})
    none = write(overrides={"swiglu_clamp_exp": 0.0, "swiglu_clamp_shexp": None})
    assert np.array_equal(logits(one), logits(same))
    assert not np.allclose(logits(one), logits(none), rtol=1e-3)


# Keys that may be missing, and what the formulas are then.


def test_a_model_without_keys_that_may_be_missing(write: Write) -> None:
    """As with their defaults: no group, weights as they are, no clamp, a base of 10,000."""
    defaults: dict[str, Any] = {
        "expert_group_count": np.uint32(0),
        "expert_group_used_count": np.uint32(0),
        "expert_weights_norm": False,
        "rope.freq_base": 10000.0,
        "kda.safe_gate": True,
        "swiglu_clamp_exp": 0.0,
        "swiglu_clamp_shexp": 0.0,
        "expert_shared_feed_forward_length": np.uint32(96),
    }
    bare = logits(write(overrides=dict.fromkeys(defaults)))
    assert np.array_equal(bare, logits(write(overrides=defaults)))
    for key in ("expert_weights_norm", "rope.freq_base", "expert_group_count"):
        value = {"expert_weights_norm": True, "rope.freq_base": 500.0}.get(key, np.uint32(4))
        changed = {"expert_group_used_count": np.uint32(1)} if "group" in key else {}
        other = logits(write(overrides=defaults | {key: value} | changed))
        assert not np.allclose(bare, other, rtol=1e-3), key


def test_an_untied_and_a_tied_head(write: Write) -> None:
    """A file without output.weight has its embedding as head."""
    table = np.random.default_rng(0).normal(size=(320, 64)) * STD
    tied = write(arrays={"output.weight": None, "token_embd.weight": table})
    same = write(arrays={"output.weight": table, "token_embd.weight": table})
    assert np.array_equal(logits(tied), logits(same))


def test_layers_for_multi_token_prediction_are_skipped(write: Write) -> None:
    rng, shapes = np.random.default_rng(0), tensors(replace(TINY, n_vocab=320))
    drafts = {k.replace("blk.4.", "blk.5."): s for k, s in shapes.items() if "blk.4." in k}
    drafts |= {f"blk.5.nextn.{name}.weight": (64,) for name in ("enorm", "hnorm")}
    drafts |= {"blk.5.nextn.eh_proj.weight": (64, 128), "blk.5.layer_output_norm.weight": (64,)}
    arrays = {name: rng.normal(size=shape) for name, shape in drafts.items()}
    overrides: dict[str, Any] = {
        "block_count": 6,
        "nextn_predict_layers": 1,
        "attention.head_count_kv": np.array([0, 0, 1, 0, 1, 1], np.int32),
    }
    for key, limits in zip(
        ("swiglu_clamp_exp", "swiglu_clamp_shexp"),
        (TINY.clamps_exp, TINY.clamps_shexp),
        strict=True,
    ):
        overrides[key] = np.array([*limits, 0.01], np.float32)
    assert np.array_equal(logits(write(overrides=overrides, arrays=arrays)), logits(write()))


# What is refused, and what is warned of.


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("kda.gate_lower_bound", None, "metadata kda.gate_lower_bound is missing"),
        ("kda.gate_lower_bound", 0.0, "kda.gate_lower_bound: expected a negative number, got 0.0"),
        ("kda.gate_lower_bound", 5.0, "kda.gate_lower_bound: expected a negative number, got 5.0"),
        (
            "kda.safe_gate",
            False,
            "kda.safe_gate: expected true (false is not implemented), got false",
        ),
        (
            "rope.dimension_sections",
            np.array([8, 4, 4, 0], np.int32),
            "rope.dimension_sections: expected none (vision-language models are not implemented), "
            "got an array of 4 int32",
        ),
        (
            "swiglu_clamp_exp",
            np.zeros(4, np.float32),
            "swiglu_clamp_exp: expected 5 numbers, got an array of 4 float32",
        ),
        (
            "swiglu_clamp_shexp",
            np.array([0, 1, -1, 0, 0], np.float32),
            "swiglu_clamp_shexp: expected finite numbers of at least 0, got an array of 5 float32",
        ),
        ("swiglu_clamp_exp", -1.0, "swiglu_clamp_exp: expected at least 0, got -1.0"),
        ("rope.dimension_count", 15, "rope.dimension_count: expected an even number, got 15"),
        ("expert_group_used_count", 0, "expert_group_used_count: expected 1 to 4, got 0"),
        ("expert_group_count", 3, "expert_group_count: expected a divisor of 8, got 3"),
        ("rope.scaling.alpha", 2.0, "rope.scaling.alpha: expected none (not implemented), got 2.0"),
    ],
)
def test_keys_that_are_refused(refused: Refused, key: str, value: Any, expected: str) -> None:
    assert refused({A + key: value}, None, "tiny-ling").replace(A, "") == expected


@pytest.mark.parametrize("name", ["ssm_f", "ssm_g"])
def test_files_of_an_older_fork_are_refused_by_name(refused: Refused, name: str) -> None:
    arrays = {f"blk.1.{name}.weight": np.ones((128, 64)), f"blk.1.{name}_a.weight": None}
    line = refused(None, arrays, "tiny-ling")
    got = f"got blk.1.{name}.weight"
    assert line == f"expected ssm_f_a and ssm_g_a (this file is an older fork's), {got}"


@pytest.mark.parametrize("name", ["attn_q_a", "attn_q_a_norm", "attn_q_b", "attn_gate"])
def test_missing_tensors_of_latent_attention(refused: Refused, name: str) -> None:
    line = refused(None, {f"blk.2.{name}.weight": None}, "tiny-ling")
    assert line == f"1 missing tensor: blk.2.{name}.weight"


def test_a_file_of_flash_without_clamps_warns(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    preset = replace(TINY, n_layers=42, clamps_exp=(), clamps_shexp=())
    for overrides, n in (({}, 1), ({"swiglu_clamp_exp": 0.0}, 0)):
        caplog.clear()
        load_model(GGUFFile(write(preset, overrides)))
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == n, lines
    load_model(GGUFFile(write(replace(preset, n_layers=41))))
    assert not caplog.records
