"""What a qwen35 file may say about its layers, and how little of it changes the logits.

Variants that mean the same must give the same logits, variants that don't must differ. What is
refused is in test_bad_models.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import Engine
from engine.formats.gguf import GGUFFile
from engine.formats.quants import dequantize
from tests.support.helpers import ROW_BY_ROW, STD, random_ids
from tools.presets import PRESETS, Preset, tensors
from tools.synth import write_model

A = "qwen35."
TINY: Any = PRESETS["tiny"]
LINEAR = np.array([True, True, True, False])
Arrays = dict[str, NDArray[Any] | None]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """load(preset, overrides, arrays): an engine on a file written that way."""
    stack, numbers = ExitStack(), count()

    def written(preset: Preset | str = TINY, **options: Any) -> Engine:
        # Each its own file: an engine reads its weights when it first needs them.
        path = tmp_path / f"{next(numbers)}.gguf"
        path = write_model(path, preset, "F32", std=STD, **options)
        return stack.enter_context(Engine.load(path, n_ctx=256, **ROW_BY_ROW))

    with stack:
        yield written


@pytest.fixture
def ids(rng: np.random.Generator) -> list[int]:
    return random_ids(rng, 80)


@pytest.fixture
def expected(load: Callable[..., Engine], ids: list[int]) -> NDArray[np.float32]:
    return load().logits(ids)


def kinds(engine: Engine) -> str:
    """One letter per layer: d or a."""
    return "".join(kind[0] for kind in engine.plan.graph.layer_kinds.values())


def weights(path: Path, *names: str) -> list[NDArray[np.float32]]:
    file = GGUFFile(path)
    infos = [file.tensors[name] for name in names]
    return [dequantize(t.dtype, file.raw(t.name), t.shape).copy() for t in infos]


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention.recurrent_layers": None},
        {"attention.recurrent_layers": None, "full_attention_interval": None},
        # The array wins: converters write an interval of 4 beside it whatever it is.
        {"full_attention_interval": 2},
        {"attention.recurrent_layers": LINEAR.astype(np.int32)},
        {"feed_forward_length": np.full(4, 192, np.uint32)},
        {"attention.head_count": np.full(4, 4, np.int32)},
        {"attention.head_count_kv": np.full(4, 2, np.int32)},
        {"attention.value_length": None},
        {"nextn_predict_layers": 0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0},
        {"rope.dimension_sections": np.array([3, 3, 2, 0], np.int32)},
        {"rope.dimension_sections": np.array([11, 11, 10, 0], np.uint64)},
        {"block_count": np.int64(4), "embedding_length": np.uint8(64)},
        {"context_length": 128},
    ],
    ids=lambda overrides: ",".join(overrides),
)
def test_other_ways_to_say_the_same(
    load: Callable[..., Engine],
    ids: list[int],
    expected: NDArray[np.float32],
    overrides: dict[str, Any],
) -> None:
    engine = load(overrides={A + key: value for key, value in overrides.items()})
    assert kinds(engine) == "ddda"
    assert (engine.logits(ids) == expected).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.factor", 4.0),
        ("rope.freq_base", 1e4),
        ("rope.dimension_count", 32),
        ("attention.layer_norm_rms_epsilon", 1e-2),
    ],
)
def test_what_changes_the_logits(
    load: Callable[..., Engine],
    ids: list[int],
    expected: NDArray[np.float32],
    key: str,
    value: float,
) -> None:
    assert np.abs(load(overrides={A + key: value}).logits(ids) - expected).max() > 1e-3


@pytest.mark.parametrize(("key", "default"), [("freq_base", 1e4), ("dimension_count", 32)])
def test_defaults_of_rope(
    load: Callable[..., Engine], ids: list[int], key: str, default: float
) -> None:
    given, missing = (load(overrides={f"{A}rope.{key}": value}) for value in (default, None))
    assert (given.logits(ids) == missing.logits(ids)).all()


def test_the_head_size_defaults_to_the_width_by_heads(load: Callable[..., Engine]) -> None:
    preset = replace(TINY, head_dim=16)
    lengths = dict.fromkeys((A + "attention.key_length", A + "attention.value_length"))
    given, missing = (load(preset, overrides=overrides) for overrides in ({}, lengths))
    model: Any = given.model
    assert model.attention[3].d_head == 16
    assert (given.logits([1, 2]) == missing.logits([1, 2])).all()


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("said", ["by the interval", "by an array"])
def test_attention_every_so_often(load: Callable[..., Engine], interval: int, said: str) -> None:
    preset = replace(TINY, full_attention_interval=interval)
    drop, lie = {A + "attention.recurrent_layers": None}, {A + "full_attention_interval": 4}
    engine = load(preset, overrides=drop if said == "by the interval" else lie)
    assert kinds(engine) == {1: "aaaa", 2: "dada", 3: "ddad"}[interval]
    assert np.isfinite(engine.logits([1, 2, 3])).all()


@pytest.mark.parametrize(("linear", "layers"), [(True, "dddd"), (False, "aaaa")])
def test_one_scalar_for_all_layers(load: Callable[..., Engine], linear: bool, layers: str) -> None:
    preset = replace(TINY, full_attention_interval=100 if linear else 1)
    engine = load(preset, overrides={A + "attention.recurrent_layers": linear})
    assert kinds(engine) == layers
    logits = engine.logits(list(range(70)))
    seq = engine.memory.create()
    engine.prefill(seq, list(range(50)))
    assert np.allclose(engine.prefill(seq, list(range(50, 70)))[-1], logits[-1], atol=1e-3)


def mtp_layer(p: Preset, rng: np.random.Generator) -> Arrays:
    """Layer 4: an attention block like layer 3, and what joins it to the trunk."""
    shapes = {k.replace("blk.3.", "blk.4."): s for k, s in tensors(p).items() if "blk.3." in k}
    shapes |= {
        "blk.4.nextn.eh_proj.weight": (p.n_embd, 2 * p.n_embd),
        "blk.4.nextn.enorm.weight": (p.n_embd,),
        "blk.4.nextn.hnorm.weight": (p.n_embd,),
        "blk.4.nextn.shared_head_norm.weight": (p.n_embd,),
    }
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def test_layers_for_multi_token_prediction_are_skipped(
    load: Callable[..., Engine], ids: list[int], expected: NDArray[np.float32]
) -> None:
    overrides = {
        A + "block_count": 5,
        A + "nextn_predict_layers": 1,
        A + "attention.recurrent_layers": np.append(LINEAR, False),
        A + "feed_forward_length": np.full(5, 192, np.int32),
    }
    arrays = mtp_layer(TINY, np.random.default_rng(0))
    engine = load(overrides=overrides, arrays=arrays)
    assert kinds(engine) == "ddda"
    assert (engine.logits(ids) == expected).all()


def test_feed_forward_lengths_by_layer(load: Callable[..., Engine]) -> None:
    lengths = np.array([192, 64, 320, 192], np.int32)
    rng, arrays = np.random.default_rng(0), dict[str, Any]()
    for i, n_ff in enumerate(lengths.tolist()):
        arrays |= {f"blk.{i}.ffn_{x}.weight": rng.normal(size=(n_ff, 64)) for x in ("gate", "up")}
        arrays[f"blk.{i}.ffn_down.weight"] = rng.normal(size=(64, n_ff)) * 0.1
    engine = load(overrides={A + "feed_forward_length": lengths}, arrays=arrays)
    assert np.isfinite(engine.logits([1, 2, 3])).all()
    outputs = {node.name: node.outputs[0].shape[1] for node in engine.plan.graph.nodes}
    assert [outputs[f"blk.{i}.swiglu"] for i in range(4)] == lengths.tolist()


def test_fused_query_key_value_weights(
    load: Callable[..., Engine], ids: list[int], expected: NDArray[np.float32]
) -> None:
    names = [f"blk.3.attn_{x}.weight" for x in "qkv"]
    plain = load()
    fused = np.concatenate(weights(plain.file.path, *names))
    arrays: Arrays = {"blk.3.attn_qkv.weight": fused, **dict.fromkeys(names)}
    engine = load(arrays=arrays)
    assert len(engine.plan.graph.nodes) == len(plain.plan.graph.nodes)
    assert np.allclose(engine.logits(ids), expected, atol=1e-4)


def test_a_tied_head_is_the_embedding(
    load: Callable[..., Engine], ids: list[int], expected: NDArray[np.float32]
) -> None:
    (embedding,) = weights(load().file.path, "token_embd.weight")
    same = load(arrays={"output.weight": embedding})
    assert (same.logits(ids) == expected).all()
    turned = load(arrays={"output.weight": embedding[::-1]})
    assert (turned.logits(ids) == expected[:, ::-1]).all()


def test_a_split_file_is_the_same_model(
    load: Callable[..., Engine], ids: list[int], expected: NDArray[np.float32]
) -> None:
    assert (load(split=3).logits(ids) == expected).all()


def test_tensors_are_found_by_name_and_not_by_place(
    load: Callable[..., Engine], ids: list[int], expected: NDArray[np.float32]
) -> None:
    """Given arrays come last in the file; the values are the ones that were there."""
    names = ("token_embd.weight", "blk.0.ssm_a", "blk.3.attn_k_norm.weight")
    arrays = dict(zip(names, weights(load().file.path, *names), strict=True))
    assert (load(arrays=arrays).logits(ids) == expected).all()
