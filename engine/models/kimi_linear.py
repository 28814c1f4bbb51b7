"""Kimi-Linear (`kimi-linear`): Kimi delta attention (KDA) with latent attention (MLA) in between.

MLA layers have no rope: like llama.cpp, the engine does not read a file's base and scaling of it.
The first feed-forwards are dense; then come routed experts and a shared one without a gate. Follows
llama.cpp's files and transformers' `kimi_linear`.
"""

from functools import partial

import numpy as np

from engine.graph import Shape
from engine.models.attention import LatentShape, latent_attention
from engine.models.base import Model
from engine.models.delta_net import DeltaNetShape, kimi_delta
from engine.models.hparams import HParams
from engine.models.layers import Layer, dense_ffn, dense_weights
from engine.models.moe import MoEShape, moe_ffn
from engine.ops.router import Routing

_GATINGS = {1: "softmax", 2: "sigmoid"}


class KimiLinear(Model):
    """KDA where `attention.head_count_kv` is 0, else MLA."""

    name = "kimi-linear"
    ffn_norm = "ffn_norm"
    may_share_embedding = False

    def _read(self, hp: HParams, n_entries: int) -> None:
        self._n_heads = hp.per_layer("attention.head_count", n_entries)
        kv_heads = hp.per_layer("attention.head_count_kv", n_entries, minimum=0)
        self._linear = [n == 0 for n in kv_heads]
        self._d_head = hp.integer("kda.head_dim")
        self._n_taps = hp.integer("ssm.conv_kernel", minimum=2)
        self._rank = hp.integer("attention.kv_lora_rank")
        self._d_pe = hp.integer("rope.dimension_count", minimum=0)
        d_key = hp.integer("attention.key_length_mla")
        self._d_nope, self._d_v = d_key - self._d_pe, hp.integer("attention.value_length_mla")
        if self._d_nope < 1:
            raise hp.fail("attention.key_length_mla", f"more than {self._d_pe}", d_key)
        if (q_rank := hp.integer("attention.q_lora_rank", 0, minimum=0)) != 0:
            raise hp.fail("attention.q_lora_rank", "none (not implemented)", q_rank)
        self._n_dense = hp.integer("leading_dense_block_count", 0, minimum=0)
        self._n_ff = hp.integer("feed_forward_length", 0 if not self._n_dense else None, minimum=0)
        self._moe = _experts(hp) if self._n_dense < self.n_layers else None

    def _delta_net(self, i: int) -> DeltaNetShape:
        n, d = self._n_heads[i], self._d_head
        return DeltaNetShape(n, n, d, d, self._n_taps, "tiled", self.eps)

    def _latent(self, i: int) -> LatentShape:
        old = self._has(i, "attn_kv_b.weight")
        return LatentShape(self._n_heads[i], self._rank, self._d_nope, self._d_pe, self._d_v, old)

    def _mixer_weights(self, i: int) -> dict[str, Shape]:
        return self._linear_weights(i) if self._linear[i] else self._latent_weights(i)

    def _linear_weights(self, i: int) -> dict[str, Shape]:
        n, d, n_embd = self._n_heads[i], self._d_head, self.n_embd
        shapes = self._qkv_weights(i, dict.fromkeys("qkv", n * d))
        shapes |= {f"ssm_conv1d_{part}.weight": (n * d, self._n_taps) for part in "qkv"}
        for part in "fg":
            shapes |= {f"ssm_{part}_a.weight": (d, n_embd), f"ssm_{part}_b.weight": (n * d, d)}
        return shapes | {
            "ssm_beta.weight": (n, n_embd),
            "ssm_a": (n,),
            "ssm_dt.bias": (n * d,),
            "ssm_norm.weight": (d,),
            "attn_output.weight": (n_embd, n * d),
        }

    def _latent_weights(self, i: int) -> dict[str, Shape]:
        s, n_embd = self._latent(i), self.n_embd
        shapes: dict[str, Shape] = {
            "attn_q.weight": (s.n_heads * (s.d_nope + s.d_pe), n_embd),
            "attn_kv_a_mqa.weight": (s.rank + s.d_pe, n_embd),
            "attn_kv_a_norm.weight": (s.rank,),
            "attn_output.weight": (n_embd, s.n_heads * s.d_v),
        }
        if s.transposed:
            return shapes | {"attn_kv_b.weight": (s.n_heads * (s.d_nope + s.d_v), s.rank)}
        return shapes | {
            "attn_k_b.weight": (s.n_heads, s.rank, s.d_nope),
            "attn_v_b.weight": (s.n_heads, s.d_v, s.rank),
        }

    def _ffn_weights(self, i: int) -> dict[str, Shape]:
        if i < self._n_dense or self._moe is None:
            return dense_weights(self.n_embd, self._n_ff)
        fused = self._has(i, "ffn_gate_up_exps.weight")
        return self._moe.weights(self.n_embd, fused, gated=False, biased=True)

    def _unpack(self, i: int) -> None:
        w, prefix, n, d = self.weights, f"blk.{i}", self._n_heads[i], self._d_head
        if self._linear[i]:
            self._split_qkv(i, dict.fromkeys("qkv", n * d))
            w.reshape(f"{prefix}.ssm_dt.bias", (n, d))
        elif self._has(i, "attn_kv_b.weight"):
            s, packed = self._latent(i), f"{prefix}.attn_kv_b.weight"
            rows = np.arange(n * (s.d_nope + s.d_v)).reshape(n, -1)
            for name, index in (("k", rows[:, : s.d_nope]), ("v", rows[:, s.d_nope :])):
                shape = (n, index.shape[1], s.rank)
                w.take_rows(f"{prefix}.attn_{name}_b.weight", packed, index.reshape(-1), shape)

    def _layer(self, i: int) -> tuple[str, Layer, Layer]:
        kind, mixer = "MLA", partial(latent_attention, shape=self._latent(i))
        if self._linear[i]:
            kind, mixer = "KDA", partial(kimi_delta, shape=self._delta_net(i))
        if i < self._n_dense or self._moe is None:
            return f"{kind} (dense)", mixer, dense_ffn
        return kind, mixer, partial(moe_ffn, shape=self._moe)


def _experts(hp: HParams) -> MoEShape:
    gating = hp.integer("expert_gating_func", minimum=0)
    if gating not in _GATINGS:
        raise hp.fail("expert_gating_func", "1 (softmax) or 2 (sigmoid)", gating)
    d_ff = hp.integer("expert_feed_forward_length")
    n_experts, n_used = hp.integer("expert_count"), hp.integer("expert_used_count")
    n_shared, scale = hp.integer("expert_shared_count"), hp.number("expert_weights_scale", 1.0)
    groups = hp.integer("expert_group_count", 1), hp.integer("expert_group_used_count", 1)
    routing = Routing(n_used, _GATINGS[gating], scale, eps=1e-20, groups=groups)
    shape = MoEShape(n_experts, d_ff, d_ff * n_shared, routing)
    shape.check(hp)
    return shape
