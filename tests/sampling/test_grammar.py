"""Masks against what a grammar's language says of each token, and grammars that can't be used."""

from __future__ import annotations

import itertools
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.engine import DEMO_MODEL
from engine.errors import EngineError
from engine.formats.gguf import GGUFFile
from engine.sampling import grammar as grammar_module
from engine.sampling.grammar import Grammar, GrammarError, Grammars, _tokens
from engine.sampling.params import SamplingError, SamplingParams
from engine.text.tokenizer import Tokenizer
from tests.support.grammars import BYTES, GRAMMARS, TEXTS, TOKENIZER, accepts, allowed
from tests.text.test_tokenizer import bpe_metadata, spm_metadata
from tools.ggufwrite import write_gguf

llguidance = pytest.importorskip("llguidance")
TOKENIZER_FILE = GGUFFile(DEMO_MODEL)
WORDS = [f"{a} {n}" for a in ("yes", "no", "maybe") for n in range(100)]
# A grammar with all its texts.
FINITE: list[tuple[Grammar, list[str]]] = [
    (Grammar.regex(r"(yes|no|maybe) (0|[1-9][0-9]?)"), WORDS),
    (Grammar.gbnf('root ::= ("yes" | "no" | "maybe") " " ("0" | [1-9] [0-9]?)'), WORDS),
    # Begun as for llama.cpp; nothing is forced to be cut as the tokenizer would.
    (Grammar.gbnf('%llguidance {}\nstart: /(yes|no|maybe) / ("0" | /[1-9][0-9]?/)'), WORDS),
    (Grammar.lark('start: ("yes" | "no" | "maybe") " " ("0" | /[1-9][0-9]?/)'), WORDS),
    (Grammar.json({"enum": ["a", "ab", 12, 1.5, None, True]}),
     ['"a"', '"ab"', "12", "1.5", "null", "true"]),
    (Grammar.json({"type": "integer", "minimum": 7, "maximum": 211}),
     [str(n) for n in range(7, 212)]),
    (Grammar.regex("[äöü]{2}"), ["".join(p) for p in itertools.product("äöü", repeat=2)]),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "texts"), FINITE, ids=[g.kind for g, _ in FINITE])
def test_a_token_is_allowed_if_some_text_goes_on_with_it(
    grammar: Grammar, texts: list[str], rng: np.random.Generator
) -> None:
    words = [text.encode() for text in texts]
    for goal in rng.choice(len(words), 12):
        matcher, begun = GRAMMARS.matcher(grammar), b""
        while not matcher.is_complete:
            rests = {w[len(begun) :] for w in words if w.startswith(begun)}
            starts = {r[:n] for r in rests for n in range(1, len(r) + 1)}
            expected = {i for i, text in enumerate(TEXTS) if text in starts}
            assert allowed(matcher) - TOKENIZER.eog_ids == expected
            assert allowed(matcher) & TOKENIZER.eog_ids == (
                TOKENIZER.eog_ids if b"" in rests else set()
            )
            options = sorted(i for i in expected if words[goal].startswith(begun + TEXTS[i]))
            if not options:
                break
            token = int(rng.choice(options))
            matcher.accept(token)
            begun += TEXTS[token]
        assert begun in words


@pytest.mark.parametrize("pattern", ["a*b?", "(ab|a)*", "[^a]+", "a{2,3}|b", "(a|b)*abb", "é|a/b"])
def test_regexes_are_pythons(pattern: str) -> None:
    for n in range(6):
        for text in map("".join, itertools.product("ab/é", repeat=n)):
            assert accepts(Grammar.regex(pattern), text) == bool(re.fullmatch(pattern, text)), text


def test_its_tokens_are_ours(tmp_path: Path) -> None:
    """Of all kinds of tokens, of SentencePiece, and of a model with more logits than tokens."""
    files = [TOKENIZER_FILE]
    for metadata in (bpe_metadata(), spm_metadata()):
        write_gguf(tmp_path / "vocab.gguf", metadata, [])
        files.append(GGUFFile(tmp_path / "vocab.gguf"))
    for tokenizer in map(Tokenizer.from_gguf, files):
        made = _tokens(llguidance, tokenizer, tokenizer.n_vocab + 7)
        for i in range(tokenizer.n_vocab):
            text = tokenizer.token_bytes(i)
            if not text or text[:1] == b"\xff" or i in tokenizer.eog_ids:
                # Empty ones are shown by their ids.
                assert made.is_special_token(i) or made.decode_bytes([i]) == b"<[%d]>" % i
            else:
                assert not made.is_special_token(i)
                assert made.decode_bytes([i]) == text
        assert set(made.eos_tokens) == tokenizer.eog_ids


