"""Options of an engine, checked once, and the graph capacity that follows from them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike

from engine import backends, checks
from engine.backends.base import Traits
from engine.errors import EngineError
from engine.formats.quants import F16, F32, DType
from engine.graph import Capacity

_log = logging.getLogger(__name__)
DEFAULT_CTX = 4096
# Rows of a step that may need logits: all at once, those of a large vocabulary take gigabytes.
MAX_OUTPUTS = 512
MAX_CTX = 2**31 - 1  # Positions are int32.
CACHE_TYPES: dict[str | None, DType] = {"f32": F32, "f16": F16}
ACTIVATIONS = (8, 15)
GDN_MODES = ("auto", "scan", "chunk", "decomposed")
_LEAST = {
    "n_ctx": 0, "n_batch": 0, "n_ubatch": 0, "n_parallel": 1, "n_checkpoints": 0, "cache_ram": -1,
    "cache_disk": 0, "n_snapshots": 0, "n_threads": 1, "n_gpu_layers": 0, "n_cpu_moe": 0,
    "activations": ACTIVATIONS[0], "gpu_memory": 1,
}  # fmt: skip
_FLAGS = ("cache_prompt", "strict_backend", "batch_invariant", "keep_experts", "check")


class ConfigError(EngineError):
    """An engine option out of its range."""


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine; see Engine.load. Raises ConfigError for values that are of another type
    or out of range."""

    backend: str = "auto"
    n_ctx: int | None = None
    n_batch: int = 0
    n_ubatch: int = 0
    n_parallel: int = 1
    n_checkpoints: int = 4
    cache_ram: int | None = None
    cache_dir: str | PathLike[str] | None = None
    cache_disk: int | None = None
    cache_prompt: bool = True
    n_snapshots: int = 0
    n_threads: int | None = None
    cpu_isa: str | None = None
    activations: int | None = None
    type_k: str | None = None
    type_v: str | None = None
    gdn: str = "auto"
    strict_backend: bool = False
    batch_invariant: bool = False
    n_gpu_layers: int | None = None
    n_cpu_moe: int = 0
    gpu_memory: int | None = None
    override_tensor: Sequence[str] = ()
    keep_experts: bool = False
    check: bool = False

    def __post_init__(self) -> None:
        for name, low in _LEAST.items():
            value, is_optional = getattr(self, name), getattr(EngineConfig, name) is None
            if not (value is None and is_optional):
                checks.put(self, name, checks.integer(ConfigError, name, value, low, MAX_CTX))
        if self.activations not in (None, *ACTIVATIONS):
            checks.refuse(ConfigError, "activations", "8 or 15", self.activations)
        for name in _FLAGS:
            checks.put(self, name, checks.flag(ConfigError, name, getattr(self, name)))
        if self.cache_dir is not None:
            checks.put(self, "cache_dir", checks.path(ConfigError, "cache_dir", self.cache_dir))
        elif self.cache_disk is not None:
            raise ConfigError("cache_disk (--cache-disk): expected cache_dir (--cache-dir), too")
        if self.cpu_isa is not None:
            checks.text(ConfigError, "cpu_isa", self.cpu_isa)
        rules = checks.texts(ConfigError, "override_tensor", self.override_tensor)
        checks.put(self, "override_tensor", rules)
        types = (None, *CACHE_TYPES)
        choices = (backends.names(), GDN_MODES, types, types)
        for name, known in zip(("backend", "gdn", "type_k", "type_v"), choices, strict=True):
            checks.one_of(ConfigError, name, getattr(self, name), known)

    def resolved(self, traits: Traits) -> EngineConfig:
        """The same, where sizes of steps and cache types not set come from a backend's traits.
        Raises ConfigError for activations that a backend was given by name and has no choice of."""
        n_ubatch = self.n_ubatch or min(traits.n_ubatch, self.n_batch or traits.n_ubatch)
        n_batch = self.n_batch or max(2048, n_ubatch)
        # As other options of the CPU, with `auto` this one is for the nodes that run there.
        if self.backend != "auto" and self.activations not in (None, *traits.activations):
            raise ConfigError(
                f"activations (--activations): {self.backend} has no choice of them, got "
                f"{self.activations}"
            )
        type_k, type_v = self.type_k or traits.cache_type, self.type_v or traits.cache_type
        return replace(self, n_ubatch=n_ubatch, n_batch=n_batch, type_k=type_k, type_v=type_v)

    def cache_types(self) -> tuple[DType, DType]:
        """Types of the K and V cache of a resolved config."""
        return CACHE_TYPES[self.type_k], CACHE_TYPES[self.type_v]


def context_size(n_ctx: int | None, n_ctx_train: int, n_parallel: int = 1) -> int:
    """Positions of memory, which n_parallel sequences share: n_ctx, with None and 0 as in
    Engine.load. Warns where a share is more than the model was trained on."""
    size = min(DEFAULT_CTX, n_ctx_train) if n_ctx is None else n_ctx or n_ctx_train
    if size > MAX_CTX:
        raise ConfigError(f"n_ctx: expected at most {MAX_CTX}, got {size}")
    if (share := size // n_parallel) > n_ctx_train:
        _log.warning(
            "n_ctx (-c): a context of %d tokens, but the model was trained on %d: its text gets "
            "worse after them", share, n_ctx_train,
        )  # fmt: skip
    return size


def capacity_of(config: EngineConfig, n_ctx: int, traits: Traits) -> Capacity:
    """The capacity of the graph of a resolved config; traits: of the backend first in priority."""
    n_tokens = min(config.n_batch, config.n_ubatch)
    # An overlapped step writes slots of its own.
    n_overlapped = config.n_parallel if traits.overlaps_steps else 0
    return Capacity(
        n_tokens=n_tokens,
        n_seqs=min(config.n_parallel, n_tokens),
        n_outputs=min(n_tokens, max(MAX_OUTPUTS, config.n_parallel)),
        n_slots=config.n_parallel * (1 + config.n_snapshots) + config.n_checkpoints + n_overlapped,
        # Every holder of a sequence may own one partly filled block.
        n_blocks=math.ceil(n_ctx / Capacity.block_size) + config.n_parallel + config.n_checkpoints,
        n_snapshots=config.n_snapshots,
    )
