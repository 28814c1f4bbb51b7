"""`cli.py bench`: tokens per second, as a table or with the keys of llama-bench."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.bench.facts import ModelFacts, cpu_name
from engine.bench.measure import backend_names, n_gpu_layers, n_threads
from engine.bench.throughput import Case, Measurement, cases_of, mean_and_deviation, measure
from engine.commands.options import (
    Parser,
    at_least,
    common_options,
    engine_options,
    given_fields,
    integers,
)
from engine.config import EngineConfig
from engine.engine import Engine
from engine.version import __version__

ABOUT = "Measure tokens per second of prompts and of generation, as llama-bench does."
# Column -> width, negative for text that stands on the left; llama-bench's.
_COLUMNS = {
    "model": -30, "size": 10, "params": 10, "backend": -10, "threads": 7, "test": 15, "t/s": 20,
}  # fmt: skip
_SAMPLES = ("samples_ns", "samples_ts")
Row = dict[str, Any]


def add_options(p: Parser) -> None:
    """Its options."""
    common_options(p, many=True)
    add = p.add_argument
    lists: Any = {"type": integers(0), "action": "extend", "metavar": "N[,N…]"}
    add("-p", "--n-prompt", help="prompts of N tokens (512; 0: none)", **lists)
    add("-n", "--n-gen", help="generation of N tokens (128; 0: none)", **lists)
    add("-d", "--n-depth", help="each after N positions (0)", **lists)
    add("-r", "--repetitions", type=at_least(1), default=5, metavar="N",
        help="runs of each test that count (5)")  # fmt: skip
    add("--no-warmup", action="store_true", help="no run before those that count")
    add("-s", "--seed", type=at_least(0), default=0, metavar="N", help="of the tokens (0)")
    add("-o", "--output", choices=("md", "json", "csv"), default="md")
    engine_options(p, without=("n_parallel",))


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Print a row for every test of every model."""
    cases = cases_of(args.n_prompt or [512], args.n_gen or [128], args.n_depth or [0])
    if not cases:
        parser.error("nothing to measure: expected a size above 0 for -p or for -n")
    config = {"n_checkpoints": 1} | given_fields(args, EngineConfig)
    longest = max(cases, key=lambda case: case.n_depth + case.n_tokens)
    models = [ModelFacts.of(path) for path in args.model]
    needed = longest.n_depth + longest.n_tokens
    for facts in models:
        facts.check_context(needed, longest.name, config.get("n_ctx"))
    config.setdefault("n_ctx", needed)
    n_runs = len(models) * len(cases) * (args.repetitions + (not args.no_warmup))
    rows: list[Row] = []
    try:
        with tqdm(total=n_runs, unit="run", disable=None) as bar:
            for facts in models:
                bar.set_description(facts.type)
                for row in _rows(facts, cases, config, args, lambda: bar.update()):
                    rows.append(row)
                    with tqdm.external_write_mode():
                        _show(rows, args.output)
    finally:
        if rows and args.output == "json":
            print(json.dumps(rows, indent=2))
    return 0


def _rows(
    facts: ModelFacts,
    cases: list[Case],
    config: dict[str, Any],
    args: argparse.Namespace,
    on_run: Callable[[], None],
) -> Iterator[Row]:
    rng = np.random.default_rng(args.seed)
    with Engine.load(facts.path, **config) as engine:
        for m in measure(engine, cases, args.repetitions, rng, not args.no_warmup, on_run):
            yield _row(facts, engine, m)


def _row(facts: ModelFacts, engine: Engine, m: Measurement) -> Row:
    """A measurement under llama-bench's keys."""
    config, (type_k, type_v) = engine.config, engine.config.cache_types()
    avg_ns, stddev_ns = mean_and_deviation(m.samples_ns)
    avg_ts, stddev_ts = mean_and_deviation(m.samples_ts)
    return {
        "build_commit": __version__,
        "cpu_info": cpu_name(),
        "backends": backend_names(engine),
        "model_filename": facts.path,
        "model_type": facts.type,
        "model_size": facts.size,
        "model_n_params": facts.n_params,
        "n_batch": config.n_batch,
        "n_ubatch": config.n_ubatch,
        "n_threads": n_threads(engine),
        "type_k": type_k.name.lower(),
        "type_v": type_v.name.lower(),
        "n_gpu_layers": n_gpu_layers(engine),
        "n_prompt": m.case.n_prompt,
        "n_gen": m.case.n_gen,
        "n_depth": m.case.n_depth,
        "test_time": m.test_time,
        "avg_ns": round(avg_ns),
        "stddev_ns": round(stddev_ns),
        "avg_ts": avg_ts,
        "stddev_ts": stddev_ts,
        "samples_ns": m.samples_ns,
        "samples_ts": m.samples_ts,
    }


def _show(rows: list[Row], output: str) -> None:
    """The last row at once; JSON is one array, so it comes at the end."""
    if output == "md":
        _show_markdown(rows)
    elif output == "csv":
        _show_csv(rows)
    sys.stdout.flush()


def _show_markdown(rows: list[Row]) -> None:
    """The last row, after the head of the table if it is the first."""
    if len(rows) == 1:
        print(_line(list(_COLUMNS)))
        rules = (f"{'-' * (abs(w) - 1)}{':' if w > 0 else '-'}" for w in _COLUMNS.values())
        print("".join(["|", *(f" {rule} |" for rule in rules)]))
    row = rows[-1]
    size, n_params = row["model_size"], row["model_n_params"]
    in_gib, in_billions = size >= 1 << 30, n_params >= 1e9
    print(
        _line(
            [
                row["model_type"],
                f"{size / 2**30:.2f} GiB" if in_gib else f"{size / 2**20:.2f} MiB",
                f"{n_params / 1e9:.2f} B" if in_billions else f"{n_params / 1e6:.2f} M",
                row["backends"],
                str(row["n_threads"]),
                Case(row["n_prompt"], row["n_gen"], row["n_depth"]).name,
                f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
            ]
        )
    )


def _line(cells: list[str]) -> str:
    widths = zip(cells, _COLUMNS.values(), strict=True)
    aligned = (cell.rjust(w) if w > 0 else cell.ljust(-w) for cell, w in widths)
    return "".join(["|", *(f" {cell} |" for cell in aligned)])


def _show_csv(rows: list[Row]) -> None:
    """The last row, after the names of the columns if it is the first."""
    row = {key: value for key, value in rows[-1].items() if key not in _SAMPLES}
    if len(rows) == 1:
        print(",".join(row))
    csv.writer(sys.stdout, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(row.values())
