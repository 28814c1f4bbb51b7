"""The demo model in PyTorch: Qwen3.5's text model, small, with transformers' parameter names.

`state_dict()` loads into transformers' Qwen3_5ForCausalLM with `transformers_config()`; a parity
test compares the two. Written anew because the kernels that make transformers' own delta rule fast
are no part of it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.train_demo.delta import gated_delta_rule

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class Sizes:
    """Every size of a model; the rest follows from them."""

    n_vocab: int = 4096
    n_embd: int = 256
    n_layers: int = 8
    interval: int = 4
    n_ff: int = 1024
    n_heads: int = 8
    n_kv_heads: int = 2
    n_linear_heads: int = 4
    head_dim: int = 64
    n_rot: int = 32
    sections: tuple[int, int, int] = (6, 5, 5)
    rope_base: float = 10000.0
    conv_kernel: int = 4
    eps: float = 1e-6
    n_ctx: int = 4096

    @property
    def layer_types(self) -> list[str]:
        return [LINEAR if (i + 1) % self.interval else FULL for i in range(self.n_layers)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def wide(x: Tensor) -> Tensor:
    """In float32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Its weight is stored as its distance from one."""

    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(n)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight)).to(x.dtype)


class GatedNorm(nn.Module):
    """Norm per head, then SiLU of a gate. Its weight is stored as it is."""

    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        y = wide(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return (y * F.silu(wide(gate))).to(gate.dtype)


class Linear(nn.Linear):
    """A product in the type `compute`; weights stay float32."""

    compute = torch.float32

    def __init__(self, n_in: int, n_out: int, zero: bool = False) -> None:
        super().__init__(n_in, n_out, bias=False)
        nn.init.normal_(self.weight, std=0.0 if zero else n_in**-0.5 / 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.compute), self.weight.to(self.compute))


class DeltaNet(nn.Module):
    """A linear-attention layer."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.kernel = s.n_linear_heads, s.head_dim, s.conv_kernel
        n = s.n_linear_heads * s.head_dim
        self.in_proj_qkv = Linear(s.n_embd, 3 * n)
        self.in_proj_z = Linear(s.n_embd, n)
        self.in_proj_b = Linear(s.n_embd, s.n_linear_heads)
        self.in_proj_a = Linear(s.n_embd, s.n_linear_heads)
        self.conv1d = nn.Conv1d(3 * n, 3 * n, s.conv_kernel, groups=3 * n, bias=False)
        self.A_log = nn.Parameter(torch.empty(s.n_linear_heads).uniform_(1, 8).log())
        # Time steps from 0.001 to 0.1, as Mamba has them: some heads forget slowly.
        step = torch.exp(torch.rand(s.n_linear_heads) * math.log(100) + math.log(0.001))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.norm = GatedNorm(s.head_dim, s.eps)
        self.out_proj = Linear(n, s.n_embd, zero=True)

    def _conv(self, x: Tensor) -> Tensor:
        """A causal depthwise convolution as a sum of shifted products, which can be fused."""
        n = x.shape[1]
        padded = F.pad(x, (0, 0, self.kernel - 1, 0))
        first, *taps = self.conv1d.weight[:, 0].to(x.dtype).unbind(-1)
        out = padded[:, :n] * first
        for i, tap in enumerate(taps, 1):
            out = out + padded[:, i : i + n] * tap
        return F.silu(out)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        mixed = self._conv(self.in_proj_qkv(x))
        q, k, v = (y.reshape(b, n, self.n_heads, self.head_dim) for y in mixed.chunk(3, -1))
        z = self.in_proj_z(x).reshape(b, n, self.n_heads, self.head_dim)
        beta = wide(self.in_proj_b(x)).sigmoid()
        g = -self.A_log.exp() * F.softplus(wide(self.in_proj_a(x)) + self.dt_bias)
        out = gated_delta_rule(_unit(q), _unit(k), wide(v), g, beta)
        return self.out_proj(self.norm(out, z).reshape(b, n, -1))


