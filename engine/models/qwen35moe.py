"""Qwen3.5 mixture of experts (`qwen35moe`)."""

from __future__ import annotations

from functools import partial

from engine.graph import Shape
from engine.models.hparams import HParams
from engine.models.hybrid import Hybrid
from engine.models.layers import Layer
from engine.models.moe import moe_ffn, moe_shapes


class Qwen35MoE(Hybrid):
    """Qwen3.5's layers with routed experts and a gated shared one instead of the feed-forward."""

    name = "qwen35moe"

    def _read_ffn(self, hp: HParams, n_entries: int) -> None:
        self._moe = moe_shapes(hp, n_entries)

    def _ffn_weights(self, i: int) -> dict[str, Shape]:
        fused = f"blk.{i}.ffn_gate_up_exps.weight" in self._in_file
        return self._moe[i].weights(self.n_embd, fused, gated=True, biased=False)

    def _ffn(self, i: int) -> Layer:
        return partial(moe_ffn, shape=self._moe[i])
