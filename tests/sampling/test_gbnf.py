"""GBNF against what llama.cpp means by it: all short texts of an alphabet, and random grammars."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.gbnf import GbnfError, to_lark
from engine.sampling.grammar import Grammar, GrammarError
from tests.support.grammars import GRAMMARS, TOKENIZER, accepts, language

pytest.importorskip("llguidance")


def texts(alphabet: str, longest: int) -> list[str]:
    return ["".join(t) for n in range(longest + 1) for t in product(alphabet, repeat=n)]


def is_balanced(text: str) -> bool:
    """Of ( a )."""
    before = None
    while before != text:
        before, text = text, text.replace("(a)", "").replace("()", "")
    return not text


# A grammar, an alphabet, and the regex of its language, or whether a text is in it.
CASES: list[tuple[str, str, str | Callable[[str], bool]]] = [
    ('root ::= "ab" | "b"', "ab", "ab|b"),
    ('root ::= "a"* "b"+ "c"?', "abc", "a*b+c?"),
    ('root ::= "ab"{2} | "b"{1,} | "c"{0,2}', "abc", "abab|b+|c{0,2}"),
    ('root ::= "ab"*', "ab", "(?:ab)*"),  # The whole literal is repeated.
    ("root ::= [ab]* [^a]", "abc", "[ab]*[^a]"),
    ("root ::= [a-b-]+", "ab-", "[a-b-]+"),
    (r"root ::= [\]\[\\^]", "]\\[^", r"[\]\[\\^]"),
    ("root ::= . .", "aé", ".."),
    (r'root ::= "\x61\u0062\U00000063" "\t"', "abc\t", "abc\t"),
    ('root ::= ("a" | "b" ("a" | ))* # a comment\n# another\n', "ab", "(?:a|ba?)*"),
    ('root ::= "a" (\n"b" |\n"a"\n) "a"\n', "ab", "a(?:b|a)a"),
    ('root ::= "a" |\n  "b"', "ab", "a|b"),
    ('root ::= x-1 y\nx-1 ::= "a"\ny ::= x-1 | "b"', "ab", "a(?:a|b)"),
    ('a ::= "b"\nroot ::= a\na ::= "a"', "ab", "a"),  # As in llama.cpp, the last one counts.
    ("root ::= [a-z]+ [a-c]", "abz", "[a-z]+[a-c]"),
    ('root ::= ""', "a", ""),
    ('root ::= "a" root | "b"', "ab", "a*b"),
    ('root ::= root "a" | "b"', "ab", "ba*"),
    ('root ::= "(" root ")" root | "a" root | ', "(a)",
     lambda text: is_balanced(text.replace("a", ""))),
    # Lexemes that begin alike: the longest one is not always meant.
    ('root ::= "ab" "c" t | [ab] [ab] "d" t\nt ::= "x" t | ', "abcdx", "(?:abc|[ab][ab]d)x*"),
    ('root ::= [ab]+ "a" t\nt ::= "(" t ")" | ', "ab()", r"[ab]+a(?:|\(\)|\(\(\)\))"),
    ('root ::= w (" " w)* t\nw ::= [ab]+\nt ::= "(" root ")" | ', "ab ()",
     lambda text: bool(re.fullmatch(r"(?:[ab]+(?: [ab]+)*\()*[ab]+(?: [ab]+)*\)*", text))
     and text.count("(") == text.count(")")),
    # As in llama.cpp's arithmetic.gbnf: a lexeme of num would take the line's end.
    ('root ::= (num "\\n")+ t\nnum ::= [0-9]+ ws\nws ::= [ \\n]*\nt ::= "(" t ")" | ', "1 \n()",
     r"(?:1+[ \n]*\n)+(?:|\(\)|\(\(\)\))"),
    ('root ::= "\\"" [^"]* "\\"" t\nt ::= "," root | ', 'a",', '"[^"]*"(?:,"[^"]*")*'),
    ('root ::= ("a" | "ab")* t\nt ::= "(" t ")" | ', "ab()",
     r"(?:a|ab)*(?:|\(\)|\(\(\)\)|\(\(\(\)\)\))"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "alphabet", "expected"), CASES, ids=[c[0][:40] for c in CASES])
def test_the_language(text: str, alphabet: str, expected: str | Callable[[str], bool]) -> None:
    longest = {2: 7, 3: 6, 4: 5, 5: 5}.get(len(alphabet), 8)
    matches = expected if callable(expected) else re.compile(expected).fullmatch
    found = {t for t in texts(alphabet, longest) if matches(t)}
    assert found
    assert language(Grammar.gbnf(text), alphabet, longest) == found


# (GBNF, the regex) of random expressions over a and b.
ATOMS = st.sampled_from([('"a"', "a"), ('"ab"', "ab"), ("[ab]", "[ab]"), ("[^ac]", "[^ac]"),
                         ('"ba"', "ba"), ('""', "")])  # fmt: skip


def combined(inner: st.SearchStrategy[tuple[str, str]]) -> st.SearchStrategy[tuple[str, str]]:
    several = st.lists(inner, min_size=2, max_size=3)
    return st.one_of(
        several.map(lambda x: (" ".join(g for g, _ in x), "".join(r for _, r in x))),
        several.map(
            lambda x: (f"({' | '.join(g for g, _ in x)})", f"(?:{'|'.join(r for _, r in x)})")
        ),
        st.tuples(inner, st.sampled_from("*+?")).map(
            lambda x: (f"({x[0][0]}){x[1]}", f"(?:{x[0][1]}){x[1]}")
        ),
        inner.map(lambda x: (f"({x[0]}){{1,2}}", f"(?:{x[1]}){{1,2}}")),
    )


@settings(deadline=None, max_examples=80)
@given(st.recursive(ATOMS, combined, max_leaves=6), st.booleans())
def test_random_grammars(expression: tuple[str, str], is_recursive: bool) -> None:
    """With recursion, the grammar is cut into lexemes, which must lose no reading."""
    gbnf, regex = expression
    end = 't ::= "c" t "c" | "cc"' if is_recursive else 't ::= "cc"'
    found = {t for t in texts("ab", 4) if re.fullmatch(regex, t)}
    ends = ["cc", "cccc", "cccccc"] if is_recursive else ["cc"]
    expected = {t + e for t in found for e in ends if len(t + e) <= 6}
    got = language(Grammar.gbnf(f"root ::= {gbnf} t\n{end}"), "abc", 6)
    assert {t for t in got if len(t.rstrip("c")) <= 4} == expected


JSON = r"""
root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


