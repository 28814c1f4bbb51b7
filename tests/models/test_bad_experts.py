"""Files of the architectures with experts and latents that have a mistake: one clear line each.

What all architectures have in common is in tests/models/test_bad_models.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.helpers import Refused
from tests.support.presets import WITH_EXPERTS, WITH_LATENTS
from tools.presets import PRESETS

NAMES = {name: PRESETS[name].arch for name in WITH_EXPERTS}
BIG = np.uint64(2**62)
every_preset = pytest.mark.parametrize("preset", NAMES)
KIMI_INTEGERS = (
    "attention.kv_lora_rank",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "kda.head_dim",
    "expert_feed_forward_length",
    "expert_gating_func",
    "expert_shared_count",
)


@pytest.fixture
def refused_keys(refused: Refused) -> Refused:
    """refused_keys(preset, key=value, …) without the architecture's prefix, before and after."""

    def run(preset: str, keys: dict[str, Any]) -> str:
        prefix = f"{NAMES[preset]}."
        return refused({prefix + k: v for k, v in keys.items()}, None, preset).replace(prefix, "")

    return run


@every_preset
@pytest.mark.parametrize("key", ["expert_count", "expert_used_count"])
def test_missing_counts(refused_keys: Refused, preset: str, key: str) -> None:
    assert refused_keys(preset, {key: None}) == f"metadata {key} is missing"


@every_preset
@pytest.mark.parametrize("key", ["expert_count", "expert_used_count"])
@pytest.mark.parametrize("value", [0, -1])
def test_no_experts(refused_keys: Refused, preset: str, key: str, value: int) -> None:
    assert refused_keys(preset, {key: value}) == f"{key}: expected at least 1, got {value}"


@every_preset
@pytest.mark.parametrize("n_more", [1, 2**40])
def test_more_experts_used_than_there_are(refused_keys: Refused, preset: str, n_more: int) -> None:
    n, n_used = PRESETS[preset].n_experts, PRESETS[preset].n_experts + n_more
    line = refused_keys(preset, {"expert_used_count": n_used})
    assert line == f"expert_used_count: expected 1 to {n}, got {n_used}"


def test_more_experts_used_in_one_layer(refused_keys: Refused) -> None:
    counts = np.array([2, 2, 9, 2], np.int32)
    line = refused_keys("tiny-moe", {"expert_used_count": counts})
    assert line == "expert_used_count: expected 1 to 8, got 9"


@every_preset
@pytest.mark.parametrize("value", [7, 16, 2**31, BIG], ids=str)
def test_another_number_of_experts_than_the_tensors_have(
    refused_keys: Refused, preset: str, value: Any
) -> None:
    groups = dict.fromkeys(("expert_group_count", "expert_group_used_count"))
    line = refused_keys(preset, {"expert_count": value} | groups)
    shape = [PRESETS[preset].n_experts, PRESETS[preset].n_embd]
    layer = 1 if preset in WITH_LATENTS else 0
    assert "misshapen tensors: " in line
    assert f"blk.{layer}.ffn_gate_inp.weight (expected [{value}, {shape[1]}], got {shape})" in line


@every_preset
@pytest.mark.parametrize("key", ["expert_feed_forward_length", "expert_count"])
@pytest.mark.parametrize("value", ["two", 1.5, True, ["a", "b"]], ids=str)
def test_values_of_the_wrong_type(refused_keys: Refused, preset: str, key: str, value: Any) -> None:
    assert f"{key}: expected " in refused_keys(preset, {key: value})


@every_preset
def test_missing_tensors_of_experts(refused: Refused, preset: str) -> None:
    names = ("ffn_gate_inp", "ffn_up_exps", "ffn_down_exps", "ffn_gate_shexp")
    for name in names:
        arrays = {f"blk.2.{name}.weight": None}
        assert refused(None, arrays, preset) == f"1 missing tensor: blk.2.{name}.weight"


@every_preset
def test_experts_of_another_size(refused_keys: Refused, preset: str) -> None:
    n, width, n_embd = PRESETS[preset].n_experts, 48, PRESETS[preset].n_embd
    line = refused_keys(preset, {"expert_feed_forward_length": width})
    assert f"ffn_gate_exps.weight (expected [{n}, {width}, {n_embd}], got " in line


