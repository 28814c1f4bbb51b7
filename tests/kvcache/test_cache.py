"""The prefix cache on real memory, without a model, against one that runs token lists again.

A slot holds the ids that its state has read, a block the token of each position. A state machine
runs, keeps, finds, names and gives up; exceptions come between the cache's lines. Whatever is used
must read back its own ids, and the bytes are counted anew after every operation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kvcache.cache import PrefixCache
from engine.kvcache.entries import Entry, Room
from engine.kvcache.policy import BLOCK as POLICY_BLOCK
from engine.kvcache.policy import Kind
from engine.kvcache.pool import MemoryFullError
from engine.kvcache.prefix import Node, packed, unpacked
from tests.kvcache.test_sequences import Contents, stepped

STATE, KV = 1000, 200
# Few letters, so that prefixes meet; what a sequence reads next may be what another one read.
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)
KINDS = st.sampled_from(list(Kind))


class InjectedError(Exception):
    """Raised by these tests alone."""


def raise_at(n_lines: int, call: Callable[[], object]) -> bool:
    """Call with an exception at the n-th line of memory and cache that runs; whether it came."""
    n = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal n
        if "/engine/kvcache/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            n += 1
            if n == n_lines:
                raise InjectedError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except InjectedError:
        return True
    finally:
        sys.settrace(before)
    return False


class World:
    """A cache beyond the memory of a few sequences; each is a list of the ids that it has read."""

    def __init__(self, budget: int, n_states: int = 6, n_blocks: int = 20) -> None:
        self.contents = Contents(n_blocks + 24, n_states + 8)
        self.memory = self.contents.memory
        self.given_back: list[tuple[str, list[int]]] = []
        room = Room(budget, STATE, KV, n_states, n_blocks)
        self.cache = PrefixCache(self.memory, room, self._note)
        self.running: dict[int, list[int]] = {}

    def _note(self, dim: str, indices: list[int]) -> None:
        """What is given back is lost."""
        self.given_back.append((dim, indices))
        for index in indices:
            if dim == "n_slots":
                self.contents.slots[index] = "given back"
            else:
                self.contents.blocks[index] = ["given back"] * len(self.contents.blocks[index])

    def grow(self, seq: int, tokens: list[int]) -> None:
        stepped(self.contents, seq, tokens)
        self.running[seq] += tokens

    def run(self, tokens: list[int]) -> int:
        seq = self.memory.create()
        self.running[seq] = []
        self.grow(seq, tokens)
        return seq

    def keep(self, seq: int, kind: Kind = Kind.ANSWER, n_logits: int = 0) -> Node[Entry] | None:
        """Its logits are those after its ids."""
        ids = self.running[seq]
        logits = np.full(n_logits, sum(ids), np.float32) if n_logits else None
        node = self.cache.keep(packed(ids), seq, kind, logits)
        if logits is not None:
            logits[:] = -1  # The next step's output.
        return node

    @property
    def kept(self) -> dict[tuple[int, ...], Node[Entry]]:
        return {tuple(unpacked(node.path)): node for node in self.cache._entries}

    @property
    def entries(self) -> dict[tuple[int, ...], Entry]:
        return {ids: node.kept for ids, node in self.kept.items() if node.kept is not None}

    def check(self) -> None:
        self._check_contents()
        self._check_bytes()
        self._check_texts()
        self._check_references()

    def _check_contents(self) -> None:
        held = dict(self.running)
        held |= {entry.seq: list(ids) for ids, entry in self.entries.items()}
        for seq, tokens in held.items():
            self.contents.check(self.memory.allocation(seq), tokens)
        for ids, entry in self.entries.items():
            assert entry.logits is None or set(entry.logits.tolist()) == {float(sum(ids))}

    def _check_bytes(self) -> None:
        """Counted anew, edge by edge."""
        cache, entries = self.cache, list(self.entries.values())
        blocks = {b for e in entries for b in self.memory.allocation(e.seq).table.blocks}
        logits = sum(e.logits.nbytes for e in entries if e.logits is not None)
        trees = (cache._entries, cache._texts)
        edges = sum(len(n.edge) for tree in trees for n in tree._root.subtree)
        n_bytes = len(entries) * STATE + len(blocks) * KV + logits + edges
        assert cache.n_bytes == n_bytes <= cache.room.budget
        assert cache.n_states == len(entries) <= cache.room.n_states
        assert POLICY_BLOCK * len(blocks) >= cache.n_tokens == cache._entries.n_bytes // 4
        assert len(blocks) <= cache.room.n_blocks

    def _check_texts(self) -> None:
        named = list(self.cache._texts)
        entries = self.entries.values()
        assert sorted(map(id, named)) == sorted(id(t) for e in entries for t in e.texts)
        for text in named:
            assert text.kept is not None
            entry = text.kept.node.kept
            assert entry is not None
            assert text in entry.texts
            assert entry in self.entries.values()

    def _check_references(self) -> None:
        """What is in use is what running sequences and entries refer to, each as often."""
        owners = [*self.running, *(entry.seq for entry in self.entries.values())]
        assert sorted(owners) == sorted(self.memory._sequences)
        held = [self.memory.allocation(seq) for seq in owners]
        blocks = [b for own in held for b in own.table.blocks]
        slots = [s for own in held for state in own.states for s in state.slots]
        for pool, used in ((self.memory.blocks, blocks), (self.memory.slots, slots)):
            assert pool._references == [used.count(i) for i in range(pool.size)]
            assert pool.n_free == pool.size - len(set(used))
            assert set(used) <= pool.touched


class Cache(RuleBasedStateMachine):
    """Few states fit, so that something is given up all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(budget=5 * STATE + 8 * KV)
        self.cache, self.memory = self.world.cache, self.world.memory
        self.named: dict[str, list[int]] = {}
        self.raises_at = 0

    def choose(self, data: st.DataObject) -> int:
        return int(data.draw(st.sampled_from(sorted(self.world.running))))

    def call(self, operation: Callable[[], object]) -> bool:
        """Run an operation, which an exception may break off; whether it did."""
        at, self.raises_at = self.raises_at, 0
        if not at:
            operation()
            return False
        if is_broken := raise_at(at, operation):
            self.memory.recount()
            self.cache.settle()
        return is_broken

    @rule(at=st.integers(1, 60))
    def break_the_next(self, at: int) -> None:
        self.raises_at = at

    @precondition(lambda self: len(self.world.running) < 3)
    @rule(tokens=TOKENS)
    def start(self, tokens: list[int]) -> None:
        self.world.run(tokens)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), tokens=TOKENS)
    def grow(self, data: st.DataObject, tokens: list[int]) -> None:
        seq = self.choose(data)
        if len(self.world.running[seq]) + len(tokens) > 24:
            return
        try:
            self.world.grow(seq, tokens)
        except MemoryFullError:  # As the step loop does it.
            if self.cache.evict_one():
                self.grow(data, tokens)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        seq = self.choose(data)
        self.memory.free(seq)
        del self.world.running[seq]

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), kind=KINDS, n_logits=st.sampled_from([0, 0, 5]))
    def keep(self, data: st.DataObject, kind: Kind, n_logits: int) -> None:
        seq = self.choose(data)
        kept: list[Node[Entry] | None] = []
        if not self.call(lambda: kept.append(self.world.keep(seq, kind, n_logits))):
            node = self.world.kept.get(tuple(self.world.running[seq]))
            assert kept == [node]

    @precondition(lambda self: len(self.world.running) < 3)
    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=24), cut=st.integers(0, 2))
    def use(self, tokens: list[int], cut: int) -> None:
        """A prompt goes on from what is found of it: as if its start had been run."""
        longest = len(tokens) - min(cut, len(tokens))
        found = self.cache.match(packed(tokens), longest)
        kept = [n for n in range(longest, 0, -1) if tuple(tokens[:n]) in self.world.kept]
        assert found.n_kept == next(iter(kept), 0)
        assert found.n_kept <= found.n_known <= len(tokens)
        seq = self.memory.create()
        self.world.running[seq] = []
        if not self.call(lambda: self.cache.use(found, seq)):
            self.world.running[seq] = tokens[: found.n_kept]
        else:
            self.world.running[seq] = tokens[: self.memory.n_tokens(seq)]

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), key=st.text("ab\U0001f600\ud800", max_size=5), rest=TOKENS)
    def name(self, data: st.DataObject, key: str, rest: list[int]) -> None:
        ids = self.world.running[self.choose(data)] + rest
        if self.cache.match(packed(ids), len(ids)).node is not None and key:
            self.named[key] = ids
        if key:
            self.call(lambda: self.cache.name(key, packed(ids), ((len(key), len(ids)),)))

    @rule(key=st.text("ab\U0001f600\ud800", max_size=9))
    def match_text(self, key: str) -> None:
        """What is found has the ids of the newest of its name, whole."""
        end, text = self.cache.match_text(key)
        there = {n for n in range(1, len(key) + 1) if key[:n] in self.texts()}
        assert end == max(there, default=0)
        if text is not None:
            assert unpacked(text.ids) == self.named[key[:end]]
            assert text.ends == ((end, len(self.named[key[:end]])),)

    def texts(self) -> set[str]:
        paths = (node.path for node in self.cache._texts)
        return {path.decode("utf-32-le", "surrogatepass") for path in paths}

    @rule()
    def evict_one(self) -> None:
        n = self.cache.n_states
        if not self.call(self.cache.evict_one):
            assert self.cache.n_states == max(0, n - 1)

    @rule(data=st.data(), n=st.integers(1, 40))
    def make_room(self, data: st.DataObject, n: int) -> None:
        """What is spared stays; nothing is given up beyond what is needed."""
        nodes = [None, *self.world.kept.values()]
        spared = data.draw(st.sampled_from(nodes))
        blocks, before = self.memory.blocks, self.cache.n_states

        def has_room() -> bool:
            return blocks.n_free >= n

        had = has_room()
        if self.call(lambda: self.cache.make_room(has_room, spared)):
            return
        assert has_room() or self.cache.n_states == (spared is not None)
        assert not had or self.cache.n_states == before
        assert spared is None or spared.kept is not None

    @precondition(lambda self: self.world.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        ids = data.draw(st.sampled_from(sorted(self.world.kept)))
        node = self.world.kept[ids]
        if not self.call(lambda: self.cache.forget(node)):
            assert ids not in self.world.kept
        self.cache.forget(node)  # A second time, or after the exception.
        assert ids not in self.world.kept

    @rule()
    def clear(self) -> None:
        nodes = list(self.world.kept.values())
        if not self.call(self.cache.clear):
            self.nothing_is_left()
        self.cache.clear()
        for node in nodes:  # What a request still refers to is not there any more.
            self.cache.forget(node)

    @rule()
    def tidy(self) -> None:
        self.call(self.cache.tidy)

    def nothing_is_left(self) -> None:
        assert (self.cache.n_states, self.cache.n_tokens, self.cache.n_bytes) == (0, 0, 0)
        assert set(self.memory._sequences) == set(self.world.running)

    @invariant()
    def all_is_right(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        self.cache.clear()
        self.nothing_is_left()
        for seq in self.world.running:
            self.memory.free(seq)
        for pool in (self.memory.blocks, self.memory.slots):
            assert pool.n_free == pool.size


TestCache = Cache.TestCase
TestCache.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_texts_of_one_state_do_not_pile_up() -> None:
    """Prompts that begin alike and differ behind the state that is kept: the newest are known."""
    world = World(100 * STATE)
    seq = world.run([1, 2])
    world.keep(seq, Kind.PROMPT)
    for i in range(50):
        world.cache.name(f"text {i:02d}", packed([1, 2, 10 + i]), ())
    world.check()
    known = [i for i in range(50) if world.cache.match_text(f"text {i:02d}")[0]]
    assert known == list(range(50 - len(known), 50))
    assert 4 <= len(known) <= 16
    # To be named again is to be new.
    world.cache.name(f"text {known[0]:02d}", packed([1, 2, 10 + known[0]]), ())
    world.cache.name("another", packed([1, 2, 3]), ())
    assert world.cache.match_text(f"text {known[0]:02d}")[0]
    assert not world.cache.match_text(f"text {known[1]:02d}")[0]
