"""Kimi-Linear (`kimi-linear`): Kimi delta attention (KDA) with latent attention (MLA) in between.

MLA layers have no rope: like llama.cpp, the engine does not read a file's base and scaling of it.
Decays and output gates have low-rank matrices. Follows llama.cpp's files and transformers'
`kimi_linear`.
"""

from dataclasses import replace

import numpy as np

from engine.graph import Shape
from engine.models.attention import LatentShape
from engine.models.hparams import HParams
from engine.models.kda_hybrid import KdaHybrid
from engine.ops.router import Routing


class KimiLinear(KdaHybrid):
    """Old files have one `attn_kv_b` in place of `attn_k_b` and `attn_v_b`."""

    name = "kimi-linear"
    may_share_embedding = False

    def _read(self, hp: HParams, n_entries: int) -> None:
        super()._read(hp, n_entries)
        if (q_rank := hp.integer("attention.q_lora_rank", 0, minimum=0)) != 0:
            raise hp.fail("attention.q_lora_rank", "none (not implemented)", q_rank)

    def _routing(self, hp: HParams, routing: Routing) -> Routing:
        groups = hp.integer("expert_group_count", 1), hp.integer("expert_group_used_count", 1)
        return replace(routing, groups=groups)

    def _shared_size(self, hp: HParams, d_ff: int) -> int:
        return d_ff * hp.integer("expert_shared_count")

    def _gate_weights(self, n_rows: int, d_head: int) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for part in "fg":
            shapes[f"ssm_{part}_a.weight"] = (d_head, self.n_embd)
            shapes[f"ssm_{part}_b.weight"] = (n_rows, d_head)
        return shapes

    def _latent(self, i: int) -> LatentShape:
        return replace(super()._latent(i), transposed=self._has(i, "attn_kv_b.weight"))

    def _latent_weights(self, i: int) -> dict[str, Shape]:
        s, shapes = self._latent(i), super()._latent_weights(i)
        if s.transposed:
            del shapes["attn_k_b.weight"], shapes["attn_v_b.weight"]
            shapes["attn_kv_b.weight"] = (s.n_heads * (s.d_nope + s.d_v), s.rank)
        return shapes

    def _unpack(self, i: int) -> None:
        super()._unpack(i)
        if self.linear[i] or not self._has(i, "attn_kv_b.weight"):
            return
        s, prefix = self._latent(i), f"blk.{i}"
        rows = np.arange(s.n_heads * (s.d_nope + s.d_v)).reshape(s.n_heads, -1)
        for name, index in (("k", rows[:, : s.d_nope]), ("v", rows[:, s.d_nope :])):
            shape, name = (s.n_heads, index.shape[1], s.rank), f"{prefix}.attn_{name}_b.weight"
            self.weights.take_rows(name, f"{prefix}.attn_kv_b.weight", index.reshape(-1), shape)
