"""Parity cases of `bailingmoe3` (transformers: bailing_hybrid; with clamps: numpy_ling.py).

What is not said here is as in kimi_linear.py. KDA and MLA layers follow no period. The cases cover
low-rank and full queries, groups of experts, weights that are not normalized, tied embeddings,
YaRN, a fused attn_qkv, and clamps, which transformers does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.parity import kimi_linear
from tests.parity.common import (
    Parameters,
    Shape,
    Weights,
    a_log,
    norm_around_1,
    norm_of_both_signs,
    strong,
)
from tests.parity.kimi_linear import KDA, MLA, TWO_OF_EIGHT, small_latent
from tests.parity.routing import Routing

PREFIX = "self_attn."


@dataclass(frozen=True)
class Case(kimi_linear.Case):
    """Sizes and switches of one model. `clamps`: each layer's of routed experts, and of the shared
    one or a dense feed-forward; 0 is none."""

    routing: Routing = TWO_OF_EIGHT
    eps: float = 1e-6
    q_rank: int = 0
    lower_bound: float = -5.0
    rope_base: float = 6e6
    yarn_factor: float = 1.0
    normalized: bool = True
    is_tied: bool = False
    clamps: tuple[tuple[float, float], ...] = ()

    arch = "bailingmoe3"

    @property
    def tied(self) -> bool:  # type: ignore[override]
        return self.is_tied

    def parameters(self) -> Parameters:
        table = super().parameters()
        if self.tied:
            del table["lm_head.weight"]
            table["model.norm.weight"] = ((self.n_embd,), one_plus_both_signs)
        for i, kind in enumerate(self.layers):
            at = f"model.layers.{i}.{PREFIX}"
            table |= {at + name: entry for name, entry in self._gates(kind).items()}
            low_rank = [f"{gate}_{part}_proj" for gate in ("forget_gate.f", "g") for part in "ab"]
            gone = [f"{name}.weight" for name in low_rank] if kind == KDA else []
            if kind == MLA and self.q_rank:
                gone = ["q_proj.weight"]
            for name in gone:
                del table[at + name]
        return table

    def _gates(self, kind: str) -> Parameters:
        """What a layer has in place of Kimi's, by name."""
        if kind == KDA:
            gate = ((self.n_kda_rows, self.n_embd), strong)
            decay = ((self.n_heads,), a_log)
            return dict.fromkeys(("forget_gate.f_proj.weight", "g_proj.weight"), gate) | {
                "forget_gate.A_log": decay
            }
        gates: Parameters = {"g_proj.weight": ((self.n_heads, self.n_embd), strong)}
        if self.q_rank:
            rows = self.n_heads * self.qk_head_dim
            gates |= {
                # So small that the epsilon of their norm shows.
                "q_a_proj.weight": ((self.q_rank, self.n_embd), small_latent(self.q_rank)),
                "q_a_layernorm.weight": ((self.q_rank,), norm_around_1),
                "q_b_proj.weight": ((rows, self.q_rank), strong),
            }
        return gates

    def metadata(self) -> dict[str, Any]:
        values = super().metadata() | {
            "kda.gate_lower_bound": self.lower_bound,
            "rope.freq_base": self.rope_base,
            "expert_weights_norm": self.normalized,
            "expert_shared_feed_forward_length": self.n_ff_exp * self.n_shared,
        }
        if self.q_rank:
            values["attention.q_lora_rank"] = self.q_rank
        if self.clamps:
            keys = ("swiglu_clamp_exp", "swiglu_clamp_shexp")
            values |= zip(keys, np.array(self.clamps, np.float32).T, strict=True)
        if self.yarn_factor != 1:
            keys_of_yarn = {"type": "yarn", "factor": self.yarn_factor}
            keys_of_yarn["original_context_length"] = 32
            values |= {f"rope.scaling.{key}": value for key, value in keys_of_yarn.items()}
        return values

    def mixer_tensors(self, kind: str, w: Weights) -> Weights:
        return self._kda_tensors(w) if kind == KDA else self._mla_tensors(w)

    def _kda_tensors(self, w: Weights) -> Weights:
        q, k, v = (w[f"{PREFIX}{name}_proj.weight"] for name in "qkv")
        products = {"attn_q.weight": q, "attn_k.weight": k, "attn_v.weight": v}
        if self.fused_qkv:
            products = {"attn_qkv.weight": np.concatenate([q, k, v])}
        shape = (1, self.n_kda_rows, 1, self.conv_kernel)
        taps = np.split(w[PREFIX + "conv1d.weight"], 3)
        gate = PREFIX + "forget_gate."
        return {
            **products,
            **{
                f"ssm_conv1d_{name}.weight": part.reshape(shape if self.conv_4d else shape[1:])
                for name, part in zip("qkv", taps, strict=True)
            },
            "ssm_f_a.weight": w[gate + "f_proj.weight"],
            "ssm_g_a.weight": w[PREFIX + "g_proj.weight"],
            "ssm_beta.weight": w[PREFIX + "b_proj.weight"],
            "ssm_a": np.exp(w[gate + "A_log"])[:, np.newaxis],
            "ssm_dt.bias": w[gate + "dt_bias"],
            "ssm_norm.weight": w[PREFIX + "o_norm.weight"],
            "attn_output.weight": w[PREFIX + "o_proj.weight"],
        }

    def _mla_tensors(self, w: Weights) -> Weights:
        queries = {"attn_q": "q_proj"}
        if self.q_rank:
            queries = {"attn_q_a": "q_a_proj", "attn_q_a_norm": "q_a_layernorm"}
            queries["attn_q_b"] = "q_b_proj"
        per_head = (self.n_heads, self.nope_dim + self.v_head_dim, self.n_latent)
        kv_b = w[PREFIX + "kv_b_proj.weight"].reshape(per_head)
        k_b, v_b = np.split(kv_b, [self.nope_dim], axis=1)
        return {
            **{f"{ours}.weight": w[f"{PREFIX}{hf}.weight"] for ours, hf in queries.items()},
            "attn_kv_a_mqa.weight": w[PREFIX + "kv_a_proj_with_mqa.weight"],
            "attn_kv_a_norm.weight": w[PREFIX + "kv_a_layernorm.weight"],
            "attn_k_b.weight": k_b.transpose(0, 2, 1),
            "attn_v_b.weight": v_b,
            "attn_output.weight": w[PREFIX + "o_proj.weight"],
            "attn_gate.weight": w[PREFIX + "g_proj.weight"],
        }

    def transformers_model(self) -> Any:
        from transformers import BailingHybridConfig, BailingHybridForCausalLM

        assert not self.clamps, "transformers has none"
        config = kimi_linear.mixer_config(self) | kimi_linear.ffn_config(self)
        for key in ("linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"):
            del config[key]
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_base}
        if self.yarn_factor != 1:
            rope |= {"rope_type": "yarn", "factor": self.yarn_factor}
            rope["original_max_position_embeddings"] = 32
        config |= {
            "head_dim": self.kda_head_dim,
            "short_conv_kernel_size": self.conv_kernel,
            "q_lora_rank": self.q_rank or None,
            "kda_lower_bound": self.lower_bound,
            "norm_topk_prob": self.normalized,
            "tie_word_embeddings": self.tied,
            "rope_parameters": rope,
            "num_mtp_layers": 0,
        }
        model = BailingHybridForCausalLM(BailingHybridConfig(**config))
        if self.tied:
            # transformers reads the switch, but does not act by it.
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


