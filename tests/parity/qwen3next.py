"""Parity cases of `qwen3next` (transformers: qwen3_next).

transformers packs the inputs of a linear layer per key head: q, k, v, z in one matrix, beta and
alpha in another. GGUF keeps the second as it is; the first is sorted into attn_qkv and attn_gate,
except in old files, which keep it as ssm_in. Value heads stay grouped; rope is plain and partial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.parity.common import Parameters, Weights, matrix
from tests.parity.qwen import (
    FULL,
    LINEAR,
    MoECase,
    Scaling,
    hybrid_config,
    hybrid_metadata,
    linear_inner_parameters,
    moe_config,
    moe_metadata,
)
from tests.parity.routing import Routing

N_FF = 96  # of a dense feed-forward, which no layer has


@dataclass(frozen=True)
class Case(MoECase):
    """One model with grouped value heads."""

    head_dim: int = 32
    n_rot: int = 8
    ssm_in: bool = False  # as old files have it

    arch = "qwen3next"

    def linear_parameters(self) -> Parameters:
        n_qkvz, n_ba = self.n_conv_rows + self.n_v_rows, 2 * self.n_v_heads
        return {
            "linear_attn.in_proj_qkvz.weight": ((n_qkvz, self.n_embd), matrix),
            "linear_attn.in_proj_ba.weight": ((n_ba, self.n_embd), matrix),
            **linear_inner_parameters(self),
        }

    def linear_tensors(self, w: Weights) -> Weights:
        p = "linear_attn."
        qkvz = w[p + "in_proj_qkvz.weight"]
        return {
            **({"ssm_in.weight": qkvz} if self.ssm_in else sorted_qkvz(self, qkvz)),
            "ssm_ba.weight": w[p + "in_proj_ba.weight"],
            "ssm_conv1d.weight": w[p + "conv1d.weight"][:, 0],
            "ssm_a": -np.exp(w[p + "A_log"]),
            "ssm_dt.bias": w[p + "dt_bias"],
            "ssm_norm.weight": w[p + "norm.weight"],
            "ssm_out.weight": w[p + "out_proj.weight"],
        }

    def metadata(self) -> dict[str, Any]:
        return hybrid_metadata(self) | moe_metadata(self) | {"feed_forward_length": N_FF}

    def transformers_model(self) -> Any:
        from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

        config = {**hybrid_config(self), **moe_config(self), "intermediate_size": N_FF}
        return Qwen3NextForCausalLM(Qwen3NextConfig(**config, norm_topk_prob=True))


def sorted_qkvz(c: Case, qkvz: np.ndarray) -> Weights:
    """attn_qkv (all q, all k, all v) and attn_gate (all z) from rows packed per key head."""
    n_v = c.n_v_rows // c.n_k_heads
    per_key_head = qkvz.reshape(c.n_k_heads, -1, c.n_embd)
    ends = np.cumsum([c.k_head_dim, c.k_head_dim, n_v])
    q, k, v, z = (rows.reshape(-1, c.n_embd) for rows in np.split(per_key_head, ends, axis=1))
    return {"attn_qkv.weight": np.concatenate([q, k, v]), "attn_gate.weight": z}


# fmt: off
CASES = (
    Case("ratio2", 4, 8, n_heads=4, n_kv_heads=2),
    Case("ratio2-ssm-in", 3, 6, n_heads=4, n_kv_heads=1, eps=1e-5, interval=2, tied=True,
         ssm_in=True, routing=Routing(4, 3), fused_experts=True),
    Case("ratio3", 2, 6, n_heads=6, n_kv_heads=3, eps=1e-5, head_dim=16, n_rot=4, rope_base=1e7,
         routing=Routing(4, 3), shared_gate_row=True),
    # Layers that no interval describes, and head sizes that llama.cpp doesn't take.
    Case("ratio3-unequal-dims", 4, 12, n_heads=4, n_kv_heads=2, conv_kernel=3, ssm_in=True,
         k_head_dim=32, v_head_dim=16, fused_qkv=True, layers=(LINEAR, FULL, LINEAR)),
    Case("yarn", 2, 4, n_heads=4, n_kv_heads=1, interval=2, n_rot=16, scaling=Scaling(
         "yarn", 2.5, beta_fast=8.0, beta_slow=0.5, attn_factor=1.25)),
)
# fmt: on
