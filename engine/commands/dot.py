"""A placed graph for Graphviz: a cluster for each layer, and layers that repeat drawn once.

Layers with the same nodes, shapes and backends repeat. Folded, one cluster stands for all of them,
and what leaves the last cluster of a repetition enters its first one again without an edge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.graph import Dim, Kind, Node, Shape
from engine.placement.place import Plan

_FONT = "fontname=Helvetica"
_COLORS = ("lightblue", "palegreen", "wheat", "lightpink")
_HEAD = f"""\
digraph {{
  graph [{_FONT}, fontsize=13, labelloc=t, labeljust=l, color=gray60, nodesep=0.25, ranksep=0.1];
  node [{_FONT}, fontsize=11, shape=box, style=filled, height=0.2, margin="0.14,0.02"];
  edge [{_FONT}, fontsize=9, arrowsize=0.7];"""


@dataclass(frozen=True)
class Box:
    """`count` layers of a kind that follow each other, or `parts` that do so `count` times, and all
    layers that the box stands for."""

    layers: tuple[int, ...]
    count: int
    parts: tuple[Box, ...] = ()


def folded(places: Sequence[tuple[int, ...]], signatures: Sequence[object]) -> tuple[Box, ...]:
    """Boxes for places, each the layers that stand there, by a signature for each layer.

    Of the repetitions that begin at a place the longest is folded, of equally long ones that with
    the shortest period.
    """
    boxes: list[Box] = []
    kinds, at = [signatures[layers[0]] for layers in places], 0
    while at < len(places):
        period, count = 1, 1
        for p in range(1, (len(places) - at) // 2 + 1):
            end = at + p
            while end < len(places) and kinds[end] == kinds[end - p]:
                end += 1
            if (n := (end - at) // p) > 1 and n * p > period * count:
                period, count = p, n
        run = places[at : at + period * count]
        merged = [tuple(sorted(sum(run[i::period], ()))) for i in range(period)]
        parts = folded(merged, signatures) if period > 1 else ()
        boxes.append(Box(tuple(sorted(sum(merged, ()))), count, parts))
        at += len(run)
    return tuple(boxes)


def as_dot(plan: Plan, model: str, is_folded: bool = True) -> str:
    """The graph of a model as Graphviz text. The id of a node is its name in the graph, in the
    first of the layers that it stands for."""
    title = f"{model}: {len(plan.graph.nodes)} nodes in {len(plan.graph.layer_kinds)} layers"
    return "\n".join([_HEAD, *_Drawing(plan, is_folded).lines(title), "}", ""])


class _Drawing:
    def __init__(self, plan: Plan, is_folded: bool) -> None:
        self._plan, self._nodes = plan, plan.graph.nodes
        self._kinds = list(plan.graph.layer_kinds.values())
        by_layer: dict[str, list[Node]] = {layer: [] for layer in plan.graph.layer_kinds}
        for node in self._nodes:
            by_layer.get(node.layer, []).append(node)
        self._layers = list(by_layer.values())
        self._colors = {b: _COLORS[i % len(_COLORS)] for i, b in enumerate(plan.backends)}
        self._boxes = folded(
            [(i,) for i in range(len(self._kinds))],
            [self._signature(i) if is_folded else i for i in range(len(self._kinds))],
        )
        # The node that is drawn for a node.
        self._drawn = {node: node for node in self._nodes}
        self._n_clusters = 0

    def _signature(self, layer: int) -> tuple[object, ...]:
        """What layers that repeat have in common. A second output may be missing: the first norm
        has no sum."""
        backends = self._plan.placements
        shapes = (tuple(t.shape for t in node.outputs[:1]) for node in self._layers[layer])
        rows = ((n.op, _short(n), backends[n].backend) for n in self._layers[layer])
        return self._kinds[layer], *rows, *shapes

    def lines(self, title: str) -> Iterator[str]:
        yield f"  label={_quoted(title)};"
        yield '  subgraph cluster_backends { label="backends";'
        for backend, color in self._colors.items():
            attributes = f"label={_quoted(backend.name)}, fillcolor={color}"
            yield f"    {_quoted(f'backend {backend.name}')} [{attributes}];"
        yield "  }"
        for box in self._boxes:
            yield from self._box(box, "  ")
        inside = {node for nodes in self._layers for node in nodes}
        outside = [node for node in self._nodes if node not in inside]
        yield from (self._node(node, "  ") for node in outside)
        yield from self._ends(outside)
        yield from self._edges()

    def _box(self, box: Box, indent: str) -> Iterator[str]:
        layers = f"layer{'s' * (len(box.layers) > 1)} {_ranges(box.layers)}"
        if box.parts:
            label = f"repeated {box.count} times: {layers}"
        else:
            first = box.layers[0]
            total = f" ({len(box.layers)} in all)" if len(box.layers) > box.count else ""
            times = f"{box.count} × " if box.count > 1 else ""
            label = f"{times}{self._kinds[first]}: {layers}{total}"
            for layer in box.layers:
                self._drawn |= dict(zip(self._layers[layer], self._layers[first], strict=True))
        yield f"{indent}subgraph cluster_{self._n_clusters} {{ label={_quoted(label)};"
        self._n_clusters += 1
        for part in box.parts:
            yield from self._box(part, indent + "  ")
        if not box.parts:
            yield from (self._node(node, indent + "  ") for node in self._layers[first])
        yield f"{indent}}}"

    def _node(self, node: Node, indent: str) -> str:
        name = _short(node) if node.layer in self._plan.graph.layer_kinds else node.name
        rows = [node.op.name if name.upper() == node.op.name else f"{node.op.name} {name}"]
        states = [t.name for t in node.inputs.values() if t.kind is Kind.STATE]
        if states:
            verb = "updates" if node.op.writes else "reads"
            rows.append(f"{verb} {', '.join(s.removeprefix(f'{node.layer}.') for s in states)}")
        color = self._colors[self._plan.placements[node].backend]
        return f"{indent}{_quoted(node.name)} [label={_quoted(*rows)}, fillcolor={color}];"

    def _ends(self, outside: Sequence[Node]) -> Iterator[str]:
        """What nodes outside of layers read from the batch, and the outputs of the graph."""
        read = {t: n for n in outside for t in n.inputs.values() if t.kind is Kind.INPUT}
        made = {t: n for n in self._nodes for t in n.outputs}
        ends = [(f"input {t.name}", t.name, node.name, t) for t, node in read.items()]
        ends += [
            (made[t].name, name, f"output {name}", t)
            for name, t in self._plan.graph.outputs.items()
        ]
        for source, name, target, tensor in ends:
            end = source if source.startswith("input ") else target
            yield f"  {_quoted(end)} [label={_quoted(name)}, shape=plaintext, style=solid];"
            yield _edge(source, target, _size(tensor.shape))

    def _edges(self) -> Iterator[str]:
        """Edges between nodes, with what the second one reads from the first."""
        edges: dict[tuple[Node, Node], dict[str, list[str]]] = {}
        for node, reads in self._reads().items():
            for operand, (source, size) in reads.items():
                sizes = edges.setdefault((source, node), {})
                sizes.setdefault(size, []).append(operand if len(reads) > 1 else "")
        for (source, node), sizes in edges.items():
            rows = [f"{', '.join(operands)}: {size}" for size, operands in sizes.items()]
            yield _edge(source.name, node.name, *rows)

    def _reads(self) -> dict[Node, dict[str, tuple[Node, str]]]:
        """For each drawn node and operand, the node drawn above that most of its layers read, and
        the shape. (The first of repeated layers may read another node than the rest.)"""
        producers = {t: self._drawn[node] for node in self._nodes for t in node.outputs}
        order = {node: i for i, node in enumerate(self._nodes)}
        counts: dict[Node, dict[str, Counter[tuple[Node, str]]]] = {}
        for node in self._nodes:
            drawn = self._drawn[node]
            for operand, tensor in node.inputs.items():
                source = producers.get(tensor.base)
                if source and order[source] < order[drawn]:
                    counter = counts.setdefault(drawn, {}).setdefault(operand, Counter())
                    counter[source, _size(tensor.shape)] += 1
        return {n: {o: max(c, key=c.__getitem__) for o, c in m.items()} for n, m in counts.items()}


def _edge(source: str, target: str, *rows: str) -> str:
    # The spaces keep the line off where a font is wider than Graphviz takes it to be.
    padded = (f"  {row.removeprefix(': ')}  " for row in rows)
    return f"  {_quoted(source)} -> {_quoted(target)} [label={_quoted(*padded)}];"


def _short(node: Node) -> str:
    return node.name.removeprefix(f"{node.layer}.")


def _size(shape: Shape) -> str:
    return "×".join(d.name if isinstance(d, Dim) else str(d) for d in shape)


def _ranges(numbers: Sequence[int]) -> str:
    """Such as `0-2, 4-6, …, 20-22`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    runs = [f"{a}-{b}" if b > a else f"{a}" for a, b in zip(starts, ends, strict=True)]
    return ", ".join(runs if len(runs) < 5 else [*runs[:2], "…", runs[-1]])


def _quoted(*rows: str) -> str:
    text = "\\n".join(row.replace("\\", "\\\\").replace('"', '\\"') for row in rows)
    return f'"{text}"'
