"""Trained weights to the GGUF file that ships with the engine, and what is told about it beside it.

    python tools/train_demo/convert.py build/demo-run --corpus build/demo-corpus -o engine/data

Writes demo.gguf, demo.json (how it was made, what it can do) and heldout.txt.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.formats.quants import quantize_q8_0
from tools.ggufwrite import TensorSpec, write_gguf
from tools.train_demo.dialog import TEMPLATE
from tools.train_demo.tokenizer import gguf_vocabulary
from tools.train_demo.weights import load_weights

F32 = NDArray[np.float32]
FILE_TYPES = {"F32": 0, "Q8_0": 7, "BF16": 32}
_GGML_IDS = {"F32": 0, "Q8_0": 8, "BF16": 30}
LICENCE = "MIT"
DESCRIPTION = (
    "A hybrid model of ten million parameters, six delta-net layers and two of full attention. It "
    "adds, subtracts and multiplies two-digit numbers, sorts and repeats short lists, counts, "
    "answers questions about a text, calls functions, and writes JSON; asked to, it thinks before "
    "it answers. Trained from scratch for minutes, on generated tasks and the standard library of "
    "Python; it knows nothing else."
)
# Names within a layer: transformers', and GGUF's.
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
}
# Of the layer for drafts, beside those of a layer.
MTP_NAMES = {
    "fc.weight": "nextn.eh_proj.weight",
    "pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}


def gguf_tensors(weights: dict[str, F32]) -> dict[str, F32]:
    """Weights by their GGUF names. There is a value head for each key head, so none move.

    The layer for drafts, if there is one, comes after the trunk's.
    """
    n_layers = n_trunk_layers(weights)
    out = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"] + np.float32(1),
    }
    for name, values in weights.items():
        layer, inner = _place(name, n_layers)
        if layer is None:
            continue
        target = LAYER_NAMES.get(inner) or MTP_NAMES[inner]
        if target == "ssm_a":
            values = -np.exp(values)
        elif target == "ssm_conv1d.weight":
            values = values[:, 0]
        elif target.endswith("norm.weight") and target != "ssm_norm.weight":
            values = values + np.float32(1)
        out[f"blk.{layer}.{target}"] = values
    return out


def n_trunk_layers(weights: Iterable[str]) -> int:
    """How many layers names of weights have, without the layer for drafts."""
    return len({n.split(".")[2] for n in weights if n.startswith("model.layers.")})


def _place(name: str, n_layers: int) -> tuple[int | None, str]:
    """The layer that a weight is of (None: of none), and its name there."""
    if name.startswith("mtp."):
        return n_layers, name.removeprefix("mtp.").removeprefix("layers.0.")
    if not name.startswith("model.layers."):
        return None, name
    layer, inner = name.removeprefix("model.layers.").split(".", 1)
    return int(layer), inner


def metadata(sizes: dict[str, Any], dtype: str, made: str, n_mtp: int = 0) -> dict[str, Any]:
    """All keys but those of the tokenizer; `n_mtp` layers for drafts follow the trunk's."""
    n_linear = sizes["n_linear_heads"]
    linear = [bool((i + 1) % sizes["interval"]) for i in range(sizes["n_layers"])]
    own = {
        "block_count": sizes["n_layers"] + n_mtp,
        **({"nextn_predict_layers": n_mtp} if n_mtp else {}),
        "context_length": sizes["n_ctx"],
        "embedding_length": sizes["n_embd"],
        "feed_forward_length": sizes["n_ff"],
        "attention.head_count": sizes["n_heads"],
        "attention.head_count_kv": sizes["n_kv_heads"],
        "attention.key_length": sizes["head_dim"],
        "attention.value_length": sizes["head_dim"],
        "attention.layer_norm_rms_epsilon": float(sizes["eps"]),
        "attention.recurrent_layers": np.array(linear + [False] * n_mtp),
        "full_attention_interval": sizes["interval"],
        "rope.dimension_count": sizes["n_rot"],
        "rope.dimension_sections": np.array([*sizes["sections"], 0], np.int32),
        "rope.freq_base": float(sizes["rope_base"]),
        "ssm.conv_kernel": sizes["conv_kernel"],
        "ssm.state_size": sizes["head_dim"],
        "ssm.group_count": n_linear,
        "ssm.time_step_rank": n_linear,
        "ssm.inner_size": n_linear * sizes["head_dim"],
    }
    return {
        "general.architecture": "qwen35",
        "general.type": "model",
        "general.name": "gdn-engine demo",
        "general.description": f"{DESCRIPTION} {made}",
        "general.license": LICENCE,
        "general.size_label": "10M",
        "general.languages": ["en"],
        "general.file_type": FILE_TYPES[dtype],
        "general.quantization_version": 2,
        "general.sampling.temp": 0.0,  # what it answers is right or wrong
        **{f"qwen35.{key}": value for key, value in own.items()},
        "tokenizer.chat_template": TEMPLATE,
    }


def tensor_specs(tensors: dict[str, F32], dtype: str) -> list[TensorSpec]:
    """The tensors as a file of that type stores them."""
    specs = []
    for name, values in tensors.items():
        is_matrix = values.ndim == 2 and name.endswith(".weight") and "conv1d" not in name
        kind = dtype if is_matrix else "F32"
        data = _stored(np.ascontiguousarray(values, np.float32), kind)
        blocks = [data]
        specs.append(
            TensorSpec(name, values.shape, _GGML_IDS[kind], len(data), partial(list, blocks))
        )
    return specs


def _stored(values: F32, kind: str) -> bytes:
    if kind == "Q8_0":
        return quantize_q8_0(values).tobytes()
    if kind == "BF16":  # exact: the weights were rounded to bfloat16 before
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.tobytes()


def how_made(facts: dict[str, Any]) -> str:
    """The training run in a sentence."""
    return (
        f"{facts['tokens'] / 1e6:.0f} million tokens in {facts['seconds']:.0f} s on "
        f"{facts['device']}; text: {facts['corpus']['source']}."
    )


def convert(run: Path, corpus: Path, path: Path, dtype: str) -> dict[str, Any]:
    """Write the GGUF file of a training run; returns what run.json says."""
    facts: dict[str, Any] = json.loads((run / "run.json").read_text())
    weights = load_weights(run)
    n_mtp = int("mtp.fc.weight" in weights)
    values = metadata(facts["sizes"], dtype, how_made(facts), n_mtp)
    values |= gguf_vocabulary(corpus / "tokenizer.json")
    write_gguf(path, values, tensor_specs(gguf_tensors(weights), dtype))
    return facts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="what train.py left")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, default=Path("engine/data"))
    parser.add_argument("--type", choices=FILE_TYPES, default="Q8_0")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = convert(args.run, args.corpus, args.out / "demo.gguf", args.type)
    (args.out / "demo.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.copy(args.corpus / "heldout.txt", args.out / "heldout.txt")
    print(f"{args.out / 'demo.gguf'}: {(args.out / 'demo.gguf').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
