"""Parity cases of `qwen35moe` (transformers: qwen3_5_moe, text only).

The cases cover value:key head ratio, tied embeddings, epsilon, 2 of 8 and 3 of 4 experts, and the
tensors that the converter fuses on request (experts' gate and up rows; attention's q, k and v).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.parity.common import Parameters, Weights
from tests.parity.qwen import (
    FULL,
    LINEAR,
    MoECase,
    hybrid_config,
    hybrid_metadata,
    linear_parameters,
    linear_tensors,
    moe_config,
    moe_metadata,
    mrope_config,
    mrope_metadata,
)
from tests.parity.routing import Routing


@dataclass(frozen=True)
class Case(MoECase):
    """One model with tiled value heads."""

    sections: tuple[int, int, int] = (3, 3, 2)

    arch = "qwen35moe"

    def linear_parameters(self) -> Parameters:
        return linear_parameters(self)

    def linear_tensors(self, w: Weights) -> Weights:
        return linear_tensors(self, w)

    def metadata(self) -> dict[str, Any]:
        return hybrid_metadata(self) | moe_metadata(self) | mrope_metadata(self.sections)

    def transformers_model(self) -> Any:
        from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

        config = hybrid_config(self, **mrope_config(self.sections))
        return Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**config, **moe_config(self)))


# fmt: off
CASES = (
    Case("ratio1", 4, 4, n_heads=4, n_kv_heads=2, shared_gate_row=True),
    Case("ratio1-tied", 3, 3, n_heads=4, n_kv_heads=1, interval=2, eps=1e-5, tied=True,
         routing=Routing(4, 3), fused_experts=True, n_rot=8, sections=(2, 1, 1)),
    Case("ratio2", 4, 8, n_heads=4, n_kv_heads=2, eps=1e-5, fused_experts=True, fused_qkv=True,
         n_rot=4, sections=(1, 1, 0), rope_base=1e7),
    # Layers that no interval describes.
    Case("ratio2-tied", 3, 6, n_heads=6, n_kv_heads=3, tied=True, routing=Routing(4, 3),
         head_dim=32, n_rot=32, sections=(6, 5, 5), layers=(LINEAR, FULL, LINEAR, LINEAR, FULL)),
)
# fmt: on
