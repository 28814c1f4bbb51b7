"""Synthetic models: the random bytes decode to what was asked for, and the files are complete.

Decoding is done by the gguf package, which shares no code with tools/randblocks.py.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.formats.gguf import GGUFFile, Strings
from engine.formats.quants import WEIGHT_TYPES, dequantize
from tests.support.decoding import decode
from tools import randblocks, synth
from tools.makevocab import VocabError, made_vocabulary, padded_vocabulary
from tools.presets import PRESETS, Preset, metadata, tensors
from tools.randblocks import TYPES, generator, random_blocks
from tools.synth import SynthError, tensor_type, write_model

ROOT = Path(__file__).resolve().parents[2]
VOCAB = ROOT.parent / "shared" / "data" / "vocab" / "ggml-vocab-qwen35.gguf"
needs_vocab = pytest.mark.skipif(not VOCAB.exists(), reason=f"{VOCAB.name} is not there")
# What llama.cpp calls these sizes, in billions of parameters.
SIZES = {
    "0.8b": 0.75, "2b": 1.9, "4b": 4.2, "9b": 9.0, "27b": 26.9,
    "35b-a3b": 34.66, "122b-a10b": 122.1, "397b-a17b": 396.3, "next-80b": 79.67, "kimi-48b": 49.1,
    "ling-tiny": 7.89, "ling-flash": 124.4,
}  # fmt: skip
# What the parts of a layer hold, by the name after `blk.i.`; a letter is one of DIMS.
PARTS = {
    "linear": "attn_qkv.weight C E, attn_gate.weight V E, ssm_conv1d.weight C 4, ssm_a h, "
    "ssm_dt.bias h, ssm_norm.weight D, ssm_out.weight E V, ",
    "gates": "ssm_beta.weight h E, ssm_alpha.weight h E, ",
    "ba": "ssm_ba.weight H E, ",
    "attention": "attn_q.weight Q E, attn_k.weight 64 E, attn_v.weight 64 E, "
    "attn_q_norm.weight 32, attn_k_norm.weight 32, attn_output.weight E q, ",
    "post": "attn_norm.weight E, post_attention_norm.weight E, ",
    "kda": "attn_q.weight P E, attn_k.weight P E, attn_v.weight P E, ssm_conv1d_q.weight 1 P 1 4, "
    "ssm_conv1d_k.weight 1 P 1 4, ssm_conv1d_v.weight 1 P 1 4, ssm_f_a.weight D E, "
    "ssm_f_b.weight P D, ssm_beta.weight h E, ssm_a 1 1 h 1, ssm_dt.bias P, ssm_g_a.weight D E, "
    "ssm_g_b.weight P D, ssm_norm.weight D, attn_output.weight E P, ",
    "mla": "attn_q.weight 448 E, attn_kv_a_mqa.weight 144 E, attn_kv_a_norm.weight R, "
    "attn_k_b.weight h R 96, attn_v_b.weight h 160 R, attn_output.weight E 640, ",
    "pre": "attn_norm.weight E, ffn_norm.weight E, ",
    "dense": "ffn_gate.weight 192 E, ffn_up.weight 192 E, ffn_down.weight E 192, ",
    "moe": "ffn_gate_inp.weight X E, ffn_gate_exps.weight X F E, ffn_up_exps.weight X F E, "
    "ffn_down_exps.weight X E F, ffn_gate_shexp.weight S E, ffn_up_shexp.weight S E, "
    "ffn_down_shexp.weight E S, ",
    "shared gate": "ffn_gate_inp_shexp.weight 1 E, ",
    "bias": "exp_probs_b.bias X, ",
}
DIMS = {
    "tiny-moe": {"E": 64, "C": 128, "V": 64, "h": 4, "D": 16, "Q": 256, "q": 128, "X": 8, "F": 32,
                 "S": 96},
    "tiny-next": {"E": 256, "C": 512, "V": 256, "h": 8, "H": 16, "D": 32, "Q": 512, "q": 256,
                  "X": 4, "F": 256, "S": 256},
    "tiny-kimi": {"E": 64, "h": 4, "P": 128, "D": 32, "R": 128, "X": 8, "F": 32, "S": 96},
}  # fmt: skip
_QWEN_MOE, _KIMI_MOE = ("post", "moe", "shared gate"), ("pre", "moe", "bias")
LAYERS: dict[str, Any] = {
    "tiny-moe": [(*_QWEN_MOE, "linear", "gates")] * 3 + [(*_QWEN_MOE, "attention")],
    "tiny-next": [(*_QWEN_MOE, "linear", "ba")] * 3 + [(*_QWEN_MOE, "attention")],
    "tiny-kimi": [("pre", "dense", "kda"), *((*_KIMI_MOE, mix) for mix in ("kda", "mla") * 2)],
}
# Without the architecture's prefix; None: the key must not be there.
METADATA: dict[str, Any] = {
    "35b-a3b": {
        "block_count": 40, "feed_forward_length": None, "attention.head_count_kv": 2,
        "attention.recurrent_layers": [True, True, True, False] * 10,
        "rope.dimension_sections": [11, 11, 10, 0], "ssm.inner_size": 4096, "expert_count": 256,
        "expert_used_count": 8, "expert_feed_forward_length": 512,
        "expert_shared_feed_forward_length": 512,
    },
    "next-80b": {
        "block_count": 48, "feed_forward_length": 5120, "rope.dimension_sections": None,
        "rope.dimension_count": 64, "expert_count": 512, "expert_used_count": 10,
    },
    "kimi-48b": {
        "block_count": 27, "feed_forward_length": 9216, "vocab_size": 163840,
        "attention.head_count_kv": [0, 0, 0, 1] * 6 + [0, 0, 1], "attention.kv_lora_rank": 512,
        "attention.key_length": 576, "attention.key_length_mla": 192,
        "attention.value_length_mla": 128, "attention.q_lora_rank": None,
        "attention.recurrent_layers": None, "rope.dimension_count": 64, "ssm.conv_kernel": 4,
        "ssm.state_size": None, "kda.head_dim": 128, "leading_dense_block_count": 1,
        "expert_shared_feed_forward_length": None, "expert_shared_count": 1,
        "expert_weights_scale": 2.446, "expert_gating_func": 2,
    },
    "ling-tiny": {
        "block_count": 24, "feed_forward_length": 4608, "attention.head_count": 16,
        "attention.head_count_kv": [0, 0, 0, 1] * 6, "attention.q_lora_rank": 256,
        "kda.gate_lower_bound": -5.0, "rope.freq_base": 6e6, "leading_dense_block_count": 1,
        "expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 512,
        "expert_shared_feed_forward_length": 512, "expert_group_count": 8,
        "expert_group_used_count": 4, "swiglu_clamp_exp": None, "swiglu_clamp_shexp": None,
    },
    "ling-flash": {
        "block_count": 42, "attention.head_count_kv": [0, 0, 0, 0, 0, 1] * 7,
        "attention.q_lora_rank": None, "leading_dense_block_count": 2, "expert_count": 512,
        "expert_weights_scale": 2.5, "swiglu_clamp_exp": [0] * 35 + [4] * 7,
        "swiglu_clamp_shexp": [0] * 34 + [5] * 6 + [7] * 2,
    },
}  # fmt: skip


def decoded(path: Path, name: str) -> np.ndarray:
    """A tensor as float32, read by the engine."""
    file = GGUFFile(path)
    info = file.tensors[name]
    return dequantize(info.dtype, file.raw(name), info.shape)


def test_types_are_the_engines() -> None:
    ours = {t.name: (t.ggml_id, t.elems, t.nbytes) for t in TYPES.values()}
    engines = WEIGHT_TYPES.values()
    assert ours == {t.name: (t.ggml_id, t.block_elems, t.block_bytes) for t in engines}
    assert set(synth.FILE_TYPES) == {*ours, "Q4_K_M"}


@pytest.mark.parametrize("std", [0.004, 0.02, 1.0])
@pytest.mark.parametrize("name", TYPES)
def test_blocks_have_the_deviation_asked_for(name: str, std: float) -> None:
    block = TYPES[name]
    n_blocks = max(300_000 // block.elems, 5000)
    raw = random_blocks(block, n_blocks, std, generator(1)).reshape(n_blocks, -1)
    values = decode(name, raw).astype(np.float64)
    assert values.size == n_blocks * block.elems
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.02 * std
    assert values.std() == pytest.approx(std, rel=0.03)
    if block.elems > 1:
        assert len(np.unique(raw, axis=0)) == n_blocks


@pytest.mark.parametrize("name", ["Q8_0", "TQ1_0", "TQ2_0"])
def test_blocks_hold_no_byte_that_a_quantizer_never_writes(name: str) -> None:
    block, kind = TYPES[name], gguf.GGMLQuantizationType[name]
    raw = random_blocks(block, 2000, 1.0, generator(0)).reshape(2000, -1)
    values = np.abs(gguf.quants.dequantize(raw, kind))
    highest = 127 if name == "Q8_0" else 1
    scale = np.abs(raw[:, block.d : block.d + 2].copy().view(np.float16).astype(np.float32))
    assert (values <= highest * scale).all()


@pytest.mark.parametrize("name", TYPES)
def test_panel_repeats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randblocks, "PANEL_BYTES", 1 << 14)
    block = TYPES[name]
    panel = randblocks.random_panel(block, 0.02, generator(0))
    n_blocks = len(panel) // block.nbytes
    assert len(panel) == n_blocks * block.nbytes <= 1 << 14
    assert all(n_blocks % i for i in range(2, n_blocks))
    got = np.concatenate(list(randblocks.repeated(panel, 3 * block.nbytes, 50_000)))
    assert (got == np.resize(np.roll(panel, -3 * block.nbytes), 50_000)).all()


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_size_of_their_name(name: str) -> None:
    n_params = sum(int(np.prod(shape)) for shape in tensors(PRESETS[name]).values())
    assert n_params / 1e9 == pytest.approx(SIZES[name], rel=0.02)


def test_08b_is_qwen35() -> None:
    p = PRESETS["0.8b"]
    values = {k.removeprefix("qwen35."): v for k, v in metadata(p).items()}
    assert values["embedding_length"] == 1024
    assert values["ssm.inner_size"] == 2048
    assert values["attention.recurrent_layers"].tolist() == [True, True, True, False] * 6
    shapes = tensors(p)
    assert shapes["token_embd.weight"] == (248320, 1024)
    assert shapes["blk.0.attn_qkv.weight"] == (6144, 1024)
    assert shapes["blk.3.attn_q.weight"] == (4096, 1024)
    assert "output.weight" not in shapes
    assert "output.weight" in tensors(PRESETS["9b"])


def listed(text: str, dims: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of "name dimension dimension, name …"."""
    entries = (entry.split() for entry in text.strip(", ").split(","))
    return {name: tuple(dims.get(d) or int(d) for d in shape) for name, *shape in entries}


