"""Answers as JSON: a few facts, the schema of an object, and the object.

Evaluation draws names and values from lists, and shapes, that training never sees.
"""

from __future__ import annotations

from random import Random
from typing import Any

from tools.train_demo.questions import Question, is_held_out
from tools.train_demo.schemas import Field, again, compact, field, object_schema, shape
from tools.train_demo.words import NOUNS, Lexicon


def _facts(rng: Random, owner: str, fields: list[Field]) -> list[str]:
    """A sentence for each property."""
    forms = ("The {1} of the {0} is {2}.", "The {0} has the {1} {2}.", "{1} of the {0}: {2}.")
    sentences = []
    for f in fields:
        text = rng.choice(forms).format(owner, f.words, f.said(rng))
        sentences.append(text[0].upper() + text[1:])
    return sentences


def _fields(rng: Random, held_out: bool) -> list[Field]:
    """Of a shape from its side of the split."""
    while True:
        words = Lexicon(rng, held_out)
        fields = [field(rng, words) for _ in range(rng.randint(1, 4))]
        if is_held_out(shape(fields, [])) == held_out:
            return fields


def record(rng: Random, held_out: bool) -> Question:
    """Facts of one or two things in any order, and the schema of what is asked of one of them."""
    words = Lexicon(rng, held_out)
    owner, other, part = words.several(NOUNS, 3)
    fields = _fields(rng, held_out)
    schema = object_schema(fields, [f.name for f in fields])
    values: dict[str, Any] = {f.name: f.value for f in fields}
    facts = _facts(rng, owner, fields)
    if rng.random() < 0.5:
        facts += _facts(rng, other, [again(rng, words, f) for f in fields])
    if rng.random() < 0.3:  # One thing is a part of the record.
        inner = [field(rng, words, kind) for kind in ("string", "integer")[: rng.randint(1, 2)]]
        facts += _facts(rng, part, inner)
        schema["properties"][part] = object_schema(inner, [f.name for f in inner])
        schema["required"].append(part)
        values[part] = {f.name: f.value for f in inner}
    rng.shuffle(facts)
    asks = ("Describe the {} as JSON by this schema: {}", "Write the {} as JSON. Schema: {}")
    text = f"{' '.join(facts)} {rng.choice(asks).format(owner, compact(schema))}"
    return Question("json", text, compact(values), text)
