"""States in files: what the prefix cache keeps on a path of token ids, written and read back.

A file has the rows of states and KV blocks as the backends have them, with the ids that they stand
for and the texts that lead there. What is read is in the prefix cache then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine import checks
from engine.backends.base import StateStore
from engine.graph import Tensor, dim_name
from engine.kvcache.entries import Ends, Entry, entry_of
from engine.kvcache.policy import BLOCK, Kind
from engine.kvcache.pool import MemoryFullError
from engine.kvcache.prefix import Node
from engine.kvcache.sequences import Checkpoint
from engine.kvcache.store import PIECE, Part, Reader, Shape, StoreError
from engine.runtime.loop import StepLoop
from engine.runtime.memory import SharedMemory

Array = NDArray[Any]
T = TypeVar("T")
_NONE = np.empty(0, np.uint8)
# Other prompts, the next turn and a retry go on from these.
_KINDS = (Kind.FIRST, Kind.TURN, Kind.PROMPT)


class NoRoomError(StoreError):
    """A file that is right, but that the prefix cache has no room for."""


@dataclass(frozen=True)
class Said:
    """What a file's header says: states: (position, kind), rising; texts: (key, ids, ends)."""

    model: str
    states: list[tuple[int, Kind]]
    texts: list[tuple[str, int, Ends]]
    info: Mapping[str, Any]

    @property
    def n_kept(self) -> int:
        return self.states[-1][0]

    @classmethod
    def of(cls, reader: Reader) -> Said:
        """Raises StoreError for what no engine has said."""
        try:
            info = reader.info
            states = [(count(n), Kind[kind]) for n, kind in info["states"]]
            texts = [(str(key), count(n), _ends(ends)) for key, n, ends in info["texts"]]
            rising = sorted({n for n, _ in states})
            dtype, shape = reader.shapes["tokens"]
            is_right = states and rising == [n for n, _ in states] and rising[-1] <= shape[0]
            if not is_right or dtype != np.int32 or len(shape) != 1:
                raise ValueError
            return cls(str(info["model"]), states, texts, info)
        except (LookupError, TypeError, ValueError, RecursionError):
            raise reader.refused("a session") from None


def count(value: Any, least: int = 1) -> int:
    if not checks.is_integer(value) or not least <= value < 2**31:
        raise ValueError
    return int(value)


def _ends(ends: Any) -> Ends:
    (a, b), (c, d) = ends
    return (count(a, 0), count(b, 0)), (count(c, 0), count(d, 0))


@dataclass
class Held:
    """What a file will have: states with their positions in `ids`, as sequences that nobody writes,
    or of a host tier as copies; texts that lead there; logits of states' last tokens."""

    ids: bytes
    states: list[tuple[int, Kind]] = field(default_factory=list)
    texts: list[tuple[str, int, Ends]] = field(default_factory=list)
    logits: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    kept: list[Checkpoint] = field(default_factory=list)
    copies: dict[str, Array] = field(default_factory=dict)
    is_dropped: bool = False


class Call(Protocol):
    """Runs an action inside the door, and returns what it does."""

    def __call__(self, action: Callable[[], T]) -> T: ...


def inside(action: Callable[[], T]) -> T:
    """For who is inside the door."""
    return action()


