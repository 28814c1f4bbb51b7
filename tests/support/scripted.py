"""A double of the engine for tests of protocols and clients: it plays back given texts.

Requests, their limits, stop texts and sampling parameters are the engine's own, and so is the
tokenizer, the demo model's; the tokens are not sampled but those of a script, and come after given
delays. Its speed says nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from engine.config import EngineConfig
from engine.engine import DEMO_MODEL, Engine
from engine.formats.gguf import GGUFFile
from engine.kvcache.entries import Counts
from engine.runtime.chats import Chats
from engine.runtime.owner import Signal
from engine.runtime.request import FinishReason, Request
from engine.runtime.requests import Requests
from engine.runtime.reuse import Reuse
from engine.sampling.logprobs import Logprobs
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Script:
    """What one request gets: its text, after seconds for the prompt and for each token. error: how
    it ends instead of at an end token. is_endless: the text comes again and again."""

    text: str = "Hello there."
    prompt_s: float = 0.0
    token_s: float = 0.0
    error: str = ""
    is_endless: bool = False


class ScriptedLoop:
    """In place of a StepLoop: a thread that gives each running request a token a step."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self._lock = threading.Condition()
        self.waiting = deque[Request]()
        self.running: dict[Request, Iterator[int]] = {}
        self._thread: threading.Thread | None = None
        self._is_closed = False
        # How many steps ran, and how often signals were notified by them.
        self.n_steps = 0

    def check_usable(self) -> None:
        """It always is."""

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()

    def add(self, request: Request) -> None:
        with self._lock:
            self.waiting.append(request)
            self._lock.notify()

    def cancel_soon(self, request: Request) -> None:
        with self._lock:
            request.cancel()
            self._lock.notify()

    cancel = cancel_soon

    def wait(self, signal: Signal, is_done: Callable[[], bool]) -> None:
        self.start()
        while not is_done():
            time.sleep(0.001)

    @property
    def n_held(self) -> int:
        """Requests that have a place."""
        return len(self.running) + len(self.waiting)

    def _run(self) -> None:
        while not self._is_closed:
            with self._lock:
                while not self.n_held and not self._is_closed:
                    self._lock.wait()
                self._admit()
                running = list(self.running)
            time.sleep(max([0.0, *(self._engine.script_of(r).token_s for r in running)]))
            with self._lock:
                self._step(running)

    def _admit(self) -> None:
        for request in [r for r in self.waiting if r.finish_reason]:
            self.waiting.remove(request)
            self._end(request)
        while self.waiting and len(self.running) < self._engine.config.n_parallel:
            request = self.waiting.popleft()
            self.running[request] = self._tokens(request)

    def _tokens(self, request: Request) -> Iterator[int]:
        """The tokens of its script; -1 while nothing comes, -2 for its error."""
        script, engine = self._engine.script_of(request), self._engine
        begun = time.monotonic()
        while time.monotonic() - begun < script.prompt_s:
            yield -1
        request.count_step(len(request.ids), max(script.prompt_s, 1e-3), is_prompt=True)
        while True:
            yield from engine.tokenizer.encode(script.text, parse_special=True)
            if not script.is_endless:
                break
        yield -2 if script.error else min(engine.tokenizer.eog_ids)

    def _step(self, running: list[Request]) -> None:
        self.n_steps += 1
        for request in running:
            token = next(self.running[request])
            if request.finish_reason is None and token == -2:
                request.finish(FinishReason.ERROR, self._engine.script_of(request).error)
            elif request.finish_reason is None and token >= 0:
                n_top = request.params.logprobs
                found = None
                if n_top is not None:
                    found = Logprobs(-0.5, tuple((token + i, -0.5 - i) for i in range(n_top)))
                request.count_step(1, 1e-3, is_prompt=False)
                request._append(token, found)
            if request.finish_reason:
                del self.running[request]
                self._end(request)
        for signal in {id(r.signal): r.signal for r in running}.values():
            signal.notify()
        if all(self.running.get(r) is not None for r in running):
            time.sleep(0.0005)

    def _end(self, request: Request) -> None:
        request.source = None
        request.signal.ended.append(request)
        request.signal.notify()


class ScriptedEngine(Engine):
    """script: what a request gets, by the text of its prompt."""

    def __init__(
        self, script: Callable[[str], Script] | Script = Script(), n_parallel: int = 4,
        n_ctx: int = 2048,
    ) -> None:  # fmt: skip
        self.file = GGUFFile(DEMO_MODEL)
        self.load_s, self.n_ctx = 0.0, n_ctx
        self.config = EngineConfig(n_parallel=n_parallel)
        self.tokenizer = Tokenizer.from_gguf(self.file)
        n_vocab = self.file.tensors["token_embd.weight"].shape[0]
        made: Any = self
        made.model = SimpleNamespace(n_vocab=n_vocab, n_ctx_train=2048)
        made.cache = SimpleNamespace(budget=0, n_bytes=0, n_states=0, counts=Counts())
        pool = SimpleNamespace(n_free=1)
        self._script = script
        self._chats = Chats(self.file, self.tokenizer, lambda key: (0, None))
        self._requests = Requests(
            self.file, self.tokenizer, n_vocab, n_ctx, n_parallel, lambda key: (0, None)
        )
        self._scripts: dict[Request, Script] = {}
        self.scripted = made.loop = ScriptedLoop(self)
        made.loop.scheduler = SimpleNamespace(cache=made.cache)
        made.loop.memory = SimpleNamespace(slots=pool, blocks=pool)

    def script_of(self, request: Request) -> Script:
        if request not in self._scripts:
            prompt = self.tokenizer.decode(request.ids, special=True)
            given = self._script
            self._scripts[request] = given(prompt) if callable(given) else given
            request.reuse = Reuse(len(request.ids), reason="it is scripted")
        return self._scripts[request]

    def close(self) -> None:
        self.scripted.close()
