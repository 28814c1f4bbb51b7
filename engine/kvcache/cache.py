"""The prefix cache: what memory keeps of sequences that ran, for prompts that begin like them.

A recurrent state cannot be cut back, so a prompt continues from the deepest state that was kept on
its path. Entries are sequences of `SequenceMemory` to which no step appends: they share KV blocks
with each other and with what runs. Texts are found first: those of a model's own tokens may be
tokenized otherwise, so a text's entry gives the ids that the state has read.

An exception may come between any two statements of an operation. `settle` then empties the cache.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from engine.kvcache.entries import Counts, Ends, Entry, Found, Name, Room, Text, entry_of, name_of
from engine.kvcache.policy import BLOCK, CONVERSATION, PRIOR, Kind, worth
from engine.kvcache.prefix import ID_BYTES, Node, PrefixTree, characters
from engine.kvcache.sequences import SequenceMemory
from engine.kvcache.tier import HostTier

# More would make the search for the least worth take a millisecond; real models' states fill the
# largest budget by half as many.
MOST_STATES = 1024
# Of one entry. Prompts that begin alike and differ behind its state would name it without end.
_MOST_TEXTS = 8


class PrefixCache:
    """The cache. Its methods are called inside the owner's door."""

    def __init__(
        self, memory: SequenceMemory, room: Room,
        give_back: Callable[[str, list[int]], object] = lambda dim, indices: None,
        tier: HostTier | None = None,
    ) -> None:  # fmt: skip
        """`give_back(dim, indices)`: return the memory of free slots or blocks to the system."""
        self.memory, self.room, self.counts, self.tier = memory, room, Counts(), tier
        self._give_back = give_back
        self._entries: PrefixTree[Entry] = PrefixTree()
        self._texts: PrefixTree[Name] = PrefixTree()
        # Where the entries are, by their sequence; and those that memory holds.
        self._nodes: dict[int, Node[Entry]] = {}
        self._seqs: set[int] = set()
        self._blocks: Counter[int] = Counter()
        self._n_logits = 0
        self._floor = 0.0
        # Those that go next, with their worth.
        self._next: deque[tuple[float, Node[Entry]]] = deque()
        # Called with what is given up over the budget, or for want of room on the host.
        self.on_leave: Callable[[Node[Entry]], None] = lambda node: None
        self.n_changes = 0  # Odd while something changes; see SharedCache.match_text.

    @property
    def n_states(self) -> int:
        return len(self._nodes)

    @property
    def n_tokens(self) -> int:
        """Tokens whose keys and values are kept."""
        return self._entries.n_bytes // ID_BYTES

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is kept, apart from a device's own."""
        kept = len(self._seqs) * self.room.state_bytes + len(self._blocks) * self.room.block_bytes
        kept = kept if self.tier is None else self.tier.n_bytes
        return kept + 4 * self._n_logits + self._entries.n_bytes + self._texts.n_bytes

    def ranked(self) -> list[Node[Entry]]:
        """All entries, those that are worth least first."""
        return [node for _, node in self._ranked(self._nodes, None)]

    def match(self, ids: bytes, longest: int | None = None) -> Found:
        """What it has of a prompt of which at most `longest` ids may be reused."""
        match = self._entries.match(ids, longest)
        return Found(match.n_known, match.node)

    def match_text(self, key: str) -> tuple[int, Text | None]:
        """The longest text that a text starts with: its characters, and its ids."""
        node = self._texts.match(characters(key)).node
        if node is None:
            return 0, None
        name = name_of(node)
        return node.end, Text(name.node.path + name.rest, name.ends)

    def fork(self, node: Node[Entry], seq: int) -> Entry:
        """Give a sequence the contents of an entry."""
        entry = entry_of(node)
        with self._changing():
            if entry.seq in self._seqs:
                self.memory.fork(entry.seq, seq)
            elif self.tier is not None and entry.stored is not None:
                self.tier.load(entry.stored, seq)
                self._hold(entry, seq)
                self._shrink(self._is_crowded, on_device=True)
        return entry

    def ids_of(self, node: Node[Entry]) -> bytes:
        """Those of an entry, and what its newest text has beyond: the last token of an answer is in
        no state yet."""
        texts = entry_of(node).texts
        return node.path + (name_of(texts[-1]).rest if texts else b"")

    def texts_of(self, node: Node[Entry], ids: bytes) -> list[tuple[str, int, Ends]]:
        """(text, how many of `ids` it has, ends) of the texts that lead to an entry."""
        found = []
        for text in entry_of(node).texts:
            own = node.path + (name := name_of(text)).rest
            if ids.startswith(own):
                key = text.path.decode("utf-32-le", "surrogatepass")
                found.append((key, len(own) // ID_BYTES, name.ends))
        return found

    def use(self, found: Found, seq: int) -> Entry | None:
        """Give a sequence the contents of what was found."""
        if found.node is None or found.node.kept is None:
            return None
        entry = self.fork(found.node, seq)
        entry.n_uses += 1
        entry.floor = self._floor
        # Below a first message there are other conversations.
        below = found.node.subtree if entry.kind in CONVERSATION else ()
        for node in (found.node, *found.node.ancestors, *below):
            if node.kept is not None:
                node.kept.is_passed = True
        return entry

    def keep(
        self, ids: bytes, seq: int, kind: Kind, logits: NDArray[np.float32] | None = None
    ) -> Node[Entry] | None:
        """Keep what a sequence holds, which are `ids`; None if there is no room for it."""
        if not ids or not self.room.budget:
            return None
        with self._changing():
            match = self._entries.match(ids)
            node = match.node
            if node is None or ID_BYTES * node.end < len(ids):
                entry = Entry(self.memory.reserve(), kind, self._floor)
                self._hold(entry, seq)
                node = self._nodes[entry.seq] = self._entries.put(ids, entry)
                self.counts.n_kept += 1
            entry = entry_of(node)
            entry.kind = max(entry.kind, kind, key=PRIOR.__getitem__)
            entry.floor = self._floor
            if logits is not None and entry.logits is None:
                entry.logits = logits.copy()
                self._n_logits += len(logits)
            self._shrink(self._is_crowded, on_device=True)
            self._shrink(self._is_over)
        return node if node.kept is entry else None

    def name(self, key: str, ids: bytes, ends: Ends) -> None:
        """Let a text be found, while a state on the way of its ids is kept; see Text."""
        node = self._entries.match(ids).node
        if node is None:
            return
        with self._changing():
            named = self._texts.match(key_characters := characters(key)).node
            if named is not None and named.end == len(key):  # The newest ids count.
                entry_of(name_of(named).node).texts.remove(named)
            name = Name(node, ids[ID_BYTES * node.end :], ends)
            named = self._texts.put(key_characters, name)
            (texts := entry_of(node).texts).append(named)
            if len(texts) > _MOST_TEXTS:
                self._texts.remove(texts.pop(0))
            self._shrink(self._is_over)

    def make_room(self, has_room: Callable[[], bool], spared: Node[Entry] | None) -> bool:
        """Have entries, except one, give up memory until there is room; whether there is."""
        if not has_room():
            with self._changing():
                self._shrink(lambda: not has_room(), spared, on_device=True, is_urgent=True)
        return has_room()

    def evict_one(self) -> bool:
        """Give up what is worth least in memory; False if there is nothing."""
        n = len(self._seqs)
        self.make_room(lambda: len(self._seqs) < n or not n, None)
        return n > 0

    def forget(self, node: Node[Entry]) -> None:
        """Give up an entry, if it is there: what it holds may be wrong."""
        if node.kept is not None and self._nodes.get(node.kept.seq) is node:
            with self._changing():
                self._evict(node)

    def clear(self) -> None:
        """Give all up."""
        self.n_changes |= 1
        for seq in list(self._seqs):
            self.memory.free(seq)
        self._seqs.clear()
        self._nodes.clear()
        self._blocks.clear()
        self._next.clear()
        self._n_logits, self._floor = 0, 0.0
        if self.tier is not None:
            self.tier.clear()
        self._entries, self._texts = PrefixTree(), PrefixTree()
        self.tidy()
        self.n_changes += 1

    def settle(self) -> None:
        """Make everything right after an exception."""
        if self.n_changes % 2:
            self.clear()

    def tidy(self) -> None:
        """Return the memory of free slots and blocks to the system if more than the budget, and
        than what runs needs, was ever touched since it was done last."""
        room = self.room
        pools = (self.memory.slots, room.state_bytes), (self.memory.blocks, room.block_bytes)
        extra = room.n_states * room.state_bytes, room.n_blocks * room.block_bytes
        own = sum(pool.size * size for pool, size in pools) - sum(extra)
        if sum(len(pool.touched) * size for pool, size in pools) > own + room.budget:
            for dim, (pool, _) in zip(("n_slots", "n_blocks"), pools, strict=True):
                self._give_back(dim, pool.untouch())

    @contextmanager
    def _changing(self) -> Iterator[None]:
        if self.n_changes % 2:  # It is part of another change.
            yield
            return
        self.n_changes += 1
        yield
        self.n_changes += 1

    def _is_crowded(self) -> bool:
        """Whether entries hold more of the memory than they may."""
        return len(self._seqs) > self.room.n_states or len(self._blocks) > self.room.n_blocks

    def _is_over(self) -> bool:
        most = max(self.room.n_states, MOST_STATES)
        return self.n_bytes > self.room.budget or self.n_states > most

    def _shrink(
        self, goes_on: Callable[[], bool], spared: Node[Entry] | None = None,
        on_device: bool = False, is_urgent: bool = False,
    ) -> None:  # fmt: skip
        """Give up what is worth least while it `goes_on`; on_device: what memory holds of entries,
        which a tier may then store."""
        while goes_on():
            if not self._next:
                # Of many, some that are worth little are found at once.
                nodes = self._ranked(self._seqs if on_device else self._nodes, spared)
                self._next.extend(nodes[: len(nodes) // 8 or 1])
            if not self._next:
                return
            least, node = self._next.popleft()
            # It may have been used since.
            if node is spared or node.kept is None or self._worth(node) > least:
                continue
            entry = entry_of(node)
            if on_device and entry.seq not in self._seqs:
                continue
            if on_device and self._is_stored(node, spared):
                self._drop(entry)
            else:
                if not is_urgent:
                    self.on_leave(node)
                self._give_up(node, least)

    def _ranked(
        self, seqs: Iterable[int], spared: Node[Entry] | None
    ) -> list[tuple[float, Node[Entry]]]:
        """Entries with their worth, except one; the least first."""
        nodes = (node for node in map(self._nodes.__getitem__, seqs) if node is not spared)
        return sorted(((self._worth(node), node) for node in nodes), key=itemgetter(0))

    def _give_up(self, node: Node[Entry], worth: float) -> None:
        self._floor = max(self._floor, worth)
        self._evict(node)
        self.counts.n_evicted += 1

    def _is_stored(self, node: Node[Entry], spared: Node[Entry] | None) -> bool:
        """Have the tier store an entry, in place of those there that are worth less, if it can."""
        entry, tier = entry_of(node), self.tier
        if entry.stored is None and tier is not None:
            own, worth = self.memory.allocation(entry.seq), self._worth(node)
            there = () if tier.has_room(own) else self._nodes.keys() - self._seqs
            for least, other in self._ranked(there, spared):
                if least > worth or tier.has_room(own):
                    break
                self.on_leave(other)
                self._give_up(other, least)
            entry.stored = tier.store(own)
        return entry.stored is not None

    def _hold(self, entry: Entry, seq: int) -> None:
        """Have memory hold an entry, with the contents of a sequence."""
        self._seqs.add(entry.seq)
        self.memory.fork(seq, entry.seq)
        self._blocks.update(self.memory.allocation(entry.seq).table.blocks)

    def _drop(self, entry: Entry) -> None:
        """Free what memory holds of an entry."""
        if entry.seq in self._seqs:
            self._blocks.subtract(blocks := self.memory.allocation(entry.seq).table.blocks)
            for block in blocks:
                if not self._blocks[block]:
                    del self._blocks[block]
            self.memory.free(entry.seq)
            self._seqs.discard(entry.seq)

    def _worth(self, node: Node[Entry]) -> float:
        entry, n_saved = entry_of(node), node.end - node.kept_above
        n_bytes = self.room.state_bytes
        if not node.children:  # Else its blocks are those of what follows it.
            n_bytes += n_saved * self.room.block_bytes // BLOCK
        return worth(entry.kind, entry.n_uses, n_saved, n_bytes, entry.floor, entry.is_passed)

    def _evict(self, node: Node[Entry]) -> None:
        entry = entry_of(node)
        for text in entry.texts:
            self._texts.remove(text)
        self._n_logits -= len(entry.logits) if entry.logits is not None else 0
        self._entries.remove(node)
        self._drop(entry)
        if entry.stored is not None and self.tier is not None:
            self.tier.free(entry.stored)
        self._nodes.pop(entry.seq, None)
