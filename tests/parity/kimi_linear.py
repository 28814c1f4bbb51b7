"""Parity cases of `kimi-linear` (transformers: kimi_linear).

KDA and MLA layers follow no period. The GGUF writing switches choose between the forms that files
of different age have: fused or separate q, k, v; attn_kv_b or its two halves; the number of
dimensions of convolutions and decays. No norm is zero-centred and embeddings are never tied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.parity.common import (
    GLOBAL_NAMES,
    Parameters,
    Shape,
    Weights,
    a_log,
    conv,
    dt_bias,
    layer_weights,
    matrix,
    norm_around_1,
    strong,
)
from tests.parity.ffn import expert_parameters, expert_tensors, swiglu_parameters, swiglu_tensors
from tests.parity.routing import Routing

KDA, MLA = "linear_attention", "full_attention"
SIGMOID = 2  # expert_gating_func
TWO_OF_EIGHT = Routing(8, 2, sigmoid=True)


@dataclass(frozen=True)
class Case:
    """Sizes and switches of one model; the methods are common.Case's."""

    name: str
    layers: tuple[str, ...]
    n_heads: int = 4
    n_embd: int = 48
    kda_head_dim: int = 16
    conv_kernel: int = 4
    n_latent: int = 24
    nope_dim: int = 16
    pe_dim: int = 8
    v_head_dim: int = 16
    n_dense: int = 1  # leading layers with a dense feed-forward
    n_ff: int = 80
    n_ff_exp: int = 32
    n_shared: int = 1
    routing: Routing = TWO_OF_EIGHT
    expert_scale: float = 2.446
    eps: float = 1e-5
    n_vocab: int = 96
    # How the GGUF file is written.
    fused_qkv: bool = False
    old_kv_b: bool = False
    conv_4d: bool = True
    decay_4d: bool = True

    arch = "kimi-linear"
    tied = False

    @property
    def qk_head_dim(self) -> int:
        return self.nope_dim + self.pe_dim

    @property
    def n_kda_rows(self) -> int:
        return self.n_heads * self.kda_head_dim

    def parameters(self) -> Parameters:
        table: Parameters = {
            "model.embed_tokens.weight": ((self.n_vocab, self.n_embd), matrix),
            "model.norm.weight": ((self.n_embd,), norm_around_1),
            "lm_head.weight": ((self.n_vocab, self.n_embd), matrix),
        }
        for i, kind in enumerate(self.layers):
            mixer = kda_parameters(self) if kind == KDA else mla_parameters(self)
            dense = i < self.n_dense
            ffn = swiglu_parameters("mlp.", self.n_ff, self.n_embd) if dense else moe(self)
            layer = mixer | ffn | norm_parameters(self)
            table |= {f"model.layers.{i}.{name}": entry for name, entry in layer.items()}
        return table

    def metadata(self) -> dict[str, Any]:
        return mixer_metadata(self) | ffn_metadata(self)

    def gguf_tensors(self, weights: Weights) -> Weights:
        out = {GLOBAL_NAMES[name]: weights[name] for name in GLOBAL_NAMES if name in weights}
        out["output_norm.weight"] = weights["model.norm.weight"]
        for i, kind in enumerate(self.layers):
            w = layer_weights(weights, i)
            mixer = self.mixer_tensors(kind, w)
            ffn = swiglu_tensors(w, "mlp.") if i < self.n_dense else moe_tensors(w)
            norms = {
                "attn_norm.weight": w["input_layernorm.weight"],
                "ffn_norm.weight": w["post_attention_layernorm.weight"],
            }
            out |= {f"blk.{i}.{k}": values for k, values in (mixer | ffn | norms).items()}
        return out

    def mixer_tensors(self, kind: str, w: Weights) -> Weights:
        return kda_tensors(self, w) if kind == KDA else mla_tensors(self, w)

    def transformers_model(self) -> Any:
        from transformers import KimiLinearConfig, KimiLinearForCausalLM

        return KimiLinearForCausalLM(KimiLinearConfig(**mixer_config(self), **ffn_config(self)))


# Distributions.


