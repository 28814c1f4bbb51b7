"""Files differ in how they pack the same values; the model is the same.

A random model is written twice: as the preset has it, and with stored rows joined or put in
another order, as converters of other ages have them. Rows stay as they are stored, so that this
holds for quantized files too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.formats.gguf import GGUFFile
from engine.formats.quants import F32, DType, dequantize
from engine.models import load_model
from tests.support.helpers import STD, assert_same, float64_engine, random_ids
from tests.support.presets import WITH_EXPERTS
from tools.ggufwrite import TensorSpec, write_gguf
from tools.presets import PRESETS, QwenPreset
from tools.synth import write_model

N_IDS = 70


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: uint8 [..., rows, bytes of a row]."""

    dtype: DType
    n_columns: int
    rows: NDArray[np.uint8]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows.shape[:-1], self.n_columns)

    def reshaped(self, *shape: int) -> Stored:
        """Another shape with rows of another length, which only plain values may have."""
        assert self.dtype is F32
        return Stored(F32, shape[-1], self.rows.reshape(*shape[:-1], -1))


Tensors = dict[str, Stored]
Repack = Callable[[Tensors, str], None]


def read_tensors(path: Path) -> Tensors:
    file = GGUFFile(path)
    return {
        name: Stored(
            info.dtype, info.shape[-1], file.raw(name).reshape(*info.shape[:-1], -1).copy()
        )
        for name, info in file.tensors.items()
    }


def _pieces(rows: np.ndarray[Any, Any]) -> list[bytes]:
    return [rows.tobytes()]


def write_tensors(path: Path, metadata: dict[str, Any], tensors: Tensors) -> Path:
    specs = [
        TensorSpec(name, t.shape, t.dtype.ggml_id, t.rows.nbytes, partial(_pieces, t.rows))
        for name, t in tensors.items()
    ]
    write_gguf(path, metadata, specs)
    return path


def join(tensors: Tensors, joined: str, *names: str, axis: int = 0) -> None:
    """Several tensors' rows in one tensor; nothing happens where a layer doesn't have them."""
    if any(name not in tensors for name in names):
        return
    parts = [tensors.pop(name) for name in names]
    assert len({(part.dtype, part.n_columns) for part in parts}) == 1
    tensors[joined] = replace(parts[0], rows=np.concatenate([p.rows for p in parts], axis=axis))


# Each changes one layer, whose tensors' names start with a prefix.


def join_qkv(tensors: Tensors, layer: str) -> None:
    names = [f"{layer}.attn_{part}.weight" for part in "qkv"]
    join(tensors, f"{layer}.attn_qkv.weight", *names)


def join_experts(tensors: Tensors, layer: str) -> None:
    names = [f"{layer}.ffn_{part}_exps.weight" for part in ("gate", "up")]
    join(tensors, f"{layer}.ffn_gate_up_exps.weight", *names, axis=1)


def join_per_key_head(tensors: Tensors, layer: str) -> None:
    """ssm_in: q, k, v and z of each key head in turn."""
    if f"{layer}.attn_gate.weight" not in tensors:
        return
    p = PRESETS["tiny-next"]
    assert isinstance(p, QwenPreset)
    qkv, z = (tensors.pop(f"{layer}.{name}.weight") for name in ("attn_qkv", "attn_gate"))
    n_keys, per_key = p.n_k_heads * p.k_dim, p.n_v_heads // p.n_k_heads * p.v_dim
    q, k, v = np.split(qkv.rows, [n_keys, 2 * n_keys])
    rows: list[NDArray[np.uint8]] = []
    for h in range(p.n_k_heads):
        keys = slice(h * p.k_dim, (h + 1) * p.k_dim)
        values = slice(h * per_key, (h + 1) * per_key)
        rows += [q[keys], k[keys], v[values], z.rows[values]]
    tensors[f"{layer}.ssm_in.weight"] = replace(qkv, rows=np.concatenate(rows))


def drop_ones(tensors: Tensors, layer: str) -> None:
    for name, t in tensors.items():
        if name.startswith(f"{layer}.") and t.dtype is F32:
            tensors[name] = t.reshaped(*[n for n in t.shape if n > 1])


