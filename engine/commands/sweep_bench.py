"""`cli.py sweep-bench`: speed at every depth of the context, in ik_llama.cpp's formats.

Rows are printed as they are measured, and every place where output goes is tried before that.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.bench.measure import backend_names, n_gpu_layers, n_threads, rss_hwm_mib
from engine.bench.plots import Curve, Point, check_output, draw
from engine.bench.sweep import (
    TABLE_HEAD,
    Row,
    context_needed,
    depths,
    sequence_bytes,
    sweep,
    table_line,
    warm_up,
)
from engine.commands.options import Parser, at_least, common_options, engine_options, given_fields
from engine.config import DEFAULT_CTX, EngineConfig
from engine.engine import Engine, resolved_config

ABOUT = (
    "Measure generation (TG) and then a prompt of -ub tokens (PP) after every -ub positions of "
    "the context. JSON lines also have the nodes of the graph, the bytes of state and of KV "
    "cache that a sequence of N_KV tokens fills, and the most memory used so far."
)


def add_options(p: Parser) -> None:
    """Its options."""
    common_options(p)
    add, size = p.add_argument, at_least(1)
    add("-c", "--ctx-size", dest="n_kv_max", type=size, default=DEFAULT_CTX, metavar="N",
        help=f"rows for N_KV from 0 to below N ({DEFAULT_CTX})")  # fmt: skip
    add("-n", "--n-predict", dest="n_gen", type=size, metavar="N",
        help="generate N tokens (a quarter of -ub)")  # fmt: skip
    add("-nrep", "--repetitions", dest="repeats", type=size, default=1, metavar="N",
        help="measure everything N times, report medians (1)")  # fmt: skip
    add("--no-warmup", action="store_true",
        help="measure at once, without a prompt and a few generated tokens before")  # fmt: skip
    add("-s", "--seed", type=at_least(0), default=0, metavar="N", help="of the tokens (0)")
    add("--output-format", choices=("md", "table", "jsonl"), default="md",
        help="md, or table for short: ik_llama.cpp's table (the default); jsonl")  # fmt: skip
    add("--plot", metavar="FILE.png", help="also draw the rows (.png, .svg, .pdf)")
    engine_options(p, without=("n_ctx", "n_parallel"))


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Print a row for every depth."""
    options = given_fields(args, EngineConfig)
    n_prompt = resolved_config(**options).n_ubatch
    options |= {"n_ubatch": n_prompt, "n_batch": options.get("n_batch", max(n_prompt, 2048))}
    if args.n_kv_max < n_prompt:
        parser.error(f"argument -c: expected at least the {n_prompt} of -ub, got {args.n_kv_max}")
    n_gen = args.n_gen or max(1, n_prompt // 4)
    options["n_ctx"] = context_needed(args.n_kv_max, n_prompt, n_gen)
    if args.plot is not None:
        check_output(args.plot)
    with Engine.load(args.model, n_checkpoints=1, **options) as engine:
        rows = _measure(engine, args, n_prompt, n_gen)
    if args.plot is not None:
        points = [Point(row.n_kv, row.speed_pp, row.speed_tg) for row in rows]
        draw([Curve(Path(args.model).stem, points)], args.plot)
    return 0


def _measure(engine: Engine, args: argparse.Namespace, n_prompt: int, n_gen: int) -> list[Row]:
    settings = _settings(engine, args.n_kv_max)
    as_json = args.output_format == "jsonl"
    if not as_json:
        facts = ", ".join(f"{name} = {value}" for name, value in settings.items())
        _print(f"\nmain: {facts}\n\n{TABLE_HEAD}")
    rng = np.random.default_rng(args.seed)
    if not args.no_warmup:
        warm_up(engine, n_prompt, n_gen, rng)
    rows = []
    seq = engine.memory.create()
    n_rows = len(depths(args.n_kv_max, n_prompt))
    with tqdm(total=n_rows, unit="row", leave=False, disable=None) as bar:
        for row in sweep(engine, seq, args.n_kv_max, n_prompt, n_gen, rng, args.repeats):
            _print(_json_line(engine, settings, row) if as_json else table_line(row))
            rows.append(row)
            bar.update()
    return rows


def _settings(engine: Engine, n_kv_max: int) -> dict[str, int]:
    """What ik_llama.cpp prints before the rows, in its order."""
    threads = n_threads(engine)
    layers = len(engine.plan.graph.layer_kinds)
    return {
        "n_kv_max": n_kv_max,
        "n_batch": engine.config.n_batch,
        "n_ubatch": engine.config.n_ubatch,
        "flash_attn": 1,
        "n_gpu_layers": layers if n_gpu_layers(engine) else 0,
        "n_threads": threads,
        "n_threads_batch": threads,
    }


def _json_line(engine: Engine, settings: dict[str, int], row: Row) -> str:
    """ik_llama.cpp's keys in its order, then ours."""
    state_bytes, kv_bytes = sequence_bytes(engine, row.n_kv)
    values: dict[str, Any] = settings | {
        "pp": row.pp,
        "tg": row.tg,
        "n_kv": row.n_kv,
        "t_pp": row.t_pp,
        "speed_pp": row.speed_pp,
        "t_tg": row.t_tg,
        "speed_tg": row.speed_tg,
        "backend": backend_names(engine),
        "graph_nodes": len(engine.plan.graph.nodes),
        "state_bytes": state_bytes,
        "kv_bytes": kv_bytes,
        "rss_hwm_mib": rss_hwm_mib(),
        "vram_delta_mib": engine.device_bytes() / 2**20,
    }
    return json.dumps(values)


def _print(text: str) -> None:
    """Print at once, past the progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
