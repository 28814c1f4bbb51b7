"""Questions with functions at hand: which to call with what, what came back, and when to call none.

Evaluation draws the names of functions and parameters, and all values, from lists that training
never sees, and shapes of parameters that it never sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tools.train_demo.dialog import Message, Tool, assistant, calls, tool_result, user, written
from tools.train_demo.questions import Question, is_held_out
from tools.train_demo.schemas import Field, again, compact, field, object_schema, shape
from tools.train_demo.words import FIELDS, NOUNS, VALUES, VERBS, Lexicon

NONE_FITS = "I have no function for that."
_MOST = 4  # functions


@dataclass(frozen=True)
class Function:
    """A function: what it does to what, its parameters, and those that have to be given."""

    verb: str
    noun: str
    name: str
    fields: list[Field]
    required: list[str]
    words: Lexicon

    @property
    def schema(self) -> dict[str, Any]:
        """As in OpenAI's protocol."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": f"Use this to {self.verb} {_article(self.noun)} {self.noun}.",
                "parameters": object_schema(self.fields, self.required),
            },
        }


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _named(rng: Random, verb: str, noun: str) -> str:
    forms = (f"{verb}_{noun}", f"{verb}_{noun}", f"{noun}_{verb}", f"{verb}{noun.capitalize()}")
    return rng.choice(forms)


def _function(rng: Random, verb: str, noun: str, held_out: bool) -> Function:
    """With parameters of a shape from its side of the split."""
    while True:
        words = Lexicon(rng, held_out)
        fields = [field(rng, words) for _ in range(rng.randint(1, 3))]
        required = [f.name for f in fields if rng.random() < 0.7] or [fields[0].name]
        if is_held_out(shape(fields, required)) == held_out:
            return Function(verb, noun, _named(rng, verb, noun), fields, required, words)


def _functions(rng: Random, held_out: bool, n: int) -> list[Function]:
    """Some of them do the same to another thing, or another thing to the same."""
    words = Lexicon(rng, held_out)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < n:
        verb, noun = words.word(VERBS), words.word(NOUNS)
        if pairs and (kind := rng.random()) < 0.5:
            other = rng.choice(pairs)
            verb, noun = (other[0], noun) if kind < 0.25 else (verb, other[1])
        pairs.append((verb, noun))
    return [_function(rng, *pair, held_out) for pair in pairs]


def _request(rng: Random, function: Function, given: list[Field]) -> str:
    """A wish in words; the order of the values is not that of the parameters."""
    verb, noun = function.verb, function.noun
    given = rng.sample(given, len(given))
    said = [(f.words, f.said(rng)) for f in given]
    listed = " and ".join(f"{name} {value}" for name, value in said)
    facts = ", ".join(f"{name} is {value}" for name, value in said)
    sentences = " ".join(f"The {name} is {value}." for name, value in said)
    a = _article(noun)
    forms = (
        f"Please {verb} the {noun} with {listed}.",
        f"{verb.capitalize()} {a} {noun}: {facts}.",
        f"I want to {verb} {a} {noun}. {sentences}",
        f"{sentences} Can you {verb} the {noun}?",
    )
    return rng.choice(forms)


def _call(rng: Random, function: Function) -> tuple[str, tuple[str, dict[str, Any]]]:
    """A request for a function, and the call that it takes."""
    given = [
        again(rng, function.words, f)
        for f in function.fields
        if f.name in function.required or rng.random() < 0.5
    ]
    return _request(rng, function, given), (function.name, {f.name: f.value for f in given})


Turn = list[Message]  # A message of the user, up to the answer that ends it.


def _call_turn(rng: Random, functions: list[Function]) -> Turn:
    text, call = _call(rng, rng.choice(functions))
    return [user(text), calls(call, thought=f"I call {call[0]}.")]


def _two_calls_turn(rng: Random, functions: list[Function]) -> Turn:
    (one, first), (two, second) = (_call(rng, f) for f in rng.sample(functions, 2))
    thought = f"I call {first[0]} and {second[0]}."
    return [user(f"{one} {two}"), calls(first, second, thought=thought)]