@pytest.mark.parametrize("name", LAYERS)
def test_tiny_files_hold_their_architectures_tensors(tmp_path: Path, name: str) -> None:
    file = GGUFFile(write_model(tmp_path / "m.gguf", name))
    dims = DIMS[name] | {"T": len(file.metadata["tokenizer.ggml.tokens"])}
    expected = listed("token_embd.weight T E, output_norm.weight E", dims)
    if name != "tiny-moe":
        expected |= listed("output.weight T E", dims)
    for i, parts in enumerate(LAYERS[name]):
        layer = listed("".join(PARTS[part] for part in parts), dims)
        expected |= {f"blk.{i}.{key}": shape for key, shape in layer.items()}
    assert {n: t.shape for n, t in file.tensors.items()} == expected


@pytest.mark.parametrize("name", METADATA)
def test_metadata_of_released_models(name: str) -> None:
    p = PRESETS[name]
    values = metadata(p)
    for key, expected in METADATA[name].items():
        got = values.get(f"{p.arch}.{key}")
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == expected, key


@pytest.mark.parametrize(
    ("name", "field", "gone", "there"),
    [
        ("tiny-moe", "fused_gate_up", ["ffn_gate_exps", "ffn_up_exps"],
         "blk.3.ffn_gate_up_exps.weight 8 64 64"),
        ("tiny-moe", "fused_qkv", ["attn_q.", "attn_k.", "attn_v."],
         "blk.3.attn_qkv.weight 384 64"),
        ("tiny-next", "legacy_ssm_in", ["blk.0.attn_qkv", "attn_gate"],
         "blk.0.ssm_in.weight 768 256"),
        ("tiny-kimi", "fused_qkv", ["attn_k.", "attn_v."],
         "blk.1.attn_qkv.weight 384 64, blk.2.attn_q.weight 448 64"),
        ("tiny-kimi", "legacy_kv_b", ["attn_k_b", "attn_v_b"], "blk.2.attn_kv_b.weight 1024 128"),
        ("tiny-moe", "stripped", [], "blk.0.ffn_gate_inp_shexp.weight 64"),
        ("tiny-kimi", "stripped", [], "blk.0.ssm_conv1d_q.weight 128 1 4, blk.0.ssm_a 4 1"),
    ],
)  # fmt: skip
def test_variants(name: str, field: str, gone: list[str], there: str) -> None:
    preset: Any = PRESETS[name]
    before, after = tensors(preset), tensors(replace(preset, **{field: True}))
    assert after.items() >= listed(there, {}).items()
    for part in gone:
        assert any(part in key for key in before)
        assert not any(part in key for key in after)


