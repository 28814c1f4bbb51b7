"""`cli.py profile`: where the time of a step goes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.backends.base import Limits
from engine.bench.profile import Row, StepProfile, by_layer_kind, by_op, profile_step
from engine.commands.options import CACHE, Parser, given_fields, load_engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.planning import resolved_config

ABOUT = "Time one step by op and by layer kind, and compare with what this machine can do."
_HEADINGS = ("n", "ms", "share", "MB", "GB/s", "of limit", "GFLOP", "GFLOP/s", "of peak")
_WIDTHS = (5, 10, 7, 10, 8, 9, 9, 9, 8)


def add_options(p: Parser) -> None:
    p.common_options()
    size = p.add_mutually_exclusive_group()
    p.number("-p --n-prompt", "profile a step of N prompt tokens", group=size)
    p.number("-n --n-gen", "profile a step of one token, the median of N (the default, with 16)",
        group=size)  # fmt: skip
    p.number("-d --n-depth", "profile it after N tokens of context (0)", low=0, default=0)
    p.number("-r --repetitions", "with -p: show the median of N steps (3)", default=3)
    p.seed()
    p.choice("-o --output", "format of the result", "table", "json")
    p.engine_options("n_parallel", *CACHE)


def run(parser: Parser, args: argparse.Namespace) -> int:
    n_tokens = args.n_prompt or 1
    repeats = args.repetitions if args.n_prompt else args.n_gen or 16
    options = given_fields(args, EngineConfig)
    n_ubatch = options.get("n_ubatch", max(n_tokens, resolved_config(**options).n_ubatch))
    if n_tokens > n_ubatch:
        parser.error(f"argument -p: expected at most the {n_ubatch} tokens of a step (-ub)")
    n_ctx = options.get("n_ctx", args.n_depth + n_tokens)
    n_batch = max(n_ubatch, options.get("n_batch", 0))
    with load_engine(args, n_ctx=n_ctx, n_ubatch=n_ubatch, n_batch=n_batch, cache_ram=0) as engine:
        rng = np.random.default_rng(args.seed)
        profile, limits = _measure(engine, n_tokens, args.n_depth, repeats, rng)
        kinds = by_layer_kind(profile, engine.plan.graph.layer_kinds)
    if args.output == "json":
        print(json.dumps(_document(profile, limits, kinds), indent=1))
    else:
        print(_table(profile, limits, kinds, args.verbose))
    return 0


def _measure(
    engine: Engine, n_tokens: int, n_past: int, repeats: int, rng: np.random.Generator
) -> tuple[StepProfile, Limits]:
    """The profile and the machine's limits; a progress bar shows what is being done."""
    # The context, two steps for the warm-up and for each repetition, and the limits.
    n_runs = 1 + 2 * (repeats + 1) + 1
    about = f"{n_past} tokens of context"
    with tqdm(total=n_runs, desc=about, unit="step", leave=False, disable=None) as bar:

        def on_run() -> None:
            bar.set_description(f"steps of {n_tokens}", refresh=False)
            bar.update()

        profile = profile_step(engine, n_tokens, n_past, repeats, rng, on_run)
        bar.set_description("limits of this machine")
        return profile, engine.plan.backends[0].measure_limits()


def _document(profile: StepProfile, limits: Limits, kinds: list[Row]) -> dict[str, Any]:
    entries = [
        {
            "label": e.label, "backend": e.backend, "nodes": [node.name for node in e.nodes],
            "seconds": e.seconds, "flops": e.cost.flops, "bytes": e.cost.bytes,
        }
        for e in profile.entries
    ]  # fmt: skip
    return {
        "n_tokens": profile.live.n_tokens, "n_past": profile.n_past,
        "step_s": profile.seconds, "step_without_timers_s": profile.plain_seconds,
        "limits": asdict(limits), "ops": [asdict(row) for row in by_op(profile)],
        "layer_kinds": [asdict(row) for row in kinds], "entries": entries,
    }  # fmt: skip


def _table(profile: StepProfile, limits: Limits, kinds: list[Row], verbose: bool) -> str:
    everything = Row.of("total", profile.entries)
    lines = [
        f"step of {profile.live.n_tokens} tokens after {profile.n_past}: "
        f"{profile.seconds * 1e3:.2f} ms, {everything.seconds / profile.seconds:.1%} of it below; "
        f"{profile.plain_seconds * 1e3:.2f} ms without timers",
        f"this machine: {limits.bytes_per_s / 1e9:.1f} GB/s ({limits.what}); GFLOP/s: "
        + ", ".join(f"{rate / 1e9:.0f} {unit}" for unit, rate in limits.ops_per_s.items()),
    ]
    sections = {"op": by_op(profile), "layer kind": kinds}
    if verbose:
        sections["node"] = [Row.of(e.name, [e]) for e in profile.entries]
    for title, rows in sections.items():
        lines += ["", _line(title, _HEADINGS)]
        lines += [_line(row.name, _cells(row, everything.seconds, limits)) for row in rows]
    cells = _cells(everything, everything.seconds, limits)
    return "\n".join([*lines, "", _line("total", cells)])


def _cells(row: Row, total_s: float, limits: Limits) -> tuple[str, ...]:
    # A GPU's clock may see no time at all between two small kernels.
    per_second = 1 / row.seconds if row.seconds else 0.0
    bandwidth, rate = row.bytes * per_second, row.flops * per_second
    of_limit = bandwidth / limits.bytes_per_s
    return (
        str(row.n), f"{row.seconds * 1e3:.3f}", f"{row.seconds / total_s:.1%}",
        f"{row.bytes / 1e6:.2f}", f"{bandwidth / 1e9:.2f}",
        f"{of_limit:.1%}" if of_limit <= 1 else _why_faster(row, limits),
        f"{row.flops / 1e9:.3f}", f"{rate / 1e9:.1f}",
        f"{limits.least_s(row.flops_of) * per_second:.1%}",
    )  # fmt: skip


def _why_faster(row: Row, limits: Limits) -> str:
    """Why a row is faster than memory: a cache held its data, or others slowed the probe."""
    fits = limits.cache_bytes is None or row.bytes / row.n <= limits.cache_bytes
    return "cache" if fits else "noise"


def _line(name: str, cells: tuple[str, ...]) -> str:
    shown = (f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
    return f"{name:<26}" + "".join(shown)
