"""A question with one right answer, and which side of the split it is on.

Every question has a key, its content in a canonical form: operands of a sum in order of size, the
items of a list to sort as a set. A tenth of all keys, by their hash, is held out: training never
sees a question with such a key, evaluation only those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tools.train_demo import dialog
from tools.train_demo.dialog import Message, Tool

HELD_OUT_SHARE = 10  # one in ten


@dataclass(frozen=True)
class Question:
    """What is asked, and the one right answer. `key`: see above.

    thought: what is thought first, if it may be. before, after: messages before the user's text,
    and between it and the answer. tools: JSON schemas.
    """

    task: str
    text: str
    answer: str
    key: str
    thought: str = ""
    before: tuple[Message, ...] = ()
    after: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()

    def messages(self, thinks: bool = False) -> list[Message]:
        """All messages up to the answer; with their thoughts, or without."""
        messages = [*self.before, dialog.user(self.text), *self.after]
        if thinks:
            return messages
        return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]

    @property
    def is_plain(self) -> bool:
        """Whether it can be asked without chat markup."""
        return not (self.before or self.after or self.tools)


Draw = Callable[[Random, bool], Question]


def pair_key(sign: str, a: int, b: int) -> str:
    """The key of a sum, difference or product: the same for both orders of the operands."""
    return f"{sign} {min(a, b)} {max(a, b)}"


def is_held_out(key: str) -> bool:
    """Whether questions with this key are kept for evaluation."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_SHARE == 0


def by_key(draw: Callable[[Random], Question]) -> Draw:
    """Questions of `draw` on one side of the split by their keys."""

    def drawn(rng: Random, held_out: bool) -> Question:
        while True:
            question = draw(rng)
            if is_held_out(question.key) == held_out:
                return question

    return drawn