def add_ones(tensors: Tensors, layer: str) -> None:
    """A one before and one behind, where there is room for them."""
    for name, t in tensors.items():
        if name.startswith(f"{layer}.") and t.dtype is F32:
            behind = (1,) if len(t.shape) == 1 else ()
            before = (1,) if len(t.shape) < 4 else ()
            tensors[name] = t.reshaped(*before, *t.shape, *behind)


def repacked(source: Path, path: Path, *repacks: Repack) -> Path:
    """The model of `source` with every layer changed by every function."""
    tensors, file = read_tensors(source), GGUFFile(source)
    before = {name: t.shape for name, t in tensors.items()}
    layers = sorted({".".join(n.split(".")[:2]) for n in tensors if n.startswith("blk.")})
    for repack in repacks:
        for layer in layers:
            repack(tensors, layer)
    assert {name: t.shape for name, t in tensors.items()} != before
    return write_tensors(path, file.metadata, tensors)


# Q6_K: blocks of 256, which the tensors of this preset alone fill.
PACKINGS = [
    (preset, dtype, repacks)
    for preset, types, options in (
        ("tiny-moe", ("F32", "Q8_0"), [(join_qkv,), (drop_ones,), (add_ones,)]),
        (
            "tiny-next",
            ("F32", "Q8_0", "Q6_K"),
            [(join_qkv,), (join_per_key_head,), (join_per_key_head, join_qkv), (add_ones,)],
        ),
        ("tiny-kimi", ("F32", "Q8_0"), [(join_qkv,), (drop_ones,)]),
        ("tiny-ling", ("F32", "Q8_0"), [(join_qkv,), (drop_ones,)]),
    )
    for dtype in types
    for repacks in options
]


def packing_id(value: Any) -> str:
    return "+".join(r.__name__ for r in value) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("preset", "dtype", "repacks"), PACKINGS, ids=packing_id)
def test_the_same_rows_make_the_same_model(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    rng: np.random.Generator,
    preset: str,
    dtype: str,
    repacks: tuple[Repack, ...],
) -> None:
    path, ids = models(preset, dtype), random_ids(rng, N_IDS)
    other = repacked(path, tmp_path / "m.gguf", *repacks)
    with float64_engine(path, n_ctx=128) as a, float64_engine(other, n_ctx=128) as b:
        for name, tensor in a.plan.graph.weights.items():
            twin = b.plan.graph.weights[name]
            assert (tensor.shape, tensor.dtype) == (twin.shape, twin.dtype)
            assert np.array_equal(a.model.weights.raw(name), b.model.weights.raw(name)), name
        assert a.plan.graph.weights.keys() == b.plan.graph.weights.keys()
        assert np.array_equal(a.logits(ids), b.logits(ids))


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
@pytest.mark.parametrize("preset", WITH_EXPERTS)
def test_experts_with_gate_and_up_in_one_tensor(
    models: Callable[[str, str], Path],
    tmp_path: Path,
    rng: np.random.Generator,
    preset: str,
    dtype: str,
) -> None:
    """They stay one, so that products are as wide, which may round otherwise."""
    path, ids = models(preset, dtype), random_ids(rng, N_IDS)
    other = repacked(path, tmp_path / "m.gguf", join_experts)
    with float64_engine(path, n_ctx=128) as a, float64_engine(other, n_ctx=128) as b:
        assert len(a.plan.graph.nodes) == len(b.plan.graph.nodes)
        assert "blk.1.ffn_gate_up_exps.weight" in b.plan.graph.weights
        assert_same(b.logits(ids), a.logits(ids))


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_keys_and_values_of_latents_in_one_tensor(
    models: Callable[[str, str], Path], tmp_path: Path, rng: np.random.Generator, dtype: str
) -> None:
    """attn_kv_b has a row per value; attn_k_b of newer files is its key part turned around."""
    new = read_tensors(models("tiny-kimi", dtype))
    old, metadata = dict(new), GGUFFile(models("tiny-kimi", dtype)).metadata
    for layer in ("blk.2", "blk.4"):
        k_b, v_b = (old.pop(f"{layer}.attn_{name}_b.weight") for name in "kv")
        # [H, N, R] in values: turning blocks around needs values, which the old file stores plain.
        keys, values = (np.swapaxes(decoded(k_b), 1, 2), decoded(v_b))
        rows = np.concatenate([keys, values], axis=1).reshape(-1, keys.shape[2])
        old[f"{layer}.attn_kv_b.weight"] = plain(rows)
    path = write_tensors(tmp_path / "old.gguf", metadata, old)
    ids = random_ids(rng, N_IDS)
    with (
        float64_engine(models("tiny-kimi", dtype), n_ctx=128) as a,
        float64_engine(path, n_ctx=128) as b,
    ):
        assert [n.op.name for n in a.plan.graph.nodes] == [n.op.name for n in b.plan.graph.nodes]
        assert_same(b.logits(ids), a.logits(ids))