def _unit(x: Tensor) -> Tensor:
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Full attention with norms of queries and keys, partial rope and an output gate."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = s.n_heads, s.n_kv_heads, s.head_dim
        self.q_proj = Linear(s.n_embd, 2 * s.n_heads * s.head_dim)
        self.k_proj = Linear(s.n_embd, s.n_kv_heads * s.head_dim)
        self.v_proj = Linear(s.n_embd, s.n_kv_heads * s.head_dim)
        self.o_proj = Linear(s.n_heads * s.head_dim, s.n_embd, zero=True)
        self.q_norm, self.k_norm = RMSNorm(s.head_dim, s.eps), RMSNorm(s.head_dim, s.eps)
        self.n_rot, self.rope_base = s.n_rot, s.rope_base

    def _rope(self, x: Tensor, first: int) -> Tensor:
        half, dtype = self.n_rot // 2, wide(x).dtype
        pairs = torch.arange(0, self.n_rot, 2, device=x.device, dtype=dtype) / self.n_rot
        positions = torch.arange(first, first + x.shape[2], device=x.device, dtype=dtype)
        angles = positions[:, None] * self.rope_base**-pairs
        cos, sin = angles.cos(), angles.sin()
        one, two = wide(x[..., :half]), wide(x[..., half : 2 * half])
        turned = torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(x.dtype)
        return torch.cat([turned, x[..., 2 * half :]], -1)

    def project(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, n_heads, T, head_dim] of x [B, T, n_embd], whose rows have
        the positions from `first` on, and the gate [B, T, n_heads, head_dim]."""
        b, n, _ = x.shape
        q, gate = self.q_proj(x).reshape(b, n, self.n_heads, -1).chunk(2, -1)
        k = self.k_proj(x).reshape(b, n, self.n_kv_heads, -1)
        v = self.v_proj(x).reshape(b, n, self.n_kv_heads, -1).transpose(1, 2)
        q = self._rope(self.q_norm(q).transpose(1, 2), first)
        k = self._rope(self.k_norm(k).transpose(1, 2), first)
        k, v = (y.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for y in (k, v))
        return q, k, v.to(q.dtype), gate

    def output(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """What the layer adds [B, T, n_embd], of mixed values [B, n_heads, T, head_dim]."""
        gated = mixed.transpose(1, 2) * gate.sigmoid()
        return self.o_proj(gated.flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.project(x)
        return self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True), gate)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.gate_proj = Linear(s.n_embd, s.n_ff)
        self.up_proj = Linear(s.n_embd, s.n_ff)
        self.down_proj = Linear(s.n_ff, s.n_embd, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Norm, mixer, norm, feed-forward; residuals around both."""

    def __init__(self, s: Sizes, kind: str) -> None:
        super().__init__()
        mixer: nn.Module = DeltaNet(s) if kind == LINEAR else Attention(s)
        self.name = "linear_attn" if kind == LINEAR else "self_attn"
        self.add_module(self.name, mixer)
        self.mlp = MLP(s)
        self.input_layernorm = RMSNorm(s.n_embd, s.eps)
        self.post_attention_layernorm = RMSNorm(s.n_embd, s.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + getattr(self, self.name)(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything but the output matrix."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.n_vocab, s.n_embd)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(s, kind) for kind in s.layer_types)
        self.norm = RMSNorm(s.n_embd, s.eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def compute_in(model: nn.Module, compute: torch.dtype) -> None:
    """Have the products of a model in this type; its weights stay as they are."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.compute = compute


class DemoModel(nn.Module):
    """The whole model; the output matrix is the embedding.

    `compute`: what its products are in. Norms, decays, the delta rule and the residual stream are
    in the weights' type, float32 unless somebody calls `double`.
    """

    def __init__(self, sizes: Sizes, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.sizes, self.model = sizes, Trunk(sizes)
        compute_in(self, compute)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, n_vocab] of ids [B, T]; T in whole chunks of the delta rule."""
        return F.linear(self.model(ids), self.model.embed_tokens.weight)


def transformers_config(s: Sizes) -> dict[str, Any]:
    """The arguments of Qwen3_5TextConfig."""
    return {
        "vocab_size": s.n_vocab, "hidden_size": s.n_embd, "num_hidden_layers": s.n_layers,
        "layer_types": s.layer_types, "intermediate_size": s.n_ff,
        "num_attention_heads": s.n_heads, "num_key_value_heads": s.n_kv_heads,
        "head_dim": s.head_dim, "linear_num_key_heads": s.n_linear_heads,
        "linear_num_value_heads": s.n_linear_heads, "linear_key_head_dim": s.head_dim,
        "linear_value_head_dim": s.head_dim, "linear_conv_kernel_dim": s.conv_kernel,
        "rms_norm_eps": s.eps, "tie_word_embeddings": True, "max_position_embeddings": s.n_ctx,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": s.rope_base,
            "partial_rotary_factor": s.n_rot / s.head_dim,
            "mrope_section": list(s.sections), "mrope_interleaved": True,
        },
        "attn_implementation": "eager",
    }  # fmt: skip