def one_plus_both_signs(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
    """norm_of_both_signs for norms that are stored as they are."""
    return 1 + norm_of_both_signs(rng, shape)


# fmt: off
CASES = (
    Case("groups", (KDA, MLA, KDA, KDA, MLA),
         routing=Routing(12, 3, sigmoid=True, n_groups=4, n_groups_used=2)),
    Case("low-rank-queries", (MLA, KDA, KDA, MLA), n_heads=3, v_head_dim=24, pe_dim=16, q_rank=20,
         conv_4d=False, n_dense=2, n_shared=2, expert_scale=1.5, rope_base=1e4, lower_bound=-2.5,
         yarn_factor=4.0),
    Case("tied", (KDA, KDA, MLA), nope_dim=8, kda_head_dim=32, n_latent=32, conv_kernel=3,
         n_dense=0, routing=Routing(4, 3, sigmoid=True), fused_qkv=True, normalized=False,
         expert_scale=0.7, is_tied=True),
    Case("clamps", (KDA, MLA, KDA, MLA), n_heads=6, v_head_dim=8, q_rank=28,
         routing=Routing(12, 3, sigmoid=True, n_groups=4, n_groups_used=2),
         clamps=((0, 0.06), (0.05, 0), (0.06, 0.05), (0.04, 0.07))),
)
# fmt: on
