"""Mixture-of-experts feed-forward: routed experts and a shared one, all SwiGLU."""

from dataclasses import dataclass

from engine.graph import Shape, Tensor
from engine.models.hparams import HParams
from engine.models.layers import Builder
from engine.ops.mul_mat_id import mul_mat_id
from engine.ops.router import ROUTER, Routing
from engine.ops.swiglu import swiglu


@dataclass(frozen=True)
class MoEShape:
    """Sizes and routing of a layer's experts; `d_ff` of a routed one, `d_shared` of the shared."""

    n_experts: int
    d_ff: int
    d_shared: int
    routing: Routing

    def check(self, hp: HParams) -> None:
        """Raise ModelError unless the numbers of experts and groups fit together."""
        n_used, (n_groups, n_groups_used) = self.routing.n_used, self.routing.groups
        if n_used > self.n_experts:
            raise hp.fail("expert_used_count", f"1 to {self.n_experts}", n_used)
        hp.divides("expert_group_count", n_groups, self.n_experts)
        if n_groups > 1 and self.n_experts // n_groups < 2:
            raise hp.fail("expert_group_count", f"at most {self.n_experts // 2}", n_groups)
        if not 1 <= n_groups_used <= n_groups:
            raise hp.fail("expert_group_used_count", f"1 to {n_groups}", n_groups_used)
        if n_used > (n := self.n_experts // n_groups * n_groups_used):
            raise hp.fail("expert_used_count", f"at most the {n} of the used groups", n_used)

    def weights(self, n_embd: int, fused: bool, gated: bool, biased: bool) -> dict[str, Shape]:
        """The tensors of a layer: gate and up fused, the shared expert gated, the router biased."""
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
    """The experts of every layer of a Qwen hybrid.

    Missing sizes follow from `feed_forward_length`: all of it, or its part of the used experts.
    """
    n_experts = hp.integer("expert_count")
    n_used = hp.per_layer("expert_used_count", n_entries)
    n_ff = hp.per_layer("feed_forward_length", n_entries, 0, minimum=0)
    keys = ("expert_feed_forward_length", "expert_shared_feed_forward_length")
    given = [hp.integer(key, 0, minimum=0) for key in keys]
    shapes = []
    for used, ff in zip(n_used, n_ff, strict=True):
        d_ff, d_shared = given[0] or ff // used, given[1] or ff
        for key, size in zip(keys, (d_ff, d_shared), strict=True):
            if not size:
                raise hp.fail(key, "at least 1", size)
        shapes.append(MoEShape(n_experts, d_ff, d_shared, Routing(used)))
        shapes[-1].check(hp)
    return shapes


def moe_ffn(
    b: Builder, x: Tensor, shape: MoEShape, limits: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Routed experts plus the shared expert, whose gate and whose router's bias may be missing.

    `limits`: of the activations of routed experts, and of the shared one (see SWIGLU).
    """
    g = b.graph
    gated = b.has("ffn_gate_inp_shexp.weight")
    names = ["ffn_gate_inp", "ffn_gate_shexp", "ffn_up_shexp", *["ffn_gate_inp_shexp"] * gated]
    logits, shared_gate, shared_up, *gate_row = b.mul_mat("ffn_in", x, *names)
    bias = b.weight("exp_probs_b.bias") if b.has("exp_probs_b.bias") else None
    ids, chosen = b.add(ROUTER, logits=logits, bias=bias, **vars(shape.routing))
    pairs = (_gate_up(b, x, ids, shape.d_ff), (shared_gate, shared_up))
    hidden, shared_hidden = swiglu(g, b.name("swiglu"), *pairs, limits=limits)
    down = b.weight("ffn_down_exps.weight")
    (y,) = mul_mat_id(g, b.name("ffn_down_exps"), hidden, ids, down, weights=chosen)
    row = gate_row[0] if gated else None
    return b.mul_mat("ffn_down", shared_hidden, "ffn_down_shexp", gate=row, add=y)[0]


def _gate_up(b: Builder, x: Tensor, ids: Tensor, d_ff: int) -> tuple[Tensor, Tensor]:
    """The routed experts' gate and up projections [T, n_used, d_ff], fused in some files."""
    name = "ffn_gate_up_exps"
    if b.has(f"{name}.weight"):
        (both,) = mul_mat_id(b.graph, b.name(name), x, ids, b.weight(f"{name}.weight"))
        return both.slice(2, 0, d_ff), both.slice(2, d_ff, 2 * d_ff)
    matrices = [b.weight(f"ffn_{part}_exps.weight") for part in ("gate", "up")]
    gate, up = mul_mat_id(b.graph, b.name(name), x, ids, *matrices)
    return gate, up
