"""Graphs of whole models: their size, that they use the file's tensors, and their order.

Released shapes of every architecture come from headers over sparse files, so that nothing is
written; the same checks run on a tiny model and on the decomposed form.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from engine.commands.graph import histogram, layer_kinds
from engine.formats.gguf import GGUFFile
from engine.graph import Graph, Kind, Tensor, dim_name
from engine.models import load_model
from engine.ops import OPS
from engine.placement.place import Plan
from engine.planning import plan_only
from tests.support.helpers import HEADER_VOCAB, write_header
from tools.presets import PRESETS

BATCHES = (1, 512)
# Per layer kind: layers of it, and nodes of each; 4 nodes more are outside of layers.
LAYERS = {
    "0.8b": {"delta net": (18, 12), "attention": (6, 9)},
    "tiny-untied": {"delta net": (3, 12), "attention": (1, 9)},
    "35b-a3b": {"delta net": (30, 15), "attention": (10, 12)},
    "next-80b": {"delta net": (36, 15), "attention": (12, 12)},
    "kimi-48b": {"KDA (dense)": (1, 14), "KDA": (19, 17), "MLA": (7, 14)},
    "ling-tiny": {"KDA (dense)": (1, 12), "KDA": (17, 15), "MLA": (6, 16)},
    "ling-flash": {"KDA (dense)": (2, 12), "KDA": (33, 15), "MLA": (7, 14)},
}
N_NODES = {"0.8b": 274, "tiny-untied": 49, "35b-a3b": 574, "next-80b": 688, "kimi-48b": 439}
N_NODES |= {"ling-tiny": 367, "ling-flash": 621}
MAX_NODES_PER_LAYER = 17
# What the recurrence costs without its fused op: nodes of the model, by batch size.
N_DECOMPOSED = {
    "0.8b": {1: 490, 64: 940, 512: 1948},
    "tiny-untied": {1: 91, 64: 166, 512: 334},
    "35b-a3b": {1: 994, 64: 1744, 512: 3424},
    "next-80b": {1: 1192, 64: 2092, 512: 4108},
    "kimi-48b": {1: 679, 64: 1699, 512: 6179},
    "ling-tiny": {1: 583, 64: 1501, 512: 5533},
    "ling-flash": {1: 1041, 64: 2826, 512: 10666},
}
# Tensors of a file that are taken apart, and what becomes of them.
TAKEN_APART = {"next-80b": ({"ssm_ba"}, {"ssm_beta", "ssm_alpha"})}


@pytest.fixture(scope="module", params=LAYERS)
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(preset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_header(tmp_path_factory.mktemp("header") / "model.gguf", preset)


@pytest.fixture(scope="module")
def plans(path: Path) -> dict[int, Plan]:
    return {n: plan_only(path, n, "fused", backend="reference") for n in BATCHES}


@pytest.fixture(scope="module", params=["fused", "decomposed"])
def graph(request: pytest.FixtureRequest, path: Path) -> Graph:
    return plan_only(path, 128, request.param, backend="reference").graph


def test_a_model_has_few_nodes_and_as_many_for_every_batch(
    preset: str, plans: dict[int, Plan]
) -> None:
    p = PRESETS[preset]
    linear = sum(p.is_linear(i) for i in range(p.n_layers))
    for plan in plans.values():
        ops = dict(histogram(plan))
        assert len(plan.graph.nodes) == N_NODES[preset]
        assert ops["GATED_DELTA_NET"] == ops["SSM_CONV"] == linear
        assert ops["ATTENTION"] == p.n_layers - linear
        assert ops.keys() <= OPS.keys()


def test_layers_have_few_nodes(preset: str, plans: dict[int, Plan]) -> None:
    for plan in plans.values():
        rows = {kind: (n, per) for kind, n, per in layer_kinds(plan)}
        assert rows == LAYERS[preset] | {"(no layer)": (1, 4)}
        assert max(per for _, per in rows.values()) <= MAX_NODES_PER_LAYER
        assert sum(n for n, _ in LAYERS[preset].values()) == PRESETS[preset].n_layers
        assert sum(n * per for n, per in rows.values()) == len(plan.graph.nodes)


def test_batches_differ_in_capacity_only(plans: dict[int, Plan]) -> None:
    one, many = (plans[n].graph for n in BATCHES)
    for a, b in zip(one.nodes, many.nodes, strict=True):
        assert (a.op, a.name, a.attrs) == (b.op, b.name, b.attrs)
        assert [t.name for t in a.inputs.values()] == [t.name for t in b.inputs.values()]
        for x, y in zip(
            (*a.inputs.values(), *a.outputs), (*b.inputs.values(), *b.outputs), strict=True
        ):
            assert [repr(d).split("≤")[0] for d in x.shape] == [
                repr(d).split("≤")[0] for d in y.shape
            ]


def test_every_tensor_of_the_file_is_used(preset: str, path: Path, graph: Graph) -> None:
    file = GGUFFile(path)
    known = load_model(file).weights.tensors
    for name, tensor in graph.weights.items():
        assert (tensor.shape, tensor.dtype) == (known[name].shape, known[name].dtype)
        assert tensor.nbytes == known[name].nbytes
    packed, parts = TAKEN_APART.get(preset, (set(), set()))
    assert {n.split(".")[2] for n in file.tensors.keys() - graph.weights.keys()} == packed
    assert {n.split(".")[2] for n in graph.weights.keys() - file.tensors.keys()} == parts
    n_bytes = sum(info.nbytes for info in file.tensors.values())
    assert n_bytes == sum(tensor.nbytes for tensor in graph.weights.values())
    used = Counter(
        t.base for node in graph.nodes for t in node.inputs.values() if t.kind is Kind.WEIGHT
    )
    assert used.keys() == set(graph.weights.values())
    tied = {graph.weights["token_embd.weight"]} if "output.weight" not in file.tensors else set()
    assert {t for t, n in used.items() if n > 1} == tied


def test_append_order_is_execution_order(graph: Graph) -> None:
    known = {*graph.inputs.values(), *graph.weights.values(), *graph.states.values()}
    for node in graph.nodes:
        for operand, t in node.inputs.items():
            assert t.base in known, (node, operand)
        assert not known & set(node.outputs)
        known |= set(node.outputs)
    assert {t.base for t in graph.outputs.values()} <= known
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)


def test_every_input_is_used(graph: Graph) -> None:
    used = {t.base for node in graph.nodes for t in node.inputs.values()}
    unused = {name for name, t in graph.inputs.items() if t not in used}
    fused = any(node.op.name == "GATED_DELTA_NET" for node in graph.nodes)
    assert unused == set() if fused else unused <= {"snapshot_dst"}


def test_only_declared_states_are_written_each_by_one_node_of_its_layer(graph: Graph) -> None:
    writers: dict[Tensor, list[str]] = {t: [] for t in graph.states.values()}
    for node in graph.nodes:
        for t in node.written:
            assert t.kind is Kind.STATE
            writers[t].append(node.name)
        assert set(node.op.writes) <= {n for n, t in node.inputs.items() if t.kind is Kind.STATE}
    for t, nodes in writers.items():
        assert len(nodes) == 1, (t, nodes)
        assert nodes[0].split(".")[:2] == t.name.split(".")[:2]
        assert dim_name(t) == ("n_blocks" if t.name.endswith("_cache") else "n_slots")


def test_attention_follows_the_write_of_its_keys(graph: Graph) -> None:
    written: set[Tensor] = set()
    for node in graph.nodes:
        if node.op.name == "ATTENTION":
            assert {node.inputs["k_cache"].base, node.inputs["v_cache"].base} <= written
        written |= set(node.written)


def test_the_decomposed_form_has_the_nodes_that_the_fused_one_saves(
    preset: str, path: Path, plans: dict[int, Plan]
) -> None:
    for n, n_nodes in N_DECOMPOSED[preset].items():
        plan = plan_only(path, n, "decomposed", backend="reference")
        assert len(plan.graph.nodes) == n_nodes
        assert "GATED_DELTA_NET" not in dict(histogram(plan))
        assert plan.graph.weights.keys() == plans[1].graph.weights.keys()
        assert plan.graph.states.keys() == plans[1].graph.states.keys()


def test_the_logits_have_a_row_for_every_output(plans: dict[int, Plan]) -> None:
    for n, plan in plans.items():
        logits = plan.graph.outputs["logits"]
        assert logits.shape == (n, HEADER_VOCAB)
        assert dim_name(logits) == "n_outputs"