def test_fewer_layers_are_the_first_ones() -> None:
    p = synth.sized("kimi-48b", 6)
    assert metadata(p)["kimi-linear.attention.head_count_kv"].tolist() == [0, 0, 0, 1, 0, 0]
    assert tensors(p).items() < tensors(PRESETS["kimi-48b"]).items()
    assert "blk.5.exp_probs_b.bias" in tensors(p)


def types_of(p: Preset, dtype: str) -> dict[str, str]:
    """Tensor name -> type name in a file of type `dtype`."""
    return {n: tensor_type(p, n, shape, dtype).name for n, shape in tensors(p).items()}


def test_q4_k_m_is_llama_cpps_mix() -> None:
    p = PRESETS["0.8b"]
    types = types_of(p, "Q4_K_M")
    more_bits = {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
    for i in range(p.n_layers):
        expected = "Q6_K" if i in more_bits else "Q4_K"
        assert types[f"blk.{i}.ffn_down.weight"] == expected
        assert types[f"blk.{i}.attn_{'qkv' if p.is_linear(i) else 'v'}.weight"] == expected
        assert types[f"blk.{i}.ffn_up.weight"] == "Q4_K"
    assert types["token_embd.weight"] == "Q6_K"
    untied = types_of(PRESETS["9b"], "Q4_K_M")
    assert (untied["output.weight"], untied["token_embd.weight"]) == ("Q6_K", "Q4_K")


def layers_of(types: dict[str, str], role: str, dtype: str) -> list[int]:
    """The layers in which that tensor has that type."""
    found = [name.split(".") for name, found in types.items() if found == dtype]
    return [int(parts[1]) for parts in found if parts[2:3] == [role]]


def test_q4_k_m_of_moe_models() -> None:
    types = types_of(PRESETS["kimi-48b"], "Q4_K_M")
    down = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26]
    assert layers_of(types, "ffn_down", "Q6_K") == down[:1]
    assert layers_of(types, "ffn_down_exps", "Q6_K") == down[1:]
    assert layers_of(types, "ffn_down_shexp", "Q6_K") == down[1:]
    # Counted among the 20 layers with an attn_v: 0, 1, 4, 7, 10, 13, 16, 17, 18 and 19.
    assert layers_of(types, "attn_v", "Q6_K") == [0, 1, 5, 9, 13, 17, 21, 22, 24, 25]
    # Rows of 128.
    q5_0 = {name.split(".")[2] for name, dtype in types.items() if dtype == "Q5_0"}
    assert q5_0 == {"attn_k_b", "ssm_f_b", "ssm_g_b"}


