"""What /metrics says, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from engine.engine import Engine
from engine.runtime.completion import Completion
from engine.runtime.request import FinishReason

# When a counter was made is of no use, and twice the text.
disable_created_metrics()  # type: ignore[no-untyped-call]
_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REFUSED = "refused"


class Places(Protocol):
    """How many completions wait or run."""

    @property
    def n_taken(self) -> int: ...

    @property
    def n_running(self) -> int: ...


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        counter = Counter("gdn_tokens", "Tokens, by kind", ["kind"], registry=registry)
        self.prompt, self.cached, self.generated = map(
            counter.labels, ("prompt", "cached", "generated")
        )
        self._ended = Counter("gdn_requests", "Requests that ended", ["outcome"], registry=registry)
        self._outcomes = {name: self._ended.labels(name) for name in (*FinishReason, _REFUSED)}
        self.first = Histogram(
            "gdn_time_to_first_token_seconds", "From the request to its first token",
            buckets=_FIRST, registry=registry,
        )  # fmt: skip
        self.between = Histogram(
            "gdn_time_between_tokens_seconds", "Between two tokens of a completion",
            buckets=_BETWEEN, registry=registry,
        )  # fmt: skip

    def watch(self, engine: Engine, places: Places) -> None:
        """Show the state of an engine, and who waits for it."""
        # What is only looked at need not wait for a step, as engine.cache would.
        cache, memory = engine.loop.scheduler.cache, engine.loop.memory
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "gdn_requests_running": ("Completions that run", lambda: places.n_running),
            "gdn_requests_waiting": (
                "Completions that wait", lambda: places.n_taken - places.n_running
            ),
            "gdn_cache_bytes": ("Bytes that the prefix cache holds", lambda: cache.n_bytes),
            "gdn_cache_states": ("States that it holds", lambda: cache.n_states),
            "gdn_slots_free": ("State slots that are free", lambda: memory.slots.n_free),
            "gdn_blocks_free": ("KV cache blocks that are free", lambda: memory.blocks.n_free),
        }  # fmt: skip
        for name, (about, value) in gauges.items():
            Gauge(name, about, registry=self.registry).set_function(value)

    def count_end(self, completion: Completion) -> None:
        """Count a completion that has ended, or whose client is gone."""
        self._outcomes[completion.finish_reason or FinishReason.CANCELLED].inc()
        self.prompt.inc(completion.timings.n_prompt)
        self.cached.inc(completion.reuse.n_reused)

    def count_refusal(self) -> None:
        self._outcomes[_REFUSED].inc()

    def text(self) -> bytes:
        """All of it; waits for no step."""
        return generate_latest(self.registry)
