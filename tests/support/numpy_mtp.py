"""The layer for multi-token prediction of a qwen35 file in float64, one row after another.

Written from the description of the format alone. Drafts overwrite rows of its KV cache, as in an
engine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.formats.gguf import GGUFFile
from engine.formats.quants import dequantize

F64 = NDArray[np.float64]


class NumpyMtp:
    """The first MTP layer of a file; `keys` and `values` are its cache, a row per position."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._layer = self._number("block_count") - 1
        self.n_heads = self._number("attention.head_count")
        self.n_kv_heads = self._number("attention.head_count_kv")
        self.head_dim = self._number("attention.key_length")
        self.n_rot = self._number("rope.dimension_count")
        self.base = float(file.metadata["qwen35.rope.freq_base"])
        self.eps = float(np.float32(file.metadata["qwen35.attention.layer_norm_rms_epsilon"]))
        self.embedding = self._read("token_embd.weight")
        names = (n for n in file.tensors if n.startswith(f"blk.{self._layer}."))
        self.w = {n.split(".", 2)[2].removesuffix(".weight"): self._read(n) for n in names}
        self.keys: list[F64] = []
        self.values: list[F64] = []

    def _number(self, key: str) -> int:
        return int(self._file.metadata[f"qwen35.{key}"])

    def _read(self, name: str) -> F64:
        info = self._file.tensors[name]
        return dequantize(info.dtype, self._file.raw(name), info.shape).astype(np.float64)

    def row(self, token: int, h: F64, position: int) -> F64:
        """h' [E] of the row at `position`, of its token and a state h [E]. What the cache has from
        there on is forgotten."""
        w = self.w
        del self.keys[position:], self.values[position:]
        e = self._norm(self.embedding[token], w["nextn.enorm"])
        x = w["nextn.eh_proj"] @ np.concatenate([e, self._norm(h, w["nextn.hnorm"])])
        x = x + self._attention(self._norm(x, w["attn_norm"]), position)
        y = self._norm(x, w["post_attention_norm"])
        gate = w["ffn_gate"] @ y
        x = x + w["ffn_down"] @ (gate / (1 + np.exp(-gate)) * (w["ffn_up"] @ y))
        return self._norm(x, w["nextn.shared_head_norm"])

    def logits(self, h: F64) -> F64:
        """Logits [n_vocab] of a state."""
        return self.embedding @ h

    def _norm(self, x: F64, weight: F64) -> F64:
        return x / np.sqrt((x * x).mean() + self.eps) * weight

    def _attention(self, x: F64, position: int) -> F64:
        w, d = self.w, self.head_dim
        q_and_gate = (w["attn_q"] @ x).reshape(self.n_heads, 2, d)
        k = (w["attn_k"] @ x).reshape(self.n_kv_heads, d)
        k = np.stack([self._turn(self._norm(head, w["attn_k_norm"]), position) for head in k])
        assert len(self.keys) == position
        self.keys.append(k)
        self.values.append((w["attn_v"] @ x).reshape(self.n_kv_heads, d))
        mixed = []
        for head in range(self.n_heads):
            q, gate = q_and_gate[head]
            q = self._turn(self._norm(q, w["attn_q_norm"]), position)
            kv = head // (self.n_heads // self.n_kv_heads)
            scores = np.array([q @ key[kv] for key in self.keys]) / np.sqrt(d)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            value = sum(s * v[kv] for s, v in zip(shares, self.values, strict=True))
            mixed.append(value / (1 + np.exp(-gate)))
        return w["attn_output"] @ np.concatenate(mixed)

    def _turn(self, x: F64, position: int) -> F64:
        out, half = x.copy(), self.n_rot // 2
        for i in range(half):
            angle = position * self.base ** (-2 * i / self.n_rot)
            a, b = x[i], x[i + half]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out


def draft(mtp: NumpyMtp, ids: list[int], h: F64, n: int) -> tuple[list[int], list[F64], list[F64]]:
    """`n` greedy drafts after `ids`, whose last token has no state yet: h [len(ids) - 1, E].

    Returns the drafts, h' of each, and the logits of each.
    """
    before = np.zeros(h.shape[1])
    for position, token in enumerate(ids):
        out = mtp.row(token, before, position)
        before = h[position] if position < len(h) else before
    tokens: list[int] = []
    states: list[F64] = []
    logits: list[F64] = []
    for i in range(n):
        states.append(out)
        logits.append(mtp.logits(out))
        tokens.append(int(logits[-1].argmax()))
        out = mtp.row(tokens[-1], out, len(ids) + i)
    return tokens, states, logits
