"""plot-bench: the formats that it reads, the curves that it draws, and its errors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.bench import plots
from engine.bench.measure import Case, Measurement
from engine.bench.plots import Curve, Facts, PlotError, Point
from engine.commands.sweep_bench import _TABLE, _values
from tests.support.helpers import Cli

Rng = np.random.Generator
Row = dict[str, float]
KEYS = ("n_kv", "speed_pp", "speed_tg")
IK_TABLE = """
main: n_kv_max = 1024, n_batch = 2048, n_ubatch = 512, flash_attn = 1, n_gpu_layers = 0, …

|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |
|-------|--------|--------|----------|----------|----------|----------|
|   512 |    128 |      0 |    1.766 |   289.92 |    2.936 |    43.60 |
ggml: a line of the log
|   512 |    128 |    512 |    2.276 |   224.96 |    3.536 |    36.20 |
"""
IK_JSON = (
    '{"n_kv_max": 1024, "n_batch": 2048, "n_ubatch": 512, "flash_attn": 1, "n_gpu_layers": 0, '
    '"n_threads": 4, "n_threads_batch": 4, "pp": 512, "tg": 128, "n_kv": 512, "t_pp": 2.276, '
    '"speed_pp": 224.956, "t_tg": 3.536, "speed_tg": 36.199}\n'
)


@pytest.fixture
def rows(rng: Rng) -> list[Row]:
    """Rows of sweep-bench with random times."""
    cases = [Case(64, 16, n_kv) for n_kv in range(0, 640, 64)]
    return [_values(Measurement(case, *rng.uniform(0.5, 9, (2, 1)).tolist())) for case in cases]


def markdown(rows: list[Row]) -> str:
    lines = (_TABLE.line(list(row.values())) for row in rows)
    return "\n".join([_TABLE.head(), *lines, ""])


def json_lines(rows: list[Row]) -> str:
    return "".join(json.dumps({key: row[key] for key in KEYS}) + "\n" for row in rows)


def test_ik_output_is_read() -> None:
    expected = [Point(0, 289.92, 43.6), Point(512, 224.96, 36.2)]
    assert plots.parse_points(IK_TABLE) == expected
    assert plots.parse_points(IK_TABLE.replace("\n", "\r\n")) == expected
    assert plots.parse_points(IK_JSON) == [Point(512, 224.956, 36.199)]
    assert len(plots.parse_points("\ufeff" + IK_JSON + IK_TABLE)) == 3


@pytest.mark.parametrize("written", [markdown, json_lines])
def test_output_of_sweep_bench_is_read(
    rows: list[Row], written: Callable[[list[Row]], str]
) -> None:
    points = plots.parse_points(written(rows))
    for point, row in zip(points, rows, strict=True):
        expected = tuple(row[key] for key in KEYS)
        assert point == pytest.approx(expected, abs=0.0051 if written is markdown else 0)


OURS = {
    "model_filename": "models/a, b.gguf", "model_type": "qwen35 0.8B Q8_0",
    "machine": "NVIDIA H200, sm_90 + Xeon", "n_threads": 1,
}  # fmt: skip
FACTS = Facts("a, b.gguf, qwen35 0.8B Q8_0", "NVIDIA H200, sm_90 + Xeon", "1 thread")
MAIN = "".join(f"main: {key} = {value}\n" for key, value in OURS.items())


def test_facts_of_a_run() -> None:
    """What the data does not say is unknown."""
    unknown = Facts("model unknown", "machine unknown", "threads unknown")
    assert plots.parse_facts(IK_JSON) == unknown._replace(threads="4 threads")
    assert plots.parse_facts(IK_TABLE) == unknown
    head = "main: n_gpu_layers = 0, n_threads = 2, n_threads_batch = 3"
    table = IK_TABLE.replace("main: ", f"{head}\nmain: ")
    assert plots.parse_facts(table) == unknown._replace(threads="2 threads")
    assert plots.parse_facts(MAIN + IK_TABLE) == FACTS
    assert plots.parse_facts("\ufeff" + json.dumps(OURS) + "\n") == FACTS


def test_facts_of_several_runs_in_one_file() -> None:
    rows = [OURS, OURS | {"n_threads": 2}, OURS]
    text = "\n".join(map(json.dumps, rows))
    assert plots.parse_facts(text) == FACTS._replace(threads="threads unknown")
    assert plots.parse_facts(MAIN + json.dumps(OURS)) == FACTS


@pytest.mark.parametrize(
    "value", [None, "", 0, {}, "\n", [], float("nan"), 1e999, "x\x1b", "y" * 99]
)
def test_strange_facts(value: Any) -> None:
    facts = plots.parse_facts(json.dumps(dict.fromkeys(OURS, value)))
    for text in facts:
        assert text.isprintable()
        assert 0 < len(text) <= 48


def drawn(curves: list[Curve], path: Path) -> list[str]:
    """The texts of a picture: an SVG has them as comments."""
    plots.draw(curves, str(path))
    return re.findall("<!-- (.*?) -->", path.read_text())


def test_the_title_has_what_curves_share(tmp_path: Path) -> None:
    points = [Point(0, 1, 1)]
    first = "a, b.gguf, qwen35 0.8B Q8_0 · NVIDIA H200, sm_90 + Xeon"
    texts = drawn([Curve("a", points, FACTS)], tmp_path / "1.svg")
    assert first + " · 1 thread" in texts
    assert "a" in texts
    two = [Curve("a", points, FACTS), Curve("b", points, FACTS._replace(threads="2 threads"))]
    texts = drawn(two, tmp_path / "2.svg")
    assert {first, "a: 1 thread", "b: 2 threads"} <= {*texts}
    texts = drawn([two[0], Curve("c", points)], tmp_path / "3.svg")
    unknown = "c: model unknown · machine unknown · threads unknown"
    assert {f"a: {first} · 1 thread", unknown} <= {*texts}


def test_the_command_reads_facts(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(MAIN + IK_TABLE)
    picture = tmp_path / "a.svg"
    assert cli("plot-bench", tmp_path / "a.md", "-o", picture) == (0, "", "")
    assert f"<!-- {' · '.join(FACTS)} -->" in picture.read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected sweep-bench's output (its table or JSON lines), got nothing"),
        ("\n hello\n", "(its table or JSON lines), got 'hello'"),
        (_TABLE.head(), "expected sweep-bench's output"),
        ("| model | size |", "line 1: expected the columns PP | TG | N_KV | T_PP s"),
        (IK_TABLE.rstrip()[:-2], "line 8: expected the columns"),
        (IK_TABLE.replace("36.20", "nan"), "line 8: expected numbers for n_kv, speed_pp"),
        (IK_TABLE.replace("36.20", "x\x1b"), "got '|   512 |"),
        ("{", "line 1: expected a row of sweep-bench as one JSON object, got '{'"),
        (IK_JSON[:-9], "line 1: expected a row of sweep-bench as one JSON object"),
        ('{"a":' * 100_000, "expected a row of sweep-bench as one JSON object"),
        (IK_JSON + '{"n_kv": 1}', "line 2: expected a row of sweep-bench with the key speed_pp"),
        (IK_JSON.replace("36.199", "null"), "line 1: expected numbers"),
        (IK_JSON.replace("36.199", "1e999"), "line 1: expected numbers"),
        (IK_JSON.replace("36.199", "-1"), "line 1: expected numbers"),
        (IK_JSON.replace("36.199", "9" * 400), "line 1: expected numbers"),
    ],
)
def test_foreign_text_is_refused(text: str, expected: str) -> None:
    with pytest.raises(PlotError) as refusal:
        plots.parse_points(text)
    assert expected in str(refusal.value)
    assert len(str(refusal.value)) < 200
    assert str(refusal.value).isprintable()


def test_labels() -> None:
    assert plots.labels_of(["x/a.md", "b.c.jsonl", "-"]) == ["a", "b.c", "-"]
    assert plots.labels_of(["x/a.md", "y/a.jsonl", "b.md"]) == ["x/a.md", "y/a.jsonl", "b"]


def test_panels(rows: list[Row]) -> None:
    """One line per curve and panel, y from 0 to above the highest point."""
    from matplotlib.figure import Figure

    points = [Point(*(row[key] for key in KEYS)) for row in rows]
    other = [Point(0, 1, 1000), Point(64, 1, 1000)]
    for field in ("speed_pp", "speed_tg"):
        axes = Figure().subplots()
        lines = plots._panel(axes, "T", [Curve("a", points), Curve("b", other)], field)
        for line, drawn in zip(lines, (points, other), strict=True):
            assert line.get_xdata().tolist() == [p.n_kv for p in drawn]
            assert line.get_ydata().tolist() == [getattr(p, field) for p in drawn]
        low, high = axes.get_ylim()
        assert low == 0
        assert high > max(getattr(p, field) for p in [*points, *other])
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("N_KV (tokens)", "tokens/s")


@pytest.mark.parametrize("suffix", plots.SUFFIXES)
def test_the_command(cli: Cli, tmp_path: Path, rows: list[Row], suffix: str) -> None:
    names = ["a.md", "b.jsonl", "_$x$ ünd.md", f"{'long' * 40}.md"]
    for name in names:
        text = json_lines(rows) if name.endswith("jsonl") else markdown(rows)
        (tmp_path / name).write_text(text)
    picture = tmp_path / f"out{suffix}"
    picture.write_text("an older one")
    status, out, err = cli("plot-bench", *(tmp_path / name for name in names), "-o", picture)
    assert (status, out, err) == (0, "", "")
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert picture.read_bytes().startswith(start)


def test_strange_names_show_in_the_legend(cli: Cli, tmp_path: Path, rows: list[Row]) -> None:
    """Many curves give no warnings; an SVG has the labels as comments."""
    curves = [Curve(f"_${i}^", [Point(0, 0, 0)]) for i in range(23)] + [Curve("日本", [])]
    path = tmp_path / "a.svg"
    plots.draw(curves, str(path))
    text = path.read_text()
    assert all(f"<!-- _${i}^ -->" in text for i in range(23))
    assert "<!-- 日本 -->" in text


def test_standard_input(cli: Cli, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    assert cli("plot-bench", "-", "-o", picture, stdin=IK_TABLE.encode()).status == 0
    assert picture.exists()


def test_bad_files(cli: Cli, tmp_path: Path) -> None:
    good, bad, binary = tmp_path / "a.md", tmp_path / "b.md", tmp_path / "c.gguf"
    good.write_text(IK_TABLE)
    bad.write_text("| model | size |\n")
    binary.write_bytes(b"GGUF\xff\xfe")
    for file, expected in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (bad, "line 1: expected the columns PP | TG"),
        (binary, "expected UTF-8, got byte 0xff at offset 4"),
    ):
        line = cli("plot-bench", good, file, "-o", tmp_path / "o.png").refused()
        assert line.startswith(f"{file}: {expected}")
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("command", ["plot-bench", "sweep-bench"])
def test_without_matplotlib(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """sweep-bench says so before it measures."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    file, picture = tmp_path / "a.md", tmp_path / "o.png"
    file.write_text(IK_TABLE)
    options = {"plot-bench": (file, "-o", picture), "sweep-bench": ("-m", tiny, "--plot", picture)}
    assert cli(command, *options[command]).refused().startswith("plots need matplotlib")


def test_checking_the_output_does_not_change_files(tmp_path: Path) -> None:
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    old.write_text("x")
    for path in (old, new):
        plots.check_output(str(path))
    assert old.read_text() == "x"
    assert not new.exists()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").symlink_to("/dev/full")
    with pytest.raises(PlotError, match="No space left on device"):
        plots.draw([Curve("a", [Point(0, 1, 1)])], str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("argv", "expected"), [(("a.md",), "required: -o"), (("-o", "a.png"), "required: FILE")]
)
def test_usage_errors(cli: Cli, argv: tuple[str, ...], expected: str) -> None:
    result = cli("plot-bench", *argv)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert expected in result.err