def test_json_has_long_lexemes() -> None:
    """A string is one, so that its masks are fast."""
    lark = to_lark(JSON, lambda text: None)
    strings = [line for line in lark.splitlines() if line.startswith("T") and "5c" in line]
    assert any(line.endswith(r"[\x{22}-\x{22}]/") and "{0,}" in line for line in strings), lark
    grammar = Grammar.gbnf(JSON)
    for text in ('{"a": [1.5, "x\\n\\u00e9", {}], "b":true}', "{}", '{"é": -0}'):
        assert accepts(grammar, text)
    for text in ("[]", '{"a": 01}', '{"a" 1}', '{"a": "\n"}', '{"a": 1,}'):
        assert not accepts(grammar, text)


def test_tokens() -> None:
    """By text or id, and any but one; as in llama.cpp a token is not its text."""
    end = TOKENIZER.encode("<|im_start|>", parse_special=True)[0]
    for spelling in ("<|im_start|>", f"<[{end}]>"):
        grammar = Grammar.gbnf(f'root ::= "a" {spelling} "b"')
        assert accepts(grammar, "a<|im_start|>b", by_bytes=False)
        assert not accepts(grammar, "a<|im_start|>b")
    matcher = GRAMMARS.matcher(Grammar.gbnf(f"root ::= !<[{end}]> [x]"))
    assert end not in matcher.allowed(TOKENIZER.n_vocab)
    assert len(matcher.allowed(TOKENIZER.n_vocab)) > 4000
    with pytest.raises(GrammarError, match="expected a token of the vocabulary, got '<tool>'"):
        GRAMMARS.matcher(Grammar.gbnf("root ::= <tool>"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("root := a", "line 1, column 6: expected ::=, got ':= a'"),
        ('root ::= "a', "line 1, column 12: expected more characters, got the end"),
        ('root ::= ("a"', "column 14: expected ), got the end"),
        ('root ::= "a")', "column 13: expected the end of the rule, got ')'"),
        ("root ::= [a", "expected more characters, got the end"),
        ("root ::= [b-a]", "expected a range that rises, got ']'"),
        (r'root ::= "\q"', "column 11: expected an escape that GBNF has, got"),
        (r'root ::= "\ud800"', "expected an escape that GBNF has"),
        (r'root ::= "\u12"', "expected an escape that GBNF has"),
        (r'root ::= "\U00110000"', "expected an escape that GBNF has"),
        ('root ::= "a"{,2}', "expected {n}, {n,} or {n,m}, got '{,2}'"),
        ('root ::= "a"{3,2}', "expected at least 3 as the second number, got '{3,2}'"),
        ("root ::= * x", "expected the end of the rule, got '* x'"),
        ("x ::= y\ny ::= z", "line 2, column 7: expected a rule z somewhere, got 'z'"),
        ('x ::= "a"', "expected a rule root, got none"),
        ('root ::= x "a"\nx ::= "(" x ")"', "expected rules that end, got root, which never does"),
        ("root ::= " + "(" * 300 + '"a"' + ")" * 300, "at most 200 groups inside each other"),
        ("=", "line 1, column 1: expected the name of a rule, got '='"),
    ],
)
def test_what_is_no_gbnf(text: str, words: str) -> None:
    with pytest.raises(GbnfError) as raised:
        to_lark(text, lambda text: None)
    assert words in str(raised.value)


def test_many_rules_are_bounded() -> None:
    """Each rule twice the one before; and rules inside each other."""
    doubled = "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40))
    assert to_lark(f'root ::= r0\n{doubled}\nr40 ::= "a"', lambda text: None)
    chain = "\n".join(f"r{i} ::= (r{i + 1})*" for i in range(3000))
    with pytest.raises(GbnfError, match="less inside each other"):
        to_lark(f'root ::= r0\n{chain}\nr3000 ::= "a"', lambda text: None)