def test_without_end_tokens_only_the_grammar_ends() -> None:
    tokenizer = Tokenizer.from_gguf(TOKENIZER_FILE)
    tokenizer.eog_ids = frozenset()
    matcher = Grammars(tokenizer, tokenizer.n_vocab).matcher(Grammar.regex("ab?"))
    matcher.accept(BYTES[ord("a")])
    assert allowed(matcher) == {BYTES[ord("b")]}
    matcher.accept(BYTES[ord("b")])
    assert matcher.is_complete


ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
REFUSED: list[tuple[Callable[[], Grammar], str]] = [
    (lambda: Grammar.json('{"a'), "expected a JSON schema, got Unterminated string"),
    (lambda: Grammar.json(5), "expected a JSON schema, an object, got 5"),
    (lambda: Grammar.json({"a": {1, 2}}), "expected a JSON schema, got Object of type set"),
    (lambda: Grammar.json("[" * 100_000), "expected a JSON schema, got maximum recursion"),
    (lambda: Grammar.json({"not": {}}), "expected keywords that can be enforced, got #/not"),
    (lambda: Grammar.json({"properties": {"a": {"items": [{"uniqueItems": True}]}}}),
     "expected keywords that can be enforced, got #/properties/a/items/0/uniqueItems"),
    (lambda: Grammar.json({"type": "string", "format": "regex"}), "Unknown format: regex"),
    (lambda: Grammar.json({"oneOf": [{"type": "number"}, {"type": "integer"}]}),
     "expected a schema that can be enforced, got: oneOf whose options overlap"),
    (lambda: Grammar.json({"type": "string", "pattern": "(?!a)b"}), "look-around"),
    (lambda: Grammar.json({"type": "strin"}), "Invalid type: strin"),
    (lambda: Grammar.json({"properties": 5}), "properties must be an object"),
    (lambda: Grammar.json({"properties": {"a": 5}}), "a schema, an object, at #/properties/a"),
    (lambda: Grammar.json({"$ref": "#/$defs/a"}), "does not exist"),
    (lambda: Grammar.json(False), "expected a schema that some value matches, got false"),
    (lambda: Grammar.json({"enum": []}), "Unsatisfiable schema"),
    (lambda: Grammar.json({"$ref": "#"}), "recursion without end"),
    (lambda: Grammar.json(ENDLESS), "recursion without end"),
    (lambda: Grammar.json({"description": "x" * 1_000_000}), "expected at most 524288 bytes"),
    # Of a divisor the lexer has as many states: this one takes gigabytes.
    (lambda: Grammar.json({"items": [{"multipleOf": 9973}, {"multipleOf": 99.67}]}),
     "expected multipleOf whose digits have a common multiple up to 10000, got 99400891"),
    (lambda: Grammar.json(nested(100)), "expected at most 64 schemas inside each other"),
    (lambda: Grammar.gbnf('root ::= "a" root'), "expected rules that end, got root"),
    (lambda: Grammar.gbnf(""), "expected a grammar (gbnf), got an empty text"),
    (lambda: Grammar.gbnf("#" * 65_537), "expected at most 65536 bytes, got 65537"),
    (lambda: Grammar.lark("start: A\nA: /(?s:.)*a(?s:.){15}b/ & /(?s:.)*b(?s:.){15}a/ & "
                          "~/(?s:.)*c(?s:.){14}c(?s:.)*/"), "expected a smaller grammar, got one"),
    (lambda: Grammar.gbnf("\ud800"), "text: expected Unicode"),
    (lambda: Grammar.lark('start: "a" b'), "line 1, column 8: unknown name"),
    (lambda: Grammar.regex("(?=a)b"), "a regex that can be used, got one where look-around"),
    (lambda: Grammar.regex("["), "expected a regex that can be used, got one where unclosed"),
    (lambda: Grammar.regex("[^\\x00-\\u{10ffff}]"), "expected one that tokens of the vocabulary"),
]  # fmt: skip


def nested(n: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "integer"}
    for _ in range(n):
        made = {"type": "array", "items": made}
    return made


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=[w[:40] for _, w in REFUSED])
def test_what_is_refused(make: Callable[[], Grammar], words: str) -> None:
    begun = time.monotonic()
    with pytest.raises(GrammarError) as raised:
        GRAMMARS.matcher(make())
    text = str(raised.value)
    assert words in text
    assert text.startswith("grammar: ")
    assert text.isprintable()
    assert len(text) < 400
    assert time.monotonic() - begun < 5


def test_params_take_grammars_only() -> None:
    with pytest.raises(SamplingError, match="grammar: expected a Grammar, got 'root"):
        SamplingParams(grammar="root ::= x")  # type: ignore[arg-type]
    with pytest.raises(GrammarError, match="kind: expected one of json_schema, gbnf"):
        Grammar("xml", "a")


