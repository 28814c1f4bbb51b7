"""What stands beside a measurement: the model as its file's header describes it, and the machine.

Nothing is loaded for it: a header is enough to refuse a file, or sizes that its context can't hold,
before anything is measured.
"""

from __future__ import annotations

import math
import platform
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from engine.bench.measure import BenchError
from engine.engine import Engine
from engine.formats.gguf import GGUFFile
from engine.models import load_model


@dataclass(frozen=True)
class ModelFacts:
    """A model file: `type` as in "qwen35 0.8B Q8_0", `size` in bytes of its tensors."""

    path: str
    type: str
    size: int
    n_params: int
    n_ctx_train: int

    @classmethod
    def of(cls, path: str) -> ModelFacts:
        """The facts of a file. Raises EngineError for one that the engine can't run."""
        file = GGUFFile(path)
        n_ctx_train = load_model(file).n_ctx_train
        tensors = file.tensors.values()
        words = (
            file.string("general.architecture"),
            file.metadata.get("general.size_label", ""),
            _file_type(file),
        )
        return cls(
            path,
            # What a file says must not break a table.
            " ".join(word for word in (re.sub(r"[^\w.+-]", "", str(w)) for w in words) if word),
            sum(t.nbytes for t in tensors),
            sum(math.prod(t.shape) for t in tensors),
            n_ctx_train,
        )

    def check_context(self, n_positions: int, what: str, n_ctx: int | None = None) -> None:
        """Raise BenchError unless so many positions fit `n_ctx` (None, 0: what it was trained on).

        `what` needs them, for the message.
        """
        limit = n_ctx or self.n_ctx_train
        if n_positions > limit:
            whose = "-c" if n_ctx else "the model's context"
            raise BenchError(
                f"{self.path}: {what} needs {n_positions} positions: expected at most the {limit} "
                f"of {whose}"
            )


def _file_type(file: GGUFFile) -> str:
    """The name of the file's type, else of the tensors' type that most bytes have."""
    from gguf import LlamaFileType

    number = file.metadata.get("general.file_type")
    for known in LlamaFileType:
        if known.value == number and type(number) is int:
            return str(known.name).removeprefix("MOSTLY_").removeprefix("ALL_")
    nbytes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        nbytes[tensor.dtype.name] += tensor.nbytes
    return nbytes.most_common(1)[0][0]


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def sequence_bytes(engine: Engine, n_tokens: int) -> tuple[int, int]:
    """Bytes of recurrent state and of KV cache that a sequence of `n_tokens` fills."""
    state, kv = engine.plan.graph.state_bytes()
    capacity = engine.capacity
    per_position = kv // (capacity.n_blocks * capacity.block_size)
    return state // capacity.n_slots, per_position * n_tokens
