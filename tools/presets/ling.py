"""Presets of Ling 3.0 (`bailingmoe3`): KDA and MLA layers, grouped experts after the first ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.presets.base import Shapes
from tools.presets.kimi import TINY, KimiPreset


@dataclass(frozen=True, kw_only=True)
class LingPreset(KimiPreset):
    """Defaults are those of Ling-3.0-flash. `q_rank` 0: queries have one full matrix. `clamps_exp`
    and `clamps_shexp`: of each layer; empty: the file has no such key."""

    arch: str = "bailingmoe3"
    n_vocab: int = 157184
    eps: float = 1e-6
    context_length: int = 262144
    rope_base: float = 6e6
    n_experts: int = 512
    n_ff_exp: int = 768
    expert_scale: float = 2.5
    n_groups: int = 8
    n_groups_used: int = 4
    q_rank: int = 0
    lower_bound: float = -5.0
    clamps_exp: tuple[float, ...] = ()
    clamps_shexp: tuple[float, ...] = ()
    bounded_decay: bool = True

    def _kda(self) -> Shapes:
        n = self.n_heads * self.kda_dim
        shapes = super()._kda() | {"ssm_a": (self.n_heads, 1)}
        for part in "fg":
            del shapes[f"ssm_{part}_b.weight"]
            shapes[f"ssm_{part}_a.weight"] = (n, self.n_embd)
        return shapes

    def _mla(self) -> Shapes:
        shapes = super()._mla() | {"attn_gate.weight": (self.n_heads, self.n_embd)}
        if self.q_rank:
            n_rows, n_embd = shapes.pop("attn_q.weight")
            shapes |= {
                "attn_q_a.weight": (self.q_rank, n_embd),
                "attn_q_a_norm.weight": (self.q_rank,),
                "attn_q_b.weight": (n_rows, self.q_rank),
            }
        return shapes

    def own_metadata(self) -> dict[str, Any]:
        values = super().own_metadata() | {
            "kda.gate_lower_bound": self.lower_bound,
            "kda.safe_gate": True,
            "expert_group_count": self.n_groups,
            "expert_group_used_count": self.n_groups_used,
            "expert_weights_norm": True,
            "expert_shared_feed_forward_length": self.n_ff_exp * self.n_shared_experts,
        }
        if self.q_rank:
            values["attention.q_lora_rank"] = self.q_rank
        clamps = {"swiglu_clamp_exp": self.clamps_exp, "swiglu_clamp_shexp": self.clamps_shexp}
        # A preset with fewer layers has their clamps.
        arrays = {key: np.array(c[: self.n_layers], np.float32) for key, c in clamps.items() if c}
        return values | arrays


PRESETS = (
    LingPreset(
        name="tiny-ling", n_layers=5, mla_layers=(2, 4), q_rank=224, n_groups=4, n_groups_used=2,
        # So low that every one of them shows in the logits.
        clamps_exp=(0, 0, 0.05, 0.04, 0.05), clamps_shexp=(0, 0.06, 0, 0.05, 0.03), **TINY,
    ),
    LingPreset(
        name="ling-tiny", n_layers=24, mla_layers=tuple(range(3, 24, 4)), n_embd=1536, n_heads=16,
        n_ff=4608, q_rank=256, n_experts=128, n_ff_exp=512,
    ),
    LingPreset(
        name="ling-flash", n_layers=42, mla_layers=tuple(range(5, 42, 6)), n_embd=2560, n_ff=6144,
        n_dense_layers=2, clamps_exp=(0,) * 35 + (4,) * 7,
        clamps_shexp=(0,) * 34 + (5,) * 6 + (7,) * 2,
    ),
)  # fmt: skip
