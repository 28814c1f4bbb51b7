"""What a run uses, in a line on standard error: model, backends, context and memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from engine import backends
from engine.backends.base import Backend
from engine.bench.facts import ModelFacts
from engine.engine import Engine
from engine.kvcache.policy import BLOCK
from engine.placement.estimate import DeviceMemory, Estimate, device_memory, estimate


def show(engine: Engine, verbose: bool = False) -> None:
    """Print the line; one more for hardware that can't be used, unless a backend was chosen. If
    verbose, also the memory of each device by use."""
    print(*_summary(engine).splitlines(), file=sys.stderr)  # A file's name may hold line ends.
    if verbose:
        for backend, memory in device_memory(engine.plan, _cached(engine)).items():
            print(*memory_lines(backend, memory), sep="\n", file=sys.stderr)
    if engine.config.backend == "auto":
        for line in backends.unusable():
            print(line, file=sys.stderr)


def cache_line(engine: Engine) -> str:
    """What the prefix cache holds and did."""
    if not _has_cache(engine):
        return "prefix cache off"
    cache, room, counts, mib = engine.cache, engine.cache.room, engine.cache.counts, 2**20
    states = cache.n_states * room.state_bytes / mib
    tokens = cache.n_tokens // BLOCK * room.block_bytes / mib
    return (
        f"prefix cache: {cache.n_bytes / mib:.1f} of {cache.budget / mib:.1f} MiB "
        f"(states: {cache.n_states}, {states:.1f} MiB; "
        f"tokens: {cache.n_tokens}, {tokens:.1f} MiB); "
        f"reused {counts.n_reused} of {counts.n_tokens} tokens; states given up: {counts.n_evicted}"
    )


def _has_cache(engine: Engine) -> bool:
    return bool(engine.cache.budget) and engine.config.cache_prompt


def _summary(engine: Engine) -> str:
    facts = ModelFacts.of_file(engine.file, engine.model.n_ctx_train)
    model = f"{engine.file.path.name}: {facts.type}"
    if "general.size_label" not in engine.file.metadata:
        model += f", {facts.n_params / 1e6:.1f}M parameters"
    used = " + ".join(f"{b.name} ({b.detail})" for b in engine.plan.backends)
    context, n = f"context {engine.n_ctx}", engine.config.n_parallel
    parts = [model, used, context + f" for {n} sequences" * (n > 1), *_memory(engine)]
    size = "off"
    if _has_cache(engine):
        room = engine.cache.room
        size = f"up to {room.budget / 2**20:.0f} MiB, {room.most_in_a_prompt} states in a prompt"
    return "; ".join([*parts, f"prefix cache {size}"])


def memory_lines(backend: Backend, memory: DeviceMemory) -> list[str]:
    """A table of a device's memory by use."""
    need, copies = memory.need, memory.copies
    copied = f"{copies.n_weights} of {copies.n_possible} weights" if copies.n_possible else ""
    rows = [
        ("weights in panels", need.weights, ""),
        ("copies in bfloat16", copies.n_bytes, copied),
        ("states", need.states, ""),
        ("KV cache", need.kv_cache, ""),
        *[("prefix cache", memory.cache, "")] * bool(memory.cache),
        ("activations", need.activations, ""),
        ("driver, libraries, others", memory.rest, ""),
        ("left", memory.left, ""),
        ("in all", memory.total, ""),
    ]
    lines = [f"{name:<28}{n / 2**20:>10.1f}  {about}".rstrip() for name, n, about in rows]
    return [f"memory of {backend.name} ({backend.detail}), MiB", *("  " + line for line in lines)]


def _cached(engine: Engine) -> dict[str, int]:
    """The prefix cache's slots and blocks beside those of sequences, by dim."""
    room = engine.cache.room
    return {"n_slots": room.n_states, "n_blocks": room.n_blocks}


def _memory(engine: Engine) -> Iterator[str]:
    """The bytes that were taken of the machine's memory, and of a device's own."""
    plan = engine.plan
    if machine := [b for b in plan.backends if not b.traits.own_memory]:
        need = estimate(plan, machine)
        yield _sizes(need, need.total)
    for memory in device_memory(plan, _cached(engine)).values():
        copies, cache = memory.copies.n_bytes, memory.cache
        sizes = _sizes(
            memory.need, engine.device_bytes(), {"copies": copies, "prefix cache": cache}
        )
        yield f"{sizes} of the {_size(memory.total)} on the device"


def _sizes(need: Estimate, total: int, more: Mapping[str, int] | None = None) -> str:
    """`total` and its parts; buffers are what no other part is."""
    parts = {"weights": need.weights, "states": need.states, "KV cache": need.kv_cache}
    parts |= {name: n for name, n in (more or {}).items() if n}
    parts["buffers"] = max(0, total - sum(parts.values()))
    total = sum(parts.values())
    size = 2**30 if total >= 2**30 else 2**20
    shown = ", ".join(f"{name} {n / size:.1f}" for name, n in parts.items())
    return f"{_size(total)} ({shown})"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
