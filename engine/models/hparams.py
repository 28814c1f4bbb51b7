"""Hyper-parameters from a GGUF's metadata, checked as they are read.

Keys carry the architecture's name as a prefix. A value may be a scalar or one per layer.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.formats.gguf import GGUFFile, Strings, shown


class ModelError(EngineError):
    """The file's hyper-parameters or tensors are not those of its architecture."""


class HParams:
    """Typed access to `<architecture>.<key>`."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.arch = file.string("general.architecture")

    def fail(self, key: str, expected: str, came: Any) -> ModelError:
        return ModelError(f"{self.file.path}: {self.arch}.{key}: expected {expected}, got {came}")

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.file.integer(f"{self.arch}.{key}", default)
        if value < minimum:
            raise self.fail(key, f"at least {minimum}", value)
        return value

    def number(self, key: str, default: float | None = None, minimum: float | None = None) -> float:
        """A number of at least `minimum`; without it, a positive one."""
        value = self.file.number(f"{self.arch}.{key}", default)
        if minimum is None and value <= 0:
            raise self.fail(key, "a positive number", value)
        if minimum is not None and value < minimum:
            raise self.fail(key, f"at least {minimum:g}", value)
        return value

    def n_layers(self) -> tuple[int, int]:
        """(entries of per-layer arrays, layers of the trunk): the difference is MTP layers."""
        n_mtp = self.integer("nextn_predict_layers", 0, minimum=0)
        n_entries = self.integer("block_count", minimum=n_mtp + 1)
        # A layer has tensors: this bounds what a wrong count makes us do.
        if n_entries > len(self.file.tensors):
            most = f"at most {len(self.file.tensors)}, the number of tensors"
            raise self.fail("block_count", most, n_entries)
        return n_entries, n_entries - n_mtp

    def n_vocab(self) -> int:
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, Strings):
            raise ModelError(
                f"{self.file.path}: tokenizer.ggml.tokens: expected strings, got {shown(tokens)}"
            )
        return len(tokens)

    def array(self, key: str, n: int, kinds: str, what: str) -> NDArray[Any] | None:
        """An array of `n` numbers of numpy's `kinds`, or None if the value is no array."""
        value = self.file.metadata.get(f"{self.arch}.{key}")
        if not isinstance(value, np.ndarray):
            return None
        if len(value) != n or value.dtype.kind not in kinds:
            raise self.fail(key, f"{n} {what}", shown(value))
        return value

    def per_layer(
        self, key: str, n_entries: int, default: int | None = None, minimum: int = 1
    ) -> list[int]:
        """One integer per layer (MTP layers too), at least `minimum`, from an array or a scalar."""
        values = self.array(key, n_entries, "iu", "integers")
        if values is None:
            return [self.integer(key, default, minimum)] * n_entries
        if (lowest := int(values.min())) < minimum:
            raise self.fail(key, f"at least {minimum} in every layer", lowest)
        return [int(v) for v in values]

    def has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.file.metadata

    def numbers(self, key: str, n_entries: int, default: float) -> list[float]:
        """One number per layer (MTP layers too), at least 0, from an array or a scalar."""
        values = self.array(key, n_entries, "f", "numbers")
        if values is None:
            return [self.number(key, default, minimum=0)] * n_entries
        if not (np.isfinite(values) & (values >= 0)).all():
            raise self.fail(key, "finite numbers of at least 0", shown(values))
        return [float(v) for v in values]

    def flags(self, key: str, n_entries: int) -> list[bool] | None:
        """One boolean per layer, from an array or a scalar; None if the key is missing."""
        if not self.has(key):
            return None
        values = self.array(key, n_entries, "biu", "booleans")
        if values is None:
            return [self.file.boolean(f"{self.arch}.{key}")] * n_entries
        return [bool(v) for v in values]

    def divides(self, key: str, divisor: int, number: int) -> None:
        if number % divisor:
            raise self.fail(key, f"a divisor of {number}", divisor)
