"""`cli.py profile`: where the time of a step goes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import numpy as np

from engine.backends.base import Limits
from engine.bench.profile import Row, StepProfile, by_layer_kind, by_op, profile_step
from engine.commands.options import Parser, at_least, common_options, engine_options, given_fields
from engine.config import EngineConfig
from engine.engine import Engine, resolved_config

ABOUT = "Time one step instruction by instruction: by op and by layer kind, against the machine."
_HEADINGS = ("", "n", "ms", "share", "MB", "GB/s", "of limit", "GFLOP", "GFLOP/s", "of peak")
_WIDTHS = (26, 5, 10, 7, 10, 8, 9, 9, 9, 8)


def add_options(p: Parser) -> None:
    """Its options."""
    common_options(p)
    size = p.add_mutually_exclusive_group()
    size.add_argument("-p", "--n-prompt", type=at_least(1), metavar="N",
        help="profile a step of N prompt tokens")  # fmt: skip
    size.add_argument("-n", "--n-gen", type=at_least(1), metavar="N",
        help="profile steps of one token, the median of N (the default, with 16)")  # fmt: skip
    p.add_argument("-d", "--n-depth", type=at_least(0), default=0, metavar="N",
        help="after N positions (0)")  # fmt: skip
    p.add_argument("-r", "--repetitions", type=at_least(1), default=3, metavar="N",
        help="with -p: show the median of N steps (3)")  # fmt: skip
    p.add_argument("-s", "--seed", type=at_least(0), default=0, metavar="N", help="of the tokens")
    p.add_argument("-o", "--output", choices=("table", "json"), default="table")
    engine_options(p, without=("n_parallel",))


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Print the profile."""
    n_tokens = args.n_prompt or 1
    repeats = args.repetitions if args.n_prompt else args.n_gen or 16
    options = given_fields(args, EngineConfig)
    usual = resolved_config(**options).n_ubatch
    if n_tokens > (limit := options.setdefault("n_ubatch", max(n_tokens, usual))):
        parser.error(f"argument -p: expected at most the {limit} tokens of a step (-ub)")
    options["n_batch"] = max(options["n_ubatch"], options.get("n_batch", 0))
    options.setdefault("n_ctx", args.n_depth + n_tokens)
    with Engine.load(args.model, **options) as engine:
        rng = np.random.default_rng(args.seed)
        profile = profile_step(engine, n_tokens, args.n_depth, repeats, rng)
        limits = engine.plan.backends[0].measure_limits()
        kinds = by_layer_kind(profile, engine.plan.graph.layer_kinds)
        if args.output == "json":
            print(json.dumps(_document(profile, limits, kinds), indent=1))
        else:
            print(_table(profile, limits, kinds, args.verbose))
    return 0


def _document(profile: StepProfile, limits: Limits, kinds: list[Row]) -> dict[str, Any]:
    return {
        "n_tokens": profile.live.n_tokens,
        "n_past": profile.n_past,
        "step_s": profile.seconds,
        "step_without_timers_s": profile.plain_seconds,
        "limits": asdict(limits),
        "ops": [asdict(row) for row in by_op(profile)],
        "layer_kinds": [asdict(row) for row in kinds],
        "entries": [
            {
                "label": e.label,
                "backend": e.backend,
                "nodes": [node.name for node in e.nodes],
                "seconds": e.seconds,
                "flops": e.cost.flops,
                "bytes": e.cost.bytes,
            }
            for e in profile.entries
        ],
    }


def _table(profile: StepProfile, limits: Limits, kinds: list[Row], verbose: bool) -> str:
    total = sum(e.seconds for e in profile.entries)
    lines = [
        f"step of {profile.live.n_tokens} tokens after {profile.n_past}: "
        f"{profile.seconds * 1e3:.2f} ms, {total / profile.seconds:.1%} of it below; "
        f"{profile.plain_seconds * 1e3:.2f} ms without timers",
        f"this machine: {limits.bytes_per_s / 1e9:.1f} GB/s, "
        f"{limits.flops_per_s / 1e9:.0f} GFLOP/s ({limits.what})",
    ]
    sections = {"op": by_op(profile), "layer kind": kinds}
    if verbose:
        sections["node"] = [
            Row(e.nodes[0].name if e.nodes else e.label, 1, e.seconds, e.cost.flops, e.cost.bytes)
            for e in profile.entries
        ]
    for title, rows in sections.items():
        lines += ["", _line((title, *_HEADINGS[1:]))]
        lines += [_line(_cells(row, total, limits)) for row in rows]
    everything = Row(
        "total",
        len(profile.entries),
        total,
        sum(e.cost.flops for e in profile.entries),
        sum(e.cost.bytes for e in profile.entries),
    )
    return "\n".join([*lines, "", _line(_cells(everything, total, limits))])


def _cells(row: Row, total: float, limits: Limits) -> tuple[str, ...]:
    # A GPU's clock may see no time at all between two small kernels.
    per_second = 1 / row.seconds if row.seconds else 0.0
    bandwidth, rate = row.bytes * per_second, row.flops * per_second
    return (
        row.name,
        str(row.n),
        f"{row.seconds * 1e3:.3f}",
        f"{row.seconds / total:.1%}",
        f"{row.bytes / 1e6:.2f}",
        f"{bandwidth / 1e9:.2f}",
        f"{bandwidth / limits.bytes_per_s:.1%}",
        f"{row.flops / 1e9:.3f}",
        f"{rate / 1e9:.1f}",
        f"{rate / limits.flops_per_s:.1%}",
    )


def _line(cells: tuple[str, ...]) -> str:
    first, *others = zip(cells, _WIDTHS, strict=True)
    return f"{first[0]:<{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others)