def test_q4_k_m_spares_the_attention_of_8_experts() -> None:
    types = types_of(replace(PRESETS["35b-a3b"], n_experts=8, n_layers=4), "Q4_K_M")
    got = {name: types[f"blk.3.attn_{name}.weight"] for name in ("q", "k", "v", "output")}
    assert got == {"q": "Q4_K", "k": "Q8_0", "v": "Q8_0", "output": "Q5_K"}
    assert layers_of(types, "attn_qkv", "Q8_0") == [0, 1, 2]
    assert layers_of(types, "ssm_out", "Q4_K") == [0, 1, 2]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"), ("Q3_K", "Q4_0"), ("IQ2_S", "IQ4_NL")],
)
def test_rows_that_are_no_whole_blocks_fall_back(dtype: str, expected: str) -> None:
    tiny = PRESETS["tiny"]
    assert tensor_type(tiny, "blk.0.ffn_up.weight", (192, 64), dtype).name == expected
    assert tensor_type(tiny, "blk.0.ffn_up.weight", (192, 48), dtype).name == "F16"
    assert set(types_of(PRESETS["tiny-untied"], dtype).values()) == {dtype, "F32"}


NORMS = "attn_norm post_attention_norm ssm_norm attn_q_norm attn_k_norm"


@pytest.mark.parametrize(
    ("name", "weights", "others"),
    [
        ("0.8b", f"{NORMS} ssm_conv1d", "ssm_a ssm_dt.bias"),
        ("35b-a3b", f"{NORMS} ssm_conv1d ffn_gate_inp ffn_gate_inp_shexp", "ssm_a ssm_dt.bias"),
        ("kimi-48b", "attn_norm ffn_norm ssm_norm attn_kv_a_norm ssm_conv1d_q ssm_conv1d_k "
         "ssm_conv1d_v ffn_gate_inp", "ssm_a ssm_dt.bias exp_probs_b.bias"),
    ],
)  # fmt: skip
def test_small_tensors_are_always_f32(name: str, weights: str, others: str) -> None:
    f32 = {key for key, dtype in types_of(PRESETS[name], "Q8_0").items() if dtype == "F32"}
    expected = {f"{weight}.weight" for weight in weights.split()} | set(others.split())
    assert {key.split(".", 2)[2] for key in f32 - {"output_norm.weight"}} == expected


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("tiny-untied", dtype) for dtype in ("f32", "Q4_K_M", "BF16", "NVFP4", "IQ1_M")]
    + [(name, "Q4_K_M") for name in LAYERS],
)
def test_file_is_read_by_both_readers(tmp_path: Path, name: str, dtype: str, fast: bool) -> None:
    path = write_model(tmp_path / "m.gguf", name, dtype, fast=fast)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    p = replace(PRESETS[name], n_vocab=len(ours.metadata["tokenizer.ggml.tokens"]))
    assert {n: t.shape for n, t in ours.tensors.items()} == tensors(p)
    for t in theirs.tensors:
        assert ours.raw(t.name).tobytes() == t.data.tobytes()
        values = decoded(path, t.name)
        assert np.isfinite(values).all()
        if values.size > 10_000:
            assert values.std() == pytest.approx(0.02, rel=0.15)
    assert ours.string("general.architecture") == p.arch
    assert ours.integer("general.file_type") == synth.FILE_TYPES[dtype.upper()]
    assert metadata(p).keys() < ours.metadata.keys()


