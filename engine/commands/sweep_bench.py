"""`cli.py sweep-bench`: speed at every depth of the context, in ik_llama.cpp's formats."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.bench.facts import (
    ModelFacts,
    backend_names,
    machine,
    n_gpu_layers,
    rss_hwm_mib,
    sequence_bytes,
    settings,
)
from engine.bench.measure import Measurement, measure_and_extend, sequences
from engine.bench.plots import COLUMNS, Curve, Facts, Point, check_output, draw
from engine.commands.options import CACHE, Parser, given_fields, load_engine
from engine.commands.output import Rows, Table, say
from engine.config import DEFAULT_CTX, EngineConfig
from engine.engine import Engine
from engine.planning import resolved_config

ABOUT = (
    "Measure generation (TG) and then a prompt of -ub tokens (PP) after every -ub tokens of "
    "context. JSON lines also have the nodes of the graph, the bytes of state and of KV "
    "cache that a sequence of N_KV tokens fills, and the peak memory of the process so far."
)
_TABLE = Table(COLUMNS)
_WARM_UP = 4


def add_options(p: Parser) -> None:
    p.common_options()
    p.number("-c --ctx-size", f"print rows for N_KV from 0 to below N ({DEFAULT_CTX})",
        dest="n_kv_max", default=DEFAULT_CTX)  # fmt: skip
    p.number("-n --n-predict", "generate N tokens (a quarter of -ub)", dest="n_gen")
    p.number("-nrep --repetitions", "measure each row N times, report medians (1)",
        dest="repeats", default=1)  # fmt: skip
    p.flag("--no-warmup", "no unmeasured prompt and generation before the first row")
    p.seed()
    p.choice("--output-format", "md and table are the same", "md", "table", "jsonl")
    p.add_argument("--plot", metavar="FILE.png", help="also draw the rows (.png, .svg, .pdf)")
    p.engine_options("n_ctx", "n_parallel", *CACHE)


def run(parser: Parser, args: argparse.Namespace) -> int:
    given = given_fields(args, EngineConfig)
    n_prompt = resolved_config(**given).n_ubatch
    if args.n_kv_max < n_prompt:
        parser.error(f"argument -c: expected at least the {n_prompt} of -ub, got {args.n_kv_max}")
    n_gen = args.n_gen or max(1, n_prompt // 4)
    if args.plot is not None:
        check_output(args.plot)
    with load_engine(
        args, cache_ram=0, n_checkpoints=1, n_ctx=context_needed(args.n_kv_max, n_prompt, n_gen),
        n_ubatch=n_prompt, n_batch=given.get("n_batch", max(n_prompt, 2048)),
    ) as engine:  # fmt: skip
        rows = _measure(engine, args, n_prompt, n_gen)
    if args.plot is not None:
        points = [Point(*(row[key] for key in Point._fields)) for row in rows]
        draw([Curve(Path(args.model).stem, points, Facts.of(rows[0]))], args.plot)
    return 0


def depths(n_kv_max: int, n_prompt: int) -> range:
    return range(0, n_kv_max, n_prompt)


def context_needed(n_kv_max: int, n_prompt: int, n_gen: int) -> int:
    """Context for a sweep: the last row's prompt and generation come after its N_KV."""
    return depths(n_kv_max, n_prompt)[-1] + n_prompt + n_gen


def _measure(
    engine: Engine, args: argparse.Namespace, n_prompt: int, n_gen: int
) -> list[dict[str, Any]]:
    """The rows with all keys; prints each as it is measured."""
    shown = settings(engine, args.n_kv_max, flash_attn=1)
    # ik_llama.cpp counts the layers; llama.cpp has -1 for all.
    shown["n_gpu_layers"] = len(engine.plan.graph.layer_kinds) if n_gpu_layers(engine) else 0
    facts = _facts(engine, args.model)
    if args.output_format != "jsonl":
        say("\nmain: " + ", ".join(f"{name} = {value}" for name, value in shown.items()))
        say("".join(f"main: {name} = {value}\n" for name, value in facts.items()))
    rng = np.random.default_rng(args.seed)
    if not args.no_warmup:
        with sequences(engine, 1) as (seq,):
            measure_and_extend(engine, seq, n_prompt, min(n_gen, _WARM_UP), rng)
    measured = []
    with sequences(engine, 1) as (seq,), Rows(args.output_format, _TABLE) as rows:
        for _ in tqdm(depths(args.n_kv_max, n_prompt), unit="row", leave=False, disable=None):
            m = measure_and_extend(engine, seq, n_prompt, n_gen, rng, args.repeats)
            values = _values(m)
            measured.append(shown | values | facts | _extra(engine, m.case.n_depth))
            rows.add(measured[-1], list(values.values()))
    return measured


def _values(m: Measurement) -> dict[str, float]:
    """A row under ik_llama.cpp's keys, in the order of its columns."""
    case = m.case
    return {"pp": case.n_prompt, "tg": case.n_gen, "n_kv": case.n_depth, **m.medians()}


def _facts(engine: Engine, path: str) -> dict[str, str]:
    """What was measured, and on what; ik_llama.cpp does not say."""
    model_type = ModelFacts.of_file(engine.file, engine.model.n_ctx_train).type
    return {"model_filename": path, "model_type": model_type, "machine": machine(engine)}


def _extra(engine: Engine, n_kv: int) -> dict[str, Any]:
    """The keys of a JSON line that ik_llama.cpp does not have."""
    state_bytes, kv_bytes = sequence_bytes(engine, n_kv)
    return {
        "backend": backend_names(engine), "graph_nodes": len(engine.plan.graph.nodes),
        "state_bytes": state_bytes, "kv_bytes": kv_bytes,
        "rss_hwm_mib": rss_hwm_mib(), "vram_delta_mib": engine.device_bytes() / 2**20,
    }  # fmt: skip
