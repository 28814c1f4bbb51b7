"""An exception at any place of a step: no completion goes on with a token too few or too many.

An exception is raised at lines of the engine while several requests run, on both kinds of steps:
an error, a KeyboardInterrupt, and one that a signal's handler raises at random times. Whatever ends
with `stop` or `length` must be what the request gives alone, and all memory must be free after it,
but what the prefix cache holds, which must add up. Prompts begin alike, so that they share it.
`python -m tests.runtime.test_interrupts` tries every line event instead of some.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import engine
from engine import EngineError, SamplingParams
from engine.runtime.completion import Completion
from engine.runtime.owner import Owner
from engine.text.template import BUILT_IN, ChatError, ChatTemplate
from tests.support.hash_model import hash_engine
from tests.support.helpers import STD, assert_all_free
from tools.synth import write_model

ENGINE = str(Path(engine.__file__).parent)
# Code that every step enters, but that shares nothing: an exception there is one of its caller's.
ELSEWHERE = (
    "/models/",
    "/ops/",
    "/formats/",
    "/placement/",
    "/backends/",
    "/text/",
    "/sampling/params",
    "/checks",
)
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=1.5, seed=3, stop=("e",))
HOST = replace(DRAWN, repeat_penalty=1.3, stop=())
CHATML = ChatTemplate(BUILT_IN["chatml"])
PROMPTS = [
    ([5] * 70, GREEDY),
    ([6, 7], DRAWN),
    ([8] * 3, HOST),
    ([9], replace(GREEDY, max_tokens=9)),
    ([5] * 70, HOST),
    ([5] * 66 + [1], GREEDY),
]
MESSAGES = [{"role": "user", "content": "hello"}]
# Another answer than the model's: the history is tokenized alike, whatever is known of it.
NEXT_MESSAGES = [
    *MESSAGES,
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "go on"},
]
PRESET = "tiny-next"  # Its states are so large that the cache has room for eight.
KINDS = {"steps one by one": False, "overlapped steps": True}


class InjectedError(Exception):
    """Raised by the tests alone."""


class Tracer:
    """Sees the lines of the engine that run, and raises at one of them."""

    def __init__(self, error: type[BaseException] = InjectedError) -> None:
        self.error = error
        self.visits: list[tuple[CodeType, int]] = []
        self.at = -1
        # `with` leaves a lock at the line where it took it: no signal's handler can come there.
        self._leaves_lock = self._lines_of_locks()
        self._skipped: set[CodeType] = set()

    @staticmethod
    def _lines_of_locks() -> set[tuple[CodeType, int]]:
        code = Owner.call.__code__
        lines = Path(code.co_filename).read_text().splitlines()
        return {(code, i) for i, line in enumerate(lines, 1) if "with self._lock:" in line}

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code in self._skipped:
            return None
        name = frame.f_code.co_filename
        if not name.startswith(ENGINE) or any(part in name for part in ELSEWHERE):
            self._skipped.add(frame.f_code)
            return None
        seen: Counter[tuple[CodeType, int]] = Counter()

        def at_line(frame: FrameType, event: str, arg: object) -> Any:
            if event == "line":
                place = frame.f_code, frame.f_lineno
                seen[place] += 1
                if place in self._leaves_lock and seen[place] > 1:
                    return at_line
                self.visits.append(place)
                if len(self.visits) - 1 == self.at:
                    raise self.error(f"{Path(name).name}:{frame.f_lineno}")
            return at_line

        return at_line

    @contextlib.contextmanager
    def watching(self, at: int = -1) -> Iterator[None]:
        self.visits, self.at = [], at
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(None)


class Scenario:
    """Requests of several kinds that run together, and a user who goes on after an exception."""

    def __init__(self, path: Path, overlaps: bool) -> None:
        # An overlapped step takes a slot of its own; the reference backend has none for it.
        self.engine = hash_engine(path, overlaps, n_ctx=512, n_ubatch=64, n_parallel=3)
        alone = hash_engine(path, False, n_ctx=512, n_ubatch=64, cache_ram=0)
        self.expected = [self._outcome(c) for p, s in PROMPTS for c in alone.generate_batch([p], s)]
        for messages in (MESSAGES, NEXT_MESSAGES):
            answer = alone.chat(messages, GREEDY, template=CHATML)
            list(answer)
            self.expected.append(self._outcome(answer))

    @staticmethod
    def _outcome(completion: Completion) -> tuple[Any, ...]:
        return completion.finish_reason, completion.tokens, completion.text

    def run(self, errors: tuple[type[BaseException], ...]) -> list[tuple[int, Completion]]:
        """Start everything, and read it to its end whatever comes."""
        started: list[tuple[int, Completion]] = []
        starts: list[Callable[[], Completion]] = [
            lambda prompt=prompt, params=params: self.engine.generate(prompt, params)  # type: ignore[misc]
            for prompt, params in PROMPTS
        ]
        starts.append(lambda: self.engine.chat(MESSAGES, GREEDY, template=CHATML))
        for i, start in enumerate(starts):
            # To a template's renderer, what comes within it is the template's.
            with contextlib.suppress(*errors, ChatError):
                started.append((i, start()))
        for i, completion in started:
            # One is cancelled after two tokens, unless an exception comes before.
            self._read(completion, errors, 2 if i == 1 else 99)
        with contextlib.suppress(*errors, ChatError):
            answer = self.engine.chat(NEXT_MESSAGES, GREEDY, template=CHATML)
            started.append((len(starts), answer))
            self._read(answer, errors, 99)
        return started

    @staticmethod
    def _read(completion: Completion, errors: tuple[type[BaseException], ...], n: int) -> None:
        # More rounds than there can be exceptions.
        for _ in range(50):
            try:
                for _ in completion:
                    if len(completion.tokens) == n:
                        completion.cancel()
            except errors:
                continue
            except EngineError:
                pass
            return
        raise AssertionError("it does not end")

    def check(self, started: list[tuple[int, Completion]]) -> Counter[str]:
        """What ended as it should is what its request gives alone. Returns the reasons."""
        for i, completion in started:
            if completion.finish_reason == "cancelled":
                assert self.expected[i][1][: len(completion.tokens)] == completion.tokens
            elif completion.finish_reason != "error":
                got = self._outcome(completion)
                assert got == self.expected[i], (i, got, completion.detail, self.expected[i])
            else:
                assert "broke off" in completion.detail or "inject" in completion.detail.lower()
        return Counter(str(c.finish_reason) for _, c in started)

    def check_memory(self) -> None:
        gc.collect()
        assert not self.engine.advance()
        assert_all_free(self.engine)


@pytest.fixture(params=KINDS)
def scenario(
    models: Callable[[str, str], Path], request: pytest.FixtureRequest
) -> Iterator[Scenario]:
    made = Scenario(models(PRESET, "F32"), KINDS[request.param])
    # What is there need not be looked at by every collection.
    gc.collect()
    gc.freeze()
    yield made
    gc.unfreeze()


def inject(scenario: Scenario, error: type[BaseException], at: int) -> Counter[str]:
    """A run with an exception at one line event, then one without: nothing is left of it."""
    tracer = Tracer(error)
    try:
        with tracer.watching(at):
            started = scenario.run((error,))
        reasons = scenario.check(started)
        del started
        scenario.check_memory()
    except BaseException:
        code, line = tracer.visits[-1] if at >= len(tracer.visits) else tracer.visits[at]
        print(f"{error.__name__} at line event {at}: {code.co_filename}:{line} {code.co_name}")
        raise
    return reasons


def line_events(scenario: Scenario) -> list[tuple[CodeType, int]]:
    tracer, before = Tracer(), scenario.engine.cache.counts
    with tracer.watching():
        scenario.run(())
    counts = scenario.engine.cache.counts
    assert counts.n_reused > before.n_reused + 64
    assert counts.n_evicted > before.n_evicted
    scenario.check_memory()
    return tracer.visits


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_at_every_line(scenario: Scenario, rng: Any) -> None:
    """At one of the visits of every line, an error or an interrupt."""
    visits: dict[tuple[CodeType, int], list[int]] = defaultdict(list)
    for i, place in enumerate(line_events(scenario)):
        visits[place].append(i)
    reasons: Counter[str] = Counter()
    for events in visits.values():
        error = rng.choice([InjectedError, KeyboardInterrupt])
        reasons += inject(scenario, error, int(rng.choice(events)))
    assert len(visits) > 250
    assert reasons["length"] > reasons["error"] > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_at_random_times(scenario: Scenario, rng: Any) -> None:
    """By a signal's handler, which comes between any two bytecodes."""
    reasons: Counter[str] = Counter()
    for _ in range(150):
        reasons += interrupted(scenario, float(rng.uniform(1e-4, 0.02)))
        scenario.check_memory()
    assert reasons["length"]
    assert reasons["error"]


def interrupted(scenario: Scenario, seconds: float) -> Counter[str]:
    def handler(number: int, frame: FrameType | None) -> None:
        raise InjectedError

    earlier = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        started = scenario.run((InjectedError,))
        signal.setitimer(signal.ITIMER_REAL, 0)
        return scenario.check(started)
    except InjectedError:  # It came in the test's own code.
        return Counter()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000, help="of a signal at a random time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = write_model(Path(directory) / "model.gguf", PRESET, "F32", std=STD)
        for kind, overlaps in KINDS.items():
            made = Scenario(path, overlaps)
            gc.collect()
            gc.freeze()
            n = len(line_events(made))
            for error in (InjectedError, KeyboardInterrupt):
                reasons: Counter[str] = Counter()
                for at in range(n):
                    reasons += inject(made, error, at)
                print(f"{kind}, {error.__name__} at {n} line events: {dict(reasons)}", flush=True)
            reasons = Counter()
            for _ in range(args.rounds):
                reasons += interrupted(made, random.uniform(1e-4, 0.02))
                made.check_memory()
            print(f"{kind}, {args.rounds} signals: {dict(reasons)}", flush=True)


if __name__ == "__main__":
    main()
