"""The base of Kimi-Linear and Ling 3.0: Kimi delta attention (KDA) and latent attention (MLA).

The first feed-forwards are dense; then come routed experts and a shared one without a gate.
"""

from abc import abstractmethod
from dataclasses import replace
from functools import partial

from engine.graph import Shape
from engine.models.attention import LatentShape, latent_attention
from engine.models.base import Model
from engine.models.delta_net import DeltaNetShape, kimi_delta
from engine.models.hparams import HParams
from engine.models.layers import Layer, dense_ffn, dense_weights
from engine.models.moe import MoEShape, moe_ffn
from engine.ops.router import Routing

_GATINGS = {1: "softmax", 2: "sigmoid"}


class KdaHybrid(Model):
    """KDA where `attention.head_count_kv` is 0, else MLA.

    Subclasses change `self.latent` and `self.delta_net`, the shapes that all layers have but for
    their numbers of heads, when they read hyper-parameters; `self.limits` are a layer's clamps of
    its routed experts, and of its shared one or its dense feed-forward.
    """

    ffn_norm = "ffn_norm"

    def _read(self, hp: HParams, n_entries: int) -> None:
        self.n_heads = hp.per_layer("attention.head_count", n_entries)
        kv_heads = hp.per_layer("attention.head_count_kv", n_entries, minimum=0)
        self.linear = [n == 0 for n in kv_heads]
        d_head, n_taps = hp.integer("kda.head_dim"), hp.integer("ssm.conv_kernel", minimum=2)
        self.delta_net = DeltaNetShape(1, 1, d_head, d_head, n_taps, "tiled", self.eps)
        rank, d_pe = (
            hp.integer("attention.kv_lora_rank"),
            hp.integer("rope.dimension_count", None, 0),
        )
        d_key = hp.integer("attention.key_length_mla")
        if d_key <= d_pe:
            raise hp.fail("attention.key_length_mla", f"more than {d_pe}", d_key)
        d_v = hp.integer("attention.value_length_mla")
        self.latent = LatentShape(1, rank, d_key - d_pe, d_pe, d_v)
        self.n_dense = hp.integer("leading_dense_block_count", 0, minimum=0)
        self.n_ff = hp.integer("feed_forward_length", 0 if not self.n_dense else None, minimum=0)
        self.moe = self._read_experts(hp) if self.n_dense < self.n_layers else None
        self.limits = [(0.0, 0.0)] * n_entries

    def _read_experts(self, hp: HParams) -> MoEShape:
        gating = hp.integer("expert_gating_func", minimum=0)
        if gating not in _GATINGS:
            raise hp.fail("expert_gating_func", "1 (softmax) or 2 (sigmoid)", gating)
        d_ff, n_experts = hp.integer("expert_feed_forward_length"), hp.integer("expert_count")
        n_used, scale = hp.integer("expert_used_count"), hp.number("expert_weights_scale", 1.0)
        routing = self._routing(hp, Routing(n_used, _GATINGS[gating], scale, eps=1e-20))
        shape = MoEShape(n_experts, d_ff, self._shared_size(hp, d_ff), routing)
        shape.check(hp)
        return shape

    @abstractmethod
    def _routing(self, hp: HParams, routing: Routing) -> Routing:
        """The routing with groups and normalization as the architecture's keys say."""

    @abstractmethod
    def _shared_size(self, hp: HParams, d_ff: int) -> int:
        """The width of the shared expert; d_ff: of a routed one."""

    @abstractmethod
    def _gate_weights(self, n_rows: int, d_head: int) -> dict[str, Shape]:
        """The tensors of a KDA layer's decays and output gates, each of `n_rows` rows."""

    def _delta_net(self, i: int) -> DeltaNetShape:
        n = self.n_heads[i]
        return replace(self.delta_net, n_k_heads=n, n_v_heads=n)

    def _latent(self, i: int) -> LatentShape:
        return replace(self.latent, n_heads=self.n_heads[i])

    def _mixer_weights(self, i: int) -> dict[str, Shape]:
        return self._linear_weights(i) if self.linear[i] else self._latent_weights(i)

    def _linear_weights(self, i: int) -> dict[str, Shape]:
        s, n_embd = self._delta_net(i), self.n_embd
        n, d = s.n_v_heads, s.d_v
        shapes = self._qkv_weights(i, dict.fromkeys("qkv", n * d))
        shapes |= {f"ssm_conv1d_{part}.weight": (n * d, s.n_taps) for part in "qkv"}
        return (
            shapes
            | self._gate_weights(n * d, d)
            | {
                "ssm_beta.weight": (n, n_embd),
                "ssm_a": (n,),
                "ssm_dt.bias": (n * d,),
                "ssm_norm.weight": (d,),
                "attn_output.weight": (n_embd, n * d),
            }
        )

    def _latent_weights(self, i: int) -> dict[str, Shape]:
        s, n_embd = self._latent(i), self.n_embd
        return {
            "attn_q.weight": (s.n_heads * (s.d_nope + s.d_pe), n_embd),
            "attn_kv_a_mqa.weight": (s.rank + s.d_pe, n_embd),
            "attn_kv_a_norm.weight": (s.rank,),
            "attn_k_b.weight": (s.n_heads, s.rank, s.d_nope),
            "attn_v_b.weight": (s.n_heads, s.d_v, s.rank),
            "attn_output.weight": (n_embd, s.n_heads * s.d_v),
        }

    def _ffn_weights(self, i: int) -> dict[str, Shape]:
        if i < self.n_dense or self.moe is None:
            return dense_weights(self.n_embd, self.n_ff)
        fused = self._has(i, "ffn_gate_up_exps.weight")
        return self.moe.weights(self.n_embd, fused, gated=False, biased=True)

    def _unpack(self, i: int) -> None:
        if self.linear[i]:
            s = self._delta_net(i)
            self._split_qkv(i, dict.fromkeys("qkv", s.value_dim))
            self.weights.reshape(f"blk.{i}.ssm_dt.bias", (s.n_v_heads, s.d_v))

    def _layer(self, i: int) -> tuple[str, Layer, Layer]:
        kind, mixer = "MLA", partial(latent_attention, shape=self._latent(i))
        if self.linear[i]:
            kind, mixer = "KDA", partial(kimi_delta, shape=self._delta_net(i))
        if i < self.n_dense or self.moe is None:
            return f"{kind} (dense)", mixer, partial(dense_ffn, limit=self.limits[i][1])
        return kind, mixer, partial(moe_ffn, shape=self.moe, limits=self.limits[i])
