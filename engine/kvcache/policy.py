"""Where a prompt's states are kept, and what a kept state is worth.

A state weighs as much as thousands of cached tokens, so positions are chosen and bytes budgeted.
Both functions are pure. `worth` is GreedyDual-Size-Frequency (Cherkasova, "Improving WWW Proxies
Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998), with a prior for how
often the states of a kind are used again.
"""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """Why a state is kept: it is that after the first message (system and tools), a prompt, an
    answer; at the last boundary that the next turn is sure to keep; where a prompt left a cached
    path; or some way into a long prompt."""

    FIRST = "first message"
    PROMPT = "prompt"
    ANSWER = "answer"
    TURN = "turn"
    LEFT = "divergence"
    DISTANCE = "distance"


# Uses to expect of a state that was not used yet. Many conversations share a first message. Most
# answers are followed by one turn. A retry continues from the prompt. States on the way into a
# prompt are for histories that change in their midst: rare, so they go first.
PRIOR = {
    Kind.FIRST: 6.0, Kind.ANSWER: 1.0, Kind.TURN: 1.0, Kind.LEFT: 0.5, Kind.PROMPT: 0.2,
    Kind.DISTANCE: 0.05,
}  # fmt: skip
# The same of a conversation's state that the conversation has left behind: it went on, so only a
# retry or an edit comes back to it, and its first use was the one to expect.
_PASSED = 0.2
CONVERSATION = (Kind.PROMPT, Kind.ANSWER, Kind.TURN)
BLOCK = 64  # Positions. A prompt may be cut at its multiples without a change of any bit.
_LEAST_DISTANCE = 256
# States at distances of one prompt, at most; fewer where they would take more than a quarter of
# the budget: they must not push out what is surer to be used.
_MOST_IN_A_PROMPT = (16, 8, 4)


def most_in_a_prompt(budget: int, state_bytes: int) -> int:
    """How many states at distances one prompt may keep, with a budget in bytes."""
    fitting = (n for n in _MOST_IN_A_PROMPT if 4 * n * state_bytes <= budget)
    return next(fitting, _MOST_IN_A_PROMPT[-1])


def distance(n_prompt: int, n_most: int) -> int:
    """Tokens between two states of a prompt that has `n_prompt`: at most 1 / n_most of them, or
    256; a multiple of 64."""
    return max(_LEAST_DISTANCE, n_prompt // n_most // BLOCK * BLOCK)


def positions(n_prompt: int, n_most: int) -> dict[int, Kind]:
    """Where on the way into a prompt states are kept: it follows from its length alone."""
    step = distance(n_prompt, n_most)
    return dict.fromkeys(range(step, n_prompt - BLOCK, step), Kind.DISTANCE)


def worth(
    kind: Kind, n_uses: int, n_saved: int, n_bytes: int, floor: float, is_passed: bool = False
) -> float:
    """What goes first has the least worth.

    n_saved: tokens that a prompt processes less with the state than with the one before it on its
    path. n_bytes: what giving it up would free. floor: the worth of what was given up last when
    this one was kept or used; so what is not used any more sinks under what comes new. is_passed:
    whether its conversation went on, from there, from behind it, or another way.
    """
    expected = n_uses + PRIOR[kind]
    if is_passed and kind in CONVERSATION:
        expected = max(0, n_uses - 1) + _PASSED
    return floor + expected * n_saved / n_bytes