@every_preset
def test_gate_and_up_of_experts_both_joined_and_apart(refused: Refused, preset: str) -> None:
    p = PRESETS[preset]
    joined = {"blk.2.ffn_gate_up_exps.weight": np.ones((p.n_experts, 2 * p.n_ff_exp, p.n_embd))}
    assert refused(None, joined, preset) == (
        "2 unexpected tensors: blk.2.ffn_gate_exps.weight, blk.2.ffn_up_exps.weight"
    )


def test_experts_whose_sizes_follow_from_nothing(refused_keys: Refused) -> None:
    shared = "expert_shared_feed_forward_length"
    line = refused_keys("tiny-moe", {"expert_feed_forward_length": None})
    assert line == "expert_feed_forward_length: expected at least 1, got 0"
    assert refused_keys("tiny-moe", {shared: None}) == f"{shared}: expected at least 1, got 0"


def test_a_dense_file_that_says_it_has_experts(refused: Refused) -> None:
    sizes = {"expert_count": 8, "expert_used_count": 2, "expert_shared_feed_forward_length": 32}
    overrides = {f"qwen35moe.{key}": value for key, value in sizes.items()}
    line = refused(overrides, None, replace(PRESETS["tiny"], arch="qwen35moe"))
    assert "missing tensors: blk.0.ffn_gate_inp.weight, " in line
    assert "unexpected tensors: blk.0.ffn_gate.weight, " in line


def test_tensors_of_a_relative(refused: Refused) -> None:
    """qwen3next keeps beta and alpha in one tensor, its relatives in two."""
    line = refused(None, None, replace(PRESETS["tiny-moe"], arch="qwen3next"))
    assert "missing tensors: blk.0.ssm_ba.weight, " in line
    assert "unexpected tensors: blk.0.ssm_beta.weight, blk.0.ssm_alpha.weight, " in line


def test_inputs_of_a_linear_layer_both_joined_and_apart(refused: Refused) -> None:
    arrays = {"blk.1.ssm_in.weight": np.ones((768, 256))}
    line = refused(None, arrays, "tiny-next")
    assert line == "2 unexpected tensors: blk.1.attn_qkv.weight, blk.1.attn_gate.weight"


# kimi-linear.


@pytest.mark.parametrize("key", KIMI_INTEGERS)
def test_missing_keys(refused_keys: Refused, key: str) -> None:
    assert refused_keys("tiny-kimi", {key: None}) == f"metadata {key} is missing"


@pytest.mark.parametrize("key", [k for k in KIMI_INTEGERS if k != "expert_gating_func"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 2**40, BIG], ids=str)
def test_absurd_sizes(refused_keys: Refused, key: str, value: Any) -> None:
    line = refused_keys("tiny-kimi", {key: value})
    assert "expected " in line
    assert ", got " in line
    assert len(line) < 1500


@pytest.mark.parametrize("value", [0, 3, 4, BIG], ids=str)
def test_an_unknown_gating(refused_keys: Refused, value: Any) -> None:
    line = refused_keys("tiny-kimi", {"expert_gating_func": value})
    assert line == f"expert_gating_func: expected 1 (softmax) or 2 (sigmoid), got {value}"


@pytest.mark.parametrize("value", [[0, 0, 1, 0], [0, 0, 1, 0, 1, 0], []], ids=str)
def test_kinds_of_fewer_or_more_layers(refused_keys: Refused, value: list[int]) -> None:
    kinds = np.array(value, np.int32)
    line = refused_keys("tiny-kimi", {"attention.head_count_kv": kinds})
    assert (
        line == f"attention.head_count_kv: expected 5 integers, got an array of {len(value)} int32"
    )


def test_kinds_of_layers_that_are_no_counts(refused_keys: Refused) -> None:
    for kinds in (np.array([0, 0, 1, 0, -1], np.int32), np.array([0, 0, 1, 0, 1], np.float32)):
        line = refused_keys("tiny-kimi", {"attention.head_count_kv": kinds})
        assert line.startswith("attention.head_count_kv: expected ")


