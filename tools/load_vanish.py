"""Clients that close their connections at any moment, and what the server holds afterwards."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tools.load_client import Client, LoadError, ServerProcess, request_bytes

WAYS = ("stays", "is reset", "closes", "closes one half", "sends half a request")
# Descriptors that a process may open late: of threads, of the process that runs templates. Those of
# clients would be many more.
_LATE_FILES = 2
_PATIENCE_S, _MOST_WORDS = 30, 900
# The latest moment at which a client goes; and what the server has to close connections.
_LONGEST_S, _SETTLED_S = 3.0, 0.2
_IDLE = ("gdn_requests_running", "gdn_requests_waiting")
_FREE = ("gdn_slots_free", "gdn_blocks_free", "gdn_cache_states")


@dataclass
class State:
    """What a server holds: values of /metrics, file descriptors, MiB; seconds until it was idle."""

    gauges: dict[str, float]
    n_files: int
    resident: float
    seconds: float

    @property
    def n_slots(self) -> float:
        """State slots that no request has."""
        return self.gauges["gdn_slots_free"] + self.gauges["gdn_cache_states"]


@dataclass
class Vanished:
    """What clients did, how often, and the errors of those that stayed."""

    ways: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)


def _request(draw: random.Random, body: dict[str, Any]) -> bytes:
    """A prompt of a few tokens, or of so many that it takes several steps."""
    n_words = draw.choice((8, _MOST_WORDS))
    text = " ".join(str(draw.randrange(100)) for _ in range(n_words))
    return request_bytes({"messages": [{"role": "user", "content": text}], **body})


async def _come_and_go(
    port: int, draw: random.Random, body: dict[str, Any], found: Vanished
) -> None:
    way, request = draw.choice(WAYS), _request(draw, body)
    client = await Client.connected(port)
    if way == "sends half a request":
        request = request[: draw.randrange(1, len(request))]
    answer = asyncio.ensure_future(client.stream(request))
    found.ways[way] += 1
    if way == "stays":
        came = await answer
        found.errors += [came.error] if came.error else []
    else:
        await asyncio.sleep(draw.uniform(0, _LONGEST_S))
        if way == "closes one half":
            client.close_half()
            async with asyncio.timeout(_PATIENCE_S):
                await answer
    client.close(is_abrupt=way == "is reset")
    await answer


async def come_and_go(
    port: int, n_clients: int, seconds: float, seed: int, body: dict[str, Any]
) -> Vanished:
    """So many clients at a time, each of which is followed by another. Moments at which they vanish
    reach from the queue to the last tokens."""
    found, end = Vanished(), time.perf_counter() + seconds

    async def one(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        while time.perf_counter() < end:
            await _come_and_go(port, draw, body, found)

    await asyncio.gather(*(one(i) for i in range(n_clients)))
    return found


async def vanish_at_once(port: int, n_clients: int, seed: int, body: dict[str, Any]) -> None:
    """Have clients wait, prefill and read tokens, and all of them go at the same moment."""
    draw = random.Random(seed)
    clients = [await Client.connected(port) for _ in range(n_clients)]
    requests = [_request(draw, body) for _ in clients]
    answers = [asyncio.ensure_future(c.stream(r)) for c, r in zip(clients, requests, strict=True)]
    await asyncio.sleep(_LONGEST_S / 2)
    for client in clients:
        client.close(is_abrupt=True)
    await asyncio.gather(*answers)


def state(server: ServerProcess, before: State | None = None) -> State:
    """What it holds once nothing waits or runs, and no fewer slots are free or kept than before.
    Raises LoadError if that does not come."""
    n_slots = before.n_slots if before else 0
    begun = time.perf_counter()
    while True:
        now = State(server.gauges(), server.n_files, 0, time.perf_counter() - begun)
        if not any(now.gauges[name] for name in _IDLE) and now.n_slots >= n_slots:
            break
        if now.seconds > _PATIENCE_S:
            raise LoadError(f"expected a server without requests, got {now.gauges}")
    # It may have yet to close connections, also that of the question.
    time.sleep(_SETTLED_S)
    most = before.n_files + _LATE_FILES if before else 0
    while before and server.n_files > most and time.perf_counter() < begun + _PATIENCE_S:
        time.sleep(_SETTLED_S)
    return State(server.gauges(), server.n_files, server.resident / 2**20, now.seconds)


def table(before: State, after: State) -> str:
    lines = ["| | before | after |", "|---|---|---|"]
    for name in (*_IDLE, *_FREE):
        cells = f"{before.gauges[name]:.0f} | {after.gauges[name]:.0f}"
        lines.append(f"| {name.removeprefix('gdn_').replace('_', ' ')} | {cells} |")
    lines.append(f"| file descriptors | {before.n_files} | {after.n_files} |")
    lines.append(f"| memory, MiB | {before.resident:.0f} | {after.resident:.0f} |")
    return "\n".join(
        [*lines, f"| ms until that, after all vanished at once | | {1e3 * after.seconds:.0f} |"]
    )


def check(before: State, after: State, found: Vanished, has_cache: bool) -> None:
    """Raise LoadError if something is held that was not before."""
    if found.errors:
        raise LoadError(f"expected no errors of clients that stay, got {found.errors[0]}")
    if after.n_files > (most := before.n_files + _LATE_FILES):
        raise LoadError(f"expected at most {most} file descriptors, got {after.n_files}")
    for name in () if has_cache else _FREE:
        if before.gauges[name] != after.gauges[name]:
            raise LoadError(f"{name}: expected {before.gauges[name]}, got {after.gauges[name]}")
    if before.n_slots != after.n_slots:
        raise LoadError(f"expected {before.n_slots} slots free or kept, got {after.n_slots}")


def vanish(
    server: ServerProcess, n_clients: int, seconds: float, body: dict[str, Any], has_cache: bool
) -> str:
    """A table of what the server holds before and after. A third of the time warms up. Raises
    LoadError if something is held that was not before."""
    come = partial(come_and_go, server.port, n_clients)
    asyncio.run(come(seconds / 3, 1, body))
    before = state(server)
    found = asyncio.run(come(seconds * 2 / 3, 2, body))
    asyncio.run(vanish_at_once(server.port, n_clients, 3, body))
    after = state(server, before)
    said = ", ".join(f"{way}: {found.ways[way]}" for way in WAYS)
    check(before, after, found, has_cache)
    return f"a client that … {said}\n\n{table(before, after)}"
