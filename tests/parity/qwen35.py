"""Parity cases of `qwen35` (transformers: qwen3_5, text only).

The cases cover, pairwise, value:key head ratio, tied embeddings, epsilon and attention interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.parity.common import Parameters, Weights
from tests.parity.ffn import swiglu_parameters, swiglu_tensors
from tests.parity.qwen import (
    FULL,
    LINEAR,
    HybridCase,
    Scaling,
    hybrid_config,
    hybrid_metadata,
    linear_parameters,
    linear_tensors,
    mrope_config,
    mrope_metadata,
)


@dataclass(frozen=True)
class Case(HybridCase):
    """One model with dense feed-forward."""

    n_ff: int = 80
    sections: tuple[int, int, int] = (3, 3, 2)

    arch = "qwen35"
    routing = None

    def linear_parameters(self) -> Parameters:
        return linear_parameters(self)

    def linear_tensors(self, w: Weights) -> Weights:
        return linear_tensors(self, w)

    def ffn_parameters(self) -> Parameters:
        return swiglu_parameters("mlp.", self.n_ff, self.n_embd)

    def ffn_tensors(self, w: Weights) -> Weights:
        return swiglu_tensors(w, "mlp.")

    def metadata(self) -> dict[str, Any]:
        own = {"feed_forward_length": self.n_ff}
        return hybrid_metadata(self) | own | mrope_metadata(self.sections)

    def transformers_model(self) -> Any:
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        config = hybrid_config(self, **mrope_config(self.sections))
        return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**config, intermediate_size=self.n_ff))


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
    # Of the 16 pairs, 2 keep their speed, 8 have a quarter of it, and those between a mix.
    Case("yarn", 2, 4, n_heads=4, n_kv_heads=2, interval=2, head_dim=32, n_rot=32,
         sections=(6, 5, 5), scaling=Scaling("yarn", 4.0)),
    Case("linear", 2, 4, n_heads=3, n_kv_heads=3, interval=2, head_dim=32, n_rot=16,
         scaling=Scaling("linear", 8.0)),
)
# fmt: on
