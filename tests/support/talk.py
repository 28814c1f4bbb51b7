"""Conversations with an engine whose answers are compared with a fresh engine's.

The reference for an answer is the whole prompt's ids, as one prompt of an engine without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from engine import ChatTemplate, Engine, SamplingParams
from engine.backends.cpu.backend import CpuProgram
from engine.backends.reference import ReferenceProgram
from engine.graph import Live
from engine.kvcache.policy import Kind
from engine.kvcache.prefix import unpacked
from engine.runtime.batch import Chunk
from engine.runtime.completion import Completion
from tests.support.chats import Messages
from tests.support.helpers import assert_same

Logits = NDArray[np.float32]
GREEDY = SamplingParams(temperature=0, max_tokens=8)
CACHE_RAM = 8  # MiB: hundreds of the tiny model's states; more takes seconds to allocate.


class Talk:
    """A conversation with an engine; every answer is compared with the fresh engine's."""

    def __init__(
        self,
        engine: Engine,
        fresh: Engine,
        template: ChatTemplate,
        params: SamplingParams = GREEDY,
        **options: Any,
    ) -> None:
        self.engine, self.fresh, self.params = engine, fresh, params
        self.template, self.options = template, options
        self.messages: Messages = []

    def ask(self, text: str) -> Completion:
        self.messages.append({"role": "user", "content": text})
        answer = self.answer(self.messages)
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer

    def answer(self, messages: Messages) -> Completion:
        answer = self.engine.chat(messages, self.params, template=self.template, **self.options)
        assert_right(answer.wait(), self.fresh)
        return answer


def assert_right(done: Completion, fresh: Engine) -> None:
    """Its tokens are those of a fresh engine; its numbers agree."""
    ids, reuse = done.request.ids, done.reuse
    assert reuse.n_prompt == len(ids)
    assert reuse.n_reused <= reuse.n_known <= len(ids)
    assert done.timings.n_prompt == len(processed(done))
    expected = fresh.generate(ids, done.request.params, cache_prompt=False).wait()
    assert expected.tokens == done.tokens


def forced(tokens: Sequence[int], n_prompt: int) -> SamplingParams:
    """Parameters that make a model write these tokens after a prompt of `n_prompt`."""

    def processor(before: Sequence[int], logits: Logits) -> Logits:
        logits[:] = -np.inf
        logits[tokens[len(before) - n_prompt]] = 0
        return logits

    return replace(GREEDY, max_tokens=len(tokens), logits_processors=processor)


class Noting:
    """A logits processor that keeps a copy of what it gets."""

    def __init__(self) -> None:
        self.rows: list[Logits] = []

    def __call__(self, before: Sequence[int], logits: Logits) -> Logits:
        self.rows.append(logits.copy())
        return logits

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logits_processors=self)


def processed(done: Completion) -> list[int]:
    """The tokens of a prompt that steps processed."""
    return done.request.ids[done.reuse.n_reused :]


def marks(done: Completion, kind: Kind) -> list[int]:
    """Where on the way into a prompt states of a kind are kept."""
    return sorted(n for n, of in done.request.stops.items() if of is kind and n)


def kept_ends(engine: Engine) -> list[int]:
    """How many ids each state has read that the cache keeps."""
    return sorted(node.end for node in engine.loop.scheduler.cache._entries)


def assert_cache_right(engine: Engine, fresh: Engine) -> list[int]:
    """Every state that the cache has, with its KV blocks and logits, is that of its ids. Returns
    `kept_ends`."""
    kept = kept_ends(engine)
    for node in engine.loop.scheduler.cache._entries:
        ids, entry = unpacked(node.path), node.kept
        assert entry is not None
        seq = engine.memory.fork(entry.seq)
        assert engine.memory.n_tokens(seq) == len(ids)
        expected = fresh.logits([*ids, 7])[-2:]
        assert_same(engine.step([Chunk(seq, [7])])[0], expected[1])
        engine.memory.free(seq)
        if entry.logits is not None:
            assert_same(entry.logits, expected[0])
    return kept


@contextmanager
def steps_run() -> Iterator[list[Live]]:
    """Inside this context, the live counts of every step that a backend runs."""
    lives: list[Live] = []

    def counting(run: Any) -> Any:
        def counted(self: Any, live: Live, *rest: Any) -> Any:
            lives.append(live)
            return run(self, live, *rest)

        return counted

    with (
        patch.object(ReferenceProgram, "run", counting(ReferenceProgram.run)),
        patch.object(CpuProgram, "run", counting(CpuProgram.run)),
    ):
        yield lives
