"""From options and a model to a placed graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine import backends
from engine.backends.base import BackendOptions
from engine.config import EngineConfig, capacity_of, context_size
from engine.formats.gguf import GGUFFile
from engine.models import BuildOptions, Model, load_model
from engine.placement.place import Plan
from engine.placement.rules import Offload, place_where_it_fits


def resolved_config(**options: Any) -> EngineConfig:
    """The config of an engine with these options, with the sizes that suit its backend."""
    config = EngineConfig(**options)
    return config.resolved(backends.traits(config.backend))


def plan_only(path: str | Path, n_tokens: int, gdn: str = "fused", **options: Any) -> Plan:
    """The placed graph of a file for batches of `n_tokens`, from its header; options: as `load`."""
    options |= {"gdn": "auto" if gdn == "fused" else gdn}
    config = EngineConfig(**options, n_ubatch=n_tokens, n_batch=n_tokens)
    model = load_model(GGUFFile(path))
    return planned(model, config, context_size(None, model.n_ctx_train))[1]


def planned(model: Model, config: EngineConfig, n_ctx: int) -> tuple[EngineConfig, Plan]:
    """The config with what suits the backend, and the placed graph."""
    options = BackendOptions(
        config.n_threads, config.cpu_isa, config.batch_invariant, config.activations,
        config.gpu_memory,
    )  # fmt: skip
    available = backends.create(config.backend, options)
    traits = available[0].traits
    config = config.resolved(traits)
    capacity = capacity_of(config, n_ctx, traits)
    graph = model.build(BuildOptions(capacity, *config.cache_types(), config.gdn))
    if config.keep_experts:
        graph.kept += [node.outputs[0] for node in graph.nodes if node.op.name == "ROUTER"]
    rules = Offload(config.n_gpu_layers, config.n_cpu_moe, config.override_tensor)
    return config, place_where_it_fits(graph, available, rules, config.strict_backend)
