"""NVFP4 with a scale for each weight, or for each expert's: y = scale · (W x).

The same values are written as float32, so that what a model computes can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine import Engine, EngineError
from engine.formats.gguf import GGUFFile
from engine.formats.quants import F32, WEIGHT_TYPES
from tests.models.test_packings import (
    Repack,
    Stored,
    Tensors,
    join_experts,
    join_qkv,
    read_tensors,
    write_tensors,
)
from tests.support.decoding import decode
from tests.support.helpers import float64_engine, random_ids
from tests.support.opcase import nmse

Models = Callable[[str, str], Path]
NVFP4 = WEIGHT_TYPES["NVFP4"]
# What float32 leaves of values that are multiplied twice.
FLOAT_LIMIT = 1e-12


def as_f32(values: np.ndarray) -> Stored:
    rows = np.ascontiguousarray(values, np.float32).view(np.uint8)
    return Stored(F32, values.shape[-1], rows)


def scaled(
    source: Path, folder: Path, rng: np.random.Generator, *repacks: Repack
) -> tuple[Path, Path]:
    """The model of a file with scales, and the same one in float32."""
    tensors, metadata = read_tensors(source), GGUFFile(source).metadata
    for i in range(8):
        for repack in repacks:
            repack(tensors, f"blk.{i}")
    plain: Tensors = {}
    for name, t in list(tensors.items()):
        plain[name] = t
        if t.dtype is NVFP4:
            n = t.shape[0] if len(t.shape) == 3 else 1
            factors = rng.uniform(0.25, 3, n).astype(np.float32)
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.scale"] = as_f32(factors)
            tensors[f"{stem}.input_scale"] = as_f32(np.full(n + 1, 7.0))
            values = decode("NVFP4", t.rows).astype(np.float64)
            plain[name] = as_f32(values * factors.reshape(-1, *[1] * (len(t.shape) - 1)))
    assert len(tensors) > len(plain) + 8
    return (
        write_tensors(folder / "scaled.gguf", metadata, tensors),
        write_tensors(folder / "plain.gguf", metadata, plain),
    )


@pytest.mark.parametrize(
    ("preset", "repacks"),
    [
        ("tiny-untied", ()),
        ("tiny-moe", (join_experts,)),
        ("tiny-next", (join_qkv,)),
        ("tiny-next", ()),
        ("tiny-kimi", ()),
        ("tiny-ling", ()),
    ],
)
def test_a_scale_multiplies_its_weight(
    models: Models, tmp_path: Path, rng: np.random.Generator, preset: str,
    repacks: tuple[Repack, ...],
) -> None:  # fmt: skip
    path, plain = scaled(models(preset, "NVFP4"), tmp_path, rng, *repacks)
    ids = random_ids(rng, 70)
    with float64_engine(path) as ours, float64_engine(plain) as expected:
        assert nmse(ours.logits(ids), expected.logits(ids)) < FLOAT_LIMIT


def test_a_weight_may_have_ones_in_its_shape(
    models: Models, tmp_path: Path, rng: np.random.Generator
) -> None:
    """What it is in the model says how many factors it has."""
    source = models("tiny-untied", "NVFP4")
    path, plain = scaled(source, tmp_path, rng)
    tensors = read_tensors(path)
    t = tensors["blk.0.ffn_up.weight"]
    tensors["blk.0.ffn_up.weight"] = Stored(t.dtype, t.n_columns, t.rows[:, np.newaxis])
    write_tensors(path, GGUFFile(source).metadata, tensors)
    ids = random_ids(rng, 5)
    with Engine.load(path) as engine, float64_engine(path) as ours:
        assert np.isfinite(engine.logits(ids)).all()
        with float64_engine(plain) as expected:
            assert nmse(ours.logits(ids), expected.logits(ids)) < FLOAT_LIMIT
    tensors["blk.0.ffn_up.scale"] = as_f32(np.ones(len(t.rows)))
    write_tensors(path, GGUFFile(source).metadata, tensors)
    with pytest.raises(EngineError, match=r"ffn_up.scale \(expected F32 \[1\] beside NVFP4, got"):
        Engine.load(path)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("blk.0.ffn_gate_exps", np.ones(3), "expected F32 [4] beside NVFP4, got F32 [3] beside N"),
        ("blk.0.attn_gate", np.ones(2), "expected F32 [1] beside NVFP4, got F32 [2] beside NVFP4"),
        ("blk.0.ssm_a", np.ones(1), "1 unexpected tensor: blk.0.ssm_a.scale"),
        ("blk.0.ffn_gate_inp", np.ones(1), "NVFP4, got F32 [1] beside F32"),
    ],
)
def test_other_scales_are_refused(
    models: Models, tmp_path: Path, name: str, values: np.ndarray, said: str
) -> None:
    source = models("tiny-next", "NVFP4")
    tensors = read_tensors(source)
    tensors[f"{name}.scale"] = as_f32(values)
    path = write_tensors(tmp_path / "m.gguf", GGUFFile(source).metadata, tensors)
    with pytest.raises(EngineError) as error:
        Engine.load(path)
    assert said in str(error.value)
