"""`cli.py bench`: tokens per second, as a table or with the keys of llama-bench."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.bench.facts import ModelFacts, backend_names, cpu_name, n_gpu_layers, n_threads
from engine.bench.measure import Case, Measurement, mean_and_deviation, measure
from engine.commands import summary
from engine.commands.options import CACHE, Parser, given_fields, integers
from engine.commands.output import Rows, Table
from engine.config import EngineConfig
from engine.engine import DEMO_MODEL, Engine
from engine.planning import resolved_config
from engine.version import __version__, commit

ABOUT = "Measure tokens per second of prompts and of generation, as llama-bench does."
# Options that take a list here; the order is that of llama-bench's loops, the last one innermost.
_LISTS = {"n_batch": "batch_size", "n_ubatch": "ubatch_size", "n_threads": "threads"}
# The table's columns, with llama-bench's formats.
_COLUMNS = {
    "model": "<30", "size": ">10", "params": ">10", "backend": "<10", "threads": "7d",
    "n_batch": "7d", "n_ubatch": "8d", "type_k": ">6", "type_v": ">6", "test": ">15", "t/s": ">20",
}  # fmt: skip
_SHOWN_IF_SET = ("n_batch", "n_ubatch", "type_k", "type_v")


def add_options(p: Parser) -> None:
    p.common_options(many=True)
    p.numbers("-p --n-prompt", "process prompts of N tokens (512; 0: none)", low=0)
    p.numbers("-n --n-gen", "generate N tokens (128; 0: none)", low=0)
    p.add_argument("-pg", type=_pair, action="append", default=[], metavar="PP,TG",
        help="process a prompt of PP tokens and generate TG, as one test")  # fmt: skip
    p.numbers("-d --n-depth", "measure each after N tokens of context (0)", low=0)
    p.numbers("-b --batch-size", "most tokens of a batch (2048, or -ub)")
    p.numbers("-ub --ubatch-size", "most tokens of a step (512; cuda: 4096)")
    p.numbers("-t --threads", "CPU threads (all cores)")
    p.number("-r --repetitions", "measured runs of each test (5)", default=5)
    p.flag("--no-warmup", "no unmeasured run before each test")
    p.seed()
    p.choice("-o --output", "format of the results", "md", "csv", "json", "jsonl")
    p.engine_options("n_parallel", *CACHE, *_LISTS)


def _pair(text: str) -> tuple[int, int]:
    sizes = integers(0)(text)
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f"expected two integers and a comma, got {text!r}")
    return sizes[0], sizes[1]


def cases_of(
    prompts: list[int], gens: list[int], depths: list[int], pairs: Sequence[tuple[int, int]] = ()
) -> list[Case]:
    """Every prompt, then every generation, then every pair of both, at each depth; a size of 0
    means none."""
    sizes = [*((n, 0) for n in prompts), *((0, n) for n in gens), *pairs]
    return [Case(*size, n_depth) for n_depth, size in product(depths, sizes) if any(size)]


def engines_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The options of every engine, in llama-bench's order; a value given twice counts once."""
    # One checkpoint at the depth, and with -pg one at the end of the prompt.
    common = {"cache_ram": 0, "n_checkpoints": 2 if args.pg else 1} | given_fields(
        args, EngineConfig
    )
    lists = {field: getattr(args, name) for field, name in _LISTS.items()}
    given = {field: dict.fromkeys(values) for field, values in lists.items() if values}
    return [common | dict(zip(given, values, strict=True)) for values in product(*given.values())]


def run(parser: Parser, args: argparse.Namespace) -> int:
    sizes = args.n_prompt or [512], args.n_gen or [128], args.n_depth or [0]
    cases = cases_of(*sizes, args.pg)
    if not cases:
        parser.error("nothing to measure: expected a size above 0 for -p, -n or -pg")
    engines = engines_of(args)
    longest = max(cases, key=lambda case: case.n_depth + case.n_kv)
    needed = longest.n_depth + longest.n_kv
    models = [ModelFacts.of(path) for path in args.model or [str(DEMO_MODEL)]]
    for facts in models:
        facts.check_context(needed, longest.name, engines[0].get("n_ctx"))
    warm_up = None if args.no_warmup else warm_up_case
    n_runs = len(models) * len(engines) * len(cases) * (args.repetitions + bool(warm_up))
    rng = np.random.default_rng(args.seed)
    columns = columns_of(engines)
    with (
        Rows(args.output, Table(columns, is_markdown=True)) as rows,
        tqdm(total=n_runs, unit="run", disable=None) as bar,
    ):
        for facts, options in product(models, engines):
            bar.set_description(facts.type)
            with Engine.load(facts.path, **{"n_ctx": needed} | options) as engine:
                summary.show(engine, args.verbose)
                for m in measure(engine, cases, rng, args.repetitions, warm_up, bar.update):
                    row = _document(facts, engine, m)
                    cells = _cells(row, m.case.name)
                    rows.add(row, [cells[name] for name in columns])
    return 0


def columns_of(engines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The table's columns: as in llama-bench, sizes and types only if one is not the default."""
    default = resolved_config(backend=engines[0].get("backend", "auto"))
    hidden = {
        name
        for name in _SHOWN_IF_SET
        if all(e.get(name, getattr(default, name)) == getattr(default, name) for e in engines)
    }
    return {name: form for name, form in _COLUMNS.items() if name not in hidden}


def warm_up_case(case: Case) -> Case:
    """The whole prompt, or one generated token, as in llama-bench."""
    return replace(case, n_gen=min(case.n_gen, 1))


def _document(facts: ModelFacts, engine: Engine, m: Measurement) -> dict[str, Any]:
    """A measurement under llama-bench's keys."""
    config, (type_k, type_v), case = engine.config, engine.config.cache_types(), m.case
    ns = [round((p + g) * 1e9) for p, g in zip(m.prompt_s, m.gen_s, strict=True)]
    ts = [1e9 * case.n_kv / n for n in ns]
    (avg_ns, stddev_ns), (avg_ts, stddev_ts) = mean_and_deviation(ns), mean_and_deviation(ts)
    return {
        "build_commit": commit() or __version__,
        "cpu_info": cpu_name(), "backends": backend_names(engine),
        "model_filename": facts.path, "model_type": facts.type,
        "model_size": facts.size, "model_n_params": facts.n_params,
        "n_batch": config.n_batch, "n_ubatch": config.n_ubatch, "n_threads": n_threads(engine),
        "type_k": type_k.name.lower(), "type_v": type_v.name.lower(),
        "n_gpu_layers": n_gpu_layers(engine),
        "n_prompt": case.n_prompt, "n_gen": case.n_gen, "n_depth": case.n_depth,
        "test_time": m.test_time, "avg_ns": round(avg_ns), "stddev_ns": round(stddev_ns),
        "avg_ts": avg_ts, "stddev_ts": stddev_ts, "samples_ns": ns, "samples_ts": ts,
    }  # fmt: skip


def _cells(row: dict[str, Any], test: str) -> dict[str, Any]:
    """The cells of all columns, by name."""
    size, n_params = row["model_size"], row["model_n_params"]
    return row | {
        "model": row["model_type"],
        "size": f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB",
        "params": f"{n_params / 1e9:.2f} B" if n_params >= 1e9 else f"{n_params / 1e6:.2f} M",
        "backend": row["backends"], "threads": row["n_threads"], "test": test,
        "t/s": f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
    }  # fmt: skip
