"""Ling 3.0 in numpy float64, the oracle where transformers has no clamps.

It reads weights in the transformers layout, and shares nothing with the engine: the recurrence goes
token by token, keys and values of MLA are expanded for every head, and all positions are computed
anew for each token. Formulas: transformers' `bailing_hybrid`; clamps: inclusionAI's vLLM for
experts, llama.cpp for dense feed-forwards.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.parity.bailingmoe3 import Case
from tests.parity.common import Weights
from tests.parity.kimi_linear import KDA

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
# Of the norms of q and k, and of low-rank matrices, whatever the configuration says.
_EPS = 1e-6


class NumpyLing:
    """A model with the weights of a case."""

    def __init__(self, case: Case, weights: Weights) -> None:
        if case.yarn_factor != 1:
            raise ValueError("no YaRN here")
        self._case = case
        self._weights = {name: w.astype(np.float64) for name, w in weights.items()}
        self._margins: list[float] = []

    def logits(self, ids: list[int]) -> Array:
        """Logits of every position, float64 [n_tokens, n_vocab]."""
        c, w = self._case, self._weights
        x = w["model.embed_tokens.weight"][ids]
        for i, kind in enumerate(c.layers):
            prefix = f"model.layers.{i}."
            layer = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
            h = _rms(x, c.eps) * layer["input_layernorm.weight"]
            x = x + (_kda if kind == KDA else _mla)(c, layer, h)
            h = _rms(x, c.eps) * layer["post_attention_layernorm.weight"]
            limits = c.clamps[i] if c.clamps else (0.0, 0.0)
            if i < c.n_dense:
                x = x + _swiglu(layer, "mlp.", h, limits[1])
            else:
                x = x + self._experts(layer, h, *limits)
        head = "model.embed_tokens.weight" if c.tied else "lm_head.weight"
        return _rms(x, c.eps) * w["model.norm.weight"] @ w[head].T

    def choice_margin(self, ids: list[int]) -> float:
        """The smallest margin of all routers (Routing.margin)."""
        self._margins = []
        self.logits(ids)
        return min(self._margins)

    def _experts(self, w: Tensors, h: Array, limit: float, shared_limit: float) -> Array:
        c = self._case
        logits, bias = h @ w["mlp.gate.weight"].T, w["mlp.gate.e_score_correction_bias"]
        self._margins.append(c.routing.margin(logits, bias))
        y = _swiglu(w, "mlp.shared_experts.", h, shared_limit)
        for t, p in enumerate(_sigmoid(logits)):
            chosen = _choose(c, p + bias)
            total = sum(p[e] for e in chosen) if c.normalized else 1.0
            for e in chosen:
                gate, up = np.split(w["mlp.experts.gate_up_proj"][e] @ h[t], 2)
                hidden = _clamped(gate, up, limit)
                weight = p[e] / total * c.expert_scale
                y[t] += weight * (w["mlp.experts.down_proj"][e] @ hidden)
        return y


def _choose(c: Case, scores: Array) -> list[int]:
    """The experts of a token, whose biased probabilities are `scores`."""
    n_groups, size = c.routing.n_groups, len(scores) // c.routing.n_groups
    parts = [range(g * size, (g + 1) * size) for g in range(n_groups)]
    goodness = [sum(sorted(scores[list(part)])[-2:]) for part in parts]
    best = sorted(range(n_groups), key=lambda g: -goodness[g])[: c.routing.n_groups_used]
    eligible = [e for g in best for e in parts[g]]
    return sorted(eligible, key=lambda e: -scores[e])[: c.routing.n_used]


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _rms(x: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def _clamped(gate: Array, up: Array, limit: float) -> Array:
    activated = gate * _sigmoid(gate)
    if limit == 0:
        return activated * up
    return np.minimum(activated, limit) * np.maximum(np.minimum(up, limit), -limit)


def _swiglu(w: Tensors, prefix: str, h: Array, limit: float) -> Array:
    gate, up, down = (w[f"{prefix}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return _clamped(h @ gate.T, h @ up.T, limit) @ down.T


def _kda(c: Case, w: Tensors, h: Array) -> Array:
    """Kimi delta attention with bounded decays, a token at a time."""
    n, size = len(h), c.kda_head_dim
    w = {name.removeprefix("self_attn."): values for name, values in w.items()}
    qkv = np.concatenate([h @ w[f"{part}_proj.weight"].T for part in "qkv"], axis=1)
    taps, padded = w["conv1d.weight"][:, 0], np.pad(qkv, ((c.conv_kernel - 1, 0), (0, 0)))
    mixed = np.array([(padded[t : t + c.conv_kernel] * taps.T).sum(axis=0) for t in range(n)])
    mixed *= _sigmoid(mixed)
    q, k, v = (part.reshape(n, c.n_heads, size) for part in np.split(mixed, 3, axis=1))
    q, k = (x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + _EPS) for x in (q, k))
    f = (h @ w["forget_gate.f_proj.weight"].T + w["forget_gate.dt_bias"]).reshape(q.shape)
    decay = c.lower_bound * _sigmoid(np.exp(w["forget_gate.A_log"])[:, np.newaxis] * f)
    beta = _sigmoid(h @ w["b_proj.weight"].T)
    out, state = np.empty(q.shape), np.zeros((c.n_heads, size, size))
    for t in range(n):
        for head in range(c.n_heads):
            s = state[head] * np.exp(decay[t, head])[:, np.newaxis]
            s += np.outer(k[t, head], beta[t, head] * (v[t, head] - k[t, head] @ s))
            out[t, head], state[head] = q[t, head] @ s / np.sqrt(size), s
    gate = _sigmoid(h @ w["g_proj.weight"].T).reshape(q.shape)
    normed = _rms(out, c.eps) * w["o_norm.weight"] * gate
    return normed.reshape(n, -1) @ w["o_proj.weight"].T


def _mla(c: Case, w: Tensors, h: Array) -> Array:
    """Latent attention with keys and values of every head."""
    n, d_nope = len(h), c.nope_dim
    w = {name.removeprefix("self_attn."): values for name, values in w.items()}
    if c.q_rank:
        low = _rms(h @ w["q_a_proj.weight"].T, _EPS) * w["q_a_layernorm.weight"]
        q = low @ w["q_b_proj.weight"].T
    else:
        q = h @ w["q_proj.weight"].T
    q = q.reshape(n, c.n_heads, -1)
    latent, k_pe = np.split(h @ w["kv_a_proj_with_mqa.weight"].T, [c.n_latent], axis=1)
    latent = _rms(latent, _EPS) * w["kv_a_layernorm.weight"]
    kv = (latent @ w["kv_b_proj.weight"].T).reshape(n, c.n_heads, -1)
    k_pe, gate, out = _turned(c, k_pe), _sigmoid(h @ w["g_proj.weight"].T), []
    for head in range(c.n_heads):
        key = np.concatenate([kv[:, head, :d_nope], k_pe], axis=1)
        query = np.concatenate([q[:, head, :d_nope], _turned(c, q[:, head, d_nope:])], axis=1)
        scores = query @ key.T / np.sqrt(c.qk_head_dim)
        scores[np.triu_indices(n, 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed = p / p.sum(axis=1, keepdims=True) @ kv[:, head, d_nope:]
        out.append(mixed * gate[:, head, np.newaxis])
    return np.concatenate(out, axis=1) @ w["o_proj.weight"].T


def _turned(c: Case, x: Array) -> Array:
    """x [n, P] with its pairs (2j, 2j + 1) turned as complex numbers, row t by position t."""
    speeds = c.rope_base ** (-2.0 * np.arange(x.shape[1] // 2) / x.shape[1])
    angles = np.arange(len(x))[:, np.newaxis] * speeds
    pairs = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
    return np.stack([pairs.real, pairs.imag], axis=2).reshape(x.shape)
