"""Parity cases of `qwen35` (transformers: qwen3_5, text only).

The cases cover, pairwise, value:key head ratio, tied embeddings, epsilon and attention interval.
transformers groups the value heads by key head, GGUF tiles them; with n_k_heads = ratio that
permutation is its own inverse and a wrong direction would not show, so no case has that.
The M-RoPE sections reach every rotated pair: llama.cpp leaves the others unrotated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.parity.common import (
    Draw,
    Shape,
    Weights,
    a_log,
    conv,
    dt_bias,
    matrix,
    norm_around_0,
    norm_around_1,
    norm_of_both_signs,
)

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class Case:
    """Sizes and switches of one model; the methods are common.Case's."""

    name: str
    n_k_heads: int
    n_v_heads: int
    n_heads: int
    n_kv_heads: int
    n_embd: int = 48
    n_ff: int = 80
    head_dim: int = 16
    n_rot: int = 16
    sections: tuple[int, int, int] = (3, 3, 2)
    rope_base: float = 1e4
    k_head_dim: int = 16
    v_head_dim: int = 16
    conv_kernel: int = 4
    interval: int = 4
    layers: tuple[str, ...] | None = None  # instead of `interval`
    eps: float = 1e-6
    tied: bool = False
    n_vocab: int = 96

    arch = "qwen35"

    @property
    def layer_types(self) -> tuple[str, ...]:
        if self.layers is not None:
            return self.layers
        return tuple(LINEAR if (i + 1) % self.interval else FULL for i in range(4))

    @property
    def n_v_rows(self) -> int:
        return self.n_v_heads * self.v_head_dim

    @property
    def n_conv_rows(self) -> int:
        return 2 * self.n_k_heads * self.k_head_dim + self.n_v_rows

    def parameters(self) -> dict[str, tuple[Shape, Draw]]:
        output_norm = norm_of_both_signs if self.tied else norm_around_0
        table: dict[str, tuple[Shape, Draw]] = {
            "model.embed_tokens.weight": ((self.n_vocab, self.n_embd), matrix),
            "model.norm.weight": ((self.n_embd,), output_norm),
        }
        if not self.tied:
            table["lm_head.weight"] = ((self.n_vocab, self.n_embd), matrix)
        for i, kind in enumerate(self.layer_types):
            mixer = linear_parameters(self) if kind == LINEAR else attention_parameters(self)
            layer = mixer | dense_parameters(self) | norm_parameters(self)
            table |= {f"model.layers.{i}.{name}": entry for name, entry in layer.items()}
        return table

    def metadata(self) -> dict[str, Any]:
        return hybrid_metadata(self) | {
            "feed_forward_length": self.n_ff,
            "rope.dimension_sections": np.array([*self.sections, 0], np.int32),
        }

    def gguf_tensors(self, weights: Weights) -> Weights:
        out = {GLOBAL_NAMES[name]: weights[name] for name in GLOBAL_NAMES if name in weights}
        out["output_norm.weight"] = weights["model.norm.weight"] + np.float32(1)
        for i, kind in enumerate(self.layer_types):
            prefix = f"model.layers.{i}."
            w = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            mixer = linear_tensors(self, w) if kind == LINEAR else attention_tensors(w)
            layer = mixer | dense_tensors(w) | norm_tensors(w)
            out |= {f"blk.{i}.{name}": values for name, values in layer.items()}
        return out

    def transformers_model(self) -> Any:
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        config = Qwen3_5TextConfig(**hybrid_config(self), intermediate_size=self.n_ff)
        return Qwen3_5ForCausalLM(config)


GLOBAL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
}


