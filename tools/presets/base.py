"""What the presets of all architectures share: sizes, experts, and the frame of a model file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Preset(ABC):
    """Hyper-parameters of one model; an architecture adds its own and says what a layer holds.

    `n_vocab` 0: as many as the vocabulary has tokens; `n_ff` 0: not in the metadata;
    `n_experts` 0: a dense model. Variants of a file: `fused_qkv`, one tensor for attn_q, attn_k
    and attn_v; `fused_gate_up`, one for the experts' gate and up; `stripped`, leading dimensions
    of 1 dropped, as llama-quantize does. `bounded_decay`: decays have a lower bound, so that the
    values of ssm_a and ssm_dt are of another kind.
    """

    name: str
    arch: str
    n_layers: int
    n_embd: int
    n_heads: int
    n_vocab: int
    n_ff: int = 0
    tied: bool = False
    conv_kernel: int = 4
    eps: float = 1e-6
    context_length: int = 262144
    n_experts: int = 0
    n_experts_used: int = 0
    n_ff_exp: int = 0
    fused_qkv: bool = False
    fused_gate_up: bool = False
    stripped: bool = False
    bounded_decay: bool = False

    @abstractmethod
    def is_linear(self, layer: int) -> bool:
        """Whether the layer is a gated delta-net (else it is full attention)."""

    @abstractmethod
    def layer(self, layer: int) -> Shapes:
        """Row-major shapes of one layer's tensors, by the name after `blk.i.`."""

    @abstractmethod
    def own_metadata(self) -> dict[str, Any]:
        """The architecture's keys beyond those of `metadata`, without the prefix."""


def metadata(p: Preset) -> dict[str, Any]:
    """The hyper-parameters as GGUF metadata, without the `general.` and `tokenizer.` keys."""
    values: dict[str, Any] = {
        "block_count": p.n_layers,
        "context_length": p.context_length,
        "embedding_length": p.n_embd,
        "attention.head_count": p.n_heads,
        "attention.layer_norm_rms_epsilon": p.eps,
        "ssm.conv_kernel": p.conv_kernel,
    }
    if p.n_ff:
        values["feed_forward_length"] = p.n_ff
    if p.n_experts:
        values["expert_count"] = p.n_experts
        values["expert_used_count"] = p.n_experts_used
        values["expert_feed_forward_length"] = p.n_ff_exp
    return {f"{p.arch}.{key}": value for key, value in (values | p.own_metadata()).items()}


def tensors(p: Preset) -> Shapes:
    """Every tensor's row-major shape, in file order."""
    shapes: Shapes = {"token_embd.weight": (p.n_vocab, p.n_embd)}
    for i in range(p.n_layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in p.layer(i).items()}
    shapes["output_norm.weight"] = (p.n_embd,)
    if not p.tied:
        shapes["output.weight"] = (p.n_vocab, p.n_embd)
    return {name: _stripped(s) for name, s in shapes.items()} if p.stripped else shapes


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return _stripped(shape[1:]) if shape[0] == 1 and len(shape) > 1 else shape


def qkv(p: Preset, n_q: int, n_k: int, n_v: int) -> Shapes:
    """The projections to n_q, n_k and n_v rows, apart or fused."""
    if p.fused_qkv:
        return {"attn_qkv.weight": (n_q + n_k + n_v, p.n_embd)}
    rows = {"attn_q": n_q, "attn_k": n_k, "attn_v": n_v}
    return {f"{name}.weight": (n, p.n_embd) for name, n in rows.items()}


def dense(p: Preset) -> Shapes:
    """A SwiGLU feed-forward of width n_ff."""
    return _swiglu(p.n_embd, p.n_ff, "")


def experts(p: Preset, n_ff_shared: int) -> Shapes:
    """The router, the experts, and shared experts of that width together."""
    stacked = {
        name: (p.n_experts, *shape)
        for name, shape in _swiglu(p.n_embd, p.n_ff_exp, "_exps").items()
    }
    if p.fused_gate_up:
        del stacked["ffn_gate_exps.weight"], stacked["ffn_up_exps.weight"]
        stacked["ffn_gate_up_exps.weight"] = (p.n_experts, 2 * p.n_ff_exp, p.n_embd)
    router = {"ffn_gate_inp.weight": (p.n_experts, p.n_embd)}
    return router | stacked | _swiglu(p.n_embd, n_ff_shared, "_shexp")


def _swiglu(n_embd: int, n_ff: int, suffix: str) -> Shapes:
    return {
        f"ffn_gate{suffix}.weight": (n_ff, n_embd),
        f"ffn_up{suffix}.weight": (n_ff, n_embd),
        f"ffn_down{suffix}.weight": (n_embd, n_ff),
    }
