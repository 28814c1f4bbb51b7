"""graph --dot: a strict reader of the text finds every node and edge, folded and not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.commands.dot import Box, folded
from engine.graph import Dim, Tensor
from engine.placement.place import Plan
from engine.planning import plan_only
from tests.support.helpers import Cli, write_header

PICTURE = Path(__file__).parents[2] / "docs" / "graph-0.8b.svg"
TOKEN = re.compile(r'\s+|"(?:[^"\\]|\\["\\n])*"|->|[A-Za-z_]\w*|\d+(?:\.\d+)?|[{}\[\]=,;]')
Attributes = dict[str, str]


@dataclass
class Picture:
    """What DOT text declares: attributes of nodes, of edges and of clusters; the clusters that a
    node is in, from the outermost; attributes of the whole."""

    nodes: dict[str, Attributes] = field(default_factory=dict)
    edges: dict[tuple[str, str], Attributes] = field(default_factory=dict)
    clusters: dict[str, Attributes] = field(default_factory=dict)
    inside: dict[str, list[str]] = field(default_factory=dict)
    attributes: Attributes = field(default_factory=dict)


class Reader:
    """Reads the part of Graphviz's language that the engine writes, and nothing else."""

    def __init__(self, text: str) -> None:
        self.words: list[str] = []
        at = 0
        while at < len(text):
            match = TOKEN.match(text, at)
            assert match, text[at : at + 40]
            at = match.end()
            if not match[0].isspace():
                self.words.append(match[0])
        self.words.reverse()
        self.picture = Picture()
        self.take("digraph")
        self.block([])
        assert not self.words

    def take(self, *expected: str) -> str:
        word = self.words.pop()
        assert not expected or word in expected, (word, expected)
        return word

    def name(self) -> str:
        word = self.take()
        assert re.match(r'["\w]', word), word
        return word[1:-1] if word.startswith('"') else word

    def attributes(self) -> Attributes:
        found: Attributes = {}
        self.take("[")
        while True:
            key = self.name()
            self.take("=")
            assert key not in found
            found[key] = self.name()
            if self.take(",", "]") == "]":
                return found

    def block(self, path: list[str]) -> None:
        self.take("{")
        while self.words[-1] != "}":
            self.statement(path)
        self.take("}")

    def statement(self, path: list[str]) -> None:
        picture, name = self.picture, self.name()
        if name == "subgraph":
            cluster = self.name()
            assert cluster.startswith("cluster_")
            assert cluster not in picture.clusters
            picture.clusters[cluster] = {}
            return self.block([*path, cluster])
        if self.words[-1] == "=":
            self.take("=")
            (picture.clusters[path[-1]] if path else picture.attributes)[name] = self.name()
        elif self.words[-1] == "->":
            self.take("->")
            edge = name, self.name()
            assert edge not in picture.edges
            picture.edges[edge] = self.attributes()
        elif name in ("graph", "node", "edge"):
            self.attributes()
        else:
            assert name not in picture.nodes
            picture.nodes[name], picture.inside[name] = self.attributes(), path
        self.take(";")
        return None


def read(text: str) -> Picture:
    picture = Reader(text).picture
    assert {end for edge in picture.edges for end in edge} <= picture.nodes.keys()
    return picture


def drawn(cli: Cli, *argv: object) -> Picture:
    result = cli("graph", "--dot", "-", *argv)
    assert (result.status, result.err) == (0, "")
    return read(result.out)


def graph_nodes(picture: Picture) -> list[str]:
    """Names of nodes of the graph: others have a space."""
    return [name for name in picture.nodes if " " not in name]


def n_layers(label: str) -> int:
    """How many layers the label of a cluster says that it stands for."""
    if total := re.search(r"\((\d+) in all\)$", label):
        return int(total[1])
    times = re.match(r"(\d+) × ", label)
    return int(times[1]) if times else 1


def words_of(tensor: Tensor) -> str:
    sizes = (d.name if isinstance(d, Dim) else str(int(d)) for d in tensor.shape)
    return "×".join(sizes)


