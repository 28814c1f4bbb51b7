"""Feed-forward parts of the parity cases: SwiGLU blocks and routed experts.

transformers keeps all experts of a layer in two tensors, gate rows before up rows; GGUF has three,
or two from `--fuse-gate-up-exps`. An entry of a parameter table is a shape and a distribution.
"""

from __future__ import annotations

import numpy as np

from tests.parity.common import Parameters, Weights, matrix, strong


def swiglu_parameters(prefix: str, n_ff: int, n_embd: int) -> Parameters:
    return {
        prefix + "gate_proj.weight": ((n_ff, n_embd), matrix),
        prefix + "up_proj.weight": ((n_ff, n_embd), matrix),
        prefix + "down_proj.weight": ((n_embd, n_ff), matrix),
    }


def swiglu_tensors(w: Weights, prefix: str, suffix: str = "") -> Weights:
    """`suffix`: what the GGUF names have after gate, up and down."""
    return {
        f"ffn_{name}{suffix}.weight": w[f"{prefix}{name}_proj.weight"]
        for name in ("gate", "up", "down")
    }


def expert_parameters(n_experts: int, n_ff: int, n_embd: int) -> Parameters:
    """The router and the routed experts."""
    return {
        "mlp.gate.weight": ((n_experts, n_embd), strong),
        "mlp.experts.gate_up_proj": ((n_experts, 2 * n_ff, n_embd), matrix),
        "mlp.experts.down_proj": ((n_experts, n_embd, n_ff), matrix),
    }


def expert_tensors(w: Weights, fused: bool = False) -> Weights:
    """The router and the routed experts; `fused`: gate and up rows stay in one tensor."""
    gate_up = w["mlp.experts.gate_up_proj"]
    gate, up = np.split(gate_up, 2, axis=1)
    out = {"ffn_gate_inp.weight": w["mlp.gate.weight"]}
    if fused:
        out["ffn_gate_up_exps.weight"] = gate_up
    else:
        out |= {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
    return out | {"ffn_down_exps.weight": w["mlp.experts.down_proj"]}
