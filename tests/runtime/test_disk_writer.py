"""The thread that writes the prefix cache: steps run meanwhile, and its memory is theirs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.kvcache import store
from engine.runtime import disk
from tests.support.helpers import assert_all_free, exact_engine, random_ids

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


class SlowWriter:
    """A writer that waits before it reads what it writes."""

    def __init__(self) -> None:
        self.begins, self.goes_on = threading.Event(), threading.Event()

    def __call__(self, *given: Any) -> int:
        self.begins.set()
        assert self.goes_on.wait(60)
        return store.write(*given)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowWriter]:
    made = SlowWriter()
    monkeypatch.setattr(disk, "write", made)
    yield made
    made.goes_on.set()


@pytest.fixture
def engine(tiny: Path, tmp_path: Path) -> Iterator[Engine]:
    """Its cache has room for a few prompts."""
    options: dict[str, Any] = {"n_ctx": 1024, "cache_ram": 1}
    with exact_engine("cpu", tiny, cache_dir=tmp_path / "cache", **options) as made:
        yield made
        made._disk = None  # It writes nothing more.


def run_until(engine: Engine, event: threading.Event, rng: np.random.Generator) -> None:
    """Prompts push each other out of memory."""
    for _ in range(40):
        if event.is_set():
            return
        engine.generate(random_ids(rng, 600), GREEDY).wait()
    raise AssertionError("nothing is written")


def held(engine: Engine) -> int:
    """Slots that neither the cache nor what runs has."""
    cache, slots = engine.loop.scheduler.cache, engine.loop.memory.slots
    return slots.size - slots.n_free - len(cache._seqs)


def files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").iterdir() if path.name != "lock"]


def test_steps_run_while_a_file_is_written(
    engine: Engine, slow: SlowWriter, tmp_path: Path, rng: np.random.Generator
) -> None:
    run_until(engine, slow.begins, rng)
    assert held(engine) > 0
    prompt = random_ids(rng, 600)
    done = engine.generate(prompt, GREEDY).wait()
    assert done.tokens == engine.generate(prompt, GREEDY, cache_prompt=False).wait().tokens
    assert files(tmp_path) == []
    slow.goes_on.set()
    engine._disk._wait()  # type: ignore[union-attr]
    assert len(files(tmp_path)) == 1
    assert held(engine) == 0
    assert_all_free(engine)


def test_a_request_that_needs_the_memory_gets_it(
    engine: Engine, slow: SlowWriter, tmp_path: Path, rng: np.random.Generator,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The file is given up, and nobody is warned; the next one is written."""
    run_until(engine, slow.begins, rng)
    n_free = engine.memory.slots.n_free
    # Nothing else is left: all but what is held is the running requests'.
    scheduler = engine.loop.scheduler
    make_room = scheduler.cache.make_room
    monkeypatch.setattr(
        scheduler.cache, "make_room", lambda *given: held(engine) == 0 and make_room(*given)
    )
    prompt = random_ids(rng, 100)
    done = engine.generate(prompt, GREEDY).wait()
    assert (done.finish_reason, len(done.tokens)) == ("length", 4)
    assert held(engine) == 0
    assert engine.memory.slots.n_free > n_free - 3
    slow.goes_on.set()
    engine._disk._wait()  # type: ignore[union-attr]
    assert files(tmp_path) == []
    assert caplog.messages == []
    slow.begins.clear()
    run_until(engine, slow.begins, rng)
    engine._disk._wait()  # type: ignore[union-attr]
    assert files(tmp_path)
    assert_all_free(engine)