def test_special_values_are_realistic(tmp_path: Path) -> None:
    preset: Any = PRESETS["tiny"]
    path = write_model(tmp_path / "m.gguf", replace(preset, n_v_heads=400), layers=1)
    a, dt = decoded(path, "blk.0.ssm_a"), decoded(path, "blk.0.ssm_dt.bias")
    log_decay = a * np.log1p(np.exp(dt))
    assert -0.81 < log_decay.min() < -0.1
    assert -0.005 < log_decay.max() < 0
    assert decoded(path, "blk.0.attn_norm.weight").mean() == pytest.approx(1, abs=0.05)
    assert decoded(path, "blk.0.ssm_conv1d.weight").std() == pytest.approx(0.3, rel=0.05)


def test_bounded_decays_are_realistic(tmp_path: Path) -> None:
    """With f of rms 1, as the gain of its matrix makes it."""
    preset: Any = PRESETS["tiny-ling"]
    path = write_model(tmp_path / "m.gguf", replace(preset, n_heads=400), layers=1)
    a, dt = decoded(path, "blk.0.ssm_a"), decoded(path, "blk.0.ssm_dt.bias")
    f = np.random.default_rng(0).standard_normal(dt.shape)
    decays = preset.lower_bound / (1 + np.exp(-a.reshape(-1, 1) * (f + dt).reshape(400, -1)))
    assert (a > 0).all()
    strong, middle, weak = np.quantile(decays, [0.01, 0.5, 0.99])
    assert -4 < strong < -2
    assert -0.7 < middle < -0.3
    assert -0.005 < weak < 0


