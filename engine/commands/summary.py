"""What a run uses, in a line on standard error: model, backends, context and memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from engine import backends
from engine.bench.facts import ModelFacts
from engine.engine import Engine
from engine.placement.estimate import Estimate, estimate


def show(engine: Engine) -> None:
    """Print the line; one more for hardware that can't be used, unless a backend was chosen."""
    print(*_summary(engine).splitlines(), file=sys.stderr)  # A file's name may hold line ends.
    if engine.config.backend == "auto":
        for line in backends.unusable():
            print(line, file=sys.stderr)


def _summary(engine: Engine) -> str:
    facts = ModelFacts.of_file(engine.file, engine.model.n_ctx_train)
    model = f"{engine.file.path.name}: {facts.type}"
    if "general.size_label" not in engine.file.metadata:
        model += f", {facts.n_params / 1e6:.1f}M parameters"
    used = " + ".join(f"{b.name} ({b.detail})" for b in engine.plan.backends)
    context, n = f"context {engine.n_ctx}", engine.config.n_parallel
    return "; ".join([model, used, context + f" for {n} sequences" * (n > 1), *_memory(engine)])


def _memory(engine: Engine) -> Iterator[str]:
    """The bytes that were taken of the machine's memory, and of a device's own."""
    plan = engine.plan
    own = [b for b in plan.backends if b.traits.own_memory]
    if machine := [b for b in plan.backends if b not in own]:
        need = estimate(plan, machine)
        yield _sizes(need, need.total)
    if own:
        yield _sizes(estimate(plan, own), engine.device_bytes()) + " on the device"


def _sizes(need: Estimate, total: int) -> str:
    """`total` and its parts; buffers are what no other part is."""
    parts = {"weights": need.weights, "states": need.states, "KV cache": need.kv_cache}
    parts["buffers"] = max(0, total - sum(parts.values()))
    total = sum(parts.values())
    unit, size = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    shown = ", ".join(f"{name} {n / size:.1f}" for name, n in parts.items())
    return f"{total / size:.1f} {unit} ({shown})"