def linear_parameters(c: Case) -> dict[str, tuple[Shape, Draw]]:
    return {
        "linear_attn.in_proj_qkv.weight": ((c.n_conv_rows, c.n_embd), matrix),
        "linear_attn.in_proj_z.weight": ((c.n_v_rows, c.n_embd), matrix),
        "linear_attn.in_proj_b.weight": ((c.n_v_heads, c.n_embd), matrix),
        "linear_attn.in_proj_a.weight": ((c.n_v_heads, c.n_embd), matrix),
        "linear_attn.conv1d.weight": ((c.n_conv_rows, 1, c.conv_kernel), conv),
        "linear_attn.A_log": ((c.n_v_heads,), a_log),
        "linear_attn.dt_bias": ((c.n_v_heads,), dt_bias),
        "linear_attn.norm.weight": ((c.v_head_dim,), norm_around_1),
        "linear_attn.out_proj.weight": ((c.n_embd, c.n_v_rows), matrix),
    }


def attention_parameters(c: Case) -> dict[str, tuple[Shape, Draw]]:
    return {
        "self_attn.q_proj.weight": ((2 * c.n_heads * c.head_dim, c.n_embd), matrix),
        "self_attn.k_proj.weight": ((c.n_kv_heads * c.head_dim, c.n_embd), matrix),
        "self_attn.v_proj.weight": ((c.n_kv_heads * c.head_dim, c.n_embd), matrix),
        "self_attn.q_norm.weight": ((c.head_dim,), norm_around_0),
        "self_attn.k_norm.weight": ((c.head_dim,), norm_around_0),
        "self_attn.o_proj.weight": ((c.n_embd, c.n_heads * c.head_dim), matrix),
    }


def dense_parameters(c: Case) -> dict[str, tuple[Shape, Draw]]:
    return {
        "mlp.gate_proj.weight": ((c.n_ff, c.n_embd), matrix),
        "mlp.up_proj.weight": ((c.n_ff, c.n_embd), matrix),
        "mlp.down_proj.weight": ((c.n_embd, c.n_ff), matrix),
    }


def norm_parameters(c: Case) -> dict[str, tuple[Shape, Draw]]:
    return {
        "input_layernorm.weight": ((c.n_embd,), norm_around_0),
        "post_attention_layernorm.weight": ((c.n_embd,), norm_around_0),
    }


def hybrid_metadata(c: Case) -> dict[str, Any]:
    """The keys that describe attention and linear layers, without the architecture's prefix."""
    metadata: dict[str, Any] = {
        "block_count": len(c.layer_types),
        "context_length": 512,
        "embedding_length": c.n_embd,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.eps,
        "rope.dimension_count": c.n_rot,
        "rope.freq_base": c.rope_base,
        "ssm.conv_kernel": c.conv_kernel,
        "ssm.state_size": c.k_head_dim,
        "ssm.group_count": c.n_k_heads,
        "ssm.time_step_rank": c.n_v_heads,
        "ssm.inner_size": c.n_v_rows,
        "full_attention_interval": c.interval,
    }
    if c.layers is not None:
        metadata["attention.recurrent_layers"] = np.array([kind == LINEAR for kind in c.layers])
    return metadata


def linear_tensors(c: Case, w: Weights) -> Weights:
    """One linear layer, its value heads reordered from grouped to tiled."""
    heads = tiled_heads(c)
    rows = (heads[:, None] * c.v_head_dim + np.arange(c.v_head_dim)).ravel()
    n_qk = c.n_conv_rows - c.n_v_rows
    conv_rows = np.concatenate([np.arange(n_qk), n_qk + rows])
    p = "linear_attn."
    return {
        "attn_qkv.weight": w[p + "in_proj_qkv.weight"][conv_rows],
        "attn_gate.weight": w[p + "in_proj_z.weight"][rows],
        "ssm_beta.weight": w[p + "in_proj_b.weight"][heads],
        "ssm_alpha.weight": w[p + "in_proj_a.weight"][heads],
        "ssm_conv1d.weight": w[p + "conv1d.weight"][conv_rows, 0],
        "ssm_a": -np.exp(w[p + "A_log"])[heads],
        "ssm_dt.bias": w[p + "dt_bias"][heads],
        "ssm_norm.weight": w[p + "norm.weight"],
        "ssm_out.weight": w[p + "out_proj.weight"][:, rows],
    }


