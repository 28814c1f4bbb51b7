"""Facts in a long text, and questions about single ones, up to 2600 tokens later."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import exp, log
from random import Random

from tools.train_demo.questions import Question, is_held_out
from tools.train_demo.words import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    COLORS,
    FILLER,
    NAMES,
    NATURE,
    OBJECTS,
    PLACES,
)

SHORTEST, LONGEST = 32, 2600  # in training
# About the first sentence of a text of so many tokens.
_FAR = {"recall_far": (1020, 1100), "recall_2000": (2020, 2120)}


@dataclass(frozen=True)
class Fact:
    """A sentence, the question about it, and the answer."""

    sentence: str
    question: str
    answer: str


def size(text: str) -> int:
    """About as many tokens as the demo's tokenizer makes of a text of words.py's words."""
    return len(re.findall(r"[A-Za-z]+|\d|[^\w\s]", text)) + len(re.findall(r" \d", text))


def _facts(rng: Random) -> list[Fact]:
    """All facts of one text: no two have the same question."""
    out = []
    for thing in rng.sample(OBJECTS, len(OBJECTS)):
        named = f"{rng.choice(COLORS)} {thing}"
        code = "".join(rng.choice("0123456789") for _ in range(4))
        out.append(Fact(f"The code of the {named} is {code}.",
                        f"What is the code of the {named}?", code))  # fmt: skip
    for name in rng.sample(NAMES, len(NAMES)):
        city, animal, place = rng.choice(CITIES), rng.choice(ANIMALS), rng.choice(PLACES)
        out += rng.sample(
            [
                Fact(f"{name} lives in {city}.", f"Where does {name} live?", city),
                Fact(f"{name} likes the {animal} best.",
                     f"Which animal does {name} like best?", animal),
                Fact(f"{name} works in the {place}.", f"Where does {name} work?", place),
            ],
            rng.randint(1, 2),
        )  # fmt: skip
    rng.shuffle(out)
    return out


def _filler(rng: Random) -> str:
    animals, natures = rng.sample(ANIMALS, 2), rng.sample(NATURE, 2)
    return rng.choice(FILLER).format(
        adjective=rng.choice(ADJECTIVES), color=rng.choice(COLORS), object=rng.choice(OBJECTS),
        place=rng.choice(PLACES), animal=animals[0], animal2=animals[1],
        nature=natures[0], nature2=natures[1],
    )  # fmt: skip


def text_of_facts(rng: Random, n_tokens: int, density: float) -> tuple[str, list[Fact]]:
    """A text of about `n_tokens`, a share `density` of its sentences facts; and its facts."""
    facts = _facts(rng)
    used = [facts.pop()]
    sentences = [used[0].sentence]
    n = size(sentences[0])
    while True:
        fact = facts[-1] if facts and rng.random() < density else None
        sentence = fact.sentence if fact else _filler(rng)
        n += size(sentence)
        if n > n_tokens:
            return " ".join(sentences), used
        if fact:
            used.append(facts.pop())
        sentences.append(sentence)


def _question(task: str, text: str, fact: Fact) -> Question:
    whole = f"{text} {fact.question}"
    return Question(task, whole, fact.answer, whole)


def training_text(rng: Random, n_questions: int) -> tuple[str, list[Fact]]:
    """A text of any length, and facts of it to ask for, none of them held out."""
    n_tokens = int(exp(rng.uniform(log(SHORTEST), log(LONGEST))))
    text, facts = text_of_facts(rng, n_tokens, rng.uniform(0.05, 1))
    fair = [fact for fact in facts if not is_held_out(_question("", text, fact).key)]
    return text, rng.sample(fair, min(len(fair), n_questions))


def held_out_question(task: str, rng: Random) -> Question:
    """A held-out question: `recall` within 300 tokens, `recall_far` and `recall_2000` about the
    first sentence of a text of 1000 to 1100, and of 2000 to 2120."""
    while True:
        n_tokens = rng.randint(*_FAR.get(task, (SHORTEST, 300)))
        text, facts = text_of_facts(rng, n_tokens, rng.uniform(0.1, 0.9))
        question = _question(task, text, facts[0] if task in _FAR else rng.choice(facts))
        if is_held_out(question.key):
            return question
