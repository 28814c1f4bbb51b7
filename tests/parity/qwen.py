"""What the parity cases of the Qwen architectures share: sizes, attention, norms, MoE.

A HybridCase is one model without its linear layers and feed-forward, which the architectures add.
transformers groups the value heads by key head. GGUF does so for qwen3next and tiles them for
qwen35 and qwen35moe; with n_k_heads = ratio that permutation is its own inverse and a wrong
direction would not show, so no case has that. qwen3next has M-RoPE sections nowhere, the other two
must have them, and they reach every rotated pair: llama.cpp leaves the others unrotated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.parity.common import (
    GLOBAL_NAMES,
    Parameters,
    Weights,
    a_log,
    conv,
    dt_bias,
    layer_weights,
    matrix,
    norm_around_0,
    norm_around_1,
    norm_of_both_signs,
    strong,
)
from tests.parity.ffn import expert_parameters, expert_tensors, swiglu_parameters, swiglu_tensors
from tests.parity.routing import Routing

LINEAR, FULL = "linear_attention", "full_attention"
TWO_OF_EIGHT = Routing(8, 2)


@dataclass(frozen=True)
class Scaling:
    """Of the rope; kind `linear` has no more than a factor.

    GGUF's attn_factor multiplies YaRN's own, transformers' attention_factor replaces it.
    """

    kind: str
    factor: float
    n_orig: int = 512
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attn_factor: float = 1.0

    def metadata(self) -> dict[str, Any]:
        yarn = {
            "original_context_length": self.n_orig,
            "yarn_beta_fast": self.beta_fast,
            "yarn_beta_slow": self.beta_slow,
            "attn_factor": self.attn_factor,
        }
        both = {"type": self.kind, "factor": self.factor}
        keys = both | (yarn if self.kind == "yarn" else {})
        return {f"rope.scaling.{key}": value for key, value in keys.items()}

    def config(self) -> dict[str, Any]:
        yarn = {
            "original_max_position_embeddings": self.n_orig,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "attention_factor": self.attn_factor * (1 + 0.1 * math.log(self.factor)),
        }
        both = {"rope_type": self.kind, "factor": self.factor}
        return both | (yarn if self.kind == "yarn" else {})


@dataclass(frozen=True)
class HybridCase:
    """Sizes and switches of one model; the methods are common.Case's.

    Subclasses add `arch`, `routing`, `{linear,ffn}_parameters` and `{linear,ffn}_tensors`, which
    are for one layer, and `transformers_model`.
    """

    name: str
    n_k_heads: int
    n_v_heads: int
    n_heads: int
    n_kv_heads: int
    n_embd: int = 48
    head_dim: int = 16
    n_rot: int = 16
    rope_base: float = 1e4
    scaling: Scaling | None = None
    k_head_dim: int = 16
    v_head_dim: int = 16
    conv_kernel: int = 4
    interval: int = 4
    layers: tuple[str, ...] | None = None  # instead of `interval`
    fused_qkv: bool = False
    eps: float = 1e-6
    tied: bool = False
    n_vocab: int = 96

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

    def linear_parameters(self) -> Parameters:
        raise NotImplementedError

    def linear_tensors(self, w: Weights) -> Weights:
        raise NotImplementedError

    def ffn_parameters(self) -> Parameters:
        raise NotImplementedError

    def ffn_tensors(self, w: Weights) -> Weights:
        raise NotImplementedError

    def parameters(self) -> Parameters:
        output_norm = norm_of_both_signs if self.tied else norm_around_0
        table: Parameters = {
            "model.embed_tokens.weight": ((self.n_vocab, self.n_embd), matrix),
            "model.norm.weight": ((self.n_embd,), output_norm),
        }
        if not self.tied:
            table["lm_head.weight"] = ((self.n_vocab, self.n_embd), matrix)
        for i, kind in enumerate(self.layer_types):
            mixer = self.linear_parameters() if kind == LINEAR else attention_parameters(self)
            layer = mixer | self.ffn_parameters() | norm_parameters(self)
            table |= {f"model.layers.{i}.{name}": entry for name, entry in layer.items()}
        return table

    def gguf_tensors(self, weights: Weights) -> Weights:
        out = {GLOBAL_NAMES[name]: weights[name] for name in GLOBAL_NAMES if name in weights}
        out["output_norm.weight"] = weights["model.norm.weight"] + np.float32(1)
        for i, kind in enumerate(self.layer_types):
            w = layer_weights(weights, i)
            mixer = self.linear_tensors(w) if kind == LINEAR else attention_tensors(self, w)
            layer = mixer | self.ffn_tensors(w) | norm_tensors(w)
            out |= {f"blk.{i}.{name}": values for name, values in layer.items()}
        return out


@dataclass(frozen=True)
class MoECase(HybridCase):
    """A HybridCase whose feed-forward is routed experts and a gated shared expert."""

    routing: Routing = TWO_OF_EIGHT
    n_ff_exp: int = 32
    n_ff_shared: int = 40
    fused_experts: bool = False
    shared_gate_row: bool = False  # ffn_gate_inp_shexp is [1, n_embd] instead of [n_embd]

    def ffn_parameters(self) -> Parameters:
        table = expert_parameters(self.routing.n_experts, self.n_ff_exp, self.n_embd)
        table |= swiglu_parameters("mlp.shared_expert.", self.n_ff_shared, self.n_embd)
        return table | {"mlp.shared_expert_gate.weight": ((1, self.n_embd), strong)}

    def ffn_tensors(self, w: Weights) -> Weights:
        gate = w["mlp.shared_expert_gate.weight"]
        return {
            **expert_tensors(w, self.fused_experts),
            **swiglu_tensors(w, "mlp.shared_expert.", "_shexp"),
            "ffn_gate_inp_shexp.weight": gate if self.shared_gate_row else gate[0],
        }


# Layers, transformers side.


def linear_parameters(c: HybridCase) -> Parameters:
    """A linear layer of qwen35 and qwen35moe."""
    return {
        "linear_attn.in_proj_qkv.weight": ((c.n_conv_rows, c.n_embd), matrix),
        "linear_attn.in_proj_z.weight": ((c.n_v_rows, c.n_embd), matrix),
        "linear_attn.in_proj_b.weight": ((c.n_v_heads, c.n_embd), matrix),
        "linear_attn.in_proj_a.weight": ((c.n_v_heads, c.n_embd), matrix),
        **linear_inner_parameters(c),
    }


def linear_inner_parameters(c: HybridCase) -> Parameters:
    """What the linear layers of all three have after their input projections."""
    return {
        "linear_attn.conv1d.weight": ((c.n_conv_rows, 1, c.conv_kernel), conv),
        "linear_attn.A_log": ((c.n_v_heads,), a_log),
        "linear_attn.dt_bias": ((c.n_v_heads,), dt_bias),
        "linear_attn.norm.weight": ((c.v_head_dim,), norm_around_1),
        "linear_attn.out_proj.weight": ((c.n_embd, c.n_v_rows), matrix),
    }


def attention_parameters(c: HybridCase) -> Parameters:
    return {
        "self_attn.q_proj.weight": ((2 * c.n_heads * c.head_dim, c.n_embd), matrix),
        "self_attn.k_proj.weight": ((c.n_kv_heads * c.head_dim, c.n_embd), matrix),
        "self_attn.v_proj.weight": ((c.n_kv_heads * c.head_dim, c.n_embd), matrix),
        "self_attn.q_norm.weight": ((c.head_dim,), norm_around_0),
        "self_attn.k_norm.weight": ((c.head_dim,), norm_around_0),
        "self_attn.o_proj.weight": ((c.n_embd, c.n_heads * c.head_dim), matrix),
    }


def norm_parameters(c: HybridCase) -> Parameters:
    return {
        "input_layernorm.weight": ((c.n_embd,), norm_around_0),
        "post_attention_layernorm.weight": ((c.n_embd,), norm_around_0),
    }


# GGUF side.


def hybrid_metadata(c: HybridCase) -> dict[str, Any]:
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
    return metadata | (c.scaling.metadata() if c.scaling else {})


def moe_metadata(c: MoECase) -> dict[str, Any]:
    return {
        "expert_count": c.routing.n_experts,
        "expert_used_count": c.routing.n_used,
        "expert_feed_forward_length": c.n_ff_exp,
        "expert_shared_feed_forward_length": c.n_ff_shared,
    }


def linear_tensors(c: HybridCase, w: Weights) -> Weights:
    """A linear layer of qwen35 and qwen35moe, its value heads reordered from grouped to tiled."""
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


def tiled_heads(c: HybridCase) -> NDArray[np.int64]:
    """Entry h: the grouped index of tiled value head h, which reads key head h % n_k_heads."""
    return np.arange(c.n_v_heads).reshape(c.n_k_heads, -1).T.ravel()


def attention_tensors(c: HybridCase, w: Weights) -> Weights:
    q, k, v = (w[f"self_attn.{name}_proj.weight"] for name in "qkv")
    if c.fused_qkv:
        products = {"attn_qkv.weight": np.concatenate([q, k, v])}
    else:
        products = {"attn_q.weight": q, "attn_k.weight": k, "attn_v.weight": v}
    return products | {
        "attn_q_norm.weight": w["self_attn.q_norm.weight"] + np.float32(1),
        "attn_k_norm.weight": w["self_attn.k_norm.weight"] + np.float32(1),
        "attn_output.weight": w["self_attn.o_proj.weight"],
    }


def norm_tensors(w: Weights) -> Weights:
    return {
        "attn_norm.weight": w["input_layernorm.weight"] + np.float32(1),
        "post_attention_norm.weight": w["post_attention_layernorm.weight"] + np.float32(1),
    }


# Arguments of the transformers configuration.


def hybrid_config(c: HybridCase, **rope: Any) -> dict[str, Any]:
    """All but those of the feed-forward; `rope`: more entries of the rope parameters."""
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
            **(c.scaling.config() if c.scaling else {}),
            **rope,
        },
        "attn_implementation": "eager",
    }


def moe_config(c: MoECase) -> dict[str, Any]:
    return {
        "num_experts": c.routing.n_experts,
        "num_experts_per_tok": c.routing.n_used,
        "moe_intermediate_size": c.n_ff_exp,
        "shared_expert_intermediate_size": c.n_ff_shared,
        "experts_implementation": "eager",
    }


def mrope_config(sections: tuple[int, int, int]) -> dict[str, Any]:
    """The rope parameters that qwen35 and qwen35moe add."""
    return {"mrope_section": list(sections), "mrope_interleaved": True}


def mrope_metadata(sections: tuple[int, int, int]) -> dict[str, Any]:
    return {"rope.dimension_sections": np.array([*sections, 0], np.int32)}
