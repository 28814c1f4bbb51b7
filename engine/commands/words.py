"""The words of a command line, read as llama.cpp reads them, before argparse sees them.

An option takes the words that come next as its values, whatever they begin with; no value is glued
to a name. What only llama.cpp has is in data/llama-options.tsv: each of these options is another
name of ours, has no effect here, or is refused.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from engine import checks
from engine.commands.options import Parser

_FILE = Path(__file__).parents[1] / "data" / "llama-options.tsv"
BENCH, SERVER, EARLIER = "llama-bench", "server", "earlier"
_OPTION = re.compile(r"--?[A-Za-z].*", re.S)


class Row(NamedTuple):
    """A row of the data file; its head says what the columns mean."""

    programs: tuple[str, ...]
    names: tuple[str, ...]
    n_values: int
    values: str
    kind: str
    text: str = ""

    def covers(self, given: Sequence[str]) -> bool:
        """Whether it is about these values. An option that does nothing takes no other as value."""
        if self.values and not self.values.startswith("="):
            return re.fullmatch(self.values, " ".join(given)) is not None
        is_option = self.kind == "note" and any(map(_OPTION.fullmatch, given))
        return self.kind == "refuse" or (len(given) == self.n_values and not is_option)


@cache
def rows() -> list[Row]:
    lines = _FILE.read_text("utf-8").splitlines()
    cells = (line.split("\t") for line in lines if not line.startswith("#"))
    return [
        Row(tuple(p.split(",")), tuple(n.split(",")), int(k), *rest) for p, n, k, *rest in cells
    ]


class Reader:
    """Reads the words of one command; `notes` are the lines about options without effect."""

    def __init__(self, parser: Parser, others: Callable[[], Iterable[Parser]]) -> None:
        """others: the parsers of all commands, made when an option is not of this one."""
        self._parser, self._others = parser, others
        self._given: dict[str, str] = {}  # An option of ours -> its value.
        self._found: dict[str, tuple[Row, list[str]]] = {}

    def read(self, words: Iterable[str]) -> list[str]:
        """The words for argparse, with every value in the word of its option."""
        rest, read = deque(words), list[str]()
        while rest:
            word = rest.popleft()
            if not word.startswith("-") or word == "-":
                read.append(self._positional(word))
                continue
            name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
            if name.startswith("--"):
                name = name.replace("_", "-")
            if equals:
                rest.appendleft(value)
            read += self._option(name, rest, bool(equals))
        return read

    @property
    def notes(self) -> list[str]:
        # `=-t` is no note where -t is given that value.
        return [
            f"{name} has no effect here: {row.text}"
            for name, (row, values) in self._found.items()
            if self._given.get(row.values.removeprefix("=")) not in values
        ]

    def _option(self, name: str, rest: deque[str], has_value: bool) -> list[str]:
        """The words of an option, which takes its values off `rest`."""
        if (action := self._parser.option(name)) is None:
            return self._theirs(name, rest, has_value)
        is_optional = action.nargs == "?" and not has_value
        takes = action.nargs != 0 or has_value
        if not takes or not rest or (is_optional and rest[0].startswith("-")):
            return [name]
        value = rest.popleft()
        self._given |= dict.fromkeys(action.option_strings, value)
        return [f"{name}={value}"]

    def _theirs(self, name: str, rest: deque[str], has_value: bool) -> list[str]:
        """The same for an option that only llama.cpp may have."""
        named = [row for row in rows() if name in row.names]
        mine = list(filter(self._is_mine, named)) or named
        if not mine:
            self._unknown(name)
        n_values = mine[0].n_values
        if has_value and not n_values:
            self._parser.error(f"{name}: expected no value, got {rest[0]!r}")
        values = [rest.popleft() for _ in range(min(n_values, len(rest)))]
        row = next((r for r in mine if r.n_values == n_values and r.covers(values)), None)
        if row is None:
            expected = mine[0].values.replace("|", ", ").replace("\\", "") or "a value"
            came = " ".join(map(repr, values)) or "nothing"
            self._parser.error(f"{name}: expected {expected}, got {came}")
        if row.kind == "refuse":
            # Other values are not: the value is part of what is refused.
            shown = " ".join([name, *values]) if len(mine) > 1 else name
            self._parser.error(f"{_printable(shown)} is not supported: {row.text}")
        if row.kind == "note":
            self._found[name] = row, values
            return []
        return self._translated(name, row, values)

    def _is_mine(self, row: Row) -> bool:
        """True if a row is about this command; an option may have several rows."""
        command = self._parser.prog.split()[-1]
        if command == "bench":
            return BENCH in row.programs
        if command == "serve":
            return SERVER in row.programs
        return set(row.programs) - {EARLIER} not in ({BENCH}, {SERVER})

    def _translated(self, name: str, row: Row, values: list[str]) -> list[str]:
        """What means the same among the options of this command."""
        name_of_ours, equals, value = row.text.partition("=")
        names = [name_of_ours] if row.text else row.names
        ours = next(filter(self._parser.option, names), None)
        if ours is None:
            self._elsewhere(name, names)
            self._unknown(name)
        return ["=".join([ours, *([value] if equals else values)])]

    def _positional(self, word: str) -> str:
        if not self._parser.has_positionals:
            self._parser.error(
                f"expected an option, got {word!r} (a text of several words needs quotes)"
            )
        return word

    def _elsewhere(self, name: str, names: Iterable[str]) -> None:
        """An error that says which commands have an option, if any does."""
        found = [p.prog for p in self._others() if any(map(p.option, names))]
        if found:
            self._parser.error(f"{name} is no option of this command, but of {', '.join(found)}")

    def _unknown(self, name: str) -> NoReturn:
        self._elsewhere(name, [name])
        self._parser.error(f"unknown option {_printable(name)}{self._hint(name)}")

    def _hint(self, name: str) -> str:
        glued = re.fullmatch(r"(-[a-z]+?)(?:=(.*)|([-+]?\d.*))", name)
        action = self._parser.option(glued[1]) if glued else None
        if glued and action and action.nargs != 0:
            return f" (did you mean {glued[1]} {glued[2] or glued[3]}?)"
        known = [n for row in rows() if row.kind != "refuse" for n in row.names]
        return checks.did_you_mean(name, [*self._parser.names, *known], cutoff=0.7)


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)
