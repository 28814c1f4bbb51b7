"""What the ops mean, written down a second time: plain loops in float64, for tests only.

Follows the ops' contracts and shares no code with the engine. Every function takes an op's operands
(float64, or integers) and attributes, and returns its outputs and the states after it by operand
name; its arguments stay as they are. Rows that belong to no sequence come out as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Result = tuple[list[Array], dict[str, Array]]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _silu(x: float) -> float:
    return x * _sigmoid(x)


def _softplus(x: float) -> float:
    return x if x > 20 else math.log1p(math.exp(x))


def _each(function: Callable[[float], float], x: Array) -> Array:
    return np.array([function(float(value)) for value in x.flat]).reshape(x.shape)


def _rms(row: Array, eps: float) -> Array:
    mean = sum(float(value) ** 2 for value in row) / len(row)
    return row / math.sqrt(mean + eps)


def _each_row(function: Callable[[Array], Array], x: Array) -> Array:
    rows = [function(row) for row in x.reshape(-1, x.shape[-1])]
    return np.array(rows).reshape(x.shape)


def _unwritten(*shape: int) -> Array:
    return np.full(shape, np.nan)


def add_rms_norm(x: Array, weight: Array, delta: Array | None = None, *, eps: float) -> Result:
    total = x if delta is None else x + delta
    normed = _each_row(lambda row: _rms(row, eps) * weight, total)
    return ([normed] if delta is None else [normed, total]), {}


def get_rows(table: Array, ids: Array) -> Result:
    return [np.array([table[i] for i in ids])], {}


def _products(x: Array, matrix: Array) -> Array:
    """Every row of x [n, in] times every row of a matrix [out, in]."""
    return np.array([[np.sum(row * w) for w in matrix] for row in x]).reshape(len(x), len(matrix))


def mul_mat(
    x: Array, gate: Array | None = None, add: Array | None = None, **weights: Array
) -> Result:
    products = [_products(x, weight) for weight in weights.values()]
    for y in products:
        for t in range(len(x)):
            y[t] *= 1 if gate is None else _sigmoid(float(gate[t, 0]))
            y[t] += 0 if add is None else add[t]
    return products, {}


def mul_mat_id(x: Array, ids: Array, weights: Array | None = None, **matrices: Array) -> Result:
    outs = []
    for matrix in matrices.values():
        rows = np.empty((*ids.shape, matrix.shape[1]))
        for t, u in np.ndindex(ids.shape):
            row = x[t] if x.ndim == 2 else x[t, u]
            rows[t, u] = _products(row[np.newaxis], matrix[ids[t, u]])[0]
        if weights is not None:
            rows = np.array([w @ row for w, row in zip(weights, rows, strict=True)])
        outs.append(rows)
    return outs, {}


def mul_mat_heads(
    x: Array, weight: Array, tail: Array | None = None, *, transposed: bool
) -> Result:
    heads = []
    for h, matrix in enumerate(weight):
        y = _products(x[:, h], matrix.T if transposed else matrix)
        heads.append(y if tail is None else np.hstack([y, tail[:, h]]))
    return [np.stack(heads, axis=1)], {}


def routing_scores(
    logits: Array, bias: Array | None, gating: str, groups: tuple[int, int]
) -> tuple[list[float], list[float], list[float]]:
    """Of one token: its experts' weights, what they are chosen by, and what groups are chosen by.

    An expert that can't be chosen has the score -inf.
    """
    if gating == "softmax":
        highest = max(logits)
        powers = [math.exp(x - highest) for x in logits]
        p = [power / math.fsum(powers) for power in powers]
    else:
        p = [_sigmoid(float(x)) for x in logits]
    scores = [value + (0.0 if bias is None else float(bias[e])) for e, value in enumerate(p)]
    size = len(scores) // groups[0]
    parts = [scores[g * size : (g + 1) * size] for g in range(groups[0])]
    goodness = [sum(sorted(part)[-2:]) for part in parts]
    best = sorted(range(groups[0]), key=lambda g: (-goodness[g], g))[: groups[1]]
    scores = [score if e // size in best else -math.inf for e, score in enumerate(scores)]
    return p, scores, goodness


def router(
    logits: Array,
    bias: Array | None = None,
    *,
    n_used: int,
    gating: str,
    scale: float,
    eps: float,
    groups: tuple[int, int],
    normalized: bool,
) -> Result:
    ids, weights = [], []
    for row in logits:
        p, scores, _ = routing_scores(row, bias, gating, groups)
        order = sorted(range(len(p)), key=lambda e: (-scores[e], e))
        ids.append(order[:n_used])
        total = math.fsum(p[e] for e in ids[-1]) + eps if normalized else 1
        weights.append([p[e] / total * scale for e in ids[-1]])
    return [np.array(ids), np.array(weights)], {}


def l2_norm(x: Array, *, eps: float) -> Result:
    return [_each_row(lambda row: row / math.sqrt(sum(v * v for v in row) + eps), x)], {}


def swiglu(*, limits: tuple[float, ...], **pairs: Array) -> Result:
    """gate, up, gate1, up1, …"""
    made = []
    for i, limit in enumerate(limits):
        gate, up, most = (
            _each(_silu, pairs[f"gate{i or ''}"]),
            pairs[f"up{i or ''}"],
            limit or math.inf,
        )
        made.append(gate.clip(-math.inf, most) * up.clip(-most, most))
    return made, {}


def rms_norm_gated(x: Array, gate: Array, weight: Array, *, eps: float, act: str) -> Result:
    normed = _each_row(lambda row: _rms(row, eps) * weight, x)
    return [normed * _each({"silu": _silu, "sigmoid": _sigmoid}[act], gate)], {}


def gdn_gate(alpha: Array, beta: Array, a: Array, dt: Array, *, lower_bound: float) -> Result:
    g = np.empty(alpha.shape)
    for t, head, *key_row in np.ndindex(alpha.shape):
        at = (head, *key_row)
        x = alpha[t, *at] + dt[at]
        bounded = lower_bound * _sigmoid(a[head] * x)
        g[t, *at] = bounded if lower_bound < 0 else a[head] * _softplus(x)
    return [g, _each(_sigmoid, beta)], {}


def _sequences(seq_starts: Array) -> Iterator[tuple[int, list[int]]]:
    """(sequence, its rows)."""
    for s in range(len(seq_starts) - 1):
        yield s, list(range(int(seq_starts[s]), int(seq_starts[s + 1])))


def _slots_after(i: int, n: int, dst: int, snapshots: Array) -> list[int]:
    """The slots that get the state after token i of a sequence of n."""
    slots = [dst] if i == n - 1 else []
    first = n - len(snapshots)
    slots += [int(slot) for j, slot in enumerate(snapshots) if first + j == i]
    return [slot for slot in slots if slot >= 0]


def ssm_conv(
    state: Array,
    seq_starts: Array,
    state_src: Array,
    state_dst: Array,
    snapshot_dst: Array,
    **parts: Array,
) -> Result:
    """x, weight, x1, weight1, …: the channels lie side by side."""
    numbers = sorted(name[1:] for name in parts if name.startswith("x"))
    x = np.hstack([parts[f"x{number}"] for number in numbers])
    weight = np.vstack([parts[f"weight{number}"] for number in numbers])
    out, after = _unwritten(*x.shape), state.copy()
    n_channels, n_taps = weight.shape
    for s, rows in _sequences(seq_starts):
        zeros = [np.zeros(n_channels)] * (n_taps - 1)
        window = zeros if state_src[s] < 0 else list(state[state_src[s]])
        for i, t in enumerate(rows):
            window = [*window, x[t]]
            taps = [weight[:, j] * window[j] for j in range(n_taps)]
            out[t] = _each(_silu, np.asarray(sum(taps)))
            window = window[1:]
            for slot in _slots_after(i, len(rows), state_dst[s], snapshot_dst[s]):
                after[slot] = window
    return [out], {"state": after}


def gated_delta_net(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    state: Array,
    seq_starts: Array,
    state_src: Array,
    state_dst: Array,
    snapshot_dst: Array,
    *,
    head_map: str,
    scale: float,
    algorithm: str = "",
) -> Result:
    out, after = _unwritten(*v.shape), state.copy()
    n_k_heads, n_v_heads = k.shape[1], v.shape[1]
    for s, rows in _sequences(seq_starts):
        for h in range(n_v_heads):
            kh = h % n_k_heads if head_map == "tiled" else h * n_k_heads // n_v_heads
            # [Dk, Dv], the transpose of what is stored.
            matrix = np.zeros((k.shape[2], v.shape[2]))
            if state_src[s] >= 0:
                matrix = state[state_src[s], h].T
            for i, t in enumerate(rows):
                decay = np.broadcast_to(np.exp(g[t, h]), k.shape[2])
                matrix = decay[:, np.newaxis] * matrix
                delta = beta[t, h] * (v[t, h] - matrix.T @ k[t, kh])
                matrix = matrix + np.outer(k[t, kh], delta)
                out[t, h] = matrix.T @ q[t, kh] * scale
                for slot in _slots_after(i, len(rows), state_dst[s], snapshot_dst[s]):
                    after[slot, h] = matrix.T
    return [out], {"state": after}


def _turn(
    row: Array,
    position: int,
    n_rot: int,
    base: float,
    scaling: tuple[float, ...],
    neighbours: bool = False,
) -> Array:
    """Pairs that turn: 2i and 2i + 1, or i and i + n_rot / 2."""
    first, last, low, span, magnitude = scaling
    turned, half = row.copy(), n_rot // 2
    for i in range(half):
        one, other = (2 * i, 2 * i + 1) if neighbours else (i, i + half)
        part = 0 if i < low else 1 if i > low + span else (i - low) / span
        angle = position * base ** (-2 * i / n_rot) * (first * (1 - part) + last * part)
        turn = complex(magnitude * math.cos(angle), magnitude * math.sin(angle))
        pair = complex(row[one], row[other]) * turn
        turned[one], turned[other] = pair.real, pair.imag
    return turned


def qk_norm_rope(
    q: Array,
    k: Array,
    v: Array,
    q_norm: Array,
    k_norm: Array,
    k_cache: Array,
    v_cache: Array,
    positions: Array,
    seq_starts: Array,
    block_tables: Array,
    *,
    eps: float,
    n_rot: int,
    rope_base: float,
    rope_scaling: tuple[float, ...],
) -> Result:
    rope = n_rot, rope_base, rope_scaling
    out, k_after, v_after = _unwritten(*q.shape), k_cache.copy(), v_cache.copy()
    block_size = k_cache.shape[2]
    for s, rows in _sequences(seq_starts):
        for t in rows:
            p = int(positions[t])
            block, row = block_tables[s, p // block_size], p % block_size
            for h in range(q.shape[1]):
                out[t, h] = _turn(_rms(q[t, h], eps) * q_norm, p, *rope)
            for h in range(k.shape[1]):
                k_after[block, h, row] = _turn(_rms(k[t, h], eps) * k_norm, p, *rope)
                v_after[block, h, row] = v[t, h]
    return [out], {"k_cache": k_after, "v_cache": v_after}


def mla_cache(
    kv: Array,
    norm: Array,
    k_cache: Array,
    positions: Array,
    seq_starts: Array,
    block_tables: Array,
    q_pe: Array | None = None,
    *,
    eps: float,
    n_rot: int,
    rope_base: float,
    rope_scaling: tuple[float, ...],
) -> Result:
    after, block_size, rank = k_cache.copy(), k_cache.shape[2], len(norm)
    queries = [] if q_pe is None else [(q_pe, _unwritten(*q_pe.shape))]
    for s, rows in _sequences(seq_starts):
        for t in rows:
            p = int(positions[t])
            latent = after[block_tables[s, p // block_size], 0, p % block_size]
            latent[:rank] = _rms(kv[t, :rank], eps) * norm
            rope = p, n_rot, rope_base, rope_scaling, True
            latent[rank:] = _turn(kv[t, rank:], *rope)
            for x, out in queries:
                out[t] = [_turn(row, *rope) for row in x[t]]
    return [out for _, out in queries], {"k_cache": after}


def attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    positions: Array,
    seq_starts: Array,
    block_tables: Array,
    gate: Array | None = None,
    *,
    scale: float,
) -> Result:
    n_tokens, n_heads, _ = q.shape
    n_kv_heads, block_size = k_cache.shape[1:3]
    out = _unwritten(n_tokens, n_heads, v_cache.shape[3])
    for s, rows in _sequences(seq_starts):
        for t in rows:
            at = [
                (block_tables[s, p // block_size], p % block_size) for p in range(positions[t] + 1)
            ]
            for h in range(n_heads):
                kv_head = h // (n_heads // n_kv_heads)
                scores = [float(q[t, h] @ k_cache[b, kv_head, row]) * scale for b, row in at]
                highest = max(scores)
                weights = [math.exp(score - highest) for score in scores]
                values = [v_cache[b, kv_head, row] for b, row in at]
                mixed = sum(w * value for w, value in zip(weights, values, strict=True))
                out[t, h] = mixed / sum(weights)
    if gate is not None:
        factors = _each(_sigmoid, gate)
        out *= factors[:, :, np.newaxis] if gate.ndim == 2 else factors
    return [out], {}


NAIVE: dict[str, Callable[..., Result]] = {
    "ADD_RMS_NORM": add_rms_norm,
    "ATTENTION": attention,
    "GATED_DELTA_NET": gated_delta_net,
    "GDN_GATE": gdn_gate,
    "GET_ROWS": get_rows,
    "L2_NORM": l2_norm,
    "MLA_CACHE": mla_cache,
    "MUL_MAT": mul_mat,
    "MUL_MAT_HEADS": mul_mat_heads,
    "MUL_MAT_ID": mul_mat_id,
    "QK_NORM_ROPE": qk_norm_rope,
    "RMS_NORM_GATED": rms_norm_gated,
    "ROUTER": router,
    "SSM_CONV": ssm_conv,
    "SWIGLU": swiglu,
}