def test_keywords_that_demand_nothing_are_dropped() -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": False, "then": {},
              "minContains": 2, "dependentRequired": {}, "x-guidance": {"lenient": 1}}  # fmt: skip
    assert accepts(Grammar.json(schema), "[1, 1]")
    assert not accepts(Grammar.json(schema), '["a"]')


def test_large_objects() -> None:
    """Up to a limit, of which the token's error tells."""
    for n, is_taken in ((990, True), (2000, False)):
        properties = {f"p{i}": {"type": "integer"} for i in range(n)}
        grammar = Grammar.json({"type": "object", "properties": properties})
        if is_taken:
            assert accepts(grammar, '{"p7": 1, "p989": 2}')
            assert not accepts(grammar, '{"p7": "1"}')
            continue
        with pytest.raises(GrammarError, match=r"a smaller grammar, got one with .* items"):
            accepts(grammar, "{}")


def test_long_chains_do_not_end_the_process() -> None:
    """llguidance's stack overflowed with a thousand references, one in the other."""
    parts = {
        f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(4000)
    }
    ends: dict[str, Any] = {"$ref": "#/$defs/a0", "$defs": parts | {"a4000": {"type": "integer"}}}
    assert accepts(Grammar.json(ends), "[[]]")
    rules = "\n".join(f'r{i}: "x" r{i + 1}' for i in range(12_000))
    assert not accepts(Grammar.lark(f'start: r0\n{rules}\nr12000: "a"'), "xa")


def test_what_recursion_may_end() -> None:
    tree = {"type": "object", "required": ["kids"], "additionalProperties": False,
            "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}}  # fmt: skip
    assert accepts(Grammar.json(tree), '{"kids": [{"kids": []}]}')
    either = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}, {"const": 1}]},
              "b": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/a"}}}}  # fmt: skip
    assert accepts(Grammar.json(either), "[[1], 1]")


def test_a_vocabulary_that_cannot_spell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_gguf(TOKENIZER_FILE)
    spelled = tokenizer.token_bytes

    def without_z(i: int, special: bool = False) -> bytes:
        return b"" if b"z" in spelled(i) else spelled(i, special)

    monkeypatch.setattr(tokenizer, "token_bytes", without_z)
    grammars = Grammars(tokenizer, tokenizer.n_vocab)
    with pytest.raises(GrammarError, match="tokens of the vocabulary can spell"):
        grammars.matcher(Grammar.regex("z"))
    matcher = grammars.matcher(Grammar.regex("az"))
    matcher.accept(BYTES[ord("a")])
    with pytest.raises(GrammarError, match="tokens of the vocabulary can spell"):
        matcher.allowed(tokenizer.n_vocab)


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where several threads ask for it, apart from them."""
    threads = list[str]()
    body = grammar_module._body

    def slow(*args: Any) -> str:
        threads.append(threading.current_thread().name)
        time.sleep(0.05)
        return body(*args)

    monkeypatch.setattr(grammar_module, "_body", slow)
    grammars = Grammars(TOKENIZER, TOKENIZER.n_vocab)
    ask = [
        threading.Thread(target=lambda: grammars.matcher(Grammar.json({"type": "null"})))
        for _ in range(4)
    ]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    grammars.matcher(Grammar.json('{"type":   "null"}'))
    assert len(threads) == 1
    assert threads[0].startswith("grammars")


def test_only_some_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were used last."""
    made = list[str]()
    body = grammar_module._body

    def counted(grammar: Grammar, tokenizer: Tokenizer) -> str:
        made.append(grammar.text)
        return body(grammar, tokenizer)

    monkeypatch.setattr(grammar_module, "_body", counted)
    monkeypatch.setattr(grammar_module, "_MAX_COMPILED", 2)
    grammars = Grammars(TOKENIZER, TOKENIZER.n_vocab)
    for text in "abacab":
        grammars.matcher(Grammar.regex(text))
    assert made == ["a", "b", "c", "b"]


def test_one_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(grammar_module, "_COMPILE_S", 0.05)
    monkeypatch.setattr(grammar_module, "_body", lambda *args: go.wait() and "start: " + '"a"')
    grammars = Grammars(TOKENIZER, TOKENIZER.n_vocab)
    with pytest.raises(GrammarError, match="expected one that compiles within"):
        grammars.matcher(Grammar.regex("a"))
    go.set()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EngineError) as raised:
        Grammars(TOKENIZER, TOKENIZER.n_vocab).matcher(Grammar.regex("a"))
    assert str(raised.value) == (
        "grammar: it needs llguidance: pip install 'gdn-engine[constraints]'"
    )
