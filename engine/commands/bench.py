"""`cli.py bench`: tokens per second, as a table or with the keys of llama-bench."""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.bench.facts import ModelFacts, backend_names, cpu_name, n_gpu_layers, n_threads
from engine.bench.measure import Case, Measurement, mean_and_deviation, measure
from engine.commands.options import Parser, given_fields
from engine.commands.output import Rows, Table
from engine.config import EngineConfig
from engine.engine import Engine
from engine.version import __version__

ABOUT = "Measure tokens per second of prompts and of generation, as llama-bench does."
_TABLE = Table({
    "model": "<30", "size": ">10", "params": ">10", "backend": "<10", "threads": "7d",
    "test": ">15", "t/s": ">20",
}, is_markdown=True)  # fmt: skip


def add_options(p: Parser) -> None:
    p.common_options(many=True)
    p.numbers("-p --n-prompt", "process prompts of N tokens (512; 0: none)", low=0)
    p.numbers("-n --n-gen", "generate N tokens (128; 0: none)", low=0)
    p.numbers("-d --n-depth", "measure each after N tokens of context (0)", low=0)
    p.number("-r --repetitions", "measured runs of each test (5)", default=5)
    p.flag("--no-warmup", "no unmeasured run before each test")
    p.seed()
    p.choice("-o --output", "format of the results", "md", "json", "csv")
    p.engine_options("n_parallel")


def cases_of(prompts: list[int], gens: list[int], depths: list[int]) -> list[Case]:
    """Every prompt, then every generation, at each depth; a size of 0 means none."""
    sizes = [(n, 0) for n in prompts if n] + [(0, n) for n in gens if n]
    return [Case(*size, n_depth) for n_depth, size in product(depths, sizes)]


def run(parser: Parser, args: argparse.Namespace) -> int:
    cases = cases_of(args.n_prompt or [512], args.n_gen or [128], args.n_depth or [0])
    if not cases:
        parser.error("nothing to measure: expected a size above 0 for -p or for -n")
    options = {"n_checkpoints": 1} | given_fields(args, EngineConfig)
    longest = max(cases, key=lambda case: case.n_depth + case.n_kv)
    needed = longest.n_depth + longest.n_kv
    models = [ModelFacts.of(path) for path in args.model]
    for facts in models:
        facts.check_context(needed, longest.name, options.get("n_ctx"))
    options.setdefault("n_ctx", needed)
    warm_up = None if args.no_warmup else warm_up_case
    n_runs = len(models) * len(cases) * (args.repetitions + bool(warm_up))
    rng = np.random.default_rng(args.seed)
    with Rows(args.output, _TABLE) as rows, tqdm(total=n_runs, unit="run", disable=None) as bar:
        for facts in models:
            bar.set_description(facts.type)
            with Engine.load(facts.path, **options) as engine:
                for m in measure(engine, cases, rng, args.repetitions, warm_up, bar.update):
                    row = _document(facts, engine, m)
                    rows.add(row, _cells(row, m.case.name))
    return 0


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
        "build_commit": __version__, "cpu_info": cpu_name(), "backends": backend_names(engine),
        "model_filename": facts.path, "model_type": facts.type,
        "model_size": facts.size, "model_n_params": facts.n_params,
        "n_batch": config.n_batch, "n_ubatch": config.n_ubatch, "n_threads": n_threads(engine),
        "type_k": type_k.name.lower(), "type_v": type_v.name.lower(),
        "n_gpu_layers": n_gpu_layers(engine),
        "n_prompt": case.n_prompt, "n_gen": case.n_gen, "n_depth": case.n_depth,
        "test_time": m.test_time, "avg_ns": round(avg_ns), "stddev_ns": round(stddev_ns),
        "avg_ts": avg_ts, "stddev_ts": stddev_ts, "samples_ns": ns, "samples_ts": ts,
    }  # fmt: skip


def _cells(row: dict[str, Any], name: str) -> list[Any]:
    size, n_params = row["model_size"], row["model_n_params"]
    return [
        row["model_type"],
        f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB",
        f"{n_params / 1e9:.2f} B" if n_params >= 1e9 else f"{n_params / 1e6:.2f} M",
        row["backends"], row["n_threads"], name,
        f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
    ]  # fmt: skip
