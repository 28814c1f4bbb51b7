"""Play a made trace of chat requests through the prefix cache, beside an oracle that knows it.

    python tools/reuse_trace.py -n 2000

The trace has shared system prompts, conversations that take turns, long pastes, retries, edits in
the middle, branches, and templates that drop an answer's thinking. It runs through the engine's own
scheduler and cache, with real memory, but no model: a step only counts its tokens. Sizes are those
of the 0.8B preset. Logits are not counted, so the oracle needs none.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.graph import Capacity
from engine.kvcache.cache import MOST_STATES, PrefixCache
from engine.kvcache.entries import Room
from engine.kvcache.policy import BLOCK, Kind
from engine.kvcache.sequences import SequenceMemory
from engine.runtime.request import FinishReason, Request
from engine.runtime.reuse import Source
from engine.runtime.scheduler import Scheduler
from engine.sampling.params import SamplingParams
from tools.reuse_oracle import Known, Oracle, common_lengths

STATE_BYTES, BLOCK_BYTES = int(19.3 * 2**20), 768 * 2**10
_N_VOCAB = 1 << 17
_N_SYSTEMS, _LEAST_OPEN = 20, 12
# Of requests: an open conversation's next turn, but for these.
_NEW, _RETRY, _EDIT, _BRANCH, _PASTE = 0.08, 0.06, 0.05, 0.03, 0.15
_HEADER = 4  # Tokens that open an answer, and that no history keeps in front of another one.
_CONTEXT = 1 << 17


@dataclass(frozen=True)
class Turn:
    """A request: ids of its prompt and answer; the first message's end, and where the next turn is
    sure to continue."""

    prompt: bytes
    answer: bytes
    first: int
    sure: int

    @property
    def n_prompt(self) -> int:
        return len(self.prompt) // 4


@dataclass
class _Chat:
    system: bytes
    drops_thinking: bool
    n_left: int
    turns: list[tuple[bytes, bytes]] = field(default_factory=list)


class _Maker:
    """Makes requests one by one from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = r = np.random.default_rng(seed)
        self._systems = [self._text(300, 6000) for _ in range(_N_SYSTEMS)]
        weights = 1 / np.arange(1, _N_SYSTEMS + 1)
        self._weights = weights / weights.sum()
        self._header = self._text(_HEADER, _HEADER + 1)
        self._open: list[_Chat] = []
        self._chance = r.random

    def _text(self, low: int, high: int) -> bytes:
        r = self._random
        return bytes(r.integers(0, _N_VOCAB, int(r.integers(low, high)), np.int32).tobytes())

    def _new_chat(self) -> _Chat:
        r = self._random
        system = self._systems[int(r.choice(_N_SYSTEMS, p=self._weights))]
        return _Chat(system, self._chance() < 1 / 3, int(r.geometric(1 / 9)))

    def _chosen(self) -> _Chat:
        """A conversation for the next request; recent ones go on more often."""
        if len(self._open) < _LEAST_OPEN or self._chance() < _NEW:
            self._open.append(self._new_chat())
            return self._open[-1]
        back = min(int(self._random.exponential(4)), len(self._open) - 1)
        chat = self._open.pop(-1 - back)
        self._open.append(chat)
        return chat

    def _question(self, chat: _Chat) -> tuple[_Chat, bytes]:
        """What a conversation asks next, after what its user changed in it."""
        chance = self._chance()
        if chat.turns and chance < _RETRY:
            return chat, chat.turns.pop()[0]
        if len(chat.turns) > 1 and chance < _RETRY + _EDIT:
            del chat.turns[int(self._random.integers(len(chat.turns))) :]
        elif chat.turns and chance < _RETRY + _EDIT + _BRANCH:
            chat = _Chat(chat.system, chat.drops_thinking, chat.n_left, list(chat.turns))
            self._open.append(chat)
        long = self._chance() < _PASTE
        return chat, self._text(1000, 6000) if long else self._text(20, 400)

    def turn(self) -> Turn:
        chat, question = self._question(self._chosen())
        history = b"".join([chat.system, *(part for turn in chat.turns for part in turn), question])
        answer = self._text(30, 800)
        # Of what a template drops, the header goes with it.
        kept = answer[len(answer) // 8 * 4 :] if chat.drops_thinking else self._header + answer
        chat.turns.append((question, kept))
        chat.n_left -= 1
        if chat.n_left <= 0:
            self._open.remove(chat)
        return Turn(history + self._header, answer, len(chat.system) // 4, len(history) // 4)


def make_trace(n: int, seed: int = 0) -> list[Turn]:
    """`n` requests; equal seeds make equal traces."""
    maker = _Maker(seed)
    return [maker.turn() for _ in range(n)]


def room(budget: int) -> Room:
    """The cache's room for a budget in bytes, as an engine of the 0.8B preset has it."""
    n_states = min(budget // STATE_BYTES, MOST_STATES)
    return Room(budget, STATE_BYTES, BLOCK_BYTES, n_states, min(budget // BLOCK_BYTES, 1 << 16))


class Player:
    """The engine without a model: scheduler, cache and memory. `n_processed`: tokens of prompts
    that steps had."""

    def __init__(self, room: Room) -> None:
        n_blocks = _CONTEXT // BLOCK
        self.memory = SequenceMemory(
            n_blocks + room.n_blocks, 4 + room.n_states, BLOCK, lambda source, target: None
        )
        self.cache = PrefixCache(self.memory, room)
        capacity = Capacity(n_tokens=512, n_seqs=1, n_outputs=1, n_slots=4, n_blocks=n_blocks)
        self._scheduler = Scheduler(self.memory, capacity, self.cache)
        self._logits = np.zeros(0, np.float32)
        self.n_processed = self.peak_bytes = 0

    def run(self, turn: Turn) -> None:
        """A request, from its admission until nothing but what the cache keeps is left of it."""
        request = _request(turn)
        self._scheduler.add(request)
        while not request.is_admitted or request.is_prefilling:
            ((_, chunk),) = self._scheduler.schedule()
            if n := len(chunk.tokens):
                request.take(n, 0)
                self._step(request.seq, n)
                self.n_processed += n
                is_last = not request.is_prefilling
                self._scheduler.keep(request, self._logits if is_last else None)
        request.tokens += np.frombuffer(turn.answer, np.int32).tolist()
        self._step(request.seq, len(request.tokens) - 1)  # No state has read the last one.
        request.finish(FinishReason.LENGTH)
        self._scheduler.remove(request)
        self.peak_bytes = max(self.peak_bytes, self.cache.n_bytes)

    def _step(self, seq: int, n_tokens: int) -> None:
        self.memory.begin(seq, n_tokens)
        self.memory.finish(seq, n_tokens)


class _NoSampler:
    """Samples nothing: answers are those of the trace."""

    matcher = None

    def accept(self, *tokens: int) -> None:
        pass


def _request(turn: Turn) -> Request:
    nothing: Any = _NoSampler()
    ids = np.frombuffer(turn.prompt, np.int32).tolist()
    request = Request(ids, SamplingParams(), nothing, nothing, (), _CONTEXT)
    marks = {turn.first: Kind.FIRST, turn.sure: Kind.TURN}
    request.source, request.packed, request.stops = Source(ids), turn.prompt, marks
    return request


@dataclass(frozen=True)
class Result:
    """Tokens of prompts that the cache and the oracle process within a budget in bytes; the most
    bytes that the cache held, and the seconds that its host's work took."""

    budget: int
    n_cache: int
    n_oracle: int
    peak_bytes: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.n_cache / self.n_oracle


def play(trace: Sequence[Turn], limits: Room) -> Player:
    player = Player(limits)
    for turn in trace:
        player.run(turn)
    return player


def compare(trace: Sequence[Turn], shares: Sequence[int]) -> list[Result]:
    """Results at 1 / n of the bytes that keeping everything takes, for each n of `shares`."""
    unbounded = Room(1 << 60, STATE_BYTES, BLOCK_BYTES, 32 * len(trace), 1 << 17)
    needed = play(trace, unbounded).cache.n_bytes
    known = [Known(turn.prompt, turn.prompt + turn.answer[:-4]) for turn in trace]
    common = common_lengths(known)
    results = []
    for share in shares:
        budget = needed // share
        start = time.perf_counter()
        player = play(trace, room(budget))
        seconds = time.perf_counter() - start
        n_oracle = Oracle(budget, STATE_BYTES, BLOCK_BYTES / BLOCK).run(known, common)
        results.append(Result(budget, player.n_processed, n_oracle, player.peak_bytes, seconds))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("-n", type=int, default=2000, metavar="N", help="requests of the trace")
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    options = parser.parse_args()
    if options.n < 1:
        parser.error(f"-n: expected at least 1, got {options.n}")
    trace = make_trace(options.n, options.seed)
    n_all = sum(turn.n_prompt for turn in trace)
    print(f"{options.n} requests, {n_all} tokens of prompts")
    print("budget    MiB    tokens    oracle  ratio  host s")
    for share, r in zip((1, 4, 16), compare(trace, (1, 4, 16)), strict=True):
        print(
            f"1/{share:<2} {r.budget >> 20:>9} {r.n_cache:>9} {r.n_oracle:>9} {r.ratio:>6.3f} "
            f"{r.seconds:>7.1f}"
        )


if __name__ == "__main__":
    main()
