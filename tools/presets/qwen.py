"""Presets of Qwen3.5, dense (`qwen35`) and MoE (`qwen35moe`), and Qwen3-Next (`qwen3next`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.presets.base import Preset, Shapes, dense, experts, qkv


@dataclass(frozen=True, kw_only=True)
class QwenPreset(Preset):
    """A dense Qwen3.5; the MoE models add experts to it."""

    arch: str = "qwen35"
    n_vocab: int = 248320
    n_heads: int = 16
    n_v_heads: int = 16
    n_kv_heads: int = 2
    n_k_heads: int = 16
    head_dim: int = 256
    k_dim: int = 128
    v_dim: int = 128
    full_attention_interval: int = 4
    n_rot: int = 64
    rope_base: float = 1e7
    rope_sections: tuple[int, ...] = (11, 11, 10, 0)
    n_ff_shared: int = 0

    def is_linear(self, layer: int) -> bool:
        return (layer + 1) % self.full_attention_interval != 0

    def layer(self, layer: int) -> Shapes:
        shapes: Shapes = {"attn_norm.weight": (self.n_embd,)}
        shapes |= self._linear() if self.is_linear(layer) else self._attention()
        shapes["post_attention_norm.weight"] = (self.n_embd,)
        if not self.n_experts:
            return shapes | dense(self)
        shapes |= experts(self, self.n_ff_shared)
        return shapes | {"ffn_gate_inp_shexp.weight": (1, self.n_embd)}

    def _linear(self) -> Shapes:
        n_v = self.n_v_heads * self.v_dim
        shapes = self._inputs() | self._gates()
        return shapes | {
            "ssm_conv1d.weight": (2 * self.n_k_heads * self.k_dim + n_v, self.conv_kernel),
            "ssm_a": (self.n_v_heads,),
            "ssm_dt.bias": (self.n_v_heads,),
            "ssm_norm.weight": (self.v_dim,),
            "ssm_out.weight": (self.n_embd, n_v),
        }

    def _inputs(self) -> Shapes:
        n_v = self.n_v_heads * self.v_dim
        return {
            "attn_qkv.weight": (2 * self.n_k_heads * self.k_dim + n_v, self.n_embd),
            "attn_gate.weight": (n_v, self.n_embd),
        }

    def _gates(self) -> Shapes:
        return {
            "ssm_beta.weight": (self.n_v_heads, self.n_embd),
            "ssm_alpha.weight": (self.n_v_heads, self.n_embd),
        }

    def _attention(self) -> Shapes:
        n_q, n_kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return qkv(self, 2 * n_q, n_kv, n_kv) | {
            "attn_q_norm.weight": (self.head_dim,),
            "attn_k_norm.weight": (self.head_dim,),
            "attn_output.weight": (self.n_embd, n_q),
        }

    def own_metadata(self) -> dict[str, Any]:
        values = {
            "attention.head_count_kv": self.n_kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.recurrent_layers": np.array(
                [self.is_linear(i) for i in range(self.n_layers)]
            ),
            "full_attention_interval": self.full_attention_interval,
            "rope.dimension_count": self.n_rot,
            "rope.freq_base": float(self.rope_base),
            "ssm.state_size": self.k_dim,
            "ssm.group_count": self.n_k_heads,
            "ssm.time_step_rank": self.n_v_heads,
            "ssm.inner_size": self.n_v_heads * self.v_dim,
        }
        if self.rope_sections:
            values["rope.dimension_sections"] = np.array(self.rope_sections, np.int32)
        if self.n_experts:
            values["expert_shared_feed_forward_length"] = self.n_ff_shared
        return values


@dataclass(frozen=True, kw_only=True)
class Qwen35MoePreset(QwenPreset):
    """The experts' defaults are 35B-A3B's."""

    arch: str = "qwen35moe"
    n_experts: int = 256
    n_experts_used: int = 8
    n_ff_exp: int = 512
    n_ff_shared: int = 512


@dataclass(frozen=True, kw_only=True)
class Qwen3NextPreset(QwenPreset):
    """The experts' defaults are 80B-A3B's. `legacy_ssm_in`: as in old files, one ssm_in instead
    of attn_qkv and attn_gate."""

    arch: str = "qwen3next"
    n_vocab: int = 151936
    n_ff: int = 5120
    n_experts: int = 512
    n_experts_used: int = 10
    n_ff_exp: int = 512
    n_ff_shared: int = 512
    rope_sections: tuple[int, ...] = ()
    legacy_ssm_in: bool = False

    def _inputs(self) -> Shapes:
        shapes = super()._inputs()
        if self.legacy_ssm_in:
            shapes = {"ssm_in.weight": (sum(rows for rows, _ in shapes.values()), self.n_embd)}
        return shapes

    def _gates(self) -> Shapes:
        return {"ssm_ba.weight": (2 * self.n_v_heads, self.n_embd)}


def _experts(n: int, n_used: int, n_ff: int, n_ff_shared: int) -> dict[str, Any]:
    return {"n_experts": n, "n_experts_used": n_used, "n_ff_exp": n_ff, "n_ff_shared": n_ff_shared}


_TINY: dict[str, Any] = {"head_dim": 32, "n_rot": 16, "context_length": 4096, "n_vocab": 0}
# No row is a multiple of 256: K-quants fall back to types with blocks of 32.
_NARROW = _TINY | {"n_embd": 64, "n_heads": 4, "n_v_heads": 4, "k_dim": 16, "v_dim": 16}
# Every row is a multiple of 256.
_WIDE = _TINY | {"n_embd": 256, "n_heads": 8, "n_v_heads": 8, "k_dim": 32, "v_dim": 32}
_LARGE: dict[str, Any] = {"n_heads": 32, "n_v_heads": 64}

PRESETS: tuple[QwenPreset, ...] = (
    QwenPreset(name="tiny", n_layers=4, n_ff=192, n_k_heads=4, tied=True, **_NARROW),
    QwenPreset(name="tiny-untied", n_layers=4, n_ff=512, n_k_heads=4, **_WIDE),
    QwenPreset(name="0.8b", n_layers=24, n_embd=1024, n_ff=3584, n_heads=8, tied=True),
    QwenPreset(name="2b", n_layers=24, n_embd=2048, n_ff=6144, n_heads=8, tied=True),
    QwenPreset(
        name="4b", n_layers=32, n_embd=2560, n_ff=9216, n_kv_heads=4, n_v_heads=32, tied=True
    ),
    QwenPreset(name="9b", n_layers=32, n_embd=4096, n_ff=12288, n_kv_heads=4, n_v_heads=32),
    QwenPreset(
        name="27b", n_layers=64, n_embd=5120, n_ff=17408, n_heads=24, n_kv_heads=4, n_v_heads=48
    ),
    Qwen35MoePreset(
        name="tiny-moe", n_layers=4, n_k_heads=2, tied=True, **_NARROW, **_experts(8, 2, 32, 96)
    ),
    Qwen35MoePreset(name="35b-a3b", n_layers=40, n_embd=2048, n_v_heads=32),
    Qwen35MoePreset(
        name="122b-a10b", n_layers=48, n_embd=3072, **_LARGE, **_experts(256, 8, 1024, 1024)
    ),
    Qwen35MoePreset(
        name="397b-a17b", n_layers=60, n_embd=4096, **_LARGE, **_experts(512, 10, 1024, 1024)
    ),
    Qwen3NextPreset(
        name="tiny-next", n_layers=4, n_k_heads=4, n_ff=512, **_WIDE, **_experts(4, 2, 256, 256)
    ),
    Qwen3NextPreset(name="next-80b", n_layers=48, n_embd=2048, n_v_heads=32),
)