def tiled_heads(c: Case) -> NDArray[np.int64]:
    """Entry h: the grouped index of tiled value head h, which reads key head h % n_k_heads."""
    return np.arange(c.n_v_heads).reshape(c.n_k_heads, -1).T.ravel()


def attention_tensors(w: Weights) -> Weights:
    return {
        "attn_q.weight": w["self_attn.q_proj.weight"],
        "attn_k.weight": w["self_attn.k_proj.weight"],
        "attn_v.weight": w["self_attn.v_proj.weight"],
        "attn_q_norm.weight": w["self_attn.q_norm.weight"] + np.float32(1),
        "attn_k_norm.weight": w["self_attn.k_norm.weight"] + np.float32(1),
        "attn_output.weight": w["self_attn.o_proj.weight"],
    }


def dense_tensors(w: Weights) -> Weights:
    return {f"ffn_{name}.weight": w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}


def norm_tensors(w: Weights) -> Weights:
    return {
        "attn_norm.weight": w["input_layernorm.weight"] + np.float32(1),
        "post_attention_norm.weight": w["post_attention_layernorm.weight"] + np.float32(1),
    }


def hybrid_config(c: Case) -> dict[str, Any]:
    """Arguments of the transformers configuration, without those of the feed-forward."""
    return {
        "vocab_size": c.n_vocab,
        "hidden_size": c.n_embd,
        "num_hidden_layers": len(c.layer_types),
        "layer_types": list(c.layer_types),
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "linear_num_key_heads": c.n_k_heads,
        "linear_num_value_heads": c.n_v_heads,
        "linear_key_head_dim": c.k_head_dim,
        "linear_value_head_dim": c.v_head_dim,
        "linear_conv_kernel_dim": c.conv_kernel,
        "rms_norm_eps": c.eps,
        "tie_word_embeddings": c.tied,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": c.rope_base,
            "partial_rotary_factor": c.n_rot / c.head_dim,
            "mrope_section": list(c.sections),
            "mrope_interleaved": True,
        },
        "attn_implementation": "eager",
    }


# fmt: off
CASES = (
    Case("ratio1", 4, 4, n_heads=4, n_kv_heads=2, n_embd=32),
    Case("ratio1-tied", 3, 3, n_heads=4, n_kv_heads=1, n_embd=64, interval=2, eps=1e-5, tied=True,
         k_head_dim=32, v_head_dim=32, head_dim=32, n_rot=8, sections=(2, 1, 1), rope_base=1e6),
    Case("ratio2", 4, 8, n_heads=4, n_kv_heads=4, eps=1e-5, n_rot=4, sections=(1, 1, 0),
         rope_base=1e7),
    Case("ratio2-tied", 3, 6, n_heads=6, n_kv_heads=3, interval=2, tied=True, n_vocab=97,
         head_dim=32, n_rot=32, sections=(6, 5, 5)),
    Case("ratio3", 2, 6, n_heads=4, n_kv_heads=1, interval=2, k_head_dim=32, v_head_dim=32,
         head_dim=32, n_rot=16, sections=(11, 11, 10), rope_base=1e7),
    Case("ratio3-tied", 2, 6, n_heads=3, n_kv_heads=3, n_embd=64, n_ff=160, eps=1e-5, tied=True),
    # Layers that no interval describes; the converter still writes 4 beside them.
    Case("irregular", 1, 3, n_heads=4, n_kv_heads=2, conv_kernel=3,
         layers=(FULL, LINEAR, LINEAR, FULL, LINEAR)),
    # llama.cpp demands equal head sizes, transformers doesn't.
    Case("unequal-dims", 4, 8, n_heads=6, n_kv_heads=2, interval=2, eps=1e-5, conv_kernel=2,
         k_head_dim=32, v_head_dim=16, n_vocab=128),
)
# fmt: on
