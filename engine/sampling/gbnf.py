"""GBNF, llama.cpp's notation for grammars, in the Lark dialect of llguidance.

GBNF spells character by character. llguidance cuts a text into lexemes, each as long as can be, and
is fast only with long ones. So parts without recursion become lexemes where no word of a lexeme is
the beginning of a longer word of any: then both read the same language. llguidance's own converter
makes a lexeme of each such rule; its `[0-9]+ ws "\\n"` matches nothing if ws takes line ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

from engine import checks

Ranges = tuple[tuple[int, int], ...]
_SPACE, _LINES = r"(?:[ \t]|#[^\r\n]*)*", r"(?:[ \t\r\n]|#[^\r\n]*)*"
_NAME, _TOKEN = r"[a-zA-Z0-9_-]+", re.compile(r"(!?)<(?:\[([0-9]{1,9})\]|([^<>\r\n]+))>")
_REPEAT = re.compile(r"([*+?])|\{\s*([0-9]{1,5})\s*(,\s*([0-9]{1,5})?\s*)?\}")
_SIGNS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_HEX = "[0-9a-fA-F]"
_CHARACTER = re.compile(
    rf'\\x({_HEX}{{2}})|\\u({_HEX}{{4}})|\\U({_HEX}{{8}})|\\([trn"\[\]\\])|([^\\])', re.DOTALL
)
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n"}
_LAST_CHARACTER, _SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)
_MAX_DEPTH = 200
# Characters in a lexeme, and steps to compare lexemes: beyond, they are cut into smaller ones.
_MAX_SIZE, _MAX_STEPS = 300, 300_000


class GbnfError(ValueError):
    """A grammar that is none."""


@dataclass(frozen=True)
class Node:
    """An expression. kind: chars (one character of `ranges`), seq and alt (of `parts`), repeat (of
    the one part, `most`: None for no limit), rule, token (`name`: as Lark writes it), and lexeme
    (the part is what the lexer cuts out)."""

    kind: str
    parts: tuple[Node, ...] = ()
    ranges: Ranges = ()
    name: str = ""
    least: int = 0
    most: int | None = None

    def map(self, change: Callable[[Node], Node]) -> Node:
        return replace(self, parts=tuple(map(change, self.parts))) if self.parts else self


Rules = dict[str, Node]


def to_lark(text: str, token_id: Callable[[str], int | None]) -> str:
    """A grammar in Lark; token_id: the id of a token by its text. Raises GbnfError."""
    try:
        rules = _Parser(text, token_id).rules()
        if "root" not in rules:
            raise GbnfError("expected a rule root, got none")
        if (name := _endless(rules)) is not None:
            raise GbnfError(f"expected rules that end, got {name}, which never does")
        return _written(_with_lexemes(rules))
    except RecursionError:
        raise GbnfError("expected rules with less inside each other") from None


def _written(rules: Rules) -> str:
    names = {Node("rule", name=name): f"r{i}" for i, name in enumerate(rules)}
    lexemes = {lexeme: f"T{i}" for i, lexeme in enumerate(_lexemes(rules.values()))}
    lines = [f"start: {names[Node('rule', name='root')]}"]
    every, own = names | lexemes, zip(names.values(), rules.values(), strict=True)
    lines += [f"{name}: {_spelled(rule, every)}" for name, rule in own]
    lines += [f"{name}: /{_spelled(lexeme.parts[0], {})}/" for lexeme, name in lexemes.items()]
    return "\n".join(lines) + "\n"


def _spelled(node: Node, names: dict[Node, str]) -> str:
    """An expression with the names of rules and lexemes; without any, a regex."""
    if node.kind in ("rule", "lexeme", "token"):
        return names.get(node, node.name)
    if node.kind == "chars":
        return "[" + "".join(rf"\x{{{a:x}}}-\x{{{b:x}}}" for a, b in node.ranges) + "]"
    parts, begin = [_spelled(part, names) for part in node.parts], "(" if names else "(?:"
    if node.kind == "repeat":
        return f"{begin}{parts[0]}){{{node.least},{'' if node.most is None else node.most}}}"
    if node.kind == "alt":
        return f"{begin}{'|'.join(parts)})"
    return " ".join(parts) or '""' if names else "".join(parts)


class _Parser:
    """Reads GBNF as llama.cpp does."""

    def __init__(self, text: str, token_id: Callable[[str], int | None]) -> None:
        self._text, self._at, self._token_id = text, 0, token_id
        self._used: dict[str, int] = {}  # Where each rule is used first.

    def rules(self) -> Rules:
        found: Rules = {}
        self._take(_LINES)
        while self._at < len(self._text):
            name = self._take(_NAME) or self._refuse("the name of a rule")
            self._take(_SPACE)
            self._expect("::=")
            self._take(_LINES)
            found[name] = self._alternatives(0)
            if self._text[self._at : self._at + 1] not in ("", "\r", "\n"):
                self._refuse("the end of the rule")
            self._take(_LINES)
        for name, at in self._used.items():
            if name not in found:
                self._at = at
                self._refuse(f"a rule {name} somewhere")
        return found

    def _refuse(self, expected: str) -> NoReturn:
        before, rest = self._text[: self._at], self._text[self._at :]
        line, column = before.count("\n") + 1, self._at - before.rfind("\n")
        came = checks.shown(rest[:20]) if rest else "the end"
        raise GbnfError(f"line {line}, column {column}: expected {expected}, got {came}")

    def _take(self, pattern: str) -> str:
        found = re.compile(pattern).match(self._text, self._at)
        self._at = found.end() if found else self._at
        return found[0] if found else ""

    def _expect(self, text: str) -> None:
        if not self._take(re.escape(text)):
            self._refuse(text)

    def _alternatives(self, depth: int) -> Node:
        if depth > _MAX_DEPTH:
            self._refuse(f"at most {_MAX_DEPTH} groups inside each other")
        found = [self._sequence(depth)]
        while self._take(r"\|"):
            self._take(_LINES)
            found.append(self._sequence(depth))
        return found[0] if len(found) == 1 else Node("alt", tuple(found))

    def _sequence(self, depth: int) -> Node:
        space, parts = _LINES if depth else _SPACE, list[Node]()
        while (part := self._part(depth)) is not None:
            self._take(space)
            while found := _REPEAT.match(self._text, self._at):
                least, most = _SIGNS[found[1]] if found[1] else (int(found[2]), int(found[2]))
                if found[3]:
                    most = int(found[4]) if found[4] else None
                if most is not None and most < least:
                    self._refuse(f"at least {least} as the second number")
                self._at = found.end()
                part = Node("repeat", (part,), least=least, most=most)
                self._take(space)
            if self._text.startswith("{", self._at):
                self._refuse("{n}, {n,} or {n,m}")
            parts.append(part)
        return parts[0] if len(parts) == 1 else Node("seq", tuple(parts))

    def _part(self, depth: int) -> Node | None:
        start = self._at
        if self._take('"'):
            return Node("seq", tuple(Node("chars", ranges=((c, c),)) for c in self._until('"')))
        if self._take(r"\["):
            is_not = bool(self._take(r"\^"))
            return Node("chars", ranges=_set(self._ranges(), is_not))
        if self._take(r"\("):
            self._take(_LINES)
            inner = self._alternatives(depth + 1)
            self._expect(")")
            return inner
        if self._take(r"\."):
            return Node("chars", ranges=_set((), True))
        if found := _TOKEN.match(self._text, self._at):
            i = int(found[2]) if found[2] else self._token_id(f"<{found[3]}>")
            if i is None:
                self._refuse("a token of the vocabulary")
            self._at = found.end()
            return Node("token", name=f"<[{'^' * bool(found[1])}{i}]>")
        if name := self._take(_NAME):
            self._used.setdefault(name, start)
            return Node("rule", name=name)
        return None

    def _until(self, end: str) -> Iterator[int]:
        """Characters up to an end that is not escaped."""
        while not self._take(end):
            yield self._character()

    def _character(self) -> int:
        if self._at == len(self._text):
            self._refuse("more characters")
        found = _CHARACTER.match(self._text, self._at)
        digits = found and (found[1] or found[2] or found[3])
        code = int(digits, 16) if digits else 0
        if not found or code > _LAST_CHARACTER or _SURROGATES[0] <= code <= _SURROGATES[1]:
            self._refuse("an escape that GBNF has")
        self._at = found.end()
        return code if digits else ord(_ESCAPES.get(found[4], found[4]) or found[5])

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """The ranges of a class, whose `[` is read."""
        while not self._take("]"):
            first = last = self._character()
            if self._take(r"-(?!\])"):
                last = self._character()
            if last < first:
                self._refuse("a range that rises")
            yield first, last


def _set(ranges: Iterable[tuple[int, int]], is_not: bool) -> Ranges:
    """Ranges in order, without overlaps and surrogates; or all but these."""
    gaps, at = list[tuple[int, int]](), 0
    for low, high in sorted([*ranges, _SURROGATES] if is_not else ranges):
        if low > at:
            gaps.append((at, low - 1))
        at = max(at, high + 1)
    if at <= _LAST_CHARACTER:
        gaps.append((at, _LAST_CHARACTER))
    return tuple(gaps) if is_not else _set(gaps, True)


def _endless(rules: Rules) -> str | None:
    """A rule that root needs and that no text matches, if there is one."""
    ends = set[str]()

    def can_end(node: Node) -> bool:
        match node.kind:
            case "rule":
                return node.name in ends
            case "chars":
                return bool(node.ranges)
            case "alt":
                return any(map(can_end, node.parts))
        return (node.kind == "repeat" and not node.least) or all(map(can_end, node.parts))

    while new := {name for name, rule in rules.items() if name not in ends and can_end(rule)}:
        ends |= new
    return None if "root" in ends else next(name for name in rules if name not in ends)


def _with_lexemes(rules: Rules) -> Rules:
    """The rules that root needs, with lexemes around all characters."""
    regular: Rules = {}  # Those without recursion and tokens, as one expression of characters each.
    sizes: dict[str, int] = {}

    def size(node: Node) -> int:
        """Characters in an expression; more than a lexeme may have where it is none."""
        if node.kind in ("rule", "token"):
            return sizes.get(node.name, _MAX_SIZE + 1)
        return sum(map(size, node.parts)) or 1

    def inlined(node: Node) -> Node:
        return regular[node.name] if node.kind == "rule" else node.map(inlined)

    def marked(node: Node) -> Node:
        return _lexeme(inlined(node)) if size(node) <= _MAX_SIZE else node.map(marked)

    left = dict(rules)
    while new := {name: n for name, rule in left.items() if (n := size(rule)) <= _MAX_SIZE}:
        regular |= {name: inlined(left.pop(name)) for name in new}
        sizes |= new
    if "root" in regular:  # Nothing follows it.
        return {"root": _lexeme(regular["root"])}
    made = {name: marked(rule) for name, rule in left.items()}
    while broken := _ambiguous(_lexemes(made.values())):
        made = {name: _split(rule, broken) for name, rule in made.items()}
    return made


def _lexemes(nodes: Iterable[Node]) -> dict[Node, None]:
    found = dict[Node, None]()
    for node in nodes:
        found |= {node: None} if node.kind == "lexeme" else _lexemes(node.parts)
    return found


def _lexeme(node: Node) -> Node:
    return Node("lexeme", (node,))


def _split(node: Node, broken: set[Node]) -> Node:
    """With smaller lexemes for the broken ones."""
    if node.kind != "lexeme":
        return node.map(lambda part: _split(part, broken))
    (inner,) = node.parts
    if node not in broken:
        return node
    if inner.kind == "seq" and any(part.kind != "chars" for part in inner.parts):
        *first, last = inner.parts
        return Node("seq", (_lexeme(Node("seq", tuple(first))), _lexeme(last)))
    return inner.map(_lexeme)


def _is_nullable(node: Node) -> bool:
    if node.kind == "repeat" and not node.least:
        return True
    every = any if node.kind == "alt" else all
    return node.kind != "chars" and every(map(_is_nullable, node.parts))


class _Positions:
    """Glushkov's automaton: the characters of expressions, and which follow each."""

    def __init__(self) -> None:
        self.ranges: list[Ranges] = []
        self.follow: list[set[int]] = []

    def add(self, node: Node) -> tuple[set[int], set[int]]:
        """(where it begins, where it ends)"""
        if node.kind == "chars":
            self.ranges.append(node.ranges)
            self.follow.append(set())
            return ({len(self.ranges) - 1},) * 2
        first, last, is_start = set[int](), set[int](), True
        for part in node.parts:
            begin, end = self.add(part)
            first |= begin if is_start else set()
            if node.kind == "seq":
                self._join(last, begin)
                last = last if _is_nullable(part) else set()
                is_start = is_start and _is_nullable(part)
            last = last | end
        if node.kind == "repeat" and node.most != 1:
            self._join(last, first)
        return first, last

    def _join(self, before: set[int], after: set[int]) -> None:
        for position in before:
            self.follow[position] |= after


