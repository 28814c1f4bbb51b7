"""Model files with a mistake in them: whoever opens one gets one line that says what is wrong.

Every file goes through the completion and the graph command. Counts and sizes may be absurd: the
answer must come at once, before anything of that size is made. Experts and latents have
tests/models/test_bad_experts.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine
from engine.formats.gguf import GGUFFile
from engine.models import ModelError
from tests.support.helpers import Cli, Refused
from tools.ggufwrite import TensorSpec, write_gguf
from tools.presets import PRESETS
from tools.synth import write_model

A = "qwen35."
BIG = np.uint64(2**62)


REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "ssm.conv_kernel",
    "ssm.state_size",
    "ssm.group_count",
    "ssm.time_step_rank",
    "ssm.inner_size",
)
INTEGERS = (*REQUIRED, "rope.dimension_count", "attention.key_length", "attention.value_length")
NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
SIZES = [key for key in INTEGERS if key not in (*NUMBERS, "context_length")]
OF_NO_TYPE = ("four\nlines", 1.5, True, ["a", "b"], np.array([1.5, 2]))


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_keys(refused: Refused, key: str) -> None:
    assert refused({A + key: None}) == f"metadata {A}{key} is missing"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in (*INTEGERS, "full_attention_interval", "nextn_predict_layers")
        for value in OF_NO_TYPE
        if key not in NUMBERS or not isinstance(value, float)
    ],
)
def test_values_of_the_wrong_type(refused: Refused, key: str, value: Any) -> None:
    overrides = {A + "attention.recurrent_layers": None, A + key: value}
    assert f"{A}{key}: expected " in refused(overrides)


@pytest.mark.parametrize("key", [*INTEGERS, "full_attention_interval"])
@pytest.mark.parametrize("value", [0, -1, -(2**62)])
def test_values_that_are_too_small(refused: Refused, key: str, value: int) -> None:
    overrides = {A + "attention.recurrent_layers": None, A + key: value}
    line = refused(overrides)
    assert line.startswith((f"{A}{key}: expected at least ", f"{A}{key}: expected a positive"))
    assert line.endswith(f"got {value}") or key in NUMBERS


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [2**31, 2**40, BIG, np.uint64(2**64 - 1)])
def test_absurd_sizes(refused: Refused, key: str, value: int) -> None:
    """Shown as it is, or as the shape that a tensor would have."""
    assert re.search(r"expected .*, got ", refused({A + key: value}))


@pytest.mark.parametrize("n_mtp", [4, 2**31, BIG])
def test_more_prediction_layers_than_layers(refused: Refused, n_mtp: int) -> None:
    line = refused({A + "nextn_predict_layers": n_mtp})
    assert line == f"{A}block_count: expected at least {int(n_mtp) + 1}, got 4"


def test_more_layers_than_tensors(refused: Refused) -> None:
    line = refused({A + "block_count": 56, A + "attention.recurrent_layers": None})
    assert line == f"{A}block_count: expected at most 55, the number of tensors, got 56"


def test_both_counts_of_layers_absurd(refused: Refused) -> None:
    both = {A + "nextn_predict_layers": BIG, A + "block_count": BIG + np.uint64(4)}
    assert f"{A}block_count: expected at most 55, " in refused(both)


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1.0])
def test_numbers_that_are_none(refused: Refused, key: str, value: float) -> None:
    assert f"{A}{key}: expected a" in refused({A + key: value})


@pytest.mark.parametrize(
    "key", ["feed_forward_length", "attention.head_count", "attention.head_count_kv"]
)
@pytest.mark.parametrize(
    "values",
    [[2, 2, 2], [2, 2, 2, 2, 2], [], [2, 2, 2, 0], [2, -2, 2, 2], [0, 0, 0, 0], [2.0] * 4],
    ids=str,
)
def test_arrays_of_one_value_per_layer(refused: Refused, key: str, values: list[Any]) -> None:
    kind = np.int32 if values and isinstance(values[0], int) else np.float32
    assert f"{A}{key}: expected " in refused({A + key: np.array(values, kind)})


@pytest.mark.parametrize(
    "value", [np.ones(3, bool), np.ones(0, bool), np.full(4, np.nan), ["a"] * 4, "yes", 1, 0.5]
)
def test_recurrent_layers(refused: Refused, value: Any) -> None:
    assert f"{A}attention.recurrent_layers: expected " in refused(
        {A + "attention.recurrent_layers": value}
    )


@pytest.mark.parametrize(
    "value",
    [None, 4, "abcd", ["a"] * 4, np.ones(2, np.int32), np.ones(5, np.int32), np.ones(4, float)],
    ids=str,
)
def test_rope_sections(refused: Refused, value: Any) -> None:
    assert f"{A}rope.dimension_sections: expected 4 integers, got " in refused(
        {A + "rope.dimension_sections": value}
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"rope.scaling.type": "linear\n", "rope.scaling.factor": 4.0}, "rope.scaling.type: exp"),
        ({"rope.scaling.type": "x" * 10_000}, "rope.scaling.type: expected none"),
        ({"rope.scaling.type": 1}, "rope.scaling.type: expected a string"),
        ({"rope.scaling.type": ["yarn", "linear"]}, "rope.scaling.type: expected a string"),
        ({"rope.scaling.type": np.arange(2000)}, "rope.scaling.type: expected a string"),
        ({"rope.dimension_count": 34}, "rope.dimension_count: expected an even number up to 32"),
        ({"rope.dimension_count": 15}, "rope.dimension_count: expected an even number up to 32"),
        ({"attention.value_length": 16}, "attention.value_length: expected attention.key_length"),
        ({"attention.head_count_kv": 3}, "attention.head_count_kv: expected a divisor of 4, got 3"),
        ({"attention.head_count_kv": 8}, "attention.head_count_kv: expected a divisor of 4, got 8"),
        ({"ssm.group_count": 3}, "ssm.group_count: expected a divisor of 4, got 3"),
        ({"ssm.time_step_rank": 12}, "ssm.time_step_rank: expected a divisor of 64, got 12"),
        ({"ssm.conv_kernel": 1}, "ssm.conv_kernel: expected at least 2, got 1"),
    ],
    ids=str,
)
def test_values_that_do_not_fit(refused: Refused, overrides: dict[str, Any], words: str) -> None:
    line = refused({A + key: value for key, value in overrides.items()})
    assert A + words in line
    assert len(line) < 300


@pytest.mark.parametrize("arch", ["llama", "qwen36", "", "QWEN35", "two\nlines\x1b[31m"])
def test_unknown_architectures(refused: Refused, arch: str) -> None:
    line = refused({"general.architecture": arch})
    known = "qwen35, qwen35moe, qwen3next, kimi-linear, bailingmoe3"
    assert line == f"unknown architecture {arch!r}; known are {known}"


@pytest.mark.parametrize("arch", [None, 35, ["qwen35"]])
def test_an_architecture_that_is_no_text(refused: Refused, arch: Any) -> None:
    assert "metadata general.architecture" in refused({"general.architecture": arch})


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix", 5])
def test_files_that_are_no_models(refused: Refused, kind: Any) -> None:
    """Before anything is said about their tensors or tokenizers."""
    changes = {"general.type": kind, "tokenizer.ggml.model": None, "general.architecture": "clip"}
    assert refused(changes) == f"expected a model, got general.type {kind!r}"


def test_parts_of_models(tmp_path: Path, tiny: Path) -> None:
    file = GGUFFile(tiny)
    write_gguf(tmp_path / "vocabulary", file.metadata, [])
    drafts = [TensorSpec("blk.4.nextn.eh_proj.weight", (1, 4), 0, 16, lambda: [bytes(16)])]
    write_gguf(tmp_path / "drafts", file.metadata, drafts)
    for name, what in (("vocabulary", "a vocabulary without tensors"),
                       ("drafts", "layers for multi-token prediction")):  # fmt: skip
        with pytest.raises(ModelError, match=f"expected a model, got {what}"):
            Engine.load(tmp_path / name)


FOUR = np.ones(4)
WRONG_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"blk.2.ssm_a": None}, "1 missing tensor: blk.2.ssm_a"),
    "missing embedding": ({"token_embd.weight": None}, "1 missing tensor: token_embd.weight"),
    "misshapen": (
        {"blk.1.attn_norm.weight": FOUR},
        "1 misshapen tensor: blk.1.attn_norm.weight (expected [64], got [4])",
    ),
    "turned": (
        {"blk.1.ffn_down.weight": np.ones((192, 64))},
        "1 misshapen tensor: blk.1.ffn_down.weight (expected [64, 192], got [192, 64])",
    ),
    "one dimension more": (
        {"blk.0.ssm_a": np.ones((2, 2))},
        "1 misshapen tensor: blk.0.ssm_a (expected [4], got [2, 2])",
    ),
    "a misshapen head": (
        {"output.weight": np.ones((319, 64))},
        "1 misshapen tensor: output.weight (expected [320, 64], got [319, 64])",
    ),
    "a bias": ({"blk.3.attn_q.bias": FOUR}, "1 unexpected tensor: blk.3.attn_q.bias"),
    "a scale": (
        {"blk.0.ffn_up.scale": FOUR},
        "1 unknown tensor: blk.0.ffn_up.scale (expected F32 [1] beside NVFP4, got F32 [4] "
        "beside Q8_0)",
    ),
    "rope factors": ({"rope_freqs.weight": FOUR}, "1 unexpected tensor: rope_freqs.weight"),
    "a layer too many": (
        {"blk.4.attn_norm.weight": np.ones(64)},
        "1 unexpected tensor: blk.4.attn_norm.weight",
    ),
    "fused and apart": (
        {"blk.3.attn_qkv.weight": np.ones((384, 64))},
        "3 unexpected tensors: blk.3.attn_q.weight, blk.3.attn_k.weight, blk.3.attn_v.weight",
    ),
    "everything at once": (
        {
            "blk.2.ssm_a": None,
            "output_norm.weight": None,
            "blk.3.attn_norm.weight": FOUR,
            "blk.1.ssm_dt.bias": np.ones(2),
            "blk.3.attn_output.bias": FOUR,
            "w.patch_embd.weight": FOUR,
        },
        "2 missing tensors: output_norm.weight, blk.2.ssm_a; 2 misshapen tensors: "
        "blk.1.ssm_dt.bias (expected [4], got [2]), blk.3.attn_norm.weight (expected [64], "
        "got [4]); 2 unexpected tensors: blk.3.attn_output.bias, w.patch_embd.weight",
    ),
    "many": (
        {f"blk.0.extra_{i}": FOUR for i in range(10)},
        "10 unexpected tensors: blk.0.extra_0, blk.0.extra_1, blk.0.extra_2, blk.0.extra_3, "
        "blk.0.extra_4, blk.0.extra_5 and 4 more",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors(refused: Refused, name: str) -> None:
    arrays, line = WRONG_TENSORS[name]
    assert refused(None, arrays) == line


def test_fewer_layers_than_the_file_has(refused: Refused) -> None:
    """A wrong count must not give a smaller model without a word."""
    overrides = {A + "block_count": 3, A + "attention.recurrent_layers": np.ones(3, bool)}
    line = refused(overrides)
    assert line.startswith("11 unexpected tensors: blk.3.attn_norm.weight, blk.3.attn_q.weight")


def test_prediction_layers_only(refused: Refused) -> None:
    overrides: dict[str, Any] = {A + "block_count": 2, A + "nextn_predict_layers": 1}
    overrides[A + "attention.recurrent_layers"] = np.zeros(2, bool)
    tiny: Any = PRESETS["tiny"]
    preset = replace(tiny, n_layers=1, full_attention_interval=1)
    names = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm",
             "attn_output", "post_attention_norm", "ffn_gate", "ffn_up", "ffn_down")  # fmt: skip
    arrays: dict[str, Any] = {f"blk.0.{name}.weight": None for name in names}
    arrays |= {f"blk.1.extra_{i}": FOUR for i in range(3)}
    line = refused(overrides, arrays, preset)
    assert line.startswith("11 missing tensors: blk.0.attn_q.weight, ")


@pytest.mark.parametrize("n_more", [-1, 1])
def test_a_vocabulary_of_another_size(refused: Refused, n_more: int) -> None:
    arrays = {"token_embd.weight": np.ones((320 + n_more, 64))}
    assert refused(None, arrays) == (
        f"1 misshapen tensor: token_embd.weight (expected [320, 64], got [{320 + n_more}, 64])"
    )


@pytest.mark.parametrize("value", [None, 5, "text", np.arange(320)])
def test_no_vocabulary(tmp_path: Path, cli: Cli, value: Any) -> None:
    """The commands read it at different places, each in its own words."""
    path = tmp_path / "m.gguf"
    write_model(path, "tiny", "Q8_0", overrides={"tokenizer.ggml.tokens": value})
    for command in (["-p", "a"], ["graph"], ["tokenize", "-p", "a"]):
        assert "tokenizer.ggml.tokens" in cli(*command, "-m", path).refused()
