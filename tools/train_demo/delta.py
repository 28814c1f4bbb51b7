"""The gated delta rule in chunks, in PyTorch, fast to train with on a GPU.

Blocks of 64 tokens become triangular systems, solved for all blocks at once; only the states at the
blocks' borders are computed one after the other, each by one product:

    S[c+1] = P[c] S[c] + R[c],  P = exp(G) I - K'ᵀ W,  R = K'ᵀ U

W and U as in "Gated Delta Networks" (arXiv 2412.06464); decays are differences of cumulated
logarithms, never positive. Everything is in the type that
comes in: float32, or float64 to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CHUNK = 64
_SMALLEST = 8


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Outputs [B, T, H, D] of the rule from a state of zeros.

    q, k, v [B, T, H, D], q and k of norm one; g, the logarithm of the decay, and beta [B, T, H].
    T must be whole chunks. Outputs are scaled by D^-0.5.
    """
    q, k, v = (_chunks(x) for x in (q, k, v))  # [B, H, C, 64, D]
    g, beta = (_chunks(x.unsqueeze(-1)) for x in (g, beta))  # [B, H, C, 64, 1]
    total = g.cumsum(-2)
    # Above the diagonal the difference may be large: masked before exp, for the gradient's sake.
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (total - total.mT).masked_fill(~lower, -torch.inf).exp()
    strictly = lower.tril(-1)
    mixed = (beta * (k @ k.mT) * decay).masked_fill(~strictly, 0.0)
    inverse = unit_lower_inverse(mixed)
    u = inverse @ (beta * v)
    w = inverse @ (beta * total.exp() * k)
    last = total[..., -1:, :]
    carried = (k * (last - total).exp()).mT  # K'ᵀ
    identity = torch.eye(k.shape[-1], device=q.device, dtype=q.dtype)
    states = state_scan(last.exp() * identity - carried @ w, carried @ u)
    q = q * q.shape[-1] ** -0.5
    out = (q * total.exp()) @ states + ((q @ k.mT) * decay) @ (u - w @ states)
    b, h, c, n, d = out.shape
    return out.reshape(b, h, c * n, d).transpose(1, 2)


def _chunks(x: Tensor) -> Tensor:
    b, t, h, d = x.shape
    return x.transpose(1, 2).reshape(b, h, t // CHUNK, CHUNK, d)


@contextmanager
def _exact() -> Iterator[None]:
    """Products of float32 without TF32, whose rounding a series would amplify."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.library.custom_op("train_demo::unit_lower_inverse", mutates_args=())
def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + a)^-1 for strictly lower triangular a [..., 64, 64], by blocks that double in size.

    A series for the smallest blocks, where its terms are still small: a^8 = 0.
    """
    with _exact():
        x = _diagonal_blocks(a, _SMALLEST)
        identity = torch.eye(_SMALLEST, device=a.device, dtype=a.dtype)
        x2 = x @ x
        inverse = (identity - x) @ (identity + x2) @ (identity + x2 @ x2)
        size = _SMALLEST
        while size < a.shape[-1]:
            below = _diagonal_blocks(a, 2 * size)[..., size:, :size]
            first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
            corner = -second @ below @ first
            top = torch.cat([first, torch.zeros_like(first)], -1)
            inverse = torch.cat([top, torch.cat([corner, second], -1)], -2)
            size *= 2
        return inverse.squeeze(-3).contiguous()


def _diagonal_blocks(a: Tensor, size: int) -> Tensor:
    """[..., n / size, size, size]"""
    n = a.shape[-1] // size
    blocks = a.reshape(*a.shape[:-2], n, size, n, size)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3).contiguous()


@unit_lower_inverse.register_fake
def _(a: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _inverse_backward(context: Any, grad: Tensor) -> Tensor:
    (inverse,) = context.saved_tensors
    return -(inverse.mT @ grad @ inverse.mT)


unit_lower_inverse.register_autograd(
    _inverse_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output)
)


@torch.library.custom_op("train_demo::state_scan", mutates_args=())
def state_scan(p: Tensor, r: Tensor) -> Tensor:
    """States before each chunk: S[0] = 0, S[c+1] = p[c] S[c] + r[c]. All [B, H, C, D, D]."""
    states = r.new_zeros(r.shape)
    # Views made at once: the host takes half the time to start so many small products.
    ps, rs, found = (x.flatten(0, 1).unbind(1) for x in (p, r, states))
    for c in range(1, len(rs)):
        torch.baddbmm(rs[c - 1], ps[c - 1], found[c - 1], out=found[c])
    return states


@state_scan.register_fake
def _(p: Tensor, r: Tensor) -> Tensor:
    return r.new_empty(r.shape)


@torch.library.custom_op("train_demo::state_scan_gradient", mutates_args=())
def state_scan_gradient(p: Tensor, grad: Tensor) -> Tensor:
    """What the loss gains by each r, given what it gains directly by each state."""
    gained = grad.new_zeros(grad.shape)
    ps, grads, found = (x.flatten(0, 1).unbind(1) for x in (p.mT, grad, gained))
    for c in range(len(grads) - 2, -1, -1):
        torch.baddbmm(grads[c + 1], ps[c + 1], found[c + 1], out=found[c])
    return gained


@state_scan_gradient.register_fake
def _(p: Tensor, grad: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


def _scan_backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    p, states = context.saved_tensors
    gained = state_scan_gradient(p, grad.contiguous())
    return gained @ states.mT, gained


def _keep_for_scan(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


state_scan.register_autograd(_scan_backward, setup_context=_keep_for_scan)
