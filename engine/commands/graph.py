"""`cli.py graph`: a model's compute graph, in words, JSON or DOT."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from engine.bench.facts import ModelFacts
from engine.commands.dot import as_dot
from engine.commands.options import Parser, given_fields, integers, write_text
from engine.commands.output import write
from engine.commands.summary import memory_lines
from engine.config import EngineConfig
from engine.placement.estimate import DeviceMemory, device_memory
from engine.placement.place import Plan
from engine.planning import plan_only

ABOUT = "Show a model's compute graph: node counts, and which backend runs each node and why."


def add_options(p: Parser) -> None:
    p.common_options()
    p.backend_options()
    add = p.add_argument
    add("--bs", type=integers(1), default=[512, 1], metavar="N[,N…]",
        help="batch sizes in tokens (512,1)")  # fmt: skip
    add("--gdn", dest="gdn_form", choices=("fused", "decomposed"), default="fused",
        help="the delta rule as one node, or as primitive ops (fused)")  # fmt: skip
    p.flag("--json", "print JSON")
    add("--dot", metavar="FILE",
        help="write the graph for Graphviz; -: to standard output, and no report")  # fmt: skip
    p.flag("--layers", "with --dot: draw every layer, also those that repeat")


def run(parser: Parser, args: argparse.Namespace) -> int:
    if args.dot == "-" and args.json:
        parser.error("argument --dot: expected a file beside --json, got standard output (-)")
    if args.layers and args.dot is None:
        parser.error("argument --layers: expected --dot, too")
    options = given_fields(args, EngineConfig)
    plans = {bs: plan_only(args.model, bs, args.gdn_form, **options) for bs in args.bs}
    if args.dot is not None:
        dot = as_dot(plans[args.bs[0]], ModelFacts.of(args.model).type, not args.layers)
        if args.dot == "-":
            write(dot)
            return 0
        write_text(args.dot, dot)
    print(as_json(plans) if args.json else text(plans, args.verbose))
    return 0


def summary(plans: Mapping[int, Plan]) -> list[str]:
    """The counts in llama.cpp's form; `plans` by batch size."""
    nodes = ", ".join(f"{len(p.graph.nodes)} (with bs={bs})" for bs, p in plans.items())
    splits = ", ".join(f"{len(p.splits)} (with bs={bs})" for bs, p in plans.items())
    used = {b.name: b.detail for p in plans.values() for b in p.backends}
    rows = [f"backend {name:<12} = {detail}" for name, detail in used.items()]
    stored, kept = weights(next(iter(plans.values())))
    types = ", ".join(f"{name} {n / 2**20:.1f}" for name, n in stored.items())
    where = "; ".join(f"on {name} {n / 2**20:.1f}" for name, n in kept.items())
    weight = f"weights, MiB = in the file {sum(stored.values()) / 2**20:.1f} ({types}); {where}"
    return [f"graph nodes  = {nodes}", f"graph splits = {splits}", weight, *rows]


def weights(plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the weights: in the file by type, and as each backend keeps them."""
    stored: Counter[str] = Counter()
    for tensor in plan.graph.weights.values():
        stored[tensor.dtype.name] += tensor.nbytes
    kept = {b.name: b.weight_bytes(plan.nodes_of(b)) for b in plan.backends}
    return dict(stored.most_common()), kept


def histogram(plan: Plan) -> list[tuple[str, int]]:
    """(op, number of nodes), most frequent first."""
    return Counter(node.op.name for node in plan.graph.nodes).most_common()


def layer_kinds(plan: Plan) -> list[tuple[str, int, int]]:
    """(layer kind, number of layers, nodes per layer); `(no layer)` for nodes outside of layers."""
    kinds = plan.graph.layer_kinds
    per_layer = Counter(node.layer for node in plan.graph.nodes)
    rows = []
    for kind in dict.fromkeys(kinds.values()):
        layers = [layer for layer, k in kinds.items() if k == kind]
        rows.append((kind, len(layers), max(per_layer[layer] for layer in layers)))
    outside = sum(n for layer, n in per_layer.items() if layer not in kinds)
    return [*rows, ("(no layer)", 1, outside)]


def placements(plan: Plan) -> list[tuple[str, str, int]]:
    """(backend, reason, number of nodes); reasons that differ only in a node or tensor are one."""
    counts: Counter[tuple[str, str]] = Counter()
    for placement in plan.placements.values():
        reason = re.sub(r"^follows .*", "follows its producer", placement.reason)
        reason = re.sub(r"^holds (?!its).*", "holds its weight", reason)
        counts[placement.backend.name, reason] += 1
    return [(backend, reason, n) for (backend, reason), n in counts.most_common()]


def text(plans: Mapping[int, Plan], verbose: bool = False) -> str:
    """The whole report; with `verbose` a line for every node."""
    plan = next(iter(plans.values()))
    lines = [*summary(plans), "", f"{'op':<24}{'nodes':>6}"]
    lines += [f"{op:<24}{n:>6}" for op, n in histogram(plan)]
    lines += ["", f"{'layer kind':<24}{'layers':>6}{'nodes per layer':>18}"]
    lines += [f"{kind:<24}{n:>6}{per:>18}" for kind, n, per in layer_kinds(plan)]
    for backend, memory in device_memory(plan).items():
        lines += ["", *memory_lines(backend, memory)]
    lines += ["", f"{'backend':<12}{'nodes':>6}  reason"]
    lines += [f"{backend:<12}{n:>6}  {reason}" for backend, reason, n in placements(plan)]
    if verbose:
        width = max(len(node.name) for node in plan.graph.nodes)
        lines += ["", f"{'node':<{width}}  {'op':<16}  {'backend':<10}  reason; outputs"]
        for node, placement in plan.placements.items():
            outputs = ", ".join(str(list(t.shape)) for t in node.outputs) or "state only"
            lines.append(
                f"{node.name:<{width}}  {node.op.name:<16}  {placement.backend.name:<10}  "
                f"{placement.reason}; {outputs}"
            )
    return "\n".join(lines)


def _sizes(memory: DeviceMemory) -> dict[str, int]:
    """Bytes of a device's memory by use, and how many weights have copies."""
    copies = {"copies": memory.copies.n_bytes, "copied_weights": memory.copies.n_weights}
    rest = {"rest": memory.rest, "left": memory.left}
    return {"total": memory.total, **asdict(memory.need), **copies, **rest}


def as_json(plans: Mapping[int, Plan]) -> str:
    plan = next(iter(plans.values()))
    nodes = [
        {
            "name": node.name, "op": node.op.name,
            "backend": placement.backend.name, "reason": placement.reason,
            "inputs": {operand: t.name for operand, t in node.inputs.items()},
            "outputs": [{"name": t.name, "shape": list(t.shape)} for t in node.outputs],
        }
        for node, placement in plan.placements.items()
    ]  # fmt: skip
    document: dict[str, Any] = {
        "graph_nodes": {str(bs): len(p.graph.nodes) for bs, p in plans.items()},
        "graph_splits": {str(bs): len(p.splits) for bs, p in plans.items()},
        "weight_bytes": dict(zip(("file", "memory"), weights(plan), strict=True)),
        "device_memory": {b.name: _sizes(memory) for b, memory in device_memory(plan).items()},
        "ops": dict(histogram(plan)),
        "layer_kinds": {kind: {"layers": n, "nodes": per} for kind, n, per in layer_kinds(plan)},
        "nodes": nodes,
    }
    return json.dumps(document, indent=1)
