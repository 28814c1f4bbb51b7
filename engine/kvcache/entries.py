"""What the prefix cache keeps, finds and counts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.kvcache.policy import Kind, most_in_a_prompt
from engine.kvcache.prefix import Node
from engine.kvcache.tier import Stored

Ends = tuple[tuple[int, int], ...]  # (characters, ids) of places in a text.


@dataclass(frozen=True)
class Room:
    """What the cache may hold. budget: bytes, 0 for none; state_bytes, block_bytes: of a state and
    of a KV block in all layers; n_states, n_blocks: so many of each are beyond what runs needs.
    has_tier: the budget is of the host's memory, and those are a device's."""

    budget: int = 0
    state_bytes: int = 1
    block_bytes: int = 1
    n_states: int = 0
    n_blocks: int = 0
    has_tier: bool = False

    @property
    def most_in_a_prompt(self) -> int:
        return most_in_a_prompt(self.budget, self.state_bytes)


@dataclass(eq=False)
class Entry:
    """A state that is kept, with the KV blocks of its positions: as sequence `seq`, `stored` in the
    tier, or both. `logits` [n_vocab]: of its last token, if they are known. `is_passed`: see
    `policy.worth`. `texts`: the nodes that name it."""

    seq: int
    kind: Kind
    floor: float
    logits: NDArray[np.float32] | None = None
    n_uses: int = 0
    stored: Stored | None = None
    is_passed: bool = False
    texts: list[Node[Name]] = field(default_factory=list)


@dataclass(frozen=True)
class Name:
    """What a text's node keeps: its ids are those of an entry's node, and `rest` (the last token of
    an answer is in no state yet)."""

    node: Node[Entry]
    rest: bytes
    ends: Ends


@dataclass(frozen=True)
class Text:
    """The ids of a text. `ends`: (characters, ids) of places (see Source). The tree may change
    while others read it: the ids are a copy."""

    ids: bytes
    ends: Ends


@dataclass(frozen=True)
class Found:
    """What the cache has of a prompt: the first `n_known` ids, and a state after `n_kept`."""

    n_known: int = 0
    node: Node[Entry] | None = None

    @property
    def n_kept(self) -> int:
        return self.node.end if self.node is not None else 0

    @property
    def n_shared(self) -> int:
        """Positions whose blocks a sequence that uses it shares: none if they are only stored."""
        return 0 if self.node is None or entry_of(self.node).stored is not None else self.node.end

    @property
    def logits(self) -> NDArray[np.float32] | None:
        """Those of token `n_kept`, if they are known."""
        return entry_of(self.node).logits if self.node is not None else None


@dataclass
class Counts:
    """What happened since loading: prompts looked up, their tokens, those that were reused, and
    states that were kept and given up."""

    n_prompts: int = 0
    n_tokens: int = 0
    n_reused: int = 0
    n_kept: int = 0
    n_evicted: int = 0

    def add(self, n_tokens: int, n_reused: int) -> None:
        """Count a prompt."""
        self.n_prompts += 1
        self.n_tokens += n_tokens
        self.n_reused += n_reused


def entry_of(node: Node[Entry]) -> Entry:
    assert node.kept is not None
    return node.kept


def name_of(node: Node[Name]) -> Name:
    assert node.kept is not None
    return node.kept
