"""Kimi-Linear (`kimi-linear`): Kimi delta attention (KDA) with latent attention (MLA) in between.

MLA layers have no rope. The first layers' feed-forward is dense; then come routed experts, chosen
by biased sigmoids, and a shared expert without a gate. Follows llama.cpp's files and transformers'
`kimi_linear`.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from engine.formats.gguf import GGUFFile
from engine.graph import Graph, Shape
from engine.models.attention import LatentShape, latent_attention
from engine.models.delta_net import DeltaNetShape, kimi_delta
from engine.models.hparams import HParams
from engine.models.layers import Builder, BuildOptions, Layer, dense_ffn, dense_weights, trunk
from engine.models.moe import MoEShape, moe_ffn
from engine.models.weights import Weights

_GATINGS = {1: "softmax", 2: "sigmoid"}


class KimiLinear:
    """A file's hyper-parameters and weights; raises ModelError if they or its tensors don't fit."""

    name = "kimi-linear"

    def __init__(self, file: GGUFFile) -> None:
        hp = HParams(file)
        n_entries, self.n_layers = hp.n_layers()
        self.n_embd = hp.integer("embedding_length")
        self.n_ctx_train = hp.integer("context_length")
        self.eps = hp.number("attention.layer_norm_rms_epsilon")
        self.n_vocab = hp.n_vocab()
        self._n_heads = hp.per_layer("attention.head_count", n_entries)
        # 0 means KDA; another number, which is no head count, MLA.
        kv_heads = hp.per_layer("attention.head_count_kv", n_entries, minimum=0)
        self._linear = [n == 0 for n in kv_heads]
        self._read_sizes(hp)
        self._n_dense = hp.integer("leading_dense_block_count", 0, minimum=0)
        self._n_ff = hp.integer("feed_forward_length", 0 if not self._n_dense else None, minimum=0)
        self._moe = _experts(hp) if self._n_dense < self.n_layers else None
        hp.refuse_rope_scaling()
        self._in_file = file.tensors.keys()
        self.weights = Weights(file, self._expected(), range(self.n_layers, n_entries))
        for i in range(self.n_layers):
            self._unpack(i)

    def _read_sizes(self, hp: HParams) -> None:
        self._d_head, self._n_taps = (
            hp.integer("kda.head_dim"),
            hp.integer("ssm.conv_kernel", minimum=2),
        )
        self._rank = hp.integer("attention.kv_lora_rank")
        self._d_pe = hp.integer("rope.dimension_count", minimum=0)
        d_key = hp.integer("attention.key_length_mla")
        self._d_nope, self._d_v = d_key - self._d_pe, hp.integer("attention.value_length_mla")
        if self._d_nope < 1:
            raise hp.fail("attention.key_length_mla", f"more than {self._d_pe}", d_key)
        if (q_rank := hp.integer("attention.q_lora_rank", 0, minimum=0)) != 0:
            raise hp.fail("attention.q_lora_rank", "none (not implemented)", q_rank)

    def _delta_net(self, i: int) -> DeltaNetShape:
        n, d = self._n_heads[i], self._d_head
        return DeltaNetShape(n, n, d, d, self._n_taps, "tiled", self.eps)

    def _latent(self, i: int) -> LatentShape:
        old = f"blk.{i}.attn_kv_b.weight" in self._in_file
        return LatentShape(self._n_heads[i], self._rank, self._d_nope, self._d_pe, self._d_v, old)

    def _expected(self) -> dict[str, Shape]:
        embedding = (self.n_vocab, self.n_embd)
        expected: dict[str, Shape] = {"token_embd.weight": embedding, "output.weight": embedding}
        expected["output_norm.weight"] = (self.n_embd,)
        norms = {f"{name}.weight": (self.n_embd,) for name in ("attn_norm", "ffn_norm")}
        for i in range(self.n_layers):
            layer = self._linear_weights(i) if self._linear[i] else self._latent_weights(i)
            layer |= norms | self._ffn_weights(i)
            expected |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
        return expected

    def _linear_weights(self, i: int) -> dict[str, Shape]:
        n, d, n_embd = self._n_heads[i], self._d_head, self.n_embd
        if f"blk.{i}.attn_qkv.weight" in self._in_file:
            shapes: dict[str, Shape] = {"attn_qkv.weight": (3 * n * d, n_embd)}
        else:
            shapes = {f"attn_{part}.weight": (n * d, n_embd) for part in "qkv"}
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
        fused = f"blk.{i}.ffn_gate_up_exps.weight" in self._in_file
        return self._moe.weights(self.n_embd, fused, gated=False, biased=True)

    def _unpack(self, i: int) -> None:
        w, prefix, n, d = self.weights, f"blk.{i}", self._n_heads[i], self._d_head
        if self._linear[i]:
            if (packed := f"{prefix}.attn_qkv.weight") in self._in_file:
                w.split(packed, {f"{prefix}.attn_{part}.weight": n * d for part in "qkv"})
            w.reshape(f"{prefix}.ssm_dt.bias", (n, d))
        elif (packed := f"{prefix}.attn_kv_b.weight") in self._in_file:
            s = self._latent(i)
            rows = np.arange(n * (s.d_nope + s.d_v)).reshape(n, -1)
            for name, index in (("k", rows[:, : s.d_nope]), ("v", rows[:, s.d_nope :])):
                shape = (n, index.shape[1], s.rank)
                w.take_rows(f"{prefix}.attn_{name}_b.weight", packed, index.reshape(-1), shape)

    def build(self, options: BuildOptions) -> Graph:
        """The compute graph; see Model."""
        layers: list[tuple[str, Layer, Layer]] = []
        for i in range(self.n_layers):
            kind, mixer = "MLA", partial(latent_attention, shape=self._latent(i))
            if self._linear[i]:
                kind, mixer = "KDA", partial(kimi_delta, shape=self._delta_net(i))
            if i < self._n_dense or self._moe is None:
                layers.append((f"{kind} (dense)", mixer, dense_ffn))
            else:
                layers.append((kind, mixer, partial(moe_ffn, shape=self._moe)))
        return trunk(Builder(self.weights, options), layers, "ffn_norm", self.eps)


def _experts(hp: HParams) -> MoEShape:
    gating = hp.integer("expert_gating_func", minimum=0)
    if gating not in _GATINGS:
        raise hp.fail("expert_gating_func", "1 (softmax) or 2 (sigmoid)", gating)
    d_ff = hp.integer("expert_feed_forward_length")
    shape = MoEShape(
        n_experts=hp.integer("expert_count"),
        n_used=hp.integer("expert_used_count"),
        d_ff=d_ff,
        d_shared=d_ff * hp.integer("expert_shared_count"),
        gating=_GATINGS[gating],
        scale=hp.number("expert_weights_scale", 1.0),
        eps=1e-20,
        groups=(hp.integer("expert_group_count", 1), hp.integer("expert_group_used_count", 1)),
    )
    shape.check(hp)
    return shape
