"""`cli.py graph`: a model's compute graph."""

from __future__ import annotations

import argparse

from engine.commands import report
from engine.commands.options import Parser, given_fields, integers, write_text
from engine.config import EngineConfig
from engine.engine import plan_only

ABOUT = "Show a model's compute graph: node counts, and which backend runs each node and why."


def add_options(p: Parser) -> None:
    """Its options."""
    p.common_options()
    p.backend_options()
    add = p.add_argument
    add("--bs", type=integers(1), default=[512, 1], metavar="N[,N…]",
        help="batch sizes in tokens (512,1)")  # fmt: skip
    add("--gdn", dest="gdn_form", choices=("fused", "decomposed"), default="fused",
        help="the delta rule as one node, or as primitive ops (fused)")  # fmt: skip
    p.flag("--json", "print JSON")
    add("--dot", metavar="FILE", help="write the graph for Graphviz")


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Print the report."""
    options = given_fields(args, EngineConfig)
    plans = {bs: plan_only(args.model, bs, args.gdn_form, **options) for bs in args.bs}
    if args.dot is not None:
        write_text(args.dot, report.as_dot(plans[args.bs[0]]))
    print(report.as_json(plans) if args.json else report.text(plans, args.verbose))
    return 0