@pytest.mark.parametrize("fast", [False, True])
def test_routers_and_low_rank_gates_do_not_depend_on_std(tmp_path: Path, fast: bool) -> None:
    p: Any = replace(PRESETS["tiny-kimi"], n_experts=400)
    path = write_model(tmp_path / "m.gguf", p, "Q8_0", std=0.5, layers=2, fast=fast)
    for name, n_in, rms in (
        ("ffn_gate_inp", p.n_embd, 1), ("ssm_f_a", p.n_embd, 1), ("ssm_f_b", p.kda_dim, 0.5),
        ("ssm_g_a", p.n_embd, 1), ("ssm_g_b", p.kda_dim, 1),
    ):  # fmt: skip
        std = decoded(path, f"blk.1.{name}.weight").std()
        assert std == pytest.approx(rms / n_in**0.5, rel=0.1), name
    assert decoded(path, "blk.1.exp_probs_b.bias").std() == pytest.approx(0.02, rel=0.2)
    assert decoded(path, "blk.1.ffn_up_exps.weight").std() == pytest.approx(0.5, rel=0.1)


def test_seed_decides_the_bytes(tmp_path: Path) -> None:
    def data(name: str, **options: Any) -> bytes:
        return write_model(tmp_path / name, "tiny", "Q8_0", **options).read_bytes()

    assert data("a") == data("b")
    assert data("a") != data("c", seed=1)
    assert data("d", fast=True) == data("e", fast=True)
    # A tensor does not depend on which others the file has.
    write_model(tmp_path / "short", "tiny", "Q8_0", layers=2)
    a, short = GGUFFile(tmp_path / "a"), GGUFFile(tmp_path / "short")
    assert len(short.tensors) < len(a.tensors)
    assert all(a.raw(name).tobytes() == short.raw(name).tobytes() for name in short.tensors)


