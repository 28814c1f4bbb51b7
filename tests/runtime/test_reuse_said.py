"""What completions say of their reuse."""

from __future__ import annotations

import pytest

from engine import Engine, SamplingParams
from engine.runtime.reuse import Reuse

IDS = list(range(10, 150))
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize(
    ("reuse", "said"),
    [
        (Reuse(9), "reused 0 of 9 tokens (nothing known begins like it)"),
        (Reuse(9, reason="cache_prompt is off"), "reused 0 of 9 tokens (cache_prompt is off)"),
        (Reuse(9, 9, 9), "reused 9 of 9 tokens"),
        (Reuse(9, 7, 7), "reused 7 of 9 tokens (the rest is new)"),
        (Reuse(9, 7, 7, "so"), "reused 7 of 9 tokens (so)"),
        (Reuse(9, 0, 5), "reused 0 of 9 tokens (diverged at 5, no state before)"),
        (Reuse(4326, 4096, 4211),
         "reused 4096 of 4326 tokens (diverged at 4211, nearest state at 4096)"),
        (Reuse(9, 4, 5, "so"), "reused 4 of 9 tokens (diverged at 5, nearest state at 4: so)"),
        (Reuse(9, 4, 9), "reused 4 of 9 tokens (all are known, nearest state at 4)"),
        (Reuse(10, 0, 10), "reused 0 of 10 tokens (all are known, no state before)"),
    ],
)  # fmt: skip
def test_texts(reuse: Reuse, said: str) -> None:
    assert str(reuse) == said


def test_what_has_not_begun_says_so() -> None:
    """It may be known: nobody has looked."""
    with Engine.load() as engine:
        engine.generate(IDS, GREEDY).wait()
        none = SamplingParams(max_tokens=0)
        assert str(engine.generate(IDS, none).reuse) == "reused 0 of 140 tokens (it has not begun)"


def test_what_is_known_gives_way_to_its_user() -> None:
    """Checkpoints take all slots but that of the state which the prompt would continue."""
    with Engine.load(n_ctx=256, n_checkpoints=1, cache_ram=1) as engine:
        engine.generate(IDS, GREEDY).wait()
        kept = []
        while engine.memory.slots.n_free:
            seq = engine.memory.create()
            engine.prefill(seq, [5])
            kept.append(engine.memory.checkpoint(seq))
            engine.memory.free(seq)
        assert engine.cache.n_states == 1
        completion = engine.generate([*IDS, 3, 4], GREEDY).wait()
        said = "reused 0 of 142 tokens (what was known gave way to it: it needs the room)"
        assert str(completion.reuse) == said
        assert completion.timings.n_prompt == 142


def test_prompts_that_run_at_once_and_share_little() -> None:
    with Engine.load(n_parallel=2) as engine:
        first, second = engine.generate_batch([IDS[:20], [*IDS[:14], 5]], GREEDY)
    assert str(first.reuse) == "reused 0 of 20 tokens (nothing known begins like it)"
    why = "a prompt that runs has its first 14, too: to wait for it would save less than 64"
    assert str(second.reuse) == f"reused 0 of 15 tokens ({why})"
    assert second.timings.n_prompt == 15