def test_a_quantized_tensor_of_keys_and_values_is_taken_apart_by_rows(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """The other way round: from an old quantized file to its values in a new file's tensors."""
    tiny: Any = PRESETS["tiny-kimi"]
    preset = replace(tiny, legacy_kv_b=True)
    path = write_model(tmp_path / "old.gguf", preset, "Q8_0", std=STD)
    new, metadata, ids = read_tensors(path), GGUFFile(path).metadata, random_ids(rng, N_IDS)
    for layer in ("blk.2", "blk.4"):
        packed = new.pop(f"{layer}.attn_kv_b.weight")
        assert packed.dtype.name == "Q8_0"
        # 4 heads of 96 key and 160 value rows.
        per_head = decoded(packed).reshape(4, 96 + 160, -1)
        new[f"{layer}.attn_k_b.weight"] = plain(np.swapaxes(per_head[:, :96], 1, 2))
        new[f"{layer}.attn_v_b.weight"] = plain(per_head[:, 96:])
    other = write_tensors(tmp_path / "new.gguf", metadata, new)
    with float64_engine(path, n_ctx=128) as a, float64_engine(other, n_ctx=128) as b:
        assert a.plan.graph.weights["blk.2.attn_v_b.weight"].dtype.name == "Q8_0"
        assert_same(a.logits(ids), b.logits(ids))


def decoded(tensor: Stored) -> NDArray[np.float32]:
    return dequantize(tensor.dtype, tensor.rows.reshape(-1), tensor.shape)


def plain(values: NDArray[np.float32]) -> Stored:
    values = np.ascontiguousarray(values, np.float32)
    return Stored(F32, values.shape[-1], values.view(np.uint8))


@pytest.mark.parametrize(
    ("preset", "repacks"),
    [
        ("tiny-moe", (join_qkv, join_experts)),
        ("tiny-next", (join_per_key_head, join_qkv, join_experts)),
        ("tiny-kimi", (join_qkv, join_experts)),
        ("tiny-ling", (join_qkv, join_experts)),
    ],
    ids=packing_id,
)
def test_packed_tensors_are_those_that_presets_write(
    models: Callable[[str, str], Path], tmp_path: Path, preset: str, repacks: tuple[Repack, ...]
) -> None:
    """What is joined here has the names and shapes that tools/presets knows from real files."""
    joined = GGUFFile(repacked(models(preset, "F32"), tmp_path / "a.gguf", *repacks))
    options: dict[str, Any] = {"fused_qkv": True, "fused_gate_up": True}
    if preset == "tiny-next":
        options["legacy_ssm_in"] = True
    written = GGUFFile(write_model(tmp_path / "b.gguf", replace(PRESETS[preset], **options)))
    shapes = {name: info.shape for name, info in joined.tensors.items()}
    assert shapes == {name: info.shape for name, info in written.tensors.items()}
    load_model(written)


def test_a_file_of_another_order_is_another_model(
    models: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Guards the comparisons above: heads of ssm_in in another order make other logits."""

    def swap_heads(tensors: Tensors, layer: str) -> None:
        if (packed := tensors.get(f"{layer}.ssm_in.weight")) is not None:
            rows = np.roll(packed.rows, len(packed.rows) // 4, axis=0)
            tensors[f"{layer}.ssm_in.weight"] = replace(packed, rows=rows)

    path, ids = models("tiny-next", "F32"), list(range(20))
    other = repacked(path, tmp_path / "m.gguf", join_per_key_head, swap_heads)
    with float64_engine(path, n_ctx=64) as a, float64_engine(other, n_ctx=64) as b:
        assert not np.allclose(a.logits(ids), b.logits(ids), rtol=1e-2)