def reads(plan: Plan) -> dict[tuple[str, str], set[str]]:
    """(producer, reader) of each edge of a graph, with the shapes that are read."""
    made = {id(t): node.name for node in plan.graph.nodes for t in node.outputs}
    found: dict[tuple[str, str], set[str]] = {}
    for node in plan.graph.nodes:
        for tensor in node.inputs.values():
            if source := made.get(id(tensor.base)):
                found.setdefault((source, node.name), set()).add(words_of(tensor))
    return found


def shapes(label: str) -> set[str]:
    return {row.split(":")[-1].strip() for row in label.split(r"\n")}


def inner(picture: Picture) -> dict[tuple[str, str], Attributes]:
    """The edges between nodes of the graph."""
    return {edge: a for edge, a in picture.edges.items() if not any(" " in end for end in edge)}


def test_every_layer_has_its_cluster(cli: Cli, path: Path) -> None:
    """With --layers: all nodes and edges of the graph, with shapes, in the clusters of layers."""
    plan = plan_only(path, 512)
    picture = drawn(cli, "-m", path, "--layers")
    assert set(graph_nodes(picture)) == {node.name for node in plan.graph.nodes}
    edges = {edge: shapes(a["label"]) for edge, a in inner(picture).items()}
    assert edges == reads(plan)
    for node in plan.graph.nodes:
        label = [picture.clusters[cluster]["label"] for cluster in picture.inside[node.name]]
        kind = plan.graph.layer_kinds.get(node.layer)
        assert label == ([f"{kind}: layer {node.layer.removeprefix('blk.')}"] if kind else [])
        assert node.op.name in picture.nodes[node.name]["label"]
    title = picture.attributes["label"]
    assert title.endswith(
        f": {len(plan.graph.nodes)} nodes in {len(plan.graph.layer_kinds)} layers"
    )


def test_the_ends_of_the_graph_have_shapes(cli: Cli, tiny: Path) -> None:
    edges = drawn(cli, "-m", tiny).edges
    assert shapes(edges["input tokens", "token_embd"]["label"]) == {"n_tokens"}
    assert shapes(edges["output", "output logits"]["label"]) == {"n_outputs×320"}


@pytest.mark.parametrize("preset", ["0.8b", "27b", "35b-a3b", "next-80b", "kimi-48b", "ling-tiny"])
def test_folded_counts_add_up(cli: Cli, tmp_path: Path, preset: str) -> None:
    path = write_header(tmp_path / "m.gguf", preset)
    plan, picture = plan_only(path, 512), drawn(cli, "-m", path)
    counts = {
        name: n_layers(picture.clusters[picture.inside[name][-1]]["label"])
        for name in graph_nodes(picture)
        if picture.inside[name]
    }
    outside = len(graph_nodes(picture)) - len(counts)
    assert sum(counts.values()) + outside == len(plan.graph.nodes)
    assert len(graph_nodes(picture)) < 0.3 * len(plan.graph.nodes)
    # What is drawn is there, and whoever reads has an edge from above but for the first layer's.
    every = reads(plan)
    assert {name.split(".", 2)[-1] for edge in every for name in edge} == {
        name.split(".", 2)[-1] for name in graph_nodes(picture)
    }
    for (source, reader), attributes in inner(picture).items():
        similar = [
            words
            for (a, b), words in every.items()
            if (a.split(".", 2)[-1], b.split(".", 2)[-1])
            == (source.split(".", 2)[-1], reader.split(".", 2)[-1])
        ]
        assert shapes(attributes["label"]) in similar


