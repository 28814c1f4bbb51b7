"""`cli.py batched-bench`: prompts and generation of several sequences at once."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.bench.batched import BatchedCase, BatchedMeasurement, measure_batched
from engine.bench.facts import ModelFacts
from engine.bench.measure import BenchError, n_gpu_layers, n_threads
from engine.commands.options import (
    Parser,
    at_least,
    common_options,
    engine_options,
    given_fields,
    integers,
)
from engine.config import EngineConfig
from engine.engine import Engine, resolved_config

ABOUT = "Measure prompts and generation of several sequences at once, as llama-batched-bench does."
# Column -> format of its values; llama-batched-bench's.
_COLUMNS = {
    "PP": "6d", "TG": "6d", "B": "4d", "N_KV": "6d", "T_PP s": "8.3f", "S_PP t/s": "8.2f",
    "T_TG s": "8.3f", "S_TG t/s": "8.2f", "T s": "8.3f", "S t/s": "8.2f",
}  # fmt: skip


def add_options(p: Parser) -> None:
    """Its options."""
    common_options(p)
    lists: Any = {"required": True, "type": integers(1), "action": "extend", "metavar": "N[,N…]"}
    add = p.add_argument
    add("-npp", dest="n_prompt", help="tokens of each prompt", **lists)
    add("-ntg", dest="n_gen", help="tokens generated after each", **lists)
    add("-npl", dest="n_seqs", help="sequences at once", **lists)
    add("-pps", action="store_true", help="one prompt, shared by the sequences")
    add("--no-warmup", action="store_true", help="no short run before each that counts")
    add("-s", "--seed", type=at_least(0), default=0, metavar="N", help="of the tokens (0)")
    add("--output-format", choices=("md", "jsonl"), default="md")
    engine_options(p, without=("n_parallel",))


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Print a row for every combination of the sizes."""
    sizes = product(args.n_prompt, args.n_gen, args.n_seqs)
    cases = [BatchedCase(*size, is_shared=args.pps) for size in sizes]
    config = _config(args, cases)
    rng = np.random.default_rng(args.seed)
    with (
        Engine.load(args.model, **config) as engine,
        tqdm(total=len(cases), unit="row", disable=None) as bar,
    ):
        for i, case in enumerate(cases):
            m = measure_batched(engine, case, rng, not args.no_warmup)
            bar.update()
            with tqdm.external_write_mode():
                if args.output_format == "md":
                    print(*([] if i else _head()), _line(m), sep="\n")
                else:
                    print(json.dumps(_document(engine, m)))
                sys.stdout.flush()
    return 0


def _config(args: argparse.Namespace, cases: list[BatchedCase]) -> dict[str, Any]:
    """Options of an engine that all cases fit. Raises BenchError if there can be none."""
    config = given_fields(args, EngineConfig)
    n_seqs = max(case.n_seqs for case in cases)
    facts = ModelFacts.of(args.model)
    for case in cases:
        sizes = f"-npp {case.n_prompt} -ntg {case.n_gen}"
        if "n_ctx" in config:
            facts.check_context(case.n_kv, f"{sizes} -npl {case.n_seqs}", config["n_ctx"])
        else:
            facts.check_context(case.n_prompt + case.n_gen, sizes)
    sizes_of_step = resolved_config(**config)
    n_ubatch = min(sizes_of_step.n_batch, sizes_of_step.n_ubatch)
    if n_seqs > n_ubatch:
        raise BenchError(f"-npl {n_seqs}: expected at most the {n_ubatch} tokens of a step (-ub)")
    # Sequences that share a prompt have a checkpoint each too: it is what gives them room for
    # blocks of their own.
    config |= {"n_parallel": n_seqs, "n_checkpoints": n_seqs}
    config.setdefault("n_ctx", max(case.n_kv for case in cases))
    return config


def _head() -> list[str]:
    widths = [int(form.partition(".")[0].rstrip("d")) for form in _COLUMNS.values()]
    names = (f"{name:>{width}}" for name, width in zip(_COLUMNS, widths, strict=True))
    return [
        "|" + " | ".join(names) + " |",
        "|" + "-|-".join("-" * width for width in widths) + "-|",
    ]


def _line(m: BatchedMeasurement) -> str:
    case = m.case
    values = (
        *(case.n_prompt, case.n_gen, case.n_seqs, case.n_kv),
        *(m.prompt_s, m.prompt_ts, m.gen_s, m.gen_ts, m.seconds, m.ts),
    )
    cells = (f"{v:{form}}" for v, form in zip(values, _COLUMNS.values(), strict=True))
    return "|" + " | ".join(cells) + " |"


def _document(engine: Engine, m: BatchedMeasurement) -> dict[str, Any]:
    """A measurement under llama-batched-bench's keys."""
    return {
        "n_kv_max": engine.n_ctx,
        "n_batch": engine.config.n_batch,
        "n_ubatch": engine.config.n_ubatch,
        "is_pp_shared": int(m.case.is_shared),
        "n_gpu_layers": n_gpu_layers(engine),
        "n_threads": n_threads(engine),
        "n_threads_batch": n_threads(engine),
        "pp": m.case.n_prompt,
        "tg": m.case.n_gen,
        "pl": m.case.n_seqs,
        "n_kv": m.case.n_kv,
        "t_pp": m.prompt_s,
        "speed_pp": m.prompt_ts,
        "t_tg": m.gen_s,
        "speed_tg": m.gen_ts,
        "t": m.seconds,
        "speed": m.ts,
    }
