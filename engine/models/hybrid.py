"""The Qwen hybrids: gated delta-net layers with gated full attention every few layers.

Layers past the trunk are for multi-token prediction and are skipped. Tensor names and formulas
follow llama.cpp's files and transformers' models.
"""

from abc import abstractmethod
from functools import partial

import numpy as np

from engine.formats.gguf import shown
from engine.graph import Shape
from engine.models.attention import AttentionShape, gated_attention
from engine.models.base import Model
from engine.models.delta_net import DeltaNetShape, delta_net
from engine.models.hparams import HParams
from engine.models.layers import Layer
from engine.models.moe import moe_ffn, moe_shapes
from engine.models.rope import read_rope


class Hybrid(Model):
    """`head_map`: how value heads read key heads. `has_sections`: whether files have the rope
    sections of images."""

    ffn_norm = "post_attention_norm"
    head_map = "tiled"
    has_sections = True

    def _read(self, hp: HParams, n_entries: int) -> None:
        self.linear = _linear_layers(hp, n_entries, self.n_layers)
        self.delta_net = _delta_net_shape(hp, self.head_map, self.eps)
        if self.has_sections:
            _check_sections(hp)
        self.attention = _attention_shapes(hp, n_entries, self.linear, self.n_embd, self.eps)
        self._read_ffn(hp, n_entries)

    @abstractmethod
    def _read_ffn(self, hp: HParams, n_entries: int) -> None:
        """Read the hyper-parameters of the feed-forward."""

    @abstractmethod
    def _ffn(self, i: int) -> Layer:
        """The feed-forward of layer i."""

    def _mixer_weights(self, i: int) -> dict[str, Shape]:
        if not self.linear[i]:
            a = self.attention[i]
            return self._qkv_weights(i, a.widths) | {
                "attn_q_norm.weight": (a.d_head,),
                "attn_k_norm.weight": (a.d_head,),
                "attn_output.weight": (self.n_embd, a.n_heads * a.d_head),
            }
        s = self.delta_net
        return self._projections(i) | {
            "ssm_conv1d.weight": (s.conv_dim, s.n_taps),
            "ssm_a": (s.n_v_heads,),
            self._dt(i): (s.n_v_heads,),
            "ssm_norm.weight": (s.d_v,),
            "ssm_out.weight": (self.n_embd, s.value_dim),
        }

    def _projections(self, i: int) -> dict[str, Shape]:
        """The file's tensors that make q, k, v, z, beta and alpha in a linear layer."""
        s, n_embd = self.delta_net, self.n_embd
        return {
            "attn_qkv.weight": (s.conv_dim, n_embd),
            "attn_gate.weight": (s.value_dim, n_embd),
            "ssm_beta.weight": (s.n_v_heads, n_embd),
            "ssm_alpha.weight": (s.n_v_heads, n_embd),
        }

    def _dt(self, i: int) -> str:
        """The name of the step size's bias; Ollama's files leave the suffix out."""
        return "ssm_dt" if self._has(i, "ssm_dt") else "ssm_dt.bias"

    def _unpack(self, i: int) -> None:
        if not self.linear[i]:
            self._split_qkv(i, self.attention[i].widths)
        elif self._dt(i) == "ssm_dt":
            prefix, shape = f"blk.{i}", (self.delta_net.n_v_heads,)
            self.weights.take_rows(f"{prefix}.ssm_dt.bias", f"{prefix}.ssm_dt", range(1), shape)

    def _layer(self, i: int) -> tuple[str, Layer, Layer]:
        if self.linear[i]:
            return "delta net", partial(delta_net, shape=self.delta_net), self._ffn(i)
        return "attention", partial(gated_attention, shape=self.attention[i]), self._ffn(i)


