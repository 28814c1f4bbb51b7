"""Graphs of whole models: their size, that they use the file's tensors, and their order.

The released 0.8B shape comes from a header over a sparse file, so that nothing is written; the
same checks run on a tiny model and on the decomposed form.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from engine.engine import plan_only
from engine.gguf import GGUFFile
from engine.graph import Graph, Kind, Tensor, dim_name
from engine.ops import OPS
from engine.planner import Plan
from engine.quants import BY_GGML_ID
from engine.report import histogram, layer_kinds
from tools.ggufwrite import TensorSpec, write_gguf
from tools.makevocab import made_vocabulary, padded_vocabulary
from tools.presets import PRESETS, metadata, tensors
from tools.synth import tensor_type

N_VOCAB = 512
BATCHES = (1, 512)
MAX_NODES, MAX_NODES_PER_LAYER = 340, 14


def write_header(path: Path, preset: str) -> Path:
    """A GGUF of a preset's shapes in Q4_0 whose tensors all lie over the same hole in the file."""
    p = replace(PRESETS[preset], n_vocab=N_VOCAB)
    values = {"general.architecture": p.arch} | metadata(p)
    values |= padded_vocabulary(made_vocabulary(), N_VOCAB)
    specs, largest = [], 0
    for name, shape in tensors(p).items():
        block = tensor_type(p, name, shape, "Q4_0")
        specs.append(TensorSpec(name, shape, block.ggml_id, 0, list))
        largest = max(largest, Tensor(name, shape, BY_GGML_ID[block.ggml_id], Kind.WEIGHT).nbytes)
    write_gguf(path, values, specs)
    os.truncate(path, path.stat().st_size + largest)
    return path


@pytest.fixture(scope="module", params=["0.8b", "tiny-untied"])
def preset(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def path(preset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_header(tmp_path_factory.mktemp("header") / "model.gguf", preset)


@pytest.fixture(scope="module")
def plans(path: Path) -> dict[int, Plan]:
    return {n: plan_only(path, n, "fused", "reference") for n in BATCHES}


@pytest.fixture(scope="module", params=["fused", "decomposed"])
def graph(request: pytest.FixtureRequest, path: Path) -> Graph:
    return plan_only(path, 128, request.param, "reference").graph


def test_a_model_has_few_nodes_and_as_many_for_every_batch(
    preset: str, plans: dict[int, Plan]
) -> None:
    counts = {len(plan.graph.nodes) for plan in plans.values()}
    assert len(counts) == 1
    assert max(counts) <= MAX_NODES
    linear = sum(PRESETS[preset].is_linear(i) for i in range(PRESETS[preset].n_layers))
    for plan in plans.values():
        ops = dict(histogram(plan))
        assert ops["GATED_DELTA_NET"] == ops["SSM_CONV"] == linear
        assert ops["ATTENTION"] == PRESETS[preset].n_layers - linear
        assert ops.keys() <= OPS.keys()


def test_released_models_count_their_delta_nets(preset: str, plans: dict[int, Plan]) -> None:
    n = {"0.8b": 18, "tiny-untied": 3}[preset]
    for plan in plans.values():
        assert dict(histogram(plan))["GATED_DELTA_NET"] == n


def test_layers_have_few_nodes(preset: str, plans: dict[int, Plan]) -> None:
    p = PRESETS[preset]
    for plan in plans.values():
        rows = {kind: (n, per) for kind, n, per in layer_kinds(plan)}
        assert rows.keys() == {"delta net", "attention", "(no layer)"}
        assert max(per for _, per in rows.values()) <= MAX_NODES_PER_LAYER
        assert rows["delta net"][0] + rows["attention"][0] == p.n_layers
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


def test_every_tensor_of_the_file_is_used(path: Path, graph: Graph) -> None:
    file = GGUFFile(path)
    assert graph.weights.keys() == file.tensors.keys()
    for name, tensor in graph.weights.items():
        assert (tensor.shape, tensor.dtype) == (file.tensors[name].shape, file.tensors[name].dtype)
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
            assert {node.inputs["k_cache"], node.inputs["v_cache"]} <= written
        written |= set(node.written)


def test_the_decomposed_form_has_the_nodes_that_the_fused_one_saves(path: Path) -> None:
    plan = plan_only(path, 64, "decomposed", "reference")
    fused = plan_only(path, 64, "fused", "reference")
    saved = dict(histogram(fused))
    assert "GATED_DELTA_NET" not in dict(histogram(plan))
    assert len(plan.graph.nodes) > len(fused.graph.nodes) + 20 * saved["GATED_DELTA_NET"]
    assert plan.graph.weights.keys() == fused.graph.weights.keys()
    assert plan.graph.states.keys() == fused.graph.states.keys()


def test_the_logits_have_a_row_for_every_output(plans: dict[int, Plan]) -> None:
    for n, plan in plans.items():
        logits = plan.graph.outputs["logits"]
        assert logits.shape == (n, N_VOCAB)
        assert dim_name(logits) == "n_outputs"
