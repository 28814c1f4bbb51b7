"""Qwen3.5 (dense): gated delta-net layers, with gated full attention every fourth layer.

Value heads are tiled over key heads (value head h reads key head h mod Hk). Layers past the trunk
are for multi-token prediction and are skipped. Tensor names and formulas follow llama.cpp's
`qwen35` files and transformers' `qwen3_5`.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from engine.gguf import GGUFFile
from engine.graph import Graph, Shape
from engine.models.hparams import HParams, shown
from engine.models.layers import (
    AttentionShape,
    Builder,
    BuildOptions,
    DeltaNetShape,
    delta_net,
    dense_ffn,
    gated_attention,
    trunk,
)
from engine.models.weights import check_weights


class Qwen35:
    """A `qwen35` file's hyper-parameters; raises ModelError if they or its tensors don't fit."""

    name = "qwen35"

    def __init__(self, file: GGUFFile) -> None:
        hp = HParams(file)
        n_mtp = hp.integer("nextn_predict_layers", 0, minimum=0)
        n_entries = hp.integer("block_count", minimum=n_mtp + 1)
        # A layer has tensors: this bounds what a wrong count makes us do.
        if n_entries > len(file.tensors):
            most = f"at most {len(file.tensors)}, the number of tensors"
            raise hp.fail("block_count", most, n_entries)
        self.n_layers = n_entries - n_mtp
        self.n_embd = hp.integer("embedding_length")
        self.n_ctx_train = hp.integer("context_length")
        self.eps = hp.number("attention.layer_norm_rms_epsilon")
        self.n_ff = hp.per_layer("feed_forward_length", n_entries)
        self.n_vocab = hp.n_vocab()
        self.linear = _linear_layers(hp, n_entries, self.n_layers)
        self.delta_net = delta_net_shape(hp, "tiled", self.eps)
        self.attention = _attention_shapes(hp, n_entries, self.n_embd, self.eps)
        self._tensors = file.tensors
        check_weights(file, self._expected(), range(self.n_layers, n_entries))

    def _expected(self) -> dict[str, Shape]:
        embedding = (self.n_vocab, self.n_embd)
        expected: dict[str, Shape] = {"token_embd.weight": embedding}
        if "output.weight" in self._tensors:
            expected["output.weight"] = embedding
        expected["output_norm.weight"] = (self.n_embd,)
        for i in range(self.n_layers):
            layer = self._linear_weights() if self.linear[i] else self._attention_weights(i)
            layer |= self._ffn_weights(i)
            expected |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
        return expected

    def _linear_weights(self) -> dict[str, Shape]:
        s, n_embd = self.delta_net, self.n_embd
        return {
            "attn_qkv.weight": (s.conv_dim, n_embd),
            "attn_gate.weight": (s.value_dim, n_embd),
            "ssm_conv1d.weight": (s.conv_dim, s.n_taps),
            "ssm_a": (s.n_v_heads,),
            "ssm_dt.bias": (s.n_v_heads,),
            "ssm_beta.weight": (s.n_v_heads, n_embd),
            "ssm_alpha.weight": (s.n_v_heads, n_embd),
            "ssm_norm.weight": (s.d_v,),
            "ssm_out.weight": (n_embd, s.value_dim),
        }

    def _attention_weights(self, i: int) -> dict[str, Shape]:
        s, n_embd = self.attention[i], self.n_embd
        q_dim, kv_dim = 2 * s.n_heads * s.d_head, s.n_kv_heads * s.d_head
        if f"blk.{i}.attn_qkv.weight" in self._tensors:
            products: dict[str, Shape] = {"attn_qkv.weight": (q_dim + 2 * kv_dim, n_embd)}
        else:
            products = {"attn_q.weight": (q_dim, n_embd)}
            products |= {f"attn_{name}.weight": (kv_dim, n_embd) for name in "kv"}
        return products | {
            "attn_q_norm.weight": (s.d_head,),
            "attn_k_norm.weight": (s.d_head,),
            "attn_output.weight": (n_embd, s.n_heads * s.d_head),
        }

    def _ffn_weights(self, i: int) -> dict[str, Shape]:
        n_embd, n_ff = self.n_embd, self.n_ff[i]
        return {
            "attn_norm.weight": (n_embd,),
            "post_attention_norm.weight": (n_embd,),
            "ffn_gate.weight": (n_ff, n_embd),
            "ffn_up.weight": (n_ff, n_embd),
            "ffn_down.weight": (n_embd, n_ff),
        }

    def build(self, options: BuildOptions) -> Graph:
        """The compute graph; see Model."""
        linear = ("delta net", partial(delta_net, shape=self.delta_net))
        layers = [
            linear
            if self.linear[i]
            else ("attention", partial(gated_attention, shape=self.attention[i]))
            for i in range(self.n_layers)
        ]
        builder = Builder(self._tensors, options)
        return trunk(builder, layers, dense_ffn, "post_attention_norm", self.eps)


def _linear_layers(hp: HParams, n_entries: int, n_layers: int) -> list[bool]:
    """Which layers are linear: `recurrent_layers` if it is there, else all but every n-th."""
    if (flags := hp.flags("attention.recurrent_layers", n_entries)) is not None:
        return flags[:n_layers]
    interval = hp.integer("full_attention_interval", 4)
    return [(i + 1) % interval != 0 for i in range(n_layers)]


def delta_net_shape(hp: HParams, head_map: str, eps: float) -> DeltaNetShape:
    """Sizes of the linear layers from the `ssm.*` keys."""
    n_k_heads, n_v_heads = hp.integer("ssm.group_count"), hp.integer("ssm.time_step_rank")
    inner = hp.integer("ssm.inner_size")
    hp.divides("ssm.group_count", n_k_heads, n_v_heads)
    hp.divides("ssm.time_step_rank", n_v_heads, inner)
    d_k, n_taps = hp.integer("ssm.state_size"), hp.integer("ssm.conv_kernel", minimum=2)
    return DeltaNetShape(n_k_heads, n_v_heads, d_k, inner // n_v_heads, n_taps, head_map, eps)


def _attention_shapes(hp: HParams, n_entries: int, n_embd: int, eps: float) -> list[AttentionShape]:
    n_heads = hp.per_layer("attention.head_count", n_entries)
    n_kv_heads = hp.per_layer("attention.head_count_kv", n_entries)
    d_head = hp.integer("attention.key_length", n_embd // max(n_heads))
    if (d_value := hp.integer("attention.value_length", d_head)) != d_head:
        raise hp.fail("attention.value_length", f"attention.key_length = {d_head}", d_value)
    for heads, kv_heads in zip(n_heads, n_kv_heads, strict=True):
        hp.divides("attention.head_count_kv", kv_heads, heads)
    n_rot = hp.integer("rope.dimension_count", d_head)
    if n_rot > d_head or n_rot % 2:
        raise hp.fail("rope.dimension_count", f"an even number up to {d_head}", n_rot)
    _check_sections(hp)
    hp.refuse_rope_scaling()
    base = hp.number("rope.freq_base", 10000.0)
    return [
        AttentionShape(h, kv, d_head, n_rot, base, eps)
        for h, kv in zip(n_heads, n_kv_heads, strict=True)
    ]


def _check_sections(hp: HParams) -> None:
    """Sections assign rope pairs to the axes of images; text has one position on all of them."""
    key = "rope.dimension_sections"
    sections = hp.file.metadata.get(f"{hp.arch}.{key}")
    if (
        not isinstance(sections, np.ndarray)
        or len(sections) != 4
        or sections.dtype.kind not in "iu"
    ):
        raise hp.fail(key, "4 integers", shown(sections))