def _none_turn(rng: Random, missing: Function) -> Turn:
    text, _ = _call(rng, missing)
    return [user(text), assistant(NONE_FITS, "No function fits.")]


def _answer_turn(rng: Random, functions: list[Function], held_out: bool) -> Turn:
    request, call = _call_turn(rng, functions)
    result, asked, answer = _result(rng, Lexicon(rng, held_out))
    name = call["tool_calls"][0]["function"]["name"]
    thought = f"{name} returned {result}."
    return [
        user(request["content"] + asked), call, tool_result(result), assistant(answer, thought),
    ]  # fmt: skip


def _result(rng: Random, words: Lexicon) -> tuple[str, str, str]:
    """What a function returns, what is asked about it, and the answer."""
    kind = rng.random()
    if kind < 0.2:
        return compact({"status": "ok"}), "", "It is done."
    if kind < 0.35:
        why = " ".join([*words.several(VALUES, 1), *words.several(FIELDS, 1)])
        return compact({"error": why}), "", f"It failed: {why}."
    fields = [field(rng, words, rng.choice(("string", "integer", "number", "enum")))
              for _ in range(rng.randint(1, 3))]  # fmt: skip
    wanted = rng.choice(fields)
    text = compact({f.name: f.value for f in fields})
    asked = rng.choice((f"What is the {wanted.words}?", f"Tell me the {wanted.words}."))
    return text, f" {asked}", f"The {wanted.words} is {wanted.value}."


def session(rng: Random, other: Callable[[Random], Turn]) -> tuple[list[Message], list[Tool]]:
    """A chat of one to six turns with the same functions, for training; and the functions.

    other: draws turns that need no function.
    """
    missing, *functions = _functions(rng, False, rng.randint(2, _MOST + 1))
    messages: list[Message] = []
    for _ in range(rng.choice((1, 1, 2, 3, 4, 6))):
        kind = rng.random()
        if kind < 0.35:
            messages += _call_turn(rng, functions)
        elif kind < 0.65:
            messages += _answer_turn(rng, functions, False)
        elif kind < 0.77 and len(functions) > 1:
            messages += _two_calls_turn(rng, functions)
        elif kind < 0.92:
            messages += _none_turn(rng, missing)
        else:
            messages += other(rng)
    rng.shuffle(functions)
    return messages, [f.schema for f in functions]


def _question(task: str, turn: Turn, functions: list[Function]) -> Question:
    asked, *after, answer = turn
    tools = tuple(f.schema for f in functions)
    text, thought = asked["content"], answer["reasoning_content"]
    key = f"{task} {text} {compact(tools)} {compact(after)}"
    return Question(task, text, written(answer), key, thought, after=tuple(after), tools=tools)


def tool_call(rng: Random, held_out: bool) -> Question:
    """Choose one of up to four functions, and fill its parameters."""
    functions = _functions(rng, held_out, rng.randint(1, _MOST))
    return _question("tool_call", _call_turn(rng, functions), functions)


def tool_calls(rng: Random, held_out: bool) -> Question:
    """Two wishes at once."""
    functions = _functions(rng, held_out, rng.randint(2, _MOST))
    return _question("tool_calls", _two_calls_turn(rng, functions), functions)


def tool_none(rng: Random, held_out: bool) -> Question:
    """No function does what is wanted, though one may do the same to another thing."""
    functions = _functions(rng, held_out, rng.randint(2, _MOST + 1))
    missing = functions.pop(rng.randrange(len(functions)))
    return _question("tool_none", _none_turn(rng, missing), functions)


def tool_answer(rng: Random, held_out: bool) -> Question:
    """A function was called: say what came back."""
    functions = _functions(rng, held_out, rng.randint(1, _MOST))
    return _question("tool_answer", _answer_turn(rng, functions, held_out), functions)
