"""The scheduler alone: memory without contents, and fake requests that count their tokens.

Every step of every load is checked: decode rows come first, the token budget holds, chunks end at
multiples of 64 and are the next tokens of their request, memory never runs out. Fairness is counted
in steps.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.graph import Capacity
from engine.kvcache.cache import PrefixCache
from engine.kvcache.entries import Room
from engine.kvcache.policy import Kind
from engine.kvcache.prefix import packed
from engine.kvcache.sequences import SequenceMemory
from engine.runtime.batch import Chunk, Logits, begin, check_fits
from engine.runtime.owner import Signal
from engine.runtime.request import FinishReason
from engine.runtime.reuse import Reuse
from engine.runtime.scheduler import Scheduler

BLOCK = Capacity.block_size


class Fake:
    """A request of `n_prompt` tokens that wants `n_new`, with what the scheduler uses of a Request.

    Its tokens are their own positions, so that a chunk shows where it comes from.
    """

    def __init__(self, n_prompt: int, n_new: int) -> None:
        self.ids, self.tokens = list(range(n_prompt)), list[int]()
        self.n_new, self.limit = n_new, n_prompt + n_new
        self.seq, self.n_done, self.n_past = -1, 0, 0
        self.finish_reason: FinishReason | None = None
        self.detail = ""
        # It has nothing to do with the prefix cache.
        self.source, self.has_known_logits = None, False
        self.entries = list[Any]()
        self.reuse = Reuse(n_prompt)
        self.after, self.is_admitted, self.can_decode, self.signal = None, False, True, Signal()

    @property
    def is_prefilling(self) -> bool:
        return self.n_done < len(self.ids)

    @property
    def position(self) -> int:
        return self.n_done

    @property
    def prompt_end(self) -> int:
        return len(self.ids)

    chunk_limit = prompt_end

    @property
    def has_run(self) -> bool:
        return self.n_done > 0

    def finish(self, reason: FinishReason, detail: str = "") -> None:
        self.finish_reason, self.detail = reason, detail

    def accept_logits(self) -> None:
        self.tokens.append(len(self.ids) + len(self.tokens))
        if len(self.tokens) == self.n_new:
            self.finish(FinishReason.LENGTH)


# A cache that never gives up anything by itself.
GREEDY_ROOM = Room(2**60, n_states=2**30, n_blocks=2**30)


class Harness:
    """Runs the scheduler's steps, and checks each. With a `room` the cache keeps what every request
    had in memory when it left."""

    def __init__(
        self,
        n_tokens: int,
        n_seqs: int,
        n_blocks: int = 10_000,
        n_slots: int = 0,
        room: Room = Room(),  # noqa: B008  (it is frozen)
    ):
        self.n_seqs = min(n_seqs, n_tokens)
        self.capacity = Capacity(
            n_tokens=n_tokens,
            n_seqs=self.n_seqs,
            n_outputs=n_tokens,
            n_slots=n_slots or n_seqs,
            n_blocks=n_blocks,
        )
        copy: Any = None
        self.memory = SequenceMemory(n_blocks, self.capacity.n_slots, BLOCK, copy)
        self.scheduler = Scheduler(self.memory, self.capacity, PrefixCache(self.memory, room))
        self.requests: list[Fake] = []
        self.admitted: deque[Fake] = deque()

    def add(self, n_prompt: int, n_new: int = 3) -> Fake:
        request: Any = Fake(n_prompt, n_new)
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def step(self) -> dict[Fake, int]:
        """Tokens that each request got in the next step."""
        work: Any = self.scheduler.schedule()
        if not work:
            return {}
        chunks = [chunk for _, chunk in work]
        self.check(work)
        check_fits(chunks, self.capacity)
        # Raises MemoryFullError if the scheduler admitted too much.
        begin(chunks, self.memory)
        for request, chunk in work:
            self.memory.finish(chunk.seq, len(chunk.tokens))
            self.apply(request, chunk)
        return {request: len(chunk.tokens) for request, chunk in work}

    def check(self, work: list[tuple[Fake, Chunk]]) -> None:
        kinds = [request.is_prefilling for request, _ in work]
        assert kinds == sorted(kinds), "decode rows come first"
        assert sum(len(chunk.tokens) for _, chunk in work) <= self.capacity.n_tokens
        for request, chunk in work:
            assert request in self.requests
            assert request.finish_reason is None
            assert chunk.seq == request.seq
            done = self.memory.n_tokens(chunk.seq)
            assert list(chunk.tokens) == list(range(done, done + len(chunk.tokens)))
            assert chunk.n_snapshots == 0
            if request.is_prefilling:
                end = done + len(chunk.tokens)
                last = end == len(request.ids)
                assert chunk.logits == (Logits.LAST if last else Logits.NONE)
                assert end <= len(request.ids)
                assert last or end % 64 == 0 or self.capacity.n_tokens < 64
            else:
                assert (len(chunk.tokens), chunk.logits) == (1, Logits.LAST)

    def apply(self, request: Fake, chunk: Chunk) -> None:
        request.n_done += len(chunk.tokens) if request.is_prefilling else 0
        if chunk.n_outputs:
            request.accept_logits()
        if request.finish_reason:
            self.leave(request)

    def leave(self, request: Any) -> None:
        if request.seq in self.memory:
            # Never two with the same tokens.
            n = self.memory.n_tokens(request.seq)
            ids = [self.requests.index(request), *range(n)][:n]
            self.scheduler.cache.keep(packed(ids), request.seq, Kind.ANSWER)
        self.scheduler.remove(request)

    def run(self, most: int = 10_000) -> int:
        """Steps until nothing is left."""
        for n in range(most):
            if not self.step():
                self.scheduler.cache.clear()
                assert all(r.finish_reason for r in self.requests)
                assert self.memory.blocks.n_free == self.memory.blocks.size
                assert self.memory.slots.n_free == self.memory.slots.size
                return n
        raise AssertionError(f"not done after {most} steps")


def decoding(harness: Harness, n: int, n_new: int = 1000) -> list[Fake]:
    """Requests whose prompts are done."""
    made = [harness.add(1, n_new) for _ in range(n)]
    while any(r.is_prefilling for r in made):
        harness.step()
    return made


# One step.


def test_nothing_to_do() -> None:
    assert Harness(64, 2).step() == {}


def test_decode_rows_and_pieces_share_a_step() -> None:
    harness = Harness(512, 4)
    a, b = decoding(harness, 2)
    c, d = harness.add(1000), harness.add(100)
    # 510 tokens are left: turns of 64, and 36 of the short one.
    assert harness.step() == {a: 1, b: 1, c: 384, d: 100}
    assert list(harness.step().values()) == [1, 1, 1, 448]


@pytest.mark.parametrize(
    ("n_tokens", "expected"), [(64, [64, 64, 22]), (65, [64, 64, 22]), (128, [128, 22]),
                               (149, [128, 22]), (150, [150]), (512, [150]), (7, [7] * 21 + [3])]
)  # fmt: skip
def test_a_prompt_alone_is_cut_like_this(n_tokens: int, expected: list[int]) -> None:
    harness = Harness(n_tokens, 1)
    request = harness.add(150, 1)
    assert [harness.step()[request] for _ in expected] == expected
    assert request.finish_reason


@pytest.mark.parametrize("n_tokens", [64, 100, 128])
def test_a_sequence_past_a_boundary_comes_back_to_it(n_tokens: int) -> None:
    """Beside any other rows, every chunk but the last ends at a multiple of 64."""
    harness = Harness(n_tokens, 4)
    decoding(harness, 2, 60)
    for n in (130, 64, 200):
        harness.add(n)
    harness.run()


# Fairness.


@pytest.mark.parametrize("n_tokens", [64, 128, 512, 4096])
@pytest.mark.parametrize("first", ["long", "short"])
def test_a_short_prompt_is_not_kept_by_a_long_one(n_tokens: int, first: str) -> None:
    harness = Harness(n_tokens, 2)
    if first == "long":
        harness.add(4000)
        harness.step()
    short = harness.add(10)
    if first == "short":
        harness.add(4000)
    harness.step()
    if short.is_prefilling:
        harness.step()
    assert len(short.tokens) >= 1


@pytest.mark.parametrize("n_tokens", [16, 64, 200, 512])
@pytest.mark.parametrize("n_decoding", [0, 1, 5])
@pytest.mark.parametrize("n_prompts", [2, 3, 4, 6])
def test_equal_prompts_progress_evenly(n_tokens: int, n_decoding: int, n_prompts: int) -> None:
    harness = Harness(n_tokens, 16)
    decoding(harness, n_decoding)
    prompts = [harness.add(1000) for _ in range(n_prompts)]
    while all(r.is_prefilling for r in prompts):
        harness.step()
        done = [r.n_done for r in prompts]
        assert max(done) - min(done) <= 128
    for _ in range(4 * n_prompts):
        harness.step()
    assert not any(r.is_prefilling for r in prompts)


@pytest.mark.parametrize("n_decoding", [1, 3, 10])
def test_prompts_and_decode_rows_take_turns(n_decoding: int) -> None:
    """Beside decode rows no chunk of 64 fits into 64 tokens."""
    harness = Harness(64, 12)
    rows = decoding(harness, n_decoding)
    prompt = harness.add(640)
    before = len(rows[0].tokens)
    for _ in range(20):
        harness.step()
    assert not prompt.is_prefilling
    assert len(rows[0].tokens) - before == 10
    # From then on no request waits.
    harness.step()
    assert len(rows[0].tokens) - before == 11


def test_a_stream_of_short_prompts_starves_no_long_one() -> None:
    """They fit beside the decode rows, the long one's chunks don't."""
    harness = Harness(64, 4)
    decoding(harness, 1)
    long = harness.add(640)
    for _ in range(60):
        harness.add(5, 1)
        harness.step()
        if not long.is_prefilling:
            return
    raise AssertionError(f"{long.n_done} of 640 after 60 steps")


def test_a_stream_of_prompts_starves_no_decoding() -> None:
    harness = Harness(64, 4)
    (row,) = decoding(harness, 1)
    for _ in range(40):
        harness.add(300, 1)
        harness.step()
    assert len(row.tokens) >= 20


@pytest.mark.parametrize("n_tokens", [64, 200, 512])
def test_a_short_prompt_waits_for_one_round_at_most(n_tokens: int) -> None:
    """Beside more long ones than fit in a step."""
    harness = Harness(n_tokens, 17)
    for _ in range(16):
        harness.add(1000)
    for _ in range(5):
        harness.step()
    short = harness.add(10)
    for _ in range(-(-17 * 64 // (n_tokens // 64 * 64)) + 1):
        harness.step()
    assert short.tokens


# Admission.


def test_first_come_first_served() -> None:
    harness = Harness(512, 2)
    requests = [harness.add(10, n) for n in (5, 2, 2, 2)]
    seen: list[Fake] = []
    while work := harness.step():
        seen += [r for r in work if r not in seen]
        assert len(work) <= 2
    assert seen == requests


def test_a_large_request_is_not_passed_by_small_ones() -> None:
    """The small one behind it would fit, but then the large one might never."""
    harness = Harness(512, 3, n_blocks=4)
    first = harness.add(100, 20)
    large = harness.add(150, 50)
    small = harness.add(5, 1)
    while not first.finish_reason:
        assert set(harness.step()) <= {first}
    assert set(harness.step()) == {large}
    while not large.finish_reason:
        assert small.n_done == 0
        harness.step()
    harness.run()


def test_promises_count_what_was_not_taken_yet() -> None:
    """Each will need 2 blocks of the 3; it holds one for its first 64 tokens."""
    harness = Harness(512, 2, n_blocks=3)
    a, b = harness.add(10, 100), harness.add(10, 100)
    for _ in range(99):
        assert set(harness.step()) == {a}
    harness.step()
    assert set(harness.step()) == {b}
    harness.run()


def test_slots_are_promised_too() -> None:
    """One slot of three is held by another sequence."""
    harness = Harness(64, 3)
    other = harness.memory.create()
    begin([Chunk(other, [1])], harness.memory)
    harness.memory.finish(other, 1)
    for _ in range(3):
        harness.add(5, 4)
    # After a prompt of 64 tokens the next one waits without any memory.
    harness.add(64, 4)
    while work := harness.step():
        assert len(work) <= 2
    assert all(r.finish_reason == FinishReason.LENGTH for r in harness.requests)
    harness.memory.free(other)


def test_what_never_fits_is_refused_and_the_next_runs() -> None:
    harness = Harness(512, 2, n_blocks=3)
    large, small = harness.add(150, 43), harness.add(150, 42)
    assert set(harness.step()) == {small}
    assert large.finish_reason == FinishReason.ERROR
    assert "it needs 193 positions" in large.detail
    assert "192 positions and 2 slots are free" in large.detail
    harness.run()


def test_what_the_cache_holds_is_neither_waited_for_nor_a_reason_to_refuse() -> None:
    """It holds all of the memory whenever nothing runs."""
    harness = Harness(512, 2, n_blocks=3, room=GREEDY_ROOM)
    for _ in range(3):
        harness.add(64, 1)
    while harness.step():
        pass
    memory, cache = harness.memory, harness.scheduler.cache
    assert (memory.blocks.n_free, memory.slots.n_free, cache.n_states) == (1, 0, 2)
    whole = harness.add(150, 42)
    assert harness.step() == {whole: 150}
    assert cache.n_states == 0
    while harness.step():
        pass
    # Nothing is free but a slot: the cache has it all again.
    assert (memory.blocks.n_free, memory.slots.n_free, cache.n_states) == (0, 1, 1)
    a, b = harness.add(10, 20), harness.add(70, 20)
    assert harness.step() == {a: 10, b: 70}
    harness.run()
    assert {r.finish_reason for r in harness.requests} == {"length"}


def test_removing_what_waits_or_was_removed() -> None:
    harness = Harness(512, 1)
    a, b = harness.add(5), harness.add(5)
    harness.step()
    for request in (b, b, a, a):
        harness.leave(request)
    assert harness.step() == {}
    assert harness.memory.slots.n_free == 1


# Random loads.

loads = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.one_of(st.integers(1, 10), st.integers(1, 400), st.sampled_from([63, 64, 65, 128])),
        st.integers(1, 30),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(
    loads,
    st.sampled_from([1, 3, 10, 63, 64, 65, 80, 128, 512]),
    st.sampled_from([1, 2, 3, 8]),
    st.integers(7, 20),
    st.sampled_from([Room(), GREEDY_ROOM]),
    st.randoms(use_true_random=False),
)
def test_every_request_ends_and_memory_is_never_short(
    load: list[tuple[int, int, int]], n_tokens: int, n_seqs: int, n_blocks: int, room: Room,
    random: Any,
) -> None:  # fmt: skip
    """Requests come after pauses, some leave; no block or slot is ever missing, nor waited for
    because the cache holds it."""
    harness = Harness(n_tokens, n_seqs, n_blocks, room=room)
    # Alone, a request takes this many steps; each may have to wait for all the others.
    bound = 0
    for pause, n_prompt, n_new in load:
        bound += 2 * (n_prompt // min(n_tokens, 64) + 1 + n_new)
        harness.add(n_prompt, n_new)
        for _ in range(pause):
            harness.step()
        if random.random() < 0.2:
            gone = random.choice(harness.requests)
            harness.leave(gone)
            gone.finish_reason = gone.finish_reason or FinishReason.CANCELLED
    assert harness.run() <= bound
    assert {r.finish_reason for r in harness.requests} <= {"length", "cancelled"}
