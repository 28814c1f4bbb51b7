"""The engine side of the parity cases: load one, compare its logits and greedy tokens.

The comparisons answer a description of what is wrong, or an empty string, so that a test can say
more about where it happened.
"""

from __future__ import annotations

from pathlib import Path

from engine import Engine, SamplingParams
from tests.parity.common import (
    LENGTHS,
    MAX_ERROR,
    N_GREEDY,
    Case,
    Golden,
    Weights,
    relative_error,
    write_case,
)


def load_engine(path: Path, case: Case, weights: Weights) -> Engine:
    """The engine on `path`, which is written first."""
    write_case(path, case, weights)
    return Engine.load(path, backend="reference", type_k="f32", type_v="f32")


def logits_problem(engine: Engine, expected: Golden) -> str:
    """What is wrong with the engine's logits, for prompts of all LENGTHS; empty when nothing is."""
    errors = {
        n: relative_error(engine.logits(expected.ids[:n]), expected.logits[:n]) for n in LENGTHS
    }
    # Not `any(error > …)`: NaN must fail.
    if all(error <= MAX_ERROR for error in errors.values()):
        return ""
    listed = ", ".join(f"{n}: {error:.1e}" for n, error in errors.items())
    return f"relative error of the logits by prompt length: {listed}; at most {MAX_ERROR} expected"


def tokens_problem(engine: Engine, expected: Golden) -> str:
    """Where the engine's greedy tokens leave the expected ones; empty when they don't."""
    params = SamplingParams(temperature=0.0, max_tokens=N_GREEDY, ignore_eos=True)
    got = [piece.token for piece in engine.generate(expected.prompt, params)]
    if got == expected.greedy:
        return ""
    pairs = zip(got, expected.greedy, strict=False)
    i = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), N_GREEDY))
    return f"greedy tokens differ from {i} on: expected {expected.greedy[i:]}, got {got[i:]}"
