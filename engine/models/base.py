"""The base of all architectures: common hyper-parameters, the tensors of a file, and the graph."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from engine.formats.gguf import GGUFFile
from engine.graph import Graph, Shape
from engine.models.hparams import HParams
from engine.models.layers import Builder, BuildOptions, Layer, trunk
from engine.models.weights import Weights


class Model(ABC):
    """A file's hyper-parameters and weights; raises ModelError if they or its tensors don't fit.

    `name`: the architecture's name in GGUF files. `ffn_norm`: the name of the norm before the
    feed-forward. `may_share_embedding`: whether the head may be the embedding's matrix.
    """

    name: str
    ffn_norm: str
    may_share_embedding = True

    def __init__(self, file: GGUFFile) -> None:
        hp = HParams(file)
        n_entries, self.n_layers = hp.n_layers()
        self.n_embd = hp.integer("embedding_length")
        self.n_ctx_train = hp.integer("context_length")
        self.eps = hp.number("attention.layer_norm_rms_epsilon")
        self.n_vocab = hp.n_vocab()
        self._in_file = file.tensors.keys()
        self._read(hp, n_entries)
        self.weights = Weights(file, self._expected(), range(self.n_layers, n_entries))
        for i in range(self.n_layers):
            self._unpack(i)

    @abstractmethod
    def _read(self, hp: HParams, n_entries: int) -> None:
        """Read the architecture's own hyper-parameters; per-layer arrays have `n_entries`."""

    @abstractmethod
    def _mixer_weights(self, i: int) -> dict[str, Shape]:
        """The tensors that the file has for layer i's delta net or attention."""

    @abstractmethod
    def _ffn_weights(self, i: int) -> dict[str, Shape]:
        """The tensors that the file has for layer i's feed-forward."""

    @abstractmethod
    def _layer(self, i: int) -> tuple[str, Layer, Layer]:
        """Layer i: the name of its kind, its mixer and its feed-forward."""

    def _unpack(self, i: int) -> None:
        """Make the weights that layer i's functions read, where the file packs them otherwise."""
        return

    def _has(self, i: int, name: str) -> bool:
        return f"blk.{i}.{name}" in self._in_file

    def _qkv_weights(self, i: int, widths: Mapping[str, int]) -> dict[str, Shape]:
        """The file's projections to q, k and v, which have `widths` rows: apart, or fused."""
        if self._has(i, "attn_qkv.weight"):
            return {"attn_qkv.weight": (sum(widths.values()), self.n_embd)}
        return {f"attn_{part}.weight": (n, self.n_embd) for part, n in widths.items()}

    def _split_qkv(self, i: int, widths: Mapping[str, int]) -> None:
        """Make attn_q, attn_k and attn_v of layer i, if the file has them fused."""
        if self._has(i, "attn_qkv.weight"):
            parts = {f"blk.{i}.attn_{part}.weight": n for part, n in widths.items()}
            self.weights.split(f"blk.{i}.attn_qkv.weight", parts)

    def _expected(self) -> dict[str, Shape]:
        embedding = (self.n_vocab, self.n_embd)
        expected: dict[str, Shape] = {"token_embd.weight": embedding}
        if "output.weight" in self._in_file or not self.may_share_embedding:
            expected["output.weight"] = embedding
        expected["output_norm.weight"] = (self.n_embd,)
        norms = {f"{name}.weight": (self.n_embd,) for name in ("attn_norm", self.ffn_norm)}
        for i in range(self.n_layers):
            layer = self._mixer_weights(i) | norms | self._ffn_weights(i)
            expected |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
        return expected

    def build(self, options: BuildOptions) -> Graph:
        """The compute graph: output `logits` [n_outputs, n_vocab] f32."""
        layers = [self._layer(i) for i in range(self.n_layers)]
        return trunk(Builder(self.weights, options), layers, self.ffn_norm, self.eps)
