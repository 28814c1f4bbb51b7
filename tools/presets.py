"""The shapes of models: hyper-parameters, GGUF metadata and tensor shapes of each preset.

The dense `qwen35` architecture; dimensions of the released Qwen3.5 models, and tiny ones for
tests. Used by tools/synth.py; needs only numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Preset:
    """Hyper-parameters of one model; `n_vocab` 0 means as many as the vocabulary has tokens."""

    name: str
    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_kv_heads: int
    n_v_heads: int
    tied: bool
    n_k_heads: int = 16
    head_dim: int = 256
    k_dim: int = 128
    v_dim: int = 128
    conv_kernel: int = 4
    full_attention_interval: int = 4
    n_rot: int = 64
    rope_base: float = 1e7
    rope_sections: tuple[int, ...] = (11, 11, 10, 0)
    eps: float = 1e-6
    context_length: int = 262144
    n_vocab: int = 248320
    arch: str = "qwen35"

    def is_linear(self, layer: int) -> bool:
        """Whether the layer is a gated delta-net (else it is full attention)."""
        return (layer + 1) % self.full_attention_interval != 0


_TINY: dict[str, Any] = {"n_rot": 16, "context_length": 4096, "n_vocab": 0}
PRESETS = {
    p.name: p
    for p in (
        # Rows of 64 and 192: K-quants fall back to types with blocks of 32.
        Preset("tiny", 4, 64, 192, 4, 2, 4, True, 4, 32, 16, 16, **_TINY),
        # Every row is a multiple of 256.
        Preset("tiny-untied", 4, 256, 512, 8, 2, 8, False, 4, 32, 32, 32, **_TINY),
        Preset("0.8b", 24, 1024, 3584, 8, 2, 16, True),
        Preset("2b", 24, 2048, 6144, 8, 2, 16, True),
        Preset("4b", 32, 2560, 9216, 16, 4, 32, True),
        Preset("9b", 32, 4096, 12288, 16, 4, 32, False),
        Preset("27b", 64, 5120, 17408, 24, 4, 48, False),
    )
}


def metadata(p: Preset) -> dict[str, Any]:
    """The hyper-parameters as GGUF metadata, without the `general.` and `tokenizer.` keys."""
    values = {
        "block_count": p.n_layers,
        "context_length": p.context_length,
        "embedding_length": p.n_embd,
        "feed_forward_length": p.n_ff,
        "attention.head_count": p.n_heads,
        "attention.head_count_kv": p.n_kv_heads,
        "attention.key_length": p.head_dim,
        "attention.value_length": p.head_dim,
        "attention.layer_norm_rms_epsilon": p.eps,
        "attention.recurrent_layers": np.array([p.is_linear(i) for i in range(p.n_layers)]),
        "full_attention_interval": p.full_attention_interval,
        "rope.dimension_count": p.n_rot,
        "rope.dimension_sections": np.array(p.rope_sections, np.int32),
        "rope.freq_base": float(p.rope_base),
        "ssm.conv_kernel": p.conv_kernel,
        "ssm.state_size": p.k_dim,
        "ssm.group_count": p.n_k_heads,
        "ssm.time_step_rank": p.n_v_heads,
        "ssm.inner_size": p.n_v_heads * p.v_dim,
    }
    return {f"{p.arch}.{key}": value for key, value in values.items()}


def tensors(p: Preset) -> dict[str, tuple[int, ...]]:
    """Every tensor's row-major shape, in file order."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (p.n_vocab, p.n_embd)}
    for i in range(p.n_layers):
        layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (p.n_embd,)}
        layer |= _linear_layer(p) if p.is_linear(i) else _attention_layer(p)
        layer["post_attention_norm.weight"] = (p.n_embd,)
        layer["ffn_gate.weight"] = layer["ffn_up.weight"] = (p.n_ff, p.n_embd)
        layer["ffn_down.weight"] = (p.n_embd, p.n_ff)
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    shapes["output_norm.weight"] = (p.n_embd,)
    if not p.tied:
        shapes["output.weight"] = (p.n_vocab, p.n_embd)
    return shapes


def _linear_layer(p: Preset) -> dict[str, tuple[int, ...]]:
    n_conv = 2 * p.n_k_heads * p.k_dim + p.n_v_heads * p.v_dim
    return {
        "attn_qkv.weight": (n_conv, p.n_embd),
        "attn_gate.weight": (p.n_v_heads * p.v_dim, p.n_embd),
        "ssm_conv1d.weight": (n_conv, p.conv_kernel),
        "ssm_a": (p.n_v_heads,),
        "ssm_dt.bias": (p.n_v_heads,),
        "ssm_beta.weight": (p.n_v_heads, p.n_embd),
        "ssm_alpha.weight": (p.n_v_heads, p.n_embd),
        "ssm_norm.weight": (p.v_dim,),
        "ssm_out.weight": (p.n_embd, p.n_v_heads * p.v_dim),
    }


def _attention_layer(p: Preset) -> dict[str, tuple[int, ...]]:
    return {
        "attn_q.weight": (p.n_heads * 2 * p.head_dim, p.n_embd),
        "attn_k.weight": (p.n_kv_heads * p.head_dim, p.n_embd),
        "attn_v.weight": (p.n_kv_heads * p.head_dim, p.n_embd),
        "attn_q_norm.weight": (p.head_dim,),
        "attn_k_norm.weight": (p.head_dim,),
        "attn_output.weight": (p.n_embd, p.n_heads * p.head_dim),
    }