def test_the_folded_graph_of_the_0_8b(cli: Cli, tmp_path: Path) -> None:
    picture = drawn(cli, "-m", write_header(tmp_path / "m.gguf", "0.8b"))
    labels = [a["label"] for a in picture.clusters.values()]
    assert labels == [
        "backends",
        "repeated 6 times: layers 0-23",
        "3 × delta net: layers 0-2, 4-6, …, 20-22 (18 in all)",
        "attention: layers 3, 7, …, 23 (6 in all)",
    ]
    assert len(graph_nodes(picture)) == 12 + 9 + 4
    # The residual of all layers but the first.
    assert ("blk.0.attn_norm", "blk.0.post_attention_norm") in picture.edges
    assert ("token_embd", "blk.0.post_attention_norm") not in picture.edges
    states = r"GATED_DELTA_NET\nupdates delta_state"
    assert picture.nodes["blk.0.gated_delta_net"]["label"] == states


def test_the_picture_in_the_documents_is_this_graph(cli: Cli, tmp_path: Path) -> None:
    picture = drawn(cli, "-m", write_header(tmp_path / "m.gguf", "0.8b"))
    svg = PICTURE.read_text("utf-8").replace("&#45;", "-").replace("&gt;", ">")
    titles = Counter(re.findall(r"<title>(.+)</title>", svg))
    expected = [*picture.nodes, *picture.clusters, *(f"{a}->{b}" for a, b in picture.edges)]
    assert titles == Counter(expected)
    for a in picture.clusters.values():
        assert f">{a['label']}</text>" in svg


def test_backends_have_colors_and_a_legend(cli: Cli, tiny: Path) -> None:
    plan = plan_only(tiny, 64, "decomposed")
    picture = drawn(cli, "-m", tiny, "--gdn", "decomposed", "--bs", 64, "--layers")
    legend = {name: a for name, a in picture.nodes.items() if name.startswith("backend ")}
    assert {a["label"] for a in legend.values()} == {"cpu", "reference"}
    colors = {a["label"]: a["fillcolor"] for a in legend.values()}
    assert len(set(colors.values())) == 2
    for node, placement in plan.placements.items():
        assert picture.nodes[node.name]["fillcolor"] == colors[placement.backend.name]


def spread(boxes: Sequence[Box], signatures: Sequence[Any]) -> Iterator[Any]:
    """The signatures of all layers of boxes, in order."""
    for box in boxes:
        for _ in range(box.count):
            yield from spread(box.parts, signatures) if box.parts else [signatures[box.layers[0]]]


def leaves(boxes: Sequence[Box]) -> Iterator[Box]:
    for box in boxes:
        yield from leaves(box.parts) if box.parts else [box]


@pytest.mark.parametrize("n_kinds", [1, 2, 3])
def test_folding_keeps_the_sequence(rng: np.random.Generator, n_kinds: int) -> None:
    for _ in range(50):
        part = rng.integers(0, n_kinds, rng.integers(1, 6)).tolist()
        signatures = [*rng.integers(0, n_kinds, 3).tolist(), *part * 4, *part[:2]]
        boxes = folded([(i,) for i in range(len(signatures))], signatures)
        assert list(spread(boxes, signatures)) == signatures
        layers = [layer for box in leaves(boxes) for layer in box.layers]
        assert sorted(layers) == list(range(len(signatures)))
        for box in leaves(boxes):
            assert len({signatures[layer] for layer in box.layers}) == 1


def test_nothing_else_goes_to_standard_output(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "g.dot"
    report = cli("graph", "-m", tiny, "--dot", file)
    assert report.out.startswith("graph nodes  = ")
    assert cli("graph", "-m", tiny, "--dot", "-").out == file.read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dot", "-", "--json"),
         "argument --dot: expected a file beside --json, got standard output (-)"),
        (("--layers",), "argument --layers: expected --dot, too"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    cli: Cli, tiny: Path, options: tuple[str, ...], words: str
) -> None:
    result = cli("graph", "-m", tiny, *options)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert words in result.err


@pytest.mark.parametrize(
    "text",
    ["digraph {", "digraph { a [x=1] }", "digraph { a -> b [x=1]; }", 'digraph { "a [x=1]; }',
     "digraph { a [x=1]; a [x=1]; }", "digraph { } }", "digraph { a [x]; }"],
)  # fmt: skip
def test_the_reader_is_strict(text: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        read(text)
