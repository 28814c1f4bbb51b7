"""Standard output: text as it comes, and rows of benchmarks as md, csv, json or jsonl."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm


def write(text: str) -> None:
    """Print a part of a line at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a line at once, past a progress bar."""
    with tqdm.external_write_mode():
        print(text, flush=True)


class Table:
    """A table of llama-bench's with `is_markdown`, otherwise of llama-batched-bench's; its columns
    with their format specs, such as `6d`, `>20` or `<30`."""

    def __init__(self, columns: Mapping[str, str], is_markdown: bool = False) -> None:
        self._columns, self._is_markdown = columns, is_markdown
        self._edge = "| " if is_markdown else "|"

    def head(self) -> str:
        """The names of the columns, and the rule below."""
        names, rules = [], []
        for name, form in self._columns.items():
            side, width = form[0] if form[0] in "<>" else ">", int(re.findall(r"\d+", form)[0])
            names.append(f"{name:{side}{width}}")
            rules.append("-" * (width - 1) + (":" if self._is_markdown and side == ">" else "-"))
        rule = " | ".join(rules) + " |" if self._is_markdown else "-|-".join(rules) + "-|"
        return f"{self._edge}{' | '.join(names)} |\n{self._edge}{rule}"

    def line(self, values: Sequence[Any]) -> str:
        cells = (f"{v:{form}}" for v, form in zip(values, self._columns.values(), strict=True))
        return f"{self._edge}{' | '.join(cells)} |"


class Rows:
    """Prints rows in one form; the array of `json` at the end, also after an error."""

    def __init__(self, form: str, table: Table) -> None:
        self._form, self._table = form, table
        self._documents: list[dict[str, Any]] = []

    def add(self, document: dict[str, Any], values: Sequence[Any]) -> None:
        """Print a row: `values` in the table, `document` in the other forms (csv: no lists)."""
        is_first = not self._documents
        self._documents.append(document)
        if self._form == "jsonl":
            head, line = "", json.dumps(document)
        elif self._form == "csv":
            flat = {key: value for key, value in document.items() if not isinstance(value, list)}
            text = io.StringIO()
            csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="").writerow(flat.values())
            head, line = ",".join(flat) + "\n", text.getvalue()
        else:
            head, line = self._table.head() + "\n", self._table.line(values)
        if self._form != "json":
            say(head + line if is_first else line)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *error: object) -> None:
        if self._documents and self._form == "json":
            say(json.dumps(self._documents, indent=2))
