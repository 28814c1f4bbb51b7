"""`cli.py batched-bench`: prompts and generation of several sequences at once."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.bench.facts import ModelFacts, settings
from engine.bench.measure import BenchError, Case, Measurement, measure
from engine.commands.options import CACHE, Parser, given_fields, load_engine
from engine.commands.output import Rows, Table
from engine.config import EngineConfig
from engine.planning import resolved_config

ABOUT = "Measure prompts and generation of several sequences at once, as llama-batched-bench does."
_COLUMNS = {
    "PP": "6d", "TG": "6d", "B": "4d", "N_KV": "6d", "T_PP s": "8.3f", "S_PP t/s": "8.2f",
    "T_TG s": "8.3f", "S_TG t/s": "8.2f", "T s": "8.3f", "S t/s": "8.2f",
}  # fmt: skip
_WARM_UP = 16


def add_options(p: Parser) -> None:
    p.common_options()
    p.numbers("-npp", "tokens of each prompt", dest="n_prompt", required=True)
    p.numbers("-ntg", "tokens generated after each prompt", dest="n_gen", required=True)
    p.numbers("-npl", "sequences that run at the same time", dest="n_seqs", required=True)
    p.flag("-pps", "process one prompt for all sequences")
    p.flag("--count-experts", "add a column: the distinct experts of a layer that a step of "
        "generation uses, counted in further steps that are not timed")  # fmt: skip
    p.flag("--no-warmup", "no short unmeasured run before each row")
    p.seed()
    p.choice("--output-format", "format of the results", "md", "jsonl")
    p.engine_options("n_parallel", *CACHE)


def run(parser: Parser, args: argparse.Namespace) -> int:
    sizes = product(args.n_prompt, args.n_gen, args.n_seqs)
    cases = [Case(n_prompt, n_gen, 0, n_seqs, args.pps) for n_prompt, n_gen, n_seqs in sizes]
    options = _engine_options(args, cases)
    warm_up = None if args.no_warmup else warm_up_case
    rng = np.random.default_rng(args.seed)
    counts: bool = args.count_experts
    table = Table(_COLUMNS | ({"EXPERTS": "8.2f"} if counts else {}))
    with load_engine(args, **options) as engine, Rows(args.output_format, table) as rows:
        measured = measure(engine, cases, rng, warm_up=warm_up, count_experts=counts)
        for m in tqdm(measured, total=len(cases), unit="row", disable=None):
            values = _values(m)
            shown = settings(engine, engine.n_ctx, is_pp_shared=int(args.pps))
            rows.add(shown | values, list(values.values()))
    return 0


def _values(m: Measurement) -> dict[str, Any]:
    case, medians = m.case, m.medians()
    sizes = {"pp": case.n_prompt, "tg": case.n_gen, "pl": case.n_seqs, "n_kv": case.n_kv}
    seconds = medians["t_pp"] + medians["t_tg"]
    counted = {"experts": statistics.median(m.experts)} if m.experts else {}
    return {**sizes, **medians, "t": seconds, "speed": case.n_kv / seconds, **counted}


def warm_up_case(case: Case) -> Case:
    return replace(case, n_prompt=min(case.n_prompt, _WARM_UP), n_gen=1)


def _engine_options(args: argparse.Namespace, cases: list[Case]) -> dict[str, Any]:
    """Options of an engine that can run all cases. Raises BenchError if none can."""
    given = given_fields(args, EngineConfig)
    facts = ModelFacts.of(args.model)
    if args.count_experts and not facts.has_experts:
        raise BenchError(f"--count-experts: expected a model with experts, got {facts.type}")
    for case in cases:
        sizes = f"-npp {case.n_prompt} -ntg {case.n_gen}"
        if "n_ctx" in given:
            facts.check_context(case.n_kv, f"{sizes} -npl {case.n_seqs}", given["n_ctx"])
        else:
            facts.check_context(case.n_prompt + case.n_gen, sizes)
    n_seqs = max(case.n_seqs for case in cases)
    config = resolved_config(**given)
    n_ubatch = min(config.n_batch, config.n_ubatch)
    if n_seqs > n_ubatch:
        raise BenchError(f"-npl {n_seqs}: expected at most the {n_ubatch} tokens of a step (-ub)")
    n_ctx = given.get("n_ctx", max(case.n_kv for case in cases))
    # A checkpoint for each sequence reserves the blocks that it fills after a shared prompt.
    return {
        "cache_ram": 0, "n_parallel": n_seqs, "n_checkpoints": n_seqs, "n_ctx": n_ctx,
        "keep_experts": args.count_experts,
    }  # fmt: skip
