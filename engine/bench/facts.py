"""Facts that benchmarks print beside their numbers: the model, the machine, bytes of a sequence."""

from __future__ import annotations

import math
import platform
import re
import resource
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from engine import backends
from engine.bench.measure import BenchError
from engine.engine import Engine
from engine.formats.gguf import GGUFFile
from engine.models import load_model

# Names of llama.cpp's file types, by number; a dash for a number without one. The package gguf has
# them too, but takes longer to import than a small model to load.
FILE_TYPES = (  # noqa: SIM905 (a list would be three times as long)
    "F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M "
    "Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M "
    "BF16 - - - TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0"
).split()


@dataclass(frozen=True)
class ModelFacts:
    """A model file: `type` as in "qwen35 0.8B Q8_0", `size` in bytes of its tensors; `has_experts`:
    whether layers choose among experts."""

    path: str
    type: str
    size: int
    n_params: int
    n_ctx_train: int
    has_experts: bool = False

    @classmethod
    def of(cls, path: str) -> ModelFacts:
        """The facts of a file. Raises EngineError for one that the engine can't run."""
        file = GGUFFile(path)
        return cls.of_file(file, load_model(file).n_ctx_train, path)

    @classmethod
    def of_file(cls, file: GGUFFile, n_ctx_train: int, path: str = "") -> ModelFacts:
        """The facts of a file that the engine can run; `path`: as the user wrote it."""
        tensors = file.tensors.values()
        label = file.metadata.get("general.size_label", "")
        words = (file.string("general.architecture"), label, _file_type(file))
        # Without characters of the file that would break a table.
        kind = " ".join(filter(None, (re.sub(r"[^\w.+-]", "", str(word)[:64]) for word in words)))
        n_params = sum(math.prod(t.shape) for t in tensors)
        has_experts = any(name.endswith("_exps.weight") for name in file.tensors)
        n_bytes = sum(t.nbytes for t in tensors)
        return cls(path, kind, n_bytes, n_params, n_ctx_train, has_experts)

    def check_context(self, n_positions: int, what: str, n_ctx: int | None = None) -> None:
        """Raise BenchError if `what` needs more than n_ctx positions (None, 0: the model's)."""
        limit = n_ctx or self.n_ctx_train
        if n_positions > limit:
            whose = "-c" if n_ctx else "the model's context"
            raise BenchError(
                f"{self.path}: {what} needs {n_positions} positions: expected at most the {limit} "
                f"of {whose}"
            )


def _file_type(file: GGUFFile) -> str:
    """The name of the file's type; if it names none, of the type that most bytes have."""
    number = file.metadata.get("general.file_type")
    if type(number) is int and 0 <= number < len(FILE_TYPES) and FILE_TYPES[number] != "-":
        return FILE_TYPES[number]
    nbytes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        nbytes[tensor.dtype.name] += tensor.nbytes
    return nbytes.most_common(1)[0][0]


def cpu_name() -> str:
    """The processor's name, or an empty string if the system has none."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def machine(engine: Engine) -> str:
    """The processors that run nodes, such as "NVIDIA H200, sm_90 + Intel(R) Xeon(R)"; an empty
    string if the system does not say."""
    names = [b.detail if b.traits.own_memory else cpu_name() for b in engine.plan.backends]
    return " + ".join(dict.fromkeys(filter(None, names)))


def sequence_bytes(engine: Engine, n_tokens: int) -> tuple[int, int]:
    """Bytes of recurrent state and of KV cache that a sequence of `n_tokens` fills."""
    state, kv = engine.plan.graph.state_bytes()
    capacity = engine.capacity
    per_position = kv // (capacity.n_blocks * capacity.block_size)
    return state // capacity.n_slots, per_position * n_tokens


def backend_names(engine: Engine) -> str:
    """The backends that have nodes, such as "cuda+cpu"."""
    return "+".join(backend.name for backend in engine.plan.backends)


def n_gpu_layers(engine: Engine) -> int:
    """As llama.cpp counts: -1 for all layers, 0 for none."""
    return -1 if any(backend.traits.own_memory for backend in engine.plan.backends) else 0


def n_threads(engine: Engine) -> int:
    """The CPU's threads."""
    return backends.n_threads(engine.config.n_threads)


def settings(engine: Engine, n_kv_max: int, **own: int) -> dict[str, int]:
    """An engine's settings under the keys of llama.cpp's benchmarks; `own`: keys of one command."""
    config, threads = engine.config, n_threads(engine)
    return {
        "n_kv_max": n_kv_max, "n_batch": config.n_batch, "n_ubatch": config.n_ubatch, **own,
        "n_gpu_layers": n_gpu_layers(engine), "n_threads": threads, "n_threads_batch": threads,
    }  # fmt: skip


def rss_hwm_mib() -> float:
    """The most memory that this process has had, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
