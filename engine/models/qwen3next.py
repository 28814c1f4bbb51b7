"""Qwen3-Next (`qwen3next`)."""

import numpy as np

from engine.graph import Shape
from engine.models.hybrid import MoEHybrid


class Qwen3Next(MoEHybrid):
    """Value heads are grouped under key heads: h reads key head h div ρ. Projections are packed per
    key head: `ssm_ba` has ρ beta rows, then ρ alpha rows; old files' `ssm_in` q, k, v and z."""

    name = "qwen3next"
    head_map = "grouped"
    has_sections = False

    def _projections(self, i: int) -> dict[str, Shape]:
        s, n_embd = self.delta_net, self.n_embd
        packed: dict[str, Shape] = {"ssm_ba.weight": (2 * s.n_v_heads, n_embd)}
        if self._has(i, "ssm_in.weight"):
            return packed | {"ssm_in.weight": (s.conv_dim + s.value_dim, n_embd)}
        shapes = super()._projections(i)
        return packed | {name: shapes[name] for name in ("attn_qkv.weight", "attn_gate.weight")}

    def _unpack(self, i: int) -> None:
        super()._unpack(i)
        if not self.linear[i]:
            return
        s, prefix = self.delta_net, f"blk.{i}"
        per_key = s.n_v_heads // s.n_k_heads
        source = f"{prefix}.ssm_ba.weight"
        for part, name in enumerate(("ssm_beta", "ssm_alpha")):
            self._gather(f"{prefix}.{name}.weight", source, [per_key] * 2, [part])
        if self._has(i, "ssm_in.weight"):
            source = f"{prefix}.ssm_in.weight"
            sizes = [s.d_k, s.d_k, per_key * s.d_v, per_key * s.d_v]
            self._gather(f"{prefix}.attn_qkv.weight", source, sizes, [0, 1, 2])
            self._gather(f"{prefix}.attn_gate.weight", source, sizes, [3])

    def _gather(self, name: str, source: str, sizes: list[int], parts: list[int]) -> None:
        """Make a tensor of some parts of one that holds, for every key head, parts of `sizes`."""
        rows = np.arange(self.delta_net.n_k_heads * sum(sizes)).reshape(-1, sum(sizes))
        split = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
        index = np.concatenate([split[part].reshape(-1) for part in parts])
        self.weights.take_rows(name, source, index, (len(index), self.n_embd))
