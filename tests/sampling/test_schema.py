"""JSON schemas: the expected results of the JSON-Schema-Test-Suite, and random schemas, whose texts
an independent validator reads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.grammar import Grammar, GrammarError
from tests.support.grammars import accepts, written

pytest.importorskip("llguidance")
SUITE = Path(__file__).parents[1] / "golden" / "json-schema-suite.jsonl"
ROWS = [json.loads(line) for line in SUITE.read_text().splitlines()[1:]]
NAMES = sorted({row[0] for row in ROWS})
# Days of a month and leap seconds are not enforced.
LOOSE = {"optional/format/date", "optional/format/date-time", "optional/format/time"}


@pytest.mark.parametrize("name", NAMES)
def test_the_suite(name: str) -> None:
    """What is accepted is valid. Valid values may be spelled otherwise than in the suite: with
    properties in another order, or 1.0 for 1."""
    for _, about, schema, expected in [row for row in ROWS if row[0] == name]:
        if isinstance(expected, str):
            with pytest.raises(GrammarError) as raised:
                accepts(Grammar.json(schema), "1")
            assert expected in str(raised.value), about
            continue
        for value, is_valid, is_accepted in expected:
            text = json.dumps(value, ensure_ascii=False)
            assert accepts(Grammar.json(schema), text) == bool(is_accepted), (about, text)
            assert is_valid or not is_accepted or name in LOOSE, (about, text)


def test_most_of_what_is_valid_is_accepted() -> None:
    told = [t for *_, expected in ROWS if not isinstance(expected, str) for t in expected]
    n_valid = sum(is_valid for _, is_valid, _ in told)
    assert n_valid > 500
    assert sum(v and a for _, v, a in told) > 0.93 * n_valid


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b c", 'q"', "é"])
    leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": [1, "x", [2], None]},
                         {"const": {"k": [1, "y"]}}, {"type": ["string", "integer"]},
                         {"type": "string", "format": "date"}, {"type": "number", "minimum": -2.5},
                         {"type": "string", "pattern": "^[a-c]{1,3}$"},
                         {"type": "integer", "multipleOf": 7, "minimum": 3, "maximum": 99}]),
        st.tuples(st.integers(0, 3), st.integers(0, 4)).map(
            lambda n: {"type": "string", "minLength": n[0], "maxLength": n[0] + n[1]}),
    )  # fmt: skip

    def inner(part: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        return st.one_of(
            st.tuples(part, st.integers(0, 2), st.integers(0, 2)).map(
                lambda x: {"type": "array", "items": x[0], "minItems": x[1],
                           "maxItems": x[1] + x[2]}),
            st.dictionaries(names, part, max_size=3).map(
                lambda x: {"type": "object", "properties": x, "additionalProperties": False,
                           "required": sorted(x)[::2]}),
            st.lists(part, min_size=1, max_size=3).map(lambda x: {"anyOf": x}),
        )  # fmt: skip

    return st.recursive(leaves, inner, max_leaves=6)


@settings(deadline=None, max_examples=60)
@given(schemas(), st.integers(0, 2**32))
def test_what_is_written_validates(schema: dict[str, Any], seed: int) -> None:
    text = written(Grammar.json(schema), random.Random(seed))
    if text is not None:
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)


def test_random_texts_come_to_their_end() -> None:
    """So that the test above looks at some."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}},
              "required": ["a"], "additionalProperties": False}  # fmt: skip
    texts = [written(Grammar.json(schema), random.Random(seed)) for seed in range(20)]
    assert sum(text is not None for text in texts) > 15
    assert len(set(texts)) > 5
