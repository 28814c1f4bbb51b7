"""Threads and tasks that use one engine at once: every completion is what its request gives alone.

Threads start, read, stop, cancel and forget completions, run batches and chats, take checkpoints,
process sequences of their own and clear the prefix cache, with the engine's own thread running the
steps and without. Prompts begin alike, and the cache is too small for all that they leave. The
standard is an engine without a cache, which one thread used before. `python -m
tests.runtime.test_threads` does it on every architecture for minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineError, SamplingParams
from engine.kvcache.policy import Kind
from engine.kvcache.prefix import packed
from engine.runtime.batch import Chunk
from engine.runtime.completion import Completion, GenerationError
from engine.runtime.owner import OwnerError, Signal
from engine.text.template import BUILT_IN, ChatTemplate
from tests.support.hash_model import hash_engine
from tests.support.helpers import ROW_BY_ROW, STD, assert_all_free, failing_at, random_ids
from tests.support.presets import ONE_OF_EACH
from tools.synth import write_model

Load = Callable[..., Engine]
Models = Callable[[str, str], Path]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=1.5, seed=3)
HOST = replace(DRAWN, repeat_penalty=1.3, max_tokens=5)
CHATML = ChatTemplate(BUILT_IN["chatml"])
N_THREADS, N_ACTIONS = 8, 10


class Oracle:
    """Prompts with what they give alone."""

    def __init__(self, engine: Engine, rng: np.random.Generator) -> None:
        self.work: list[tuple[list[int], SamplingParams]] = []
        shared = random_ids(rng, 130)
        for params in (
            GREEDY,
            DRAWN,
            HOST,
            replace(GREEDY, stop=("e", "a")),
            replace(DRAWN, seed=9),
        ):
            self.work += [(random_ids(rng, int(rng.choice([1, 3, 70]))), params) for _ in range(3)]
            # They begin alike, up to a multiple of 64 or not.
            n = int(rng.choice([10, 64, 100, 128, 130]))
            self.work.append((shared[:n] + random_ids(rng, int(rng.integers(3))), params))
        self.want = [self.outcome(c) for p, s in self.work for c in engine.generate_batch([p], s)]
        self.logits = [engine.logits(ids) for ids, _ in self.work]
        self.chats = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]
        self.answers = []
        for messages in self.chats:
            answer = engine.chat(messages, GREEDY, template=CHATML)
            list(answer)
            self.answers.append(self.outcome(answer))
        assert engine.cache.n_bytes == 0

    @staticmethod
    def outcome(completion: Completion) -> tuple[Any, ...]:
        return completion.finish_reason, completion.tokens, completion.text

    def check(self, i: int, completion: Completion) -> None:
        """It is whole, or it was cancelled and is the beginning."""
        reason, tokens, text = self.want[i]
        if completion.finish_reason == "cancelled":
            assert completion.tokens == tokens[: len(completion.tokens)]
            # The text of all its tokens; the last one's may end within a character.
            shown = completion.text.rstrip("\ufffd")
            assert text.startswith(shown) or completion.request.params.stop
        else:
            assert self.outcome(completion) == (reason, tokens, text)


class User:
    """One thread's random doings with an engine that others use, too."""

    def __init__(self, engine: Engine, oracle: Oracle, seed: int) -> None:
        self.engine, self.oracle = engine, oracle
        self.rng = np.random.default_rng(seed)
        self.done: Counter[str] = Counter()
        self.left: list[Callable[[], None]] = []

    def act(self) -> None:
        """Do something; everything once before anything again."""
        if not self.left:
            self.left = [self.read, self.read, self.batch, self.stop, self.forget, self.checkpoint,
                         self.own_sequence, self.chat, self.wait, self.cancel_elsewhere,
                         self.look_at_cache]  # fmt: skip
        action = self.left.pop(self.rng.integers(len(self.left)))
        action()
        self.done[action.__name__] += 1

    def start(self) -> tuple[int, Completion]:
        i = int(self.rng.integers(len(self.oracle.work)))
        return i, self.engine.generate(*self.oracle.work[i])

    def read(self) -> None:
        i, completion = self.start()
        got = [t.token for t in completion]
        # A token that completes a stop text has no text to be shown.
        assert got == completion.tokens[: len(got)]
        assert len(got) >= len(completion.tokens) - 1
        self.oracle.check(i, completion)

    def wait(self) -> None:
        i, completion = self.start()
        self.oracle.check(i, completion.wait())

    def stop(self) -> None:
        i, completion = self.start()
        for _ in range(self.rng.integers(4)):
            next(completion, None)
        (completion.stop if self.rng.integers(2) else completion.cancel)()
        for _ in completion:
            pass
        assert completion.finish_reason is not None
        self.oracle.check(i, completion)

    def cancel_elsewhere(self) -> None:
        """Another thread cancels what this one reads."""
        i, completion = self.start()
        other = threading.Timer(float(self.rng.uniform(0, 0.003)), completion.cancel)
        other.start()
        for _ in completion:
            pass
        other.join()
        self.oracle.check(i, completion)

    def forget(self) -> None:
        """A completion in a cycle, which some later collection finds, in whatever thread."""
        _, completion = self.start()
        next(completion, None)
        cycle: list[Any] = [completion]
        cycle.append(cycle)
        if self.rng.integers(4) == 0:
            gc.collect()

    def batch(self) -> None:
        chosen = self.rng.integers(len(self.oracle.work), size=5).tolist()
        prompts, params = zip(*(self.oracle.work[i] for i in chosen), strict=True)
        for i, done in zip(chosen, self.engine.generate_batch(prompts, params), strict=True):
            self.oracle.check(i, done)

    def checkpoint(self) -> None:
        """Half of a prompt in a sequence of its own, the rest after a checkpoint of it."""
        i = int(self.rng.integers(len(self.oracle.work)))
        ids, params = self.oracle.work[i]
        if len(ids) < 2 or params.repeat_penalty != 1:
            return
        seq = self.engine.memory.create()
        self.engine.prefill(seq, ids[: len(ids) // 2])
        kept = self.engine.memory.checkpoint(seq)
        self.engine.memory.free(seq)
        completion = self.engine.generate(ids[len(ids) // 2 :], params, kept)
        if self.rng.integers(2):
            kept.release()
        del kept
        assert [t.token for t in completion] == self.oracle.want[i][1]

    def own_sequence(self) -> None:
        i = int(self.rng.integers(len(self.oracle.work)))
        ids, want = self.oracle.work[i][0], self.oracle.logits[i]
        assert np.array_equal(self.engine.logits(ids), want)

    def look_at_cache(self) -> None:
        cache = self.engine.cache
        assert cache.n_bytes <= cache.budget
        assert cache.counts.n_reused <= cache.counts.n_tokens
        if self.rng.integers(4) == 0:
            cache.clear()

    def chat(self) -> None:
        i = int(self.rng.integers(len(self.oracle.chats)))
        answer = self.engine.chat(self.oracle.chats[i], GREEDY, template=CHATML)
        list(answer)
        assert self.oracle.outcome(answer) == self.oracle.answers[i]


def use_at_once(engine: Engine, oracle: Oracle, seconds: float, seed: int) -> Counter[str]:
    """Let threads do things for a while; returns what they did, raises what one of them met."""
    users = [User(engine, oracle, seed + i) for i in range(N_THREADS)]
    end, met = time.monotonic() + seconds, list[BaseException]()

    def run(user: User) -> None:
        try:
            while not met and (time.monotonic() < end or len(user.done) < N_ACTIONS):
                user.act()
        except BaseException as error:
            met.append(error)

    threads = [threading.Thread(target=run, args=(user,), daemon=True) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
        assert not thread.is_alive(), "it hangs"
    if met:
        raise met[0]
    gc.collect()
    if not engine.loop.owner.is_driven:
        while engine.advance():
            pass
    counts = engine.cache.counts
    assert counts.n_reused > 0
    assert counts.n_evicted > 0
    assert_all_free(engine)
    return sum((user.done for user in users), Counter())


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    """Threads of Python take turns a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


OPTIONS: dict[str, Any] = {"n_ctx": 1024, "n_ubatch": 64, "n_parallel": 4}


@pytest.fixture(params=["steps one by one", "overlapped steps", "cpu"])
def engines(request: pytest.FixtureRequest, models: Models) -> Iterator[Load]:
    """Loads the same engine again and again."""
    path, made = models("tiny", "F32"), list[Engine]()

    def load(**more: Any) -> Engine:
        options = {**OPTIONS, "n_checkpoints": 20, "cache_ram": 1, **more}
        if request.param == "cpu":
            options |= ROW_BY_ROW
            made.append(Engine.load(path, backend="cpu", n_threads=2, **options))
        else:
            made.append(hash_engine(path, request.param == "overlapped steps", **options))
        return made[-1]

    yield load
    for engine in made:
        engine.close()


@pytest.mark.parametrize("is_driven", [False, True], ids=["by callers", "by a thread"])
def test_threads(engines: Load, rng: np.random.Generator, is_driven: bool) -> None:
    oracle, engine = Oracle(engines(cache_ram=0), rng), engines()
    if is_driven:
        engine.start()
    with switching_often():
        done = use_at_once(engine, oracle, 2.5, int(rng.integers(2**31)))
    assert len(done) == N_ACTIONS, done


def test_tasks(engines: Load, rng: np.random.Generator) -> None:
    """Tasks of an event loop, some of which are cancelled, beside a thread."""
    oracle, engine = Oracle(engines(cache_ram=0), rng), engines()
    asyncio.run(tasks(engine, oracle, rng, 150))
    gc.collect()
    assert engine.cache.counts.n_reused > 0
    assert_all_free(engine)


async def tasks(engine: Engine, oracle: Oracle, rng: np.random.Generator, n: int) -> None:
    async def read(i: int) -> Completion:
        completion = engine.generate(*oracle.work[i])
        got = [t.token async for t in completion]
        assert got == completion.tokens[: len(got)]
        oracle.check(i, completion)
        return completion

    async def cancelled(i: int, seconds: float) -> None:
        completion = engine.generate(*oracle.work[i])

        async def iterate() -> None:
            async for _ in completion:
                pass

        task = asyncio.create_task(iterate())
        await asyncio.sleep(seconds)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.to_thread(completion.wait)
        oracle.check(i, completion)

    works = rng.integers(len(oracle.work), size=n).tolist()
    both = [
        cancelled(i, float(rng.uniform(0, 0.01))) if rng.integers(4) == 0 else read(i)
        for i in works
    ]
    thread = asyncio.to_thread(User(engine, oracle, int(rng.integers(2**31))).batch)
    await asyncio.gather(*both, thread)


def test_closing_waits_for_the_step_and_ends_all(engines: Load) -> None:
    for is_driven in (False, True):
        engine, met = engines(), list[BaseException]()
        if is_driven:
            engine.start()

        def read(engine: Engine = engine, met: list[BaseException] = met) -> None:
            try:
                while True:
                    list(engine.generate([1], replace(GREEDY, max_tokens=900)))
            except BaseException as ended:
                met.append(ended)

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        engine.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert [repr(e) for e in met if str(e) != "the engine is closed"] == []
        assert len(met) == 6
        assert_all_free(engine)


def test_a_step_that_fails_ends_its_completions_in_all_threads(models: Models) -> None:
    engine = Engine.load(models("tiny", "F32"), backend="reference", n_ctx=512, n_parallel=4)
    engine.start()
    failing = failing_at(engine, "blk.1.gated_delta_net", RuntimeError)
    with contextlib.ExitStack() as stack:

        def fail() -> bool:
            """Break it between two steps, unless one has ended already."""
            if any(c.finish_reason for c in first):
                return False
            stack.enter_context(failing)
            return True

        is_broken = False
        while not is_broken:
            first = [engine.generate([i], replace(GREEDY, max_tokens=100)) for i in range(4)]
            for completion in first:
                next(completion)
            is_broken = engine.loop.owner.call(fail)
        for completion in first:
            with pytest.raises(GenerationError, match="broke off") as raised:
                list(completion)
            assert isinstance(raised.value.__cause__, RuntimeError)
    again = engine.generate([1], GREEDY)
    assert len(list(again)) == 8
    engine.close()


def test_without_anybody_its_thread_ends(models: Models) -> None:
    engine = hash_engine(models("tiny", "F32"), True, **OPTIONS)
    engine.start()
    assert len(engine.generate([1], GREEDY).wait().tokens) == 8
    stepper = engine.loop.owner.stepper
    assert stepper is not None
    del engine
    gc.collect()
    stepper.join(10)
    assert not stepper.is_alive()


def test_within_its_own_step_an_engine_can_only_be_told_to_stop(models: Models) -> None:
    """A signal's handler comes in the midst of a step."""
    engine = hash_engine(models("tiny", "F32"), False, **OPTIONS)
    completion, met = engine.generate([1], replace(GREEDY, max_tokens=900)), list[BaseException]()

    def handler(number: int, frame: Any) -> None:
        try:
            engine.memory.free(engine.memory.create())
        except OwnerError as error:
            met.append(error)
            completion.cancel()

    earlier = signal.signal(signal.SIGALRM, handler)
    try:
        while not met:
            completion = engine.generate([1], replace(GREEDY, max_tokens=900))
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            list(completion)
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, earlier)
    assert "expected Completion.stop" in str(met[0])
    assert completion.finish_reason == "cancelled"
    assert_all_free(engine)


@pytest.mark.parametrize("is_driven", [False, True])
def test_waiting_or_closing_within_a_call_is_refused(models: Models, is_driven: bool) -> None:
    """Nobody could ever answer: this thread holds the lock that the steps need."""
    engine = hash_engine(models("tiny", "F32"), True, **OPTIONS)
    if is_driven:
        engine.start()

    def within() -> Completion:
        completion = engine.generate([1], replace(GREEDY, max_tokens=900))
        for use in (lambda: list(completion), completion.wait, engine.close, engine.advance):
            with pytest.raises(OwnerError, match="within its own step"):
                use()
        completion.stop()
        return completion

    completion = engine.loop.owner.call(within)
    assert completion.wait().finish_reason == "cancelled"
    engine.close()
    assert_all_free(engine)


def test_two_threads_that_read_one_completion_share_its_tokens(models: Models) -> None:
    engine = hash_engine(models("tiny", "F32"), True, **OPTIONS)
    engine.start()
    with switching_often():
        for _ in range(20):
            completion, got = engine.generate([1], replace(GREEDY, max_tokens=60)), list[int]()

            def read(completion: Completion = completion, got: list[int] = got) -> None:
                got.extend(t.token for t in completion)

            async def read_async(read: Completion = completion, got: list[int] = got) -> None:
                got += [t.token async for t in read]

            threads = [threading.Thread(target=read) for _ in range(2)]
            threads.append(threading.Thread(target=asyncio.run, args=(read_async(),)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive()
            assert sorted(got) == sorted(completion.tokens)
    engine.close()


def test_an_engine_that_closes_while_it_starts_has_no_thread(models: Models) -> None:
    for _ in range(30):
        engine = hash_engine(models("tiny", "F32"), True, **OPTIONS)
        engine.start()

        def start(engine: Engine = engine) -> None:
            with contextlib.suppress(EngineError):
                while True:
                    engine.start()

        thread = threading.Thread(target=start)
        thread.start()
        engine.close()
        thread.join(20)
        assert not thread.is_alive()
        assert not engine.loop.owner.is_driven


def test_news_that_an_exception_interrupts_are_told_again() -> None:
    heard: list[str] = []

    def interrupted() -> None:
        if not heard:
            heard.append("interrupted")
            raise KeyboardInterrupt
        heard.append("told")

    signal_of = Signal()
    signal_of.add(interrupted)
    with pytest.raises(KeyboardInterrupt):
        signal_of.notify()
    signal_of.notify()
    signal_of.notify()
    assert heard == ["interrupted", "told"]


# Fork.


@pytest.mark.parametrize("is_driven", [False, True])
def test_a_forked_process_gets_an_error(models: Models, is_driven: bool) -> None:
    engine = Engine.load(models("tiny", "F32"), backend="cpu", n_threads=2, n_ctx=8192)
    if is_driven:
        engine.start()
    # Long enough that it still runs when the process forks.
    running = engine.generate([1], replace(GREEDY, max_tokens=8000))
    next(running)
    seq = engine.memory.create()
    kept = engine.memory.checkpoint(seq)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls: list[Callable[[], Any]] = [
            lambda: engine.generate([1]), lambda: engine.generate_batch([[1]]), engine.advance,
            lambda: engine.logits([1]), lambda: engine.step([Chunk(seq, [1])]), engine.start,
            lambda: engine.chat([{"role": "user", "content": "a"}], template=CHATML),
            lambda: next(running), running.cancel, lambda: engine.memory.n_tokens(seq),
            lambda: asyncio.run(anext(running)),
        ]  # fmt: skip
        running.request.ready.clear()  # What its thread had done before.
        said = set()
        for call in calls:
            try:
                call()
                said.add("nothing")
            except EngineError as error:
                said.add(str(error))
        engine.close()
        os.write(writer, "\n".join(said).encode())
        os._exit(0)
    os.close(writer)
    signal.alarm(20)
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    with os.fdopen(reader) as lines:
        (line,) = lines.read().split("\n")
    assert status == 0
    assert line.startswith("this process was forked from the one that loaded the engine")
    # The parent goes on.
    assert len([next(running) for _ in range(199)]) == 199
    running.cancel()
    kept.release()
    engine.memory.free(seq)
    assert_all_free(engine)
    engine.close()


# Signals in long steps.


def test_ctrl_c_does_not_wait_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 4,000 tokens of the demo model, which takes most of a second."""
    options: dict[str, Any] = {"n_ctx": 8192, "n_ubatch": 4096, "cache_prompt": False}
    with Engine.load(backend="cpu", n_threads=2, **options) as engine:
        ids = (np.arange(4000) % 250 + 3).tolist()
        start = time.perf_counter()
        want = engine.logits(ids[:10])
        first = engine.generate(ids, replace(GREEDY, max_tokens=1))
        list(first)
        whole = time.perf_counter() - start

        def handler(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        earlier = signal.signal(signal.SIGALRM, handler)
        after, waits = whole / 4, []
        for _ in range(3):
            stopped = engine.generate(ids, replace(GREEDY, max_tokens=1))
            signal.setitimer(signal.ITIMER_REAL, after)
            start = time.perf_counter()
            with pytest.raises(KeyboardInterrupt):
                list(stopped)
            waits.append(time.perf_counter() - start - after)
            assert stopped.finish_reason == "error"
        signal.signal(signal.SIGALRM, earlier)
        assert_all_free(engine)
        assert min(waits) < max(0.25, whole / 4), (waits, whole)
        # The team of threads is as it was.
        assert np.array_equal(engine.logits(ids[:10]), want)
        again = engine.generate(ids, replace(GREEDY, max_tokens=1))
        list(again)
        assert again.tokens == first.tokens
        # In pieces as short as they can be, too.
        monkeypatch.setattr("engine.backends.cpu.backend.PIECE_SECONDS", 0.0)
        assert np.array_equal(engine.logits(ids[:10]), want)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="for all architectures together")
    args = parser.parse_args()
    rng, presets = np.random.default_rng(), ONE_OF_EACH
    with tempfile.TemporaryDirectory() as directory, switching_often():
        for preset in presets:
            path = write_model(Path(directory) / f"{preset}.gguf", preset, "F32", std=STD)
            options: dict[str, Any] = {**OPTIONS, **ROW_BY_ROW, "n_threads": 2}
            options |= {"backend": "cpu", "n_checkpoints": 20}
            oracle = Oracle(Engine.load(path, **options, cache_ram=0), rng)
            for is_driven in (False, True):
                with Engine.load(path, **options, cache_ram=1) as engine:
                    if is_driven:
                        engine.start()
                    share = args.seconds / len(presets) / 2
                    done = use_at_once(engine, oracle, share, int(rng.integers(2**31)))
                    asyncio.run(tasks(engine, oracle, rng, 500))
                by = "a thread" if is_driven else "callers"
                print(f"{preset}, steps by {by}: {dict(done)}, then 500 tasks", flush=True)


if __name__ == "__main__":
    main()


def test_a_text_is_looked_up_while_a_step_runs(tiny: Path) -> None:
    """Else every prompt that is a text, and every chat, waits for the end of a step."""
    with Engine.load(tiny, backend="reference", n_ctx=256, cache_ram=4) as engine:
        engine.generate("Once upon a time", SamplingParams(max_tokens=1)).wait()
        expected = engine.cache.match_text("text:Once upon a time, there")
        assert expected[0] == len("text:Once upon a time")
        runs, ends = threading.Event(), threading.Event()

        def step() -> None:
            runs.set()
            assert ends.wait(60)

        with ThreadPoolExecutor(2) as pool:
            stepping = pool.submit(engine.loop.owner.call, step)
            assert runs.wait(60)
            found = pool.submit(engine.cache.match_text, "text:Once upon a time, there")
            try:
                assert found.result(timeout=30) == expected
            finally:
                ends.set()
            stepping.result()


def test_texts_are_right_while_the_cache_changes(tiny: Path, rng: np.random.Generator) -> None:
    """A text gives its own ids or none, whatever threads keep and give up meanwhile."""
    with Engine.load(tiny, backend="reference", n_ctx=256, cache_ram=1) as engine:
        cache, is_over = engine.loop.scheduler.cache, threading.Event()
        texts = ["".join(map(chr, rng.integers(97, 99, n))) for n in rng.integers(1, 30, 60)]
        # A text's ids are those of its characters.
        ids = [packed([ord(c) for c in text]) for text in texts]
        seq = engine.memory.create()
        engine.prefill(seq, [1])

        def change() -> None:
            local = np.random.default_rng(1)
            while not is_over.is_set():
                i = int(local.integers(len(texts)))
                for action in (
                    partial(cache.keep, ids[i], seq, Kind.ANSWER),
                    partial(cache.name, texts[i], ids[i], ()),
                ):
                    engine.loop.owner.call(action)
                if local.random() < 0.02:
                    engine.cache.clear()

        with ThreadPoolExecutor(1) as pool:
            changing = pool.submit(change)
            try:
                n_found, end = 0, time.monotonic() + 1.5
                while time.monotonic() < end:
                    text = texts[int(rng.integers(len(texts)))]
                    n, found = engine.cache.match_text(text)
                    if found is not None:
                        assert found.ids == packed([ord(c) for c in text[:n]])
                        n_found += 1
            finally:
                is_over.set()
            changing.result()
        engine.memory.free(seq)
        engine.cache.clear()
        assert n_found > 100
        assert_all_free(engine)
