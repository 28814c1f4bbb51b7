"""JSON schemas: what of them can be enforced, and whether anything matches them.

llguidance enforces what it takes. This module names the keywords that nothing enforces, with their
place, drops those that demand nothing, and finds what has no end: recursion, and large divisors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import lcm
from typing import Any
from urllib.parse import unquote

from engine import checks

# Nothing enforces these keywords, which come from all drafts of JSON schema.
_REFUSED = {
    "not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains",
    "propertyNames", "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems",
    "unevaluatedProperties", "extends", "disallow", "divisibleBy", "$dynamicRef", "$recursiveRef",
}  # fmt: skip
# What a keyword needs beside it to demand anything.
_NEEDS = {
    "if": {"then", "else"}, "then": {"if"}, "else": {"if"}, "minContains": {"contains"},
    "maxContains": {"contains"},
}  # fmt: skip
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_PARTS = ("items", "additionalItems", "additionalProperties", "anyOf", "oneOf", "allOf",
          "prefixItems")  # fmt: skip
_MAX_DEPTH = 64
# Numbers that a divisor makes llguidance tell apart: a million takes 7 s and 400 MB.
_MAX_DIVISOR = 10_000


class SchemaError(ValueError):
    """A schema that can't be enforced."""


def checked(schema: Any, is_lenient: bool = False) -> Any:
    """A schema without keywords that demand nothing; is_lenient: and without those that can't be
    enforced. Raises SchemaError."""
    cleaner = _Cleaner(is_lenient)
    made = cleaner.cleaned(schema, "#", 0)
    if cleaner.divisor > _MAX_DIVISOR:
        expected = f"expected multipleOf whose digits have a common multiple up to {_MAX_DIVISOR}"
        raise SchemaError(f"{expected}, got {cleaner.divisor}")
    if not _can_end(made):
        expected = "expected a schema that some value matches"
        raise SchemaError(f"{expected}, got false, or recursion without end")
    return made


class _Cleaner:
    """divisor: the least common multiple of all multipleOf, which may come together. A power of ten
    is none: 2.50 counts as 25."""

    def __init__(self, is_lenient: bool) -> None:
        self._is_lenient, self.divisor = is_lenient, 1

    def cleaned(self, schema: Any, place: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            shown = checks.shown(schema)
            raise SchemaError(f"expected a schema, an object, at {place}, got {shown}")
        if depth > _MAX_DEPTH:
            raise SchemaError(f"expected at most {_MAX_DEPTH} schemas inside each other, got more")
        made: dict[str, Any] = {}
        for key, value in schema.items():
            at = f"{place}/{key}"
            if key in _REFUSED:
                if not self._is_lenient and _demands(key, value, schema):
                    raise SchemaError(f"expected keywords that can be enforced, got {at}")
            elif key in _NAMED and isinstance(value, Mapping):
                own = {n: self.cleaned(part, f"{at}/{n}", depth + 1) for n, part in value.items()}
                made[key] = own
            elif key in _PARTS and isinstance(value, list):
                parts = enumerate(value)
                made[key] = [self.cleaned(part, f"{at}/{i}", depth + 1) for i, part in parts]
            elif key in _PARTS:
                made[key] = self.cleaned(value, at, depth + 1)
            else:
                made[key] = value
        if isinstance(divisor := schema.get("multipleOf"), int | float):
            digits = re.sub(r"e.*|\D", "", repr(divisor)).strip("0")
            self.divisor = lcm(self.divisor, int(digits or 1))
        return made


def _demands(key: str, value: Any, schema: Mapping[str, Any]) -> bool:
    is_alone = key in _NEEDS and not _NEEDS[key] & schema.keys()
    is_empty = value == {} and key.startswith("depend")
    return not (is_alone or is_empty or (key == "uniqueItems" and value is False))


def _can_end(root: Any) -> bool:
    """Whether a value of finite size can match, as far as references and required parts say."""
    can, work = set[str](), ["#"]
    waiting: dict[str, set[str]] = {}  # By a reference: those that may end if it does.

    def ends(schema: Any) -> bool:
        if not isinstance(schema, Mapping) or "enum" in schema or "const" in schema:
            return schema is not False
        ref = schema.get("$ref")
        if isinstance(ref, str) and ref not in can:
            if ref not in waiting:
                waiting[ref] = set()
                work.append(ref)
            waiting[ref].add(asking)
            return False
        options = [schema[key] for key in ("anyOf", "oneOf") if key in schema]
        return all(map(ends, _needed(schema))) and all(
            any(map(ends, each)) for each in options if isinstance(each, list)
        )

    while work:
        asking = work.pop()
        if asking not in can and ends(_target(root, asking)):
            can.add(asking)
            work += waiting.pop(asking, ())
    return "#" in can


def _needed(schema: Mapping[str, Any]) -> Iterable[Any]:
    """The schemas of which a value or a part of it must match each."""
    kind, parts = schema.get("type"), list(_listed(schema.get("allOf")))
    if kind in ("object", ["object"]) and isinstance(own := schema.get("properties"), Mapping):
        required = _listed(schema.get("required"))
        parts += [own[name] for name in required if isinstance(name, str) and name in own]
    least = schema.get("minItems")
    if kind in ("array", ["array"]) and isinstance(least, int):
        items = schema.get("items", True)
        first = [*_listed(schema.get("prefixItems")), *_listed(items)]
        parts += [*first, *([] if isinstance(items, list) else [items])][: max(least, 0)]
    return parts


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _target(root: Any, ref: str) -> Any:
    """What a reference within a schema names; True for others."""
    found = root
    for name in ref.removeprefix("#").split("/")[1:] if ref.startswith("#") else ():
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if ref in ("#", "") or ref.startswith("#/") else True