def small_latent(n_latent: int) -> Any:
    """For attn_kv_a: latents so small that the epsilon of their norm shows, then key parts."""

    def draw(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
        std = np.where(np.arange(shape[0]) < n_latent, 0.002, 0.2)
        return std[:, None] * rng.standard_normal(shape)

    return draw


def choice_bias(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
    return rng.uniform(-0.3, 0.3, shape)


# Layers, transformers side.


def kda_parameters(c: Case) -> Parameters:
    projections = {
        f"self_attn.{name}_proj.weight": ((c.n_kda_rows, c.n_embd), matrix) for name in "qkv"
    }
    low_rank: Parameters = {}
    for gate, prefix in (("f", "self_attn.forget_gate."), ("g", "self_attn.")):
        low_rank |= {
            f"{prefix}{gate}_a_proj.weight": ((c.kda_head_dim, c.n_embd), strong),
            f"{prefix}{gate}_b_proj.weight": ((c.n_kda_rows, c.kda_head_dim), strong),
        }
    return {
        **projections,
        **low_rank,
        "self_attn.conv1d.weight": ((3 * c.n_kda_rows, 1, c.conv_kernel), conv),
        "self_attn.forget_gate.A_log": ((1, 1, c.n_heads, 1), a_log),
        "self_attn.forget_gate.dt_bias": ((c.n_kda_rows,), dt_bias),
        "self_attn.b_proj.weight": ((c.n_heads, c.n_embd), strong),
        "self_attn.o_norm.weight": ((c.kda_head_dim,), norm_around_1),
        "self_attn.o_proj.weight": ((c.n_embd, c.n_kda_rows), matrix),
    }


def mla_parameters(c: Case) -> Parameters:
    n_kv_b = c.n_heads * (c.nope_dim + c.v_head_dim)
    return {
        "self_attn.q_proj.weight": ((c.n_heads * c.qk_head_dim, c.n_embd), strong),
        "self_attn.kv_a_proj_with_mqa.weight": (
            (c.n_latent + c.pe_dim, c.n_embd),
            small_latent(c.n_latent),
        ),
        "self_attn.kv_a_layernorm.weight": ((c.n_latent,), norm_around_1),
        "self_attn.kv_b_proj.weight": ((n_kv_b, c.n_latent), strong),
        "self_attn.o_proj.weight": ((c.n_embd, c.n_heads * c.v_head_dim), matrix),
    }


def moe(c: Case) -> Parameters:
    n_experts = c.routing.n_experts
    return {
        **expert_parameters(n_experts, c.n_ff_exp, c.n_embd),
        "mlp.gate.e_score_correction_bias": ((n_experts,), choice_bias),
        **swiglu_parameters("mlp.shared_experts.", c.n_ff_exp * c.n_shared, c.n_embd),
    }


def norm_parameters(c: Case) -> Parameters:
    return {
        "input_layernorm.weight": ((c.n_embd,), norm_around_1),
        "post_attention_layernorm.weight": ((c.n_embd,), norm_around_1),
    }


# GGUF side.


def mixer_metadata(c: Case) -> dict[str, Any]:
    n_kv_heads = c.n_heads if c.old_kv_b else 1  # of MLA layers; only that it isn't 0 matters
    return {
        "block_count": len(c.layers),
        "context_length": 512,
        "embedding_length": c.n_embd,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": np.array(
            [0 if kind == KDA else n_kv_heads for kind in c.layers], np.int32
        ),
        "attention.layer_norm_rms_epsilon": c.eps,
        "attention.kv_lora_rank": c.n_latent,
        "attention.key_length": c.n_latent + c.pe_dim,
        # What the converter leaves there; of no meaning.
        "attention.value_length": c.n_embd // c.n_heads,
        "attention.key_length_mla": c.qk_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        "rope.dimension_count": c.pe_dim,
        "kda.head_dim": c.kda_head_dim,
        "ssm.conv_kernel": c.conv_kernel,
    }


def ffn_metadata(c: Case) -> dict[str, Any]:
    metadata = {
        "feed_forward_length": c.n_ff,
        "leading_dense_block_count": c.n_dense,
        "expert_count": c.routing.n_experts,
        "expert_used_count": c.routing.n_used,
        "expert_feed_forward_length": c.n_ff_exp,
        "expert_shared_count": c.n_shared,
        "expert_weights_scale": c.expert_scale,
        "expert_gating_func": SIGMOID,
    }
    if c.routing.n_groups > 1:
        metadata["expert_group_count"] = c.routing.n_groups
        metadata["expert_group_used_count"] = c.routing.n_groups_used
    return metadata


def kda_tensors(c: Case, w: Weights) -> Weights:
    p, gate = "self_attn.", "self_attn.forget_gate."
    q, k, v = (w[f"{p}{name}_proj.weight"] for name in "qkv")
    if c.fused_qkv:
        products = {"attn_qkv.weight": np.concatenate([q, k, v])}
    else:
        products = {"attn_q.weight": q, "attn_k.weight": k, "attn_v.weight": v}
    conv_shape = (c.n_kda_rows, 1, c.conv_kernel)
    decay = -np.exp(w[gate + "A_log"])
    return {
        **products,
        **{
            f"ssm_conv1d_{name}.weight": taps.reshape((1, *conv_shape) if c.conv_4d else conv_shape)
            for name, taps in zip("qkv", np.split(w[p + "conv1d.weight"], 3), strict=True)
        },
        "ssm_f_a.weight": w[gate + "f_a_proj.weight"],
        "ssm_f_b.weight": w[gate + "f_b_proj.weight"],
        "ssm_beta.weight": w[p + "b_proj.weight"],
        "ssm_a": decay if c.decay_4d else decay.reshape(c.n_heads, 1),
        "ssm_dt.bias": w[gate + "dt_bias"],
        "ssm_g_a.weight": w[p + "g_a_proj.weight"],
        "ssm_g_b.weight": w[p + "g_b_proj.weight"],
        "ssm_norm.weight": w[p + "o_norm.weight"],
        "attn_output.weight": w[p + "o_proj.weight"],
    }


def mla_tensors(c: Case, w: Weights) -> Weights:
    p = "self_attn."
    kv_b = w[p + "kv_b_proj.weight"]
    if c.old_kv_b:
        latent_products = {"attn_kv_b.weight": kv_b}
    else:
        per_head = kv_b.reshape(c.n_heads, c.nope_dim + c.v_head_dim, c.n_latent)
        k_b, v_b = np.split(per_head, [c.nope_dim], axis=1)
        latent_products = {"attn_k_b.weight": k_b.transpose(0, 2, 1), "attn_v_b.weight": v_b}
    return {
        "attn_q.weight": w[p + "q_proj.weight"],
        "attn_kv_a_mqa.weight": w[p + "kv_a_proj_with_mqa.weight"],
        "attn_kv_a_norm.weight": w[p + "kv_a_layernorm.weight"],
        **latent_products,
        "attn_output.weight": w[p + "o_proj.weight"],
    }


def moe_tensors(w: Weights) -> Weights:
    return {
        **expert_tensors(w),
        "exp_probs_b.bias": w["mlp.gate.e_score_correction_bias"],
        **swiglu_tensors(w, "mlp.shared_experts.", "_shexp"),
    }


# Arguments of the transformers configuration.


def mixer_config(c: Case) -> dict[str, Any]:
    return {
        "vocab_size": c.n_vocab,
        **dict.fromkeys(
            ["bos_token_id", "eos_token_id", "pad_token_id"]
        ),  # defaults exceed n_vocab
        "hidden_size": c.n_embd,
        "num_hidden_layers": len(c.layers),
        "layer_types": list(c.layers),
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_heads,
        "kv_lora_rank": c.n_latent,
        "qk_nope_head_dim": c.nope_dim,
        "qk_rope_head_dim": c.pe_dim,
        "v_head_dim": c.v_head_dim,
        "linear_head_dim": c.kda_head_dim,
        "linear_num_heads": c.n_heads,
        "linear_conv_kernel_dim": c.conv_kernel,
        "rms_norm_eps": c.eps,
        "max_position_embeddings": 512,
        "attn_implementation": "eager",
    }


def ffn_config(c: Case) -> dict[str, Any]:
    n_moe = len(c.layers) - c.n_dense
    return {
        "intermediate_size": c.n_ff,
        "mlp_layer_types": ["dense"] * c.n_dense + ["sparse"] * n_moe,
        "moe_intermediate_size": c.n_ff_exp,
        "n_shared_experts": c.n_shared,
        "num_local_experts": c.routing.n_experts,
        "num_experts_per_tok": c.routing.n_used,
        "n_group": c.routing.n_groups,
        "topk_group": c.routing.n_groups_used,
        "norm_topk_prob": True,
        "routed_scaling_factor": c.expert_scale,
        "experts_implementation": "eager",
    }


# fmt: off
CASES = (
    Case("split-kv-b", (KDA, MLA, KDA, KDA, MLA)),
    Case("old-kv-b", (MLA, KDA, KDA, MLA), n_heads=3, v_head_dim=24, pe_dim=16, conv_4d=False,
         decay_4d=False, eps=1e-6, n_dense=2, n_shared=2, expert_scale=1.5, old_kv_b=True),
    Case("fused-qkv", (KDA, KDA, MLA), nope_dim=8, kda_head_dim=32, n_latent=32, conv_kernel=3,
         n_dense=0, routing=Routing(4, 3, sigmoid=True), fused_qkv=True, decay_4d=False),
    Case("groups", (KDA, MLA, MLA, KDA), n_heads=6, v_head_dim=8, conv_4d=False, eps=1e-6,
         routing=Routing(12, 3, sigmoid=True, n_groups=4, n_groups_used=2), expert_scale=0.7),
)
# fmt: on
