"""Where states are kept and what they are worth, as numbers: the policy's functions are pure."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kvcache.policy import CONVERSATION, Kind, distance, most_in_a_prompt, positions, worth

COUNTS = st.sampled_from([16, 8, 4])
MIB = 1 << 20


@given(st.integers(1, 200_000), COUNTS)
def test_positions_are_near_enough_and_few_enough(n_prompt: int, n_most: int) -> None:
    """At most max(256, 1/16, 1/8 or 1/4 of the prompt) apart, the prompt's ends included."""
    kept = positions(n_prompt, n_most)
    ends = [0, *kept, n_prompt]
    apart = [b - a for a, b in pairwise(ends)]
    most = max(256, n_prompt / n_most)
    assert ends == sorted(set(ends))
    assert all(n <= most for n in apart[:-1])
    # The end of a prompt has a state of its own: none lies within 64 tokens of it.
    assert apart[-1] <= most + 64
    assert not kept or apart[-1] > 64
    assert all(at % 64 == 0 for at in kept)
    assert set(kept.values()) <= {Kind.DISTANCE}
    # Rounding the distance down to 64 may add some.
    assert len(kept) <= n_most * 4 / 3 + 1


@pytest.mark.parametrize(
    ("n_prompt", "n_most", "expected"),
    [
        (1, 16, []),
        (256, 16, []),
        (320, 16, []),
        (321, 16, [256]),
        (1000, 16, [256, 512, 768]),
        (16_384, 4, [4096, 8192, 12_288]),
        (16_384, 8, list(range(2048, 16_384, 2048))),
        (16_384, 16, list(range(1024, 16_384, 1024))),
        (17_000, 16, list(range(1024, 16_936, 1024))),
    ],
)
def test_positions(n_prompt: int, n_most: int, expected: list[int]) -> None:
    assert list(positions(n_prompt, n_most)) == expected


@given(st.integers(0, 1 << 20), COUNTS)
def test_distance(n_prompt: int, n_most: int) -> None:
    step = distance(n_prompt, n_most)
    assert step % 64 == 0
    assert 256 <= step <= max(256, n_prompt / n_most)
    assert step == 256 or step > n_prompt / n_most - 64
    # Fewer states lie further apart.
    assert distance(n_prompt, 16) <= distance(n_prompt, 8) <= distance(n_prompt, 4)


@pytest.mark.parametrize(
    ("n_fit", "most"), [(0, 4), (15, 4), (31, 4), (32, 8), (63, 8), (64, 16), (10**6, 16)]
)
def test_states_of_a_prompt_take_a_quarter_of_the_budget(n_fit: int, most: int) -> None:
    assert most_in_a_prompt(n_fit * 20 * MIB, 20 * MIB) == most


SAVED, BYTES = st.integers(1, 100_000), st.integers(1, 1 << 34)
USES, FLOORS = st.integers(0, 100), st.floats(0, 1e6)
KINDS = st.sampled_from(list(Kind))


@given(KINDS, USES, SAVED, BYTES, FLOORS, st.booleans())
def test_worth_grows_with_what_is_saved(
    kind: Kind, n_uses: int, n_saved: int, n_bytes: int, floor: float, passed: bool
) -> None:
    def worth_of(n_uses: int, n_saved: int, n_bytes: int, floor: float) -> float:
        return worth(kind, n_uses, n_saved, n_bytes, floor, passed)

    least = worth_of(n_uses, n_saved, n_bytes, floor)
    assert least >= floor
    assert worth_of(n_uses + 1, n_saved, n_bytes, floor) >= least
    assert worth_of(n_uses, 2 * n_saved, n_bytes, floor) >= least
    assert worth_of(n_uses, n_saved, 2 * n_bytes, floor) <= least
    assert worth_of(n_uses, n_saved, n_bytes, floor + 1) >= least
    # What saves as much of each byte is worth the same.
    doubled = worth_of(n_uses, 2 * n_saved, 2 * n_bytes, floor)
    assert doubled == pytest.approx(least)


def test_what_is_surer_to_be_used_is_worth_more() -> None:
    ranks = [
        Kind.FIRST, Kind.ANSWER, Kind.LEFT, Kind.PROMPT, Kind.DISTANCE,
    ]  # fmt: skip
    worths = [worth(kind, 0, 1000, 20 * MIB, 0.0) for kind in ranks]
    assert worths == sorted(set(worths), reverse=True)
    assert worth(Kind.TURN, 0, 1000, 20 * MIB, 0.0) == worths[1]


def test_what_is_not_used_any_more_sinks() -> None:
    """GreedyDual: a state that was used a hundred times goes before a new one at last."""
    old = worth(Kind.ANSWER, 100, 1000, 20 * MIB, 0.0)
    new = [worth(Kind.ANSWER, 0, 1000, 20 * MIB, floor) for floor in (0.0, 0.9 * old, old)]
    assert new[0] < old < new[2]


def test_a_conversation_leaves_its_earlier_states_behind() -> None:
    """Its first use was the one to expect; a second one shows a branch. Others don't change."""
    for kind in Kind:
        ahead = worth(kind, 1, 1000, 20 * MIB, 0.0)
        passed, twice = (worth(kind, n, 1000, 20 * MIB, 0.0, is_passed=True) for n in (1, 2))
        if kind in CONVERSATION:
            assert 0 < passed < ahead
            assert passed < twice
        else:
            assert passed == ahead
