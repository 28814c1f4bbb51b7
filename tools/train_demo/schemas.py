"""Small JSON schemas and values that fit them: the parameters of functions, and records.

The shape of a schema, its types and which of them are required, is held out as keys are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from tools.train_demo.words import CHOICES, FIELDS, LISTS, SWITCHES, VALUES, Lexicon

_KINDS = ("string", "string", "integer", "integer", "number", "boolean", "enum", "array")


@dataclass(frozen=True)
class Field:
    """A property: its name, its kind (a type, or `enum`), its schema, and a value of it."""

    name: str
    kind: str
    schema: dict[str, Any]
    value: Any

    @property
    def words(self) -> str:
        """The name as people write it."""
        return self.name.replace("_", " ")

    def said(self, rng: Random) -> str:
        """The value as people write it."""
        if self.kind == "boolean":
            return rng.choice((str(self.value).lower(), "yes" if self.value else "no"))
        if self.kind == "array":
            return ", ".join(self.value)
        return str(self.value)


def _number(rng: Random) -> int:
    return rng.randrange(10 ** rng.randint(1, 4))


def field(rng: Random, words: Lexicon, kind: str = "") -> Field:
    """A property of any kind, or of the one given, with a value."""
    kind = kind or rng.choice(_KINDS)
    name = words.word({"boolean": SWITCHES, "array": LISTS}.get(kind, FIELDS))
    if kind not in ("boolean", "array") and rng.random() < 0.25:
        name = f"{words.several(VALUES, 1)[0]}_{name}".lower()
    schema: dict[str, Any] = {"type": kind}
    if kind == "enum":
        schema = {"type": "string", "enum": words.several(CHOICES, rng.randint(2, 4))}
    elif kind == "array":
        schema |= {"items": {"type": "string"}}
    return Field(name, kind, schema, _value(rng, words, kind, schema))


def _value(rng: Random, words: Lexicon, kind: str, schema: dict[str, Any]) -> Any:
    match kind:
        case "string":
            text = " ".join(words.several(VALUES, rng.choice((1, 1, 2))))
            return text.capitalize() if rng.random() < 0.3 else text
        case "integer":
            return _number(rng)
        case "number":
            return _number(rng) + rng.choice((0.5, 0.25, 0.1))
        case "boolean":
            return rng.random() < 0.5
        case "enum":
            return rng.choice(schema["enum"])
    return words.several(VALUES, rng.randint(2, 4))


def again(rng: Random, words: Lexicon, field: Field) -> Field:
    """The same property with a value drawn anew."""
    return replace(field, value=_value(rng, words, field.kind, field.schema))


def object_schema(fields: list[Field], required: list[str]) -> dict[str, Any]:
    """The schema of an object with these properties."""
    properties = {f.name: f.schema for f in fields}
    return {"type": "object", "properties": properties, "required": required}


def shape(fields: list[Field], required: list[str]) -> str:
    """The kinds of all properties, in order, and which are required."""
    return "shape " + " ".join(f.kind + "!" * (f.name in required) for f in fields)


def compact(value: Any) -> str:
    """A value as JSON on one line."""
    return json.dumps(value)