def test_another_kind_of_layer_than_the_tensors_are(refused_keys: Refused) -> None:
    kinds = np.array([0, 1, 1, 0, 1], np.int32)
    line = refused_keys("tiny-kimi", {"attention.head_count_kv": kinds})
    assert "missing tensors: blk.1.attn_kv_a_mqa.weight, " in line
    assert "unexpected tensors: blk.1.attn_k.weight, blk.1.attn_v.weight, " in line


@pytest.mark.parametrize("value", [1, 16])
def test_keys_with_nothing_but_their_shared_part(refused_keys: Refused, value: int) -> None:
    line = refused_keys("tiny-kimi", {"attention.key_length_mla": value})
    assert line == f"attention.key_length_mla: expected more than 16, got {value}"


def test_queries_of_low_rank(refused_keys: Refused) -> None:
    line = refused_keys("tiny-kimi", {"attention.q_lora_rank": 32})
    assert line == "attention.q_lora_rank: expected none (not implemented), got 32"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"expert_group_count": 3}, "expert_group_count: expected a divisor of 8, got 3"),
        ({"expert_group_count": BIG}, f"expert_group_count: expected a divisor of 8, got {BIG}"),
        ({"expert_group_count": 0}, "expert_group_count: expected at least 1, got 0"),
        ({"expert_group_count": 8}, "expert_group_count: expected at most 4, got 8"),
        (
            {"expert_group_count": 4, "expert_group_used_count": 5},
            "expert_group_used_count: expected 1 to 4, got 5",
        ),
        (
            {"expert_group_count": 4, "expert_group_used_count": 0},
            "expert_group_used_count: expected at least 1, got 0",
        ),
        (
            {"expert_group_count": 4, "expert_group_used_count": 1, "expert_used_count": 3},
            "expert_used_count: expected at most the 2 of the used groups, got 3",
        ),
    ],
    ids=str,
)
def test_groups_that_do_not_fit(refused_keys: Refused, keys: dict[str, Any], expected: str) -> None:
    assert refused_keys("tiny-kimi", keys) == expected


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, "much"])
def test_a_scale_that_is_none(refused_keys: Refused, value: Any) -> None:
    line = refused_keys("tiny-kimi", {"expert_weights_scale": value})
    assert "expert_weights_scale: expected a " in line


def test_other_numbers_of_dense_layers(refused_keys: Refused) -> None:
    line = refused_keys("tiny-kimi", {"leading_dense_block_count": 2})
    assert "missing tensors: blk.1.ffn_gate.weight, " in line
    line = refused_keys("tiny-kimi", {"leading_dense_block_count": 0})
    assert "missing tensors: blk.0.ffn_gate_inp.weight, " in line
    line = refused_keys("tiny-kimi", {"leading_dense_block_count": BIG})
    assert "missing tensors: blk.1.ffn_gate.weight, " in line
    line = refused_keys("tiny-kimi", {"feed_forward_length": None})
    assert line == "metadata feed_forward_length is missing"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.1.exp_probs_b.bias", (8,)),
        ("blk.2.attn_k_b.weight", (4, 128, 96)),
        ("blk.2.attn_kv_a_norm.weight", (128,)),
        ("blk.1.ssm_conv1d_k.weight", (1, 128, 1, 4)),
        ("blk.1.ssm_f_b.weight", (128, 32)),
        ("output.weight", (320, 64)),
    ],
)
def test_missing_and_misshapen_tensors(refused: Refused, name: str, shape: tuple[int, ...]) -> None:
    assert refused(None, {name: None}, "tiny-kimi") == f"1 missing tensor: {name}"
    wrong = np.ones((*shape[:-1], shape[-1] * 2))
    line = refused(None, {name: wrong}, "tiny-kimi")
    assert line.startswith(f"1 misshapen tensor: {name} (expected [")
    assert line.endswith(f"got {list(wrong.shape)})")


def test_both_forms_of_a_latents_keys_and_values(refused: Refused) -> None:
    arrays = {"blk.2.attn_kv_b.weight": np.ones((4 * (96 + 160), 128))}
    line = refused(None, arrays, "tiny-kimi")
    assert line == "2 unexpected tensors: blk.2.attn_k_b.weight, blk.2.attn_v_b.weight"