class MoEHybrid(Hybrid):
    """A hybrid with routed experts and a gated shared one instead of the feed-forward."""

    def _read_ffn(self, hp: HParams, n_entries: int) -> None:
        self._moe = moe_shapes(hp, n_entries)

    def _ffn_weights(self, i: int) -> dict[str, Shape]:
        fused = self._has(i, "ffn_gate_up_exps.weight")
        return self._moe[i].weights(self.n_embd, fused, gated=True, biased=False)

    def _ffn(self, i: int) -> Layer:
        return partial(moe_ffn, shape=self._moe[i])


def _linear_layers(hp: HParams, n_entries: int, n_layers: int) -> list[bool]:
    """Which layers are linear: `recurrent_layers` if it is there; those without KV heads, if there
    are any, as in Ollama's files; else all but every n-th."""
    if (flags := hp.flags("attention.recurrent_layers", n_entries)) is not None:
        return flags[:n_layers]
    n_kv = hp.array("attention.head_count_kv", n_entries, "iu", "integers")
    if n_kv is not None and not n_kv.all():
        return [bool(n == 0) for n in n_kv[:n_layers]]
    interval = hp.integer("full_attention_interval", 4)
    return [(i + 1) % interval != 0 for i in range(n_layers)]


def _delta_net_shape(hp: HParams, head_map: str, eps: float) -> DeltaNetShape:
    # Ollama's converter says so; llama.cpp's does it.
    if not hp.file.boolean(f"{hp.arch}.ssm.v_head_reordered", True) and head_map == "tiled":
        raise hp.fail("ssm.v_head_reordered", "true", False)
    n_k_heads, n_v_heads = hp.integer("ssm.group_count"), hp.integer("ssm.time_step_rank")
    inner = hp.integer("ssm.inner_size")
    hp.divides("ssm.group_count", n_k_heads, n_v_heads)
    hp.divides("ssm.time_step_rank", n_v_heads, inner)
    d_k, n_taps = hp.integer("ssm.state_size"), hp.integer("ssm.conv_kernel", minimum=2)
    return DeltaNetShape(n_k_heads, n_v_heads, d_k, inner // n_v_heads, n_taps, head_map, eps)


def _check_sections(hp: HParams) -> None:
    """Raise ModelError unless there are rope sections. They assign rope pairs to the axes of
    images, which are equal for text; Ollama leaves out the fourth, which is 0."""
    key = "rope.dimension_sections"
    value = hp.file.metadata.get(f"{hp.arch}.{key}")
    n = 3 if isinstance(value, np.ndarray) and len(value) == 3 else 4
    if hp.array(key, n, "iu", "integers") is None:
        raise hp.fail(key, "4 integers", shown(value))


def _attention_shapes(
    hp: HParams, n_entries: int, linear: list[bool], n_embd: int, eps: float
) -> list[AttentionShape]:
    """The shapes of all layers. A linear layer does not use its own, so a file may give it none."""
    n_heads = hp.per_layer("attention.head_count", n_entries, minimum=0)
    n_kv_heads = hp.per_layer("attention.head_count_kv", n_entries, minimum=0)
    heads = list(zip(n_heads, n_kv_heads, strict=True))[: len(linear)]
    for counts, key in ((n_heads, "head_count"), (n_kv_heads, "head_count_kv")):
        if not all(n or is_linear for n, is_linear in zip(counts, linear, strict=False)):
            raise hp.fail(f"attention.{key}", "at least 1 in every layer with attention", 0)
    heads = [(n or 1, n_kv or n or 1) for n, n_kv in heads]
    d_head = hp.integer("attention.key_length", n_embd // max(*n_heads, 1))
    if (d_value := hp.integer("attention.value_length", d_head)) != d_head:
        raise hp.fail("attention.value_length", f"attention.key_length = {d_head}", d_value)
    for n, n_kv in heads:
        hp.divides("attention.head_count_kv", n_kv, n)
    n_rot = hp.integer("rope.dimension_count", d_head)
    if n_rot > d_head or n_rot % 2:
        raise hp.fail("rope.dimension_count", f"an even number up to {d_head}", n_rot)
    rope = read_rope(hp, n_rot)
    return [AttentionShape(n, n_kv, d_head, n_rot, *rope, eps) for n, n_kv in heads]
