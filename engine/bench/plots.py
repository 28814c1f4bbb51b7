"""Plots of speed against depth, from the output of sweep-bench, ours or ik_llama.cpp's."""

from __future__ import annotations

import json
import math
import operator
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import EngineError

# sweep-bench's columns, each with the format of its values.
COLUMNS = {
    "PP": "6d", "TG": "6d", "N_KV": "6d", "T_PP s": "8.3f", "S_PP t/s": "8.2f",
    "T_TG s": "8.3f", "S_TG t/s": "8.2f",
}  # fmt: skip
SUFFIXES = (".png", ".svg", ".pdf")
_LABEL_WIDTH = 48
# Keys of JSON lines, and of the lines `main: key = value, …` above a table, that tell of a run.
_FACTS = ("model_filename", "model_type", "machine", "n_threads")
_FACT = re.compile(rf"\b({'|'.join(_FACTS)}) = (.+?)(?=, \w+ = |$)")


class PlotError(EngineError):
    """A plot that can't be drawn: bad rows, no matplotlib, or a file that can't be written."""


class Point(NamedTuple):
    """Tokens per second of prompts and of generation after `n_kv` positions."""

    n_kv: float
    speed_pp: float
    speed_tg: float


class Facts(NamedTuple):
    """The model, machine and threads of a run, in words. A fact that the data lacks is unknown."""

    model: str = "model unknown"
    machine: str = "machine unknown"
    threads: str = "threads unknown"

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Facts:
        """The facts in a row of sweep-bench."""
        values = ("".join(filter(str.isprintable, str(row.get(key) or ""))) for key in _FACTS)
        path, kind, machine, n = values
        model = ", ".join(filter(None, (Path(path).name, kind)))
        threads = f"{n} thread{'s' * (n != '1')}" if n else ""
        named = {"model": model, "machine": machine, "threads": threads}
        return cls(**{name: _cut(text) for name, text in named.items() if text})


class Curve(NamedTuple):
    """The points of one run, its name in the legend, and its facts."""

    label: str
    points: Sequence[Point]
    facts: Facts = Facts()


def parse_facts(text: str) -> Facts:
    """The facts in the output of sweep-bench; what differs between its rows is unknown."""
    row: dict[str, str] = {}
    for line in map(str.strip, text.removeprefix("\ufeff").splitlines()):
        found = _FACT.findall(line) if line.startswith("main: ") else []
        if line.startswith("{"):
            found = [(key, str(value)) for key, value in json.loads(line).items() if value]
        for key, value in found:
            row[key] = value if row.get(key, value) == value else ""
    return Facts.of(row)


def parse_points(text: str) -> list[Point]:
    """The rows of a table or of JSON lines. Raises PlotError if there are none, or a bad one."""
    points = []
    lines = [line.strip() for line in text.removeprefix("\ufeff").splitlines()]
    for number, line in enumerate(lines, 1):
        try:
            point = _parse_line(line)
        except ValueError as error:
            got = f"{line[:60]}{'…' if len(line) > 60 else ''}"
            raise PlotError(f"line {number}: expected {error}, got {got!r}") from None
        if point is not None:
            points.append(point)
    if not points:
        got = next((repr(line[:60]) for line in lines if line), "nothing")
        raise PlotError(f"expected sweep-bench's output (its table or JSON lines), got {got}")
    return points


def _parse_line(line: str) -> Point | None:
    """A row, or None for a line that is none. Raises ValueError with what was expected."""
    if line.startswith("{"):
        values = _from_json(line)
    elif line.startswith("|"):
        cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
        if cells == list(COLUMNS) or set("".join(cells)) <= set("-:"):
            return None
        if len(cells) != len(COLUMNS) or not line.endswith("|"):
            raise ValueError(f"the columns {' | '.join(COLUMNS)}")
        values = [cells[2], cells[4], cells[6]]
    else:
        return None
    try:
        point = Point(*map(float, values))
    except (TypeError, ValueError, OverflowError):
        point = Point(math.nan, 0, 0)
    if not all(math.isfinite(v) and v >= 0 for v in point):
        raise ValueError(f"numbers for {', '.join(Point._fields)}")
    return point


def _from_json(line: str) -> list[Any]:
    try:
        row: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("a row of sweep-bench as one JSON object") from None
    if missing := [key for key in Point._fields if key not in row]:
        raise ValueError(f"a row of sweep-bench with the key {missing[0]}")
    return [row[key] for key in Point._fields]


def check_output(path: str) -> None:
    """Raise PlotError unless a plot can be written to `path`; a file that exists is not changed."""
    _figure_class()
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PlotError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    is_new = not os.path.lexists(path)
    try:
        open(path, "ab").close()
        if is_new:
            os.unlink(path)
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = f"plots need matplotlib (pip install 'gdn-engine[plot]'): {error}"
        raise PlotError(message) from None
    return Figure


def labels_of(paths: Sequence[str]) -> list[str]:
    """Names of files in a plot: their stems, or whole paths where two stems are the same."""
    stems = [Path(path).stem for path in paths]
    return [p if stems.count(s) > 1 else s for p, s in zip(paths, stems, strict=True)]


def draw(curves: Sequence[Curve], path: str) -> None:
    """Draw PP and TG against N_KV side by side, a line for each curve. Raises PlotError.

    The title has the facts that all curves share, the legend those in which they differ.
    """
    shared = [len(set(values)) == 1 for values in zip(*(c.facts for c in curves), strict=True)]
    # A label with facts may be as wide as the picture.
    n_columns, size = (min(len(curves), 3), 10) if all(shared) else (1, 8)
    legend_height = 0.25 * math.ceil(len(curves) / n_columns)
    figure = _figure_class()(figsize=(11, 4.5 + legend_height), dpi=150, layout="constrained")
    title = figure.suptitle(" · ".join(compress(curves[0].facts, shared)), fontsize=11)
    title.set_parse_math(False)
    left, right = figure.subplots(1, 2)
    lines = _panel(left, "Prompt processing (PP)", curves, "speed_pp")
    _panel(right, "Token generation (TG)", curves, "speed_tg")
    names = map(str, range(len(lines)))
    how = {"loc": "outside lower center", "ncols": n_columns, "fontsize": size}
    legend = figure.legend(lines, names, **how)
    # Set afterwards: matplotlib hides labels that begin with an underscore, and parses formulas.
    for text, (label, _, facts) in zip(legend.get_texts(), curves, strict=True):
        text.set_parse_math(False)
        own = " · ".join(compress(facts, map(operator.not_, shared)))
        text.set_text(": ".join(filter(None, (_cut(label), own))))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(path)
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None


def _cut(text: str) -> str:
    return text if len(text) <= _LABEL_WIDTH else f"…{text[1 - _LABEL_WIDTH :]}"


def _panel(axes: Any, title: str, curves: Sequence[Curve], field: str) -> list[Any]:
    lines = []
    for i, (_, points, _) in enumerate(curves):
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}
        speeds = [getattr(p, field) for p in points]
        lines += axes.plot([p.n_kv for p in points], speeds, marker="o", markersize=4, **style)
    axes.set_title(title)
    axes.set_xlabel("N_KV (tokens)")
    axes.set_ylabel("tokens/s")
    highest = max(getattr(p, field) for _, points, _ in curves for p in points)
    axes.set_ylim(0, 1.08 * highest or 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return lines
