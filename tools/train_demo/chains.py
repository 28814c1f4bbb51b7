"""Arithmetic in several steps, which can be thought through one by one before the answer."""

from __future__ import annotations

from random import Random

from tools.train_demo.questions import Question, is_held_out, pair_key

_LARGEST = 999
_WORDS = {"+": "Add {}.", "-": "Subtract {}.", "*": "Multiply by {}."}


def chain(rng: Random) -> Question:
    """A number, and three to six steps; no result is negative or above 999, and no step is a
    held-out sum or difference."""
    value = first = rng.randrange(1, 100)
    steps: list[str] = []
    asked: list[str] = []
    n_steps = rng.randint(3, 6)
    while len(steps) < n_steps:
        sign, n = rng.choice("++--*"), rng.randrange(2, 100)
        if sign == "*" and value * (n := n % 8 + 2) > _LARGEST:
            sign = "-"
        if sign == "-" and n > value:
            sign = "+"
        if sign == "+" and value + n > _LARGEST:
            sign = "-"
        if is_held_out(pair_key(sign, value, n)):
            continue
        result = {"+": value + n, "-": value - n, "*": value * n}[sign]
        steps.append(f"{value} {sign} {n} = {result}")
        asked.append(_WORDS[sign].format(n))
        value = result
    text = f"Start with {first}. {' '.join(asked)} What is the result?"
    return Question("chain", text, str(value), f"chain {first} {asked}", "\n".join(steps))
