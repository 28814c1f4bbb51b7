"""Speed against depth, drawn: curves from sweep-bench's output, ours or ik_llama.cpp's.

Both of its forms are read, the table and JSON lines, also mixed with a program's log; a line that
begins like a row and is none is refused. matplotlib is an optional extra, imported when needed.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
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
_KEYS = ("n_kv", "speed_pp", "speed_tg")


class PlotError(EngineError):
    """A plot that can't be made: unreadable rows, no matplotlib, nowhere to write it."""


class Point(NamedTuple):
    """Tokens per second of prompts and of generation after `n_kv` positions."""

    n_kv: float
    speed_pp: float
    speed_tg: float


class Curve(NamedTuple):
    """The points of one run, and what it is called."""

    label: str
    points: Sequence[Point]


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
        return _from_json(line)
    return _from_table(line) if line.startswith("|") else None


def _from_json(line: str) -> Point:
    try:
        row: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("a row of sweep-bench as one JSON object") from None
    if missing := [key for key in _KEYS if key not in row]:
        raise ValueError(f"a row of sweep-bench with the key {missing[0]}")
    return _point(row[key] for key in _KEYS)


def _from_table(line: str) -> Point | None:
    cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
    if cells == list(COLUMNS) or set("".join(cells)) <= set("-:"):
        return None
    if len(cells) != len(COLUMNS) or not line.endswith("|"):
        raise ValueError(f"the columns {' | '.join(COLUMNS)}")
    _, _, n_kv, _, speed_pp, _, speed_tg = cells
    return _point((n_kv, speed_pp, speed_tg))


def _point(values: Any) -> Point:
    try:
        point = Point(*map(float, values))
    except (TypeError, ValueError, OverflowError):
        point = Point(math.nan, 0, 0)
    if not all(math.isfinite(v) and v >= 0 for v in point):
        raise ValueError(f"numbers for {', '.join(_KEYS)}")
    return point


def check_output(path: str) -> None:
    """Raises PlotError unless a plot can be written there; leaves what is there as it is."""
    _figure_class()
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PlotError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    is_new = not os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
        if is_new:
            os.unlink(path)
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            f"plots need matplotlib (pip install 'gdn-engine[plot]'): {error}"
        ) from None
    return Figure


def labels_of(paths: Sequence[str]) -> list[str]:
    """What files are called in a plot: their stems, or whole paths where those are the same."""
    stems = [Path(path).stem for path in paths]
    return [
        path if stems.count(stem) > 1 else stem for path, stem in zip(paths, stems, strict=True)
    ]


def draw(curves: Sequence[Curve], path: str) -> None:
    """Draw PP and TG against N_KV side by side, a line for each curve. Raises PlotError."""
    n_columns = min(len(curves), 3)
    legend_height = 0.25 * math.ceil(len(curves) / n_columns)
    figure = _figure_class()(figsize=(11, 4.2 + legend_height), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = _panel(left, "Prompt processing (PP)", curves, "speed_pp")
    _panel(right, "Token generation (TG)", curves, "speed_tg")
    legend = figure.legend(
        lines, map(str, range(len(lines))), loc="outside lower center", ncols=n_columns
    )
    # Set afterwards: a label may begin with an underscore, which would hide it, or hold a formula.
    for text, curve in zip(legend.get_texts(), curves, strict=True):
        text.set_parse_math(False)
        text.set_text(_shortened(curve.label))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(path)
    except OSError as error:
        raise PlotError(f"{path}: {error.strerror}") from None


def _panel(axes: Any, title: str, curves: Sequence[Curve], field: str) -> list[Any]:
    lines = []
    for i, (_, points) in enumerate(curves):
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}
        speeds = [getattr(p, field) for p in points]
        lines += axes.plot([p.n_kv for p in points], speeds, marker="o", markersize=4, **style)
    axes.set_title(title)
    axes.set_xlabel("N_KV (tokens)")
    axes.set_ylabel("tokens/s")
    highest = max(getattr(p, field) for _, points in curves for p in points)
    axes.set_ylim(0, 1.08 * highest or 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return lines


def _shortened(label: str) -> str:
    return label if len(label) <= _LABEL_WIDTH else f"…{label[1 - _LABEL_WIDTH :]}"
