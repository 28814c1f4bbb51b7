"""Muon for the matrices of the layers, AdamW for everything else.

Muon (Keller Jordan, 2024) makes a matrix's momentum orthogonal, nearly, before it is subtracted;
small models learn from far fewer tokens with it.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

MUON_RATE, ADAM_RATE = 0.02, 3e-3
_MOMENTUM, _DECAY = 0.95, 0.1
_SERIES = (3.4445, -4.7750, 2.0315)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """The matrices x [n, rows, columns] with all singular values near one (Newton-Schulz)."""
    a, b, c = _SERIES
    tall = x.shape[-2] > x.shape[-1]
    y = x.bfloat16() if x.is_cuda else x
    y = y.mT if tall else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    return (y.mT if tall else y).to(x.dtype)


class Optimizer:
    """Both optimizers; `step(share)` takes a step at that share of their full rates."""

    def __init__(self, model: nn.Module, rate: float = 1.0) -> None:
        self._rate = rate
        groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        others = []
        for name, p in model.named_parameters():
            if p.ndim == 2 and min(p.shape) >= 32 and "embed" not in name:
                groups[p.shape].append(p)
            else:
                others.append(p)
        self._groups = list(groups.values())
        self._momenta = [torch.zeros_like(torch.stack(list(group))) for group in self._groups]
        fused = others[0].is_cuda
        self._adam = torch.optim.AdamW(
            others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        )
        self._all = [p for group in self._groups for p in group] + others

    def state_dict(self) -> dict[str, Any]:
        """All that it remembers of earlier steps."""
        return {"momenta": self._momenta, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, which stays as it is."""
        for own, momentum in zip(self._momenta, state["momenta"], strict=True):
            own.copy_(momentum)
        self._adam.load_state_dict(deepcopy(state["adam"]))

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Update all parameters from their gradients, and clear these."""
        share *= self._rate
        nn.utils.clip_grad_norm_(self._all, 1.0)
        for group, momentum in zip(self._groups, self._momenta, strict=True):
            grads = torch.stack([p.grad for p in group if p.grad is not None])
            momentum.lerp_(grads, 1 - _MOMENTUM)
            update = orthogonal(grads.lerp(momentum, _MOMENTUM))
            rows, columns = group[0].shape
            rate = MUON_RATE * share
            torch._foreach_mul_(group, 1 - rate * _DECAY)
            scale = rate * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(group, list(update.unbind()), alpha=-scale)
        for options in self._adam.param_groups:
            options["lr"] = ADAM_RATE * share
        self._adam.step()
        for p in self._all:
            p.grad = None
