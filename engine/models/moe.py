"""Mixture-of-experts feed-forward: routed experts and a shared one, all SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

from engine.graph import Shape, Tensor
from engine.models.hparams import HParams
from engine.models.layers import Builder
from engine.ops.mul_mat import mul_mat
from engine.ops.mul_mat_id import mul_mat_id
from engine.ops.router import router
from engine.ops.swiglu import swiglu


@dataclass(frozen=True)
class MoEShape:
    """Sizes and routing of a layer's experts; `d_ff` of a routed one, `d_shared` of the shared."""

    n_experts: int
    n_used: int
    d_ff: int
    d_shared: int
    gating: str = "softmax"
    scale: float = 1.0
    eps: float = 0.0
    groups: tuple[int, int] = (1, 1)

    def check(self, hp: HParams) -> None:
        """Raise ModelError unless the numbers of experts and groups fit together."""
        if self.n_used > self.n_experts:
            raise hp.fail("expert_used_count", f"1 to {self.n_experts}", self.n_used)
        n_groups, n_groups_used = self.groups
        hp.divides("expert_group_count", n_groups, self.n_experts)
        if n_groups > 1 and self.n_experts // n_groups < 2:
            raise hp.fail("expert_group_count", f"at most {self.n_experts // 2}", n_groups)
        if n_groups_used > n_groups:
            raise hp.fail("expert_group_used_count", f"1 to {n_groups}", n_groups_used)
        if self.n_used > self.n_experts // n_groups * n_groups_used:
            n = self.n_experts // n_groups * n_groups_used
            raise hp.fail("expert_used_count", f"at most the {n} of the used groups", self.n_used)

    def weights(self, n_embd: int, fused: bool, gated: bool, biased: bool) -> dict[str, Shape]:
        """The tensors of a layer: gate and up `fused` or not, a `gated` shared expert, a router
        `biased` or not."""
        x, d_ff, d_shared = self.n_experts, self.d_ff, self.d_shared
        shapes: dict[str, Shape] = {
            "ffn_gate_inp.weight": (x, n_embd),
            "ffn_down_exps.weight": (x, n_embd, d_ff),
            "ffn_gate_shexp.weight": (d_shared, n_embd),
            "ffn_up_shexp.weight": (d_shared, n_embd),
            "ffn_down_shexp.weight": (n_embd, d_shared),
        }
        if fused:
            shapes["ffn_gate_up_exps.weight"] = (x, 2 * d_ff, n_embd)
        else:
            shapes |= {f"ffn_{name}_exps.weight": (x, d_ff, n_embd) for name in ("gate", "up")}
        if gated:
            shapes["ffn_gate_inp_shexp.weight"] = (1, n_embd)
        if biased:
            shapes["exp_probs_b.bias"] = (x,)
        return shapes


def moe_shapes(hp: HParams, n_entries: int) -> list[MoEShape]:
    """The experts of every layer of a Qwen hybrid; sizes that are missing follow from F."""
    n_experts = hp.integer("expert_count")
    n_used = hp.per_layer("expert_used_count", n_entries)
    n_ff = hp.per_layer("feed_forward_length", n_entries, 0, minimum=0)
    sizes = (
        hp.integer("expert_feed_forward_length", 0, 0),
        hp.integer("expert_shared_feed_forward_length", 0, 0),
    )
    shapes = []
    for used, ff in zip(n_used, n_ff, strict=True):
        d_ff, d_shared = sizes[0] or ff // used, sizes[1] or ff
        if not d_ff:
            raise hp.fail("expert_feed_forward_length", "at least 1", d_ff)
        if not d_shared:
            raise hp.fail("expert_shared_feed_forward_length", "at least 1", d_shared)
        shapes.append(MoEShape(n_experts, used, d_ff, d_shared))
        shapes[-1].check(hp)
    return shapes


def moe_ffn(b: Builder, prefix: str, x: Tensor, shape: MoEShape) -> Tensor:
    """Routed experts plus the shared expert, whose gate and whose router's bias may be missing."""
    s, g = shape, b.graph
    names = ["ffn_gate_inp", "ffn_gate_shexp", "ffn_up_shexp"]
    gated = b.has(f"{prefix}.ffn_gate_inp_shexp.weight")
    names += ["ffn_gate_inp_shexp"] * gated
    weights = [b.weight(f"{prefix}.{name}.weight") for name in names]
    logits, shared_gate, shared_up, *shared = mul_mat(g, f"{prefix}.ffn_in", x, *weights)
    bias_name = f"{prefix}.exp_probs_b.bias"
    ids, chosen = router(
        g,
        f"{prefix}.router",
        logits,
        b.weight(bias_name) if b.has(bias_name) else None,
        n_used=s.n_used,
        gating=s.gating,
        scale=s.scale,
        eps=s.eps,
        groups=s.groups,
    )
    gate, up = _experts_in(b, prefix, x, ids, s.d_ff)
    pairs = ((gate, up), (shared_gate, shared_up))
    hidden, shared_hidden = swiglu(g, f"{prefix}.swiglu", *pairs)
    down = b.weight(f"{prefix}.ffn_down_exps.weight")
    (y,) = mul_mat_id(g, f"{prefix}.ffn_down_exps", hidden, ids, down, weights=chosen)
    down = b.weight(f"{prefix}.ffn_down_shexp.weight")
    gate_row = shared[0] if gated else None
    return mul_mat(g, f"{prefix}.ffn_down", shared_hidden, down, gate=gate_row, add=y)[0]


def _experts_in(
    b: Builder, prefix: str, x: Tensor, ids: Tensor, d_ff: int
) -> tuple[Tensor, Tensor]:
    name = f"{prefix}.ffn_gate_up_exps"
    if b.has(f"{name}.weight"):
        (both,) = mul_mat_id(b.graph, name, x, ids, b.weight(f"{name}.weight"))
        return both.slice(2, 0, d_ff), both.slice(2, d_ff, 2 * d_ff)
    matrices = [b.weight(f"{prefix}.ffn_{part}_exps.weight") for part in ("gate", "up")]
    gate, up = mul_mat_id(b.graph, name, x, ids, *matrices)
    return gate, up
