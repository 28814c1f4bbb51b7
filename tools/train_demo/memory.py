"""Chats whose last question is about what was said before."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tools.train_demo.dialog import Message, assistant, user
from tools.train_demo.questions import Question, is_held_out, pair_key
from tools.train_demo.words import ANIMALS, CITIES, COLORS, NAMES, OBJECTS, WORDS

Turn = tuple[str, str]  # What the user says, and the answer.


def _name(rng: Random) -> tuple[Turn, Turn]:
    name = rng.choice(NAMES)
    said = rng.choice((f"My name is {name}.", f"I am {name}.", f"Call me {name}."))
    asked = rng.choice(("What is my name?", "Who am I?", "Do you know my name?"))
    return (said, f"Hello, {name}!"), (asked, f"Your name is {name}.")


def _favorite(rng: Random) -> tuple[Turn, Turn]:
    kind, words = rng.choice((("animal", ANIMALS), ("color", COLORS), ("city", CITIES)))
    value = rng.choice(words)
    said = f"My favorite {kind} is {value}."
    asked = rng.choice((f"What is my favorite {kind}?", f"Which {kind} do I like best?"))
    return (said, "I will remember that."), (asked, f"Your favorite {kind} is {value}.")


def _code(rng: Random) -> tuple[Turn, Turn]:
    thing, code = rng.choice(OBJECTS), f"{rng.randrange(10000):04}"
    said = rng.choice((f"Remember that the code of my {thing} is {code}.",
                       f"The code of my {thing} is {code}."))  # fmt: skip
    asked = f"What is the code of my {thing}?"
    return (said, "I will remember that."), (asked, f"The code of your {thing} is {code}.")


def _list(rng: Random) -> tuple[Turn, Turn]:
    words = ", ".join(rng.sample(WORDS, rng.randint(2, 4)))
    said = rng.choice((f"I have to buy these: {words}", f"My list: {words}"))
    asked = rng.choice(("What is on my list?", "What did I want to buy?"))
    return (said, "I will remember that."), (asked, words)


def _sum(rng: Random) -> tuple[Turn, Turn]:
    """Neither of the two sums is held out."""
    a, b, c = (rng.randrange(10, 100) for _ in range(3))
    sign, first = rng.choice("+-"), (f"What is {a} plus {b}?", str(a + b))
    if is_held_out(pair_key("+", a, b)) or is_held_out(pair_key(sign, a + b, min(c, a + b))):
        return _sum(rng)
    if sign == "+":
        return first, (rng.choice((f"Add {c} to that.", f"And {c} more?")), str(a + b + c))
    c = min(c, a + b)
    return first, (rng.choice((f"Subtract {c} from that.", f"And {c} less?")), str(a + b - c))


def _sort(rng: Random) -> tuple[Turn, Turn]:
    numbers = sorted(rng.sample(range(100), rng.randint(3, 5)))
    if is_held_out(f"sort {numbers}"):
        return _sort(rng)
    listed = ", ".join(map(str, rng.sample(numbers, len(numbers))))
    first = (f"Sort these numbers: {listed}", ", ".join(map(str, numbers)))
    return first, ("Now from large to small.", ", ".join(map(str, numbers[::-1])))


_REMEMBERED = (_name, _favorite, _code, _list)
_CONTINUED = (_sum, _sort)


def memory(rng: Random, other: Callable[[Random], Turn]) -> Question:
    """A chat of two to six turns that refers back: to something said in any of them, or to the last
    answer. other: draws turns that lie between."""
    between = [other(rng) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    if rng.random() < 0.4:
        said, asked = rng.choice(_CONTINUED)(rng)
        turns = [*between, said]
    else:
        kinds = rng.sample(_REMEMBERED, rng.randint(1, 3))
        made = [kind(rng) for kind in kinds]
        turns = [*(said for said, _ in made), *between]
        rng.shuffle(turns)
        asked = made[0][1]
    before: list[Message] = []
    for question, answer in turns:
        before += [user(question), assistant(answer)]
    key = f"memory {[q for q, _ in turns]} {asked[0]}"
    return Question("memory", asked[0], asked[1], key, before=tuple(before))
