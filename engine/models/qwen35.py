"""Qwen3.5, dense (`qwen35`)."""

from engine.graph import Shape
from engine.models.hparams import HParams
from engine.models.hybrid import Hybrid
from engine.models.layers import Layer, dense_ffn, dense_weights


class Qwen35(Hybrid):
    """Value heads are tiled over key heads (h reads key head h mod Hk); SwiGLU feed-forward."""

    name = "qwen35"

    def _read_ffn(self, hp: HParams, n_entries: int) -> None:
        self._n_ff = hp.per_layer("feed_forward_length", n_entries)

    def _ffn_weights(self, i: int) -> dict[str, Shape]:
        return dense_weights(self.n_embd, self._n_ff[i])

    def _ffn(self, i: int) -> Layer:
        return dense_ffn