def _ambiguous(lexemes: Iterable[Node]) -> set[Node]:
    """The lexemes of which a word begins with a shorter word of a lexeme. The positions that one
    text leads to are followed in pairs, with every repetition taken as one without a limit."""
    automaton, owner, lasts, firsts = _Positions(), list[Node](), set[int](), set[int]()
    for lexeme in lexemes:
        first, last = automaton.add(lexeme.parts[0])
        owner += [lexeme] * (len(automaton.ranges) - len(owner))
        lasts |= last
        firsts |= first
    broken, seen, work, n_steps = set[Node](), set[tuple[int, int]](), [(firsts, firsts)], 0
    while work:
        left, right = work.pop()
        n_steps += len(left) * len(right)
        if n_steps > _MAX_STEPS:
            return {lexeme for lexeme in owner if lexeme.parts[0].kind != "chars"}
        for p, q in ((p, q) for p in left for q in right if (p, q) not in seen):
            if _meet(automaton.ranges[p], automaton.ranges[q]):
                seen.add((p, q))
                if p in lasts and automaton.follow[q]:
                    broken.add(owner[q])
                work.append((automaton.follow[p], automaton.follow[q]))
    return broken


def _meet(a: Ranges, b: Ranges) -> bool:
    return any(low <= high2 and low2 <= high for low, high in a for low2, high2 in b)
