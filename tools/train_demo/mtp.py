"""The layer for multi-token prediction, which drafts tokens from the trunk's hidden states.

A row is made of token t_i and h_{i-1}, the trunk's state after its final norm (zeros at row 0).
What comes out, h'_i, gives logits for t_{i+1} by the trunk's output matrix. To draft further, h'_i
takes the place of h_i in the row after it. Names are those of Qwen's checkpoints, after `mtp.`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.train_demo.model import FULL, Attention, Layer, Linear, RMSNorm, Sizes, compute_in, wide

DEPTH = 3  # drafts that it is trained for
PREFIX = "mtp."
_ROOM = 8  # entries that heads grow by: kernels want multiples of it


class Mtp(nn.Module):
    """One full-attention layer; embedding and output matrix are the trunk's."""

    def __init__(self, s: Sizes, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc = Linear(2 * s.n_embd, s.n_embd)
        self.pre_fc_norm_embedding = RMSNorm(s.n_embd, s.eps)
        self.pre_fc_norm_hidden = RMSNorm(s.n_embd, s.eps)
        self.layers = nn.ModuleList([Layer(s, FULL)])
        self.norm = RMSNorm(s.n_embd, s.eps)
        compute_in(self, compute)

    def forward(self, embedded: Tensor, hidden: Tensor, depth: int = DEPTH) -> Tensor:
        """h' [depth, B, T, E] of all drafts, each as if those before it had been accepted.

        embedded: the tokens' embeddings [B, T, E]; hidden: the trunk's states [B, T, E]. Draft k
        (from 1) of row i is made of the trunk's states before row i-k+1 and of drafts from there
        on; its first k-1 rows have no meaning. All predict the token after row i.
        """
        out: list[Tensor] = []
        own: list[tuple[Tensor, Tensor]] = []
        before = F.pad(hidden, (0, 0, 1, -1))
        # Row i of draft k is here at i-k+1, where its first draft is. The last k-1 rows wrap
        # around, and are the ones without a meaning.
        for k in range(depth):
            before = self._draft(embedded.roll(-k, 1), before, own, k)
            out.append(before.roll(k, 1))
        return torch.stack(out)

    def _draft(
        self, embedded: Tensor, before: Tensor, own: list[tuple[Tensor, Tensor]], first: int
    ) -> Tensor:
        """h' of the next draft; its keys and values join those of the drafts before it."""
        both = (self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(before))
        x = wide(self.fc(torch.cat(both, -1)))
        layer: Layer = self.layers[0]
        attention: Attention = layer.self_attn
        q, k, v, gate = attention.project(layer.input_layernorm(x), first)
        own.append((k, v))
        x = x + attention.output(attend(q, own), gate)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        normed: Tensor = self.norm(x)
        return normed


def attend(q: Tensor, own: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention to the first keys of all rows up to one's own, and to the other keys of one's own.

    All are [B, H, T, D]. The causal part needs no mask, so fast kernels have it. What its softmax
    divides by is found beside its result: by a key of zeros before all others, whose score is 0,
    and two more entries of the values, which say how much went to that key and how much to others.
    """
    (k, v), *others = own
    if not others:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    d = q.shape[-1]
    q1, k1, v1 = (F.pad(x, (0, _ROOM, 1, 0)) for x in (q, k, v))
    marks = torch.zeros_like(v1[0, 0])
    marks[1:, d], marks[0, d + 1] = 1, 1
    out = F.scaled_dot_product_attention(q1, k1, v1 + marks, is_causal=True, scale=d**-0.5)
    mixed, total, unit, _ = wide(out[:, :, 1:]).split((d, 1, 1, _ROOM - 2), -1)
    for key, value in others:
        weight = unit * ((wide(q) * key).sum(-1, keepdim=True) * d**-0.5).exp()
        mixed, total = mixed + weight * value, total + weight
    return (mixed / total).to(q.dtype)