def test_made_vocabulary_can_be_merged() -> None:
    vocabulary = made_vocabulary()
    tokens = vocabulary["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == len(vocabulary["tokenizer.ggml.token_type"])
    made = set(tokens[:256])
    for i, merge in enumerate(vocabulary["tokenizer.ggml.merges"]):
        left, right = merge.split(" ")
        assert {left, right} <= made, merge
        assert tokens[256 + i] == left + right
        made.add(left + right)
    eos, bos = (vocabulary[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "bos"))
    assert (tokens[eos], tokens[bos]) == ("<|im_end|>", "<|endoftext|>")
    byte_of = {token: b for b, token in enumerate(tokens[:256])}
    assert [byte_of[c] for c in "Ġ!Ċ~"] == [32, 33, 10, 126]


def test_vocabulary_is_padded_with_unused_tokens(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "tiny", vocab_size=1000)
    file = GGUFFile(path)
    tokens = list(file.metadata["tokenizer.ggml.tokens"])
    types = file.metadata["tokenizer.ggml.token_type"]
    assert file.tensors["token_embd.weight"].shape == (1000, 64)
    assert (len(tokens), tokens[999], types[999]) == (1000, "[PAD999]", 5)
    assert "[PAD" not in tokens[types.tolist().index(5) - 1]
    scored = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": np.ones(2, "f4")}
    assert padded_vocabulary(scored, 4)["tokenizer.ggml.scores"].tolist() == [1, 1, 0, 0]
    assert padded_vocabulary(scored, 4)["tokenizer.ggml.token_type"].tolist() == [1, 1, 5, 5]
    with pytest.raises(VocabError, match="has 2 tokens already"):
        padded_vocabulary(scored, 1)


@needs_vocab
def test_vocabulary_is_copied(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "tiny", "Q8_0", vocab=VOCAB, layers=1)
    copy, source = GGUFFile(path), GGUFFile(VOCAB)
    assert copy.tensors["token_embd.weight"].shape == (151936, 64)
    for key, value in source.metadata.items():
        if key.startswith("tokenizer."):
            copied = copy.metadata[key]
            if isinstance(value, Strings):
                assert list(copied) == list(value)
            else:
                np.testing.assert_array_equal(copied, value)


def test_split_files_are_one_model(tmp_path: Path) -> None:
    whole = GGUFFile(write_model(tmp_path / "whole.gguf", "tiny", "Q4_K_M"))
    first = write_model(tmp_path / "m.gguf", "tiny", "Q4_K_M", split=3)
    assert first.name == "m-00001-of-00003.gguf"
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("m-*"))]
    assert len(sizes) == 3
    joined = GGUFFile(first)
    assert joined.tensors.keys() == whole.tensors.keys()
    assert all(joined.raw(n).tobytes() == whole.raw(n).tobytes() for n in whole.tensors)
    everything = write_model(tmp_path / "m.gguf", "tiny", split=len(whole.tensors))
    assert len(GGUFFile(everything).tensors) == len(whole.tensors)


def test_overrides_and_arrays(tmp_path: Path) -> None:
    bias = np.arange(64, dtype=np.float32)
    path = write_model(
        tmp_path / "m.gguf",
        "tiny",
        overrides={"qwen35.rope.freq_base": 1e4, "general.name": None},
        arrays={"blk.0.attn_gate.bias": bias, "output_norm.weight": None},
    )
    file = GGUFFile(path)
    assert file.number("qwen35.rope.freq_base") == 1e4
    assert "general.name" not in file.metadata
    assert "output_norm.weight" not in file.tensors
    assert (decoded(path, "blk.0.attn_gate.bias") == bias).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "70b"}, "unknown preset '70b'"),
        ({"dtype": "Q9_Z"}, "unknown type 'Q9_Z'"),
        ({"std": 0.0}, "std 0: expected"),
        ({"std": float("nan")}, "std nan: expected"),
        ({"layers": 0}, "layers 0: expected"),
        ({"split": 0}, "split 0: expected"),
        ({"split": 10_000}, "split 10000: expected"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SynthError, match=message):
        write_model(tmp_path / "m.gguf", **({"preset": "tiny"} | options))


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = write_model(
        tmp_path / "m.gguf", "tiny", progress=lambda done, total: calls.append((done, total))
    )
    total = sum(t.nbytes for t in GGUFFile(path).tensors.values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_script_writes_a_model(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    command = [sys.executable, "tools/synth.py", "tiny", "-o", str(out), "--type", "q4_k_m"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{out}\n", "")
    assert GGUFFile(out).integer("general.file_type") == 15


@pytest.mark.parametrize(
    "arguments",
    [
        ["tiny", "-o", "missing/m.gguf"],
        ["tiny", "-o", "."],
        ["tiny", "-o", "m.gguf", "--vocab", "missing.gguf"],
        ["tiny", "-o", "m.gguf", "--vocab-size", "0"],
        ["tiny", "-o", "m.gguf", "--split", "10000"],
    ],
)
def test_mistakes_give_one_line_and_status_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert synth.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("synth.py: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("arguments", [[], ["big"], ["tiny", "-o", "m", "--type", "Q9"]])
def test_usage_gives_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        synth.main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err