class StateFiles:
    """Makes files of the cache's entries, and entries of files; `model`: a model's fingerprint."""

    def __init__(self, loop: StepLoop, memory: SharedMemory, model: Callable[[], str]) -> None:
        self._loop, self._shared, self.call, self.model = loop, memory, loop.owner.call, model
        self.cache, self._memory = loop.scheduler.cache, loop.memory

    @property
    def _states(self) -> list[tuple[StateStore, Tensor]]:
        return self._loop.executable.states

    @property
    def signature(self) -> bytes:
        """What tells apart files that have other types or sizes of rows."""
        empty = (store.read(t, [], _NONE) for store, t in self._states)
        return b"".join(_shown(a.dtype, a.shape).encode() for a in empty)

    def hold(self, node: Node[Entry], ids: bytes) -> Held:
        """An entry and those before it on the way of `ids`, to be written later. Called inside the
        door."""
        held, nodes = Held(ids), path_of(node)
        for at in nodes:
            entry = entry_of(at)
            held.states.append((at.end, entry.kind))
            held.texts += self.cache.texts_of(at, ids)
            if entry.logits is not None:
                held.logits[at.end] = entry.logits
        if all(entry_of(at).seq in self._memory for at in nodes):
            for at in nodes:
                held.kept.append(Checkpoint(self._shared, self._memory.reserve()))
                self._memory.fork(entry_of(at).seq, held.kept[-1].seq)
        else:
            each = [self._copies(entry_of(at), at is node) for at in nodes]
            for name in each[-1]:
                rows = [found[name] for found in each if name in found]
                held.copies[name] = np.concatenate(rows)
            for _, t in self._states:
                _clear_rest(t, held.copies[t.name][-1], node.end)
        return held

    def _copies(self, entry: Entry, with_blocks: bool) -> dict[str, Array]:
        """Copies of an entry's slot, and blocks, of every state."""
        tier = self.cache.tier
        if entry.stored is not None and tier is not None:
            return {t.name: rows for t, rows in tier.read(entry.stored, with_blocks).items()}
        own = self._memory.allocation(entry.seq)
        indices = {"n_slots": [own.state.slot]}
        if with_blocks:
            indices["n_blocks"] = own.table.blocks
        states = ((store, t) for store, t in self._states if dim_name(t) in indices)
        return {t.name: read_all(store, t, indices[dim_name(t)]) for store, t in states}

    def drop(self, held: Held) -> None:
        """Free what is held; who writes it gives up. Called inside the door."""
        held.is_dropped = True
        for kept in held.kept:
            self._memory.free(kept.seq)

    def contents(self, held: Held, call: Call | None = None) -> tuple[dict[str, Any], list[Part]]:
        """What a file says and has, for `write`: steps may run between its pieces."""
        states = [(n, kind.name) for n, kind in held.states]
        info = {"model": self.model(), "states": states, "texts": held.texts}
        return info, self._parts(held, self.call if call is None else call)

    def _parts(self, held: Held, call: Call) -> list[Part]:
        parts = [Part.of("tokens", np.frombuffer(held.ids, np.int32))]
        parts += [Part.of(f"logits.{n}", logits) for n, logits in held.logits.items()]
        if held.copies:
            return parts + [Part.of(name, rows) for name, rows in held.copies.items()]
        own = call(lambda: [self._memory.allocation(kept.seq) for kept in held.kept])
        indices = {"n_slots": [a.state.slot for a in own], "n_blocks": list(own[-1].table.blocks)}
        states = call(lambda: self._states)
        return parts + [
            self._part(held, store, t, indices[dim_name(t)], call) for store, t in states
        ]

    def _part(
        self, held: Held, store: StateStore, tensor: Tensor, indices: list[int], call: Call
    ) -> Part:
        empty = call(partial(store.read, tensor, [], _NONE))
        n_row = _row_bytes(empty)
        n = max(1, PIECE // max(1, n_row))

        def read(some: list[int], buffer: Array) -> Array:
            if held.is_dropped:
                raise StoreError("its memory was needed")
            return store.read(tensor, some, buffer)

        def pieces() -> Iterator[Array]:
            # New memory for each piece would cost more than its bytes.
            buffer = np.empty(min(n, len(indices)) * n_row, np.uint8)
            for begin in range(0, len(indices), n):
                rows = call(partial(read, indices[begin : begin + n], buffer))
                if begin + n >= len(indices):
                    _clear_rest(tensor, rows[-1], held.states[-1][0])
                yield rows

        return Part(tensor.name, empty.dtype, (len(indices), *empty.shape[1:]), pieces)

    def opened(self, path: Path, call: Call | None = None) -> tuple[Reader, Said]:
        """A file of this model and these types, to be read. Raises StoreError. `call`: that of the
        engine, so that steps run meanwhile, or `inside`."""
        reader = Reader(path)
        said = Said.of(reader)
        if said.model != self.model():
            raise StoreError(f"{path}: expected a session of this model, got another one's")
        expected = (self.call if call is None else call)(partial(self._expected, said))
        for n, _ in said.states:
            if (name := f"logits.{n}") in reader.shapes:
                expected[name] = np.dtype(np.float32), (self._loop.n_vocab,)
        for name, shape in expected.items():
            if (came := reader.shapes.get(name)) != shape:
                shown = "none" if came is None else _shown(*came)
                raise StoreError(f"{path}: {name}: expected {_shown(*shape)}, got {shown}")
        return reader, said

    def read(self, reader: Reader, said: Said, call: Call | None = None) -> Array:
        """Read a file into the cache; returns its tokens. Raises StoreError, and MemoryFullError
        where what runs has the memory."""
        call = self.call if call is None else call
        kept = [Checkpoint(self._shared, self._memory.reserve()) for _ in said.states]
        try:
            indices = call(partial(self._adopt, said, kept))
            others = self._filled(reader, indices, call)
            call(partial(self._keep, reader.path, said, kept, others))
        finally:
            # At once: who is inside the door may need their memory, if the cache gives it up.
            seqs = [checkpoint.seq for checkpoint in kept]
            call(lambda: list(map(self._memory.free, seqs)))
        return others["tokens"]

    def _filled(
        self, reader: Reader, indices: Mapping[str, list[int]], call: Call
    ) -> dict[str, Array]:
        """Write a file's rows to slots and blocks; returns its other tensors."""
        states = {t.name: (store, t) for store, t in call(lambda: self._states)}
        others: dict[str, list[Array]] = {}
        for name, first, values in reader.pieces():
            if name in states:
                store, t = states[name]
                some = indices[dim_name(t)][first : first + len(values)]
                call(partial(store.write, t, some, values))
            else:
                others.setdefault(name, []).append(values.copy())
        return {name: np.concatenate(each) for name, each in others.items()}

    def _expected(self, said: Said) -> dict[str, Shape]:
        """The rows of every state that a file must have."""
        n_rows = {"n_slots": len(said.states), "n_blocks": -(-said.n_kept // BLOCK)}
        rows = [(t, store.read(t, [], _NONE)) for store, t in self._states]
        return {t.name: (a.dtype, (n_rows[dim_name(t)], *a.shape[1:])) for t, a in rows}

    def _adopt(self, said: Said, kept: Sequence[Checkpoint]) -> dict[str, list[int]]:
        """Make the sequences of a file's states, which share blocks; returns slots and blocks."""
        memory, n_blocks = self._memory, -(-said.n_kept // BLOCK)
        if not self._loop.scheduler.make_room(n_blocks, len(kept)):
            raise MemoryFullError(
                f"expected memory for {said.n_kept} tokens, got {memory.blocks}, {memory.slots}, "
                "some of them for what runs"
            )
        own = [memory.adopt(kept[-1].seq, said.n_kept)]
        for (n, _), checkpoint in zip(said.states[:-1], kept, strict=False):
            own.insert(-1, memory.adopt(checkpoint.seq, n, kept[-1].seq))
        return {"n_slots": [a.state.slot for a in own], "n_blocks": own[-1].table.blocks}

    def _keep(
        self, path: Path, said: Said, kept: Sequence[Checkpoint], found: Mapping[str, Array]
    ) -> None:
        """Have the cache keep what was read."""
        ids, node = found["tokens"], None
        for (n, kind), checkpoint in zip(said.states, kept, strict=True):
            logits = found.get(f"logits.{n}")
            node = self.cache.keep(ids[:n].tobytes(), checkpoint.seq, kind, logits)
        if node is None or node.kept is None:
            raise NoRoomError(
                f"{path}: the prefix cache has no room for {said.n_kept} tokens: raise cache_ram "
                "(--cache-ram)"
            )
        for key, n_ids, ends in said.texts:
            self.cache.name(key, ids[:n_ids].tobytes(), ends)


def read_all(store: StateStore, tensor: Tensor, indices: Sequence[int]) -> Array:
    """Copies of slots or blocks."""
    n_row = _row_bytes(store.read(tensor, [], _NONE))
    return store.read(tensor, indices, np.empty(len(indices) * n_row, np.uint8))


def _clear_rest(tensor: Tensor, block: Array, n_kept: int) -> None:
    """Assign zeros to what of a last block [n_heads, BLOCK, d_head] is not kept: it may be of
    another prompt."""
    if dim_name(tensor) == "n_blocks" and n_kept % BLOCK:
        block[:, n_kept % BLOCK :] = 0


def _row_bytes(rows: Array) -> int:
    return math.prod(rows.shape[1:]) * rows.dtype.itemsize


def path_of(node: Node[Entry]) -> list[Node[Entry]]:
    """An entry behind those before it that are written with it: the deepest one of each kind, and
    one a token before it, from which its logits come again."""
    nodes, kinds = [node], set(_KINDS)
    for above in node.ancestors:
        if above.kept is not None and (above.kept.kind in kinds or above.end == node.end - 1):
            kinds.discard(above.kept.kind)
            nodes.insert(0, above)
    return nodes


def _shown(dtype: Any, shape: Sequence[int]) -> str:
    return f"{dtype} {list(shape)}"
