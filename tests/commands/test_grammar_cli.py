"""Options and lines of --prompts with grammars: what each form takes, and how it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.helpers import Cli

pytest.importorskip("llguidance")
SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"],
          "additionalProperties": False}  # fmt: skip
ASK = ("-no-cnv", "-p", "Question: What is 27 plus 48?\nAnswer:", "-n", 60, "--temp", 0)
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


def answer(cli: Cli, *options: object) -> str:
    result = cli(*ASK, "--no-display-prompt", *options)
    assert result.status == 0, result.err
    return result.out.strip()


def test_forms(cli: Cli, tmp_path: Path) -> None:
    """As a text and in a file; a file with a line's end, too."""
    file = tmp_path / "form"
    file.write_text(json.dumps(SCHEMA) + "\n")
    for options in (("-j", json.dumps(SCHEMA)), ("--json-schema-file", file)):
        assert json.loads(answer(cli, *options)).keys() == {"sum"}
    for text in ('root ::= " " [0-9]{2} " items"', "%llguidance {}\nstart: / [0-9]{2} items/"):
        file.write_text(text + "\n")
        assert answer(cli, "--grammar", text) == "75 items"
        assert answer(cli, "--grammar-file", file) == "75 items"
    assert answer(cli, "--guided-regex", " [0-9]{2} (items|things)") in ("75 items", "75 things")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-j", '{"a'), "grammar: expected a JSON schema, got Unterminated string"),
        (("-j", '{"not": {}}'), "grammar: expected keywords that can be enforced, got #/not"),
        (("-j", "false"), "grammar: expected a schema that some value matches, got false"),
        (("-j", json.dumps(ENDLESS)), "recursion without end"),
        (("-j", json.dumps({"title": "x" * 600_000})), "expected at most 524288 bytes, got 600013"),
        (("-jf", "none.json"), "none.json: No such file"),
        (("--grammar", "root ::= x"), "grammar: line 1, column 10: expected a rule x somewhere"),
        (("--grammar", 'root ::= "a" root'), "grammar: expected rules that end, got root"),
        (("--grammar", ""), "grammar: expected a grammar (gbnf), got an empty text"),
        (("--guided-regex", "["), "grammar: expected a regex that can be used, got one where"),
        (("--guided-regex", r"[^\x00-\u{10ffff}]"), "grammar: expected one that tokens of the"),
    ],
)
def test_errors_are_one_line(cli: Cli, options: tuple[object, ...], words: str) -> None:
    result = cli(*ASK, *options)
    assert (result.status, result.out) == (1, "")
    line = result.err.removesuffix("\n")
    assert line.startswith("error: ")
    assert words in line
    assert line.isprintable()
    assert len(line) < 400


def test_a_ban_on_what_the_grammar_needs(cli: Cli) -> None:
    result = cli(*ASK, "--grammar", 'root ::= "a"', "-l", "64-inf")
    assert result.status == 1
    assert "needs 'a' here, which logit_bias, ignore_eos" in result.err


def test_lines_of_prompts(cli: Cli) -> None:
    lines = [
        {"prompt": "x", "json_schema": SCHEMA, "grammar": None, "max_tokens": 60},
        {"prompt": "x", "json_schema": None, "guided_regex": "a|b"},
        {"messages": [{"role": "user", "content": "x"}], "grammar": 'root ::= "yes"'},
        {"prompt": "x", "guided_regex": "a", "grammar": "b"},
        {"prompt": "x", "grammar": 5},
        {"prompt": "x", "json_schema": "{"},
        {"prompt": "x", "grammar": "root ::= y"},
    ]
    stdin = "\n".join(map(json.dumps, lines)).encode()
    result = cli("--prompts", "-", "-np", 4, "--temp", 0, stdin=stdin)
    assert result.status == 1
    found = [json.loads(line) for line in result.out.splitlines()]
    assert json.loads(found[0]["text"]).keys() == {"sum"}
    assert found[1]["text"] in ("a", "b")
    assert found[2]["text"] == "yes"
    assert [line.get("finish_reason") for line in found] == ["stop"] * 3 + ["error"] * 4
    for line, words in zip(found[3:], (
        "expected one form of the output, got grammar and guided_regex",
        "grammar: text: expected a text, got 5", "grammar: expected a JSON schema, got Expecting",
        "grammar: line 1, column 10: expected a rule y somewhere",
    ), strict=True):  # fmt: skip
        assert words in line["error"]
