"""Presets of Kimi Linear (`kimi-linear`): KDA and MLA layers, MoE after the first ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.presets.base import Preset, Shapes, dense, experts, qkv

_SIGMOID = 2


@dataclass(frozen=True, kw_only=True)
class KimiPreset(Preset):
    """Defaults are those of 48B-A3B. `mla_layers` count from 0; `n_ff` is the width of the first
    `n_dense_layers`. `legacy_kv_b`: as in old files, one attn_kv_b instead of attn_k_b and
    attn_v_b."""

    arch: str = "kimi-linear"
    n_vocab: int = 163840
    n_heads: int = 32
    eps: float = 1e-5
    context_length: int = 1048576
    mla_layers: tuple[int, ...] = (3, 7, 11, 15, 19, 23, 26)
    kda_dim: int = 128
    kv_lora_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    v_dim: int = 128
    rope_base: float = 1e4
    n_dense_layers: int = 1
    n_experts: int = 256
    n_experts_used: int = 8
    n_ff_exp: int = 1024
    n_shared_experts: int = 1
    expert_scale: float = 2.446
    legacy_kv_b: bool = False

    def is_linear(self, layer: int) -> bool:
        return layer not in self.mla_layers

    def layer(self, layer: int) -> Shapes:
        shapes: Shapes = {"attn_norm.weight": (self.n_embd,)}
        shapes |= self._kda() if self.is_linear(layer) else self._mla()
        shapes["ffn_norm.weight"] = (self.n_embd,)
        if layer < self.n_dense_layers:
            return shapes | dense(self)
        shared = self.n_ff_exp * self.n_shared_experts
        return shapes | experts(self, shared) | {"exp_probs_b.bias": (self.n_experts,)}

    def _kda(self) -> Shapes:
        n, head_dim = self.n_heads * self.kda_dim, self.kda_dim
        conv = {f"ssm_conv1d_{x}.weight": (1, n, 1, self.conv_kernel) for x in "qkv"}
        shapes = qkv(self, n, n, n) | conv
        return shapes | {
            "ssm_f_a.weight": (head_dim, self.n_embd),
            "ssm_f_b.weight": (n, head_dim),
            "ssm_beta.weight": (self.n_heads, self.n_embd),
            "ssm_a": (1, 1, self.n_heads, 1),
            "ssm_dt.bias": (n,),
            "ssm_g_a.weight": (head_dim, self.n_embd),
            "ssm_g_b.weight": (n, head_dim),
            "ssm_norm.weight": (head_dim,),
            "attn_output.weight": (self.n_embd, n),
        }

    def _mla(self) -> Shapes:
        n, rank, nope, v = self.n_heads, self.kv_lora_rank, self.nope_dim, self.v_dim
        kv: Shapes = {"attn_k_b.weight": (n, rank, nope), "attn_v_b.weight": (n, v, rank)}
        if self.legacy_kv_b:
            kv = {"attn_kv_b.weight": (n * (nope + v), rank)}
        return kv | {
            "attn_q.weight": (n * (nope + self.rope_dim), self.n_embd),
            "attn_kv_a_mqa.weight": (rank + self.rope_dim, self.n_embd),
            "attn_kv_a_norm.weight": (rank,),
            "attn_output.weight": (self.n_embd, n * v),
        }

    def own_metadata(self) -> dict[str, Any]:
        is_mla = [not self.is_linear(i) for i in range(self.n_layers)]
        return {
            "vocab_size": self.n_vocab,
            "attention.head_count_kv": np.array(is_mla, np.int32),
            "attention.kv_lora_rank": self.kv_lora_rank,
            "attention.key_length": self.kv_lora_rank + self.rope_dim,
            # Means nothing, but converted files have it.
            "attention.value_length": self.n_embd // self.n_heads,
            "attention.key_length_mla": self.nope_dim + self.rope_dim,
            "attention.value_length_mla": self.v_dim,
            "rope.dimension_count": self.rope_dim,
            "rope.freq_base": self.rope_base,
            "kda.head_dim": self.kda_dim,
            "leading_dense_block_count": self.n_dense_layers,
            "expert_shared_count": self.n_shared_experts,
            "expert_weights_scale": self.expert_scale,
            "expert_gating_func": _SIGMOID,
        }


# No tensor has two equal dimensions; rows are multiples of 32, but not of 256; eps is the one with
# which llama.cpp and transformers agree.
TINY: dict[str, Any] = {
    "n_embd": 64,
    "n_ff": 192,
    "n_heads": 4,
    "kda_dim": 32,
    "kv_lora_rank": 128,
    "nope_dim": 96,
    "rope_dim": 16,
    "v_dim": 160,
    "n_experts": 8,
    "n_experts_used": 2,
    "n_ff_exp": 32,
    "n_shared_experts": 3,
    "eps": 1e-6,
    "context_length": 4096,
    "n_vocab": 0,
}

PRESETS = (
    KimiPreset(name="tiny-kimi", n_layers=5, mla_layers=(2, 4), **TINY),
    KimiPreset(name="kimi-48b", n_layers=27, n_embd=2304, n_ff=9216),
)
