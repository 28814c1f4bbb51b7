"""Placement: which backend takes a node, the reason it gives, and where a plan is cut.

Backends here are the reference backend under other names, each refusing some nodes. What such
plans compute is in tests/placement/test_mixed_backends.py.
"""

from __future__ import annotations

import pytest

from engine.backends.base import Support
from engine.backends.reference import ReferenceBackend
from engine.formats.gguf import GGUFFile
from engine.formats.quants import F32
from engine.graph import Capacity, Dim, Graph, Kind, Node, Tensor
from engine.models import BuildOptions, load_model
from engine.ops.add_rms_norm import add_rms_norm
from engine.ops.mul_mat import mul_mat
from engine.ops.swiglu import swiglu
from engine.placement.place import PlacementError, Plan, place
from tests.support.picky import Picky, refuse_names, refuse_ops
from tools.synth import write_model


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Three delta nets and an attention layer, embedding and head tied."""
    path = write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "tiny")
    capacity = Capacity(8, n_seqs=2, n_outputs=8, n_slots=2, n_blocks=2)
    return load_model(GGUFFile(path)).build(BuildOptions(capacity))


def where(plan: Plan) -> dict[str, str]:
    """Node -> name of its backend."""
    return {node.name: p.backend.name for node, p in plan.placements.items()}


def reasons(plan: Plan) -> dict[str, str]:
    return {node.name: p.reason for node, p in plan.placements.items()}


def test_one_backend_takes_everything_in_one_split(graph: Graph) -> None:
    only = Picky("only")
    plan = place(graph, [only], strict=True)
    assert set(where(plan).values()) == {"only"}
    assert list(plan.placements) == graph.nodes
    (split,) = plan.splits
    assert (split.nodes, split.copies, plan.backends) == (graph.nodes, [], [only])
    assert split.keeps == [graph.outputs["logits"]]
    why = reasons(plan)
    assert why["token_embd"] == why["blk.0.ffn_down"] == "the only backend"
    assert why["blk.0.gated_delta_net"] == "holds its state, the only backend"


def test_reasons_name_what_a_node_follows(graph: Graph) -> None:
    plan = place(graph, [Picky("a"), Picky("b")])
    assert set(where(plan).values()) == {"a"}
    why = reasons(plan)
    assert why["blk.0.delta_net_in"] == "a is first in order"
    assert why["blk.3.attention"] == "holds its state, a is first in order"
    assert why["blk.1.swiglu"] == "follows blk.1.ffn_gate_up"
    assert why["output_rows"] == "follows output_norm"
    assert why["output"] == "holds token_embd.weight"


def test_a_refusal_moves_a_node_and_what_follows_it(graph: Graph) -> None:
    a = Picky("a", refuse_names("too wide", "blk.1.ffn_gate_up"))
    plan = place(graph, [a, Picky("b")])
    moved = {name for name, backend in where(plan).items() if backend == "b"}
    # SWIGLU has no weight and follows its producer; the next product has one and goes back.
    assert moved == {"blk.1.ffn_gate_up", "blk.1.swiglu"}
    why = reasons(plan)
    assert why["blk.1.ffn_gate_up"] == "b is first in order after refusals (a: too wide)"
    assert why["blk.1.swiglu"] == "follows blk.1.ffn_gate_up"


def test_a_node_leaves_its_producer_if_that_refuses_it(graph: Graph) -> None:
    a, b = Picky("a", refuse_ops("no", "MUL_MAT")), Picky("b", refuse_ops("never", "SWIGLU"))
    plan = place(graph, [a, b])
    backends = where(plan)
    assert backends["blk.0.ffn_gate_up"] == backends["blk.0.ffn_down"] == "b"
    assert backends["blk.0.swiglu"] == "a"
    assert reasons(plan)["blk.0.swiglu"] == "a is first in order after refusals (b: never)"


def test_order_is_priority(graph: Graph) -> None:
    a, b, c = (Picky(name) for name in "abc")
    for backends in ([a, b, c], [c, a, b]):
        assert set(where(place(graph, backends)).values()) == {backends[0].name}


def test_nodes_that_share_a_state_stay_together(graph: Graph) -> None:
    plan = place(graph, [Picky("a", refuse_ops("heads of 256", "ATTENTION")), Picky("b")])
    backends, why = where(plan), reasons(plan)
    assert backends["blk.3.attention"] == backends["blk.3.qk_norm_rope"] == "b"
    # The reason names the node whose refusal moved the group, on both of its nodes.
    for name in ("blk.3.attention", "blk.3.qk_norm_rope"):
        assert why[name] == (
            "holds its state, b is first in order after refusals (blk.3.attention: a: heads of 256)"
        )
    assert {n for n, backend in backends.items() if backend == "b"} == {
        "blk.3.attention",
        "blk.3.qk_norm_rope",
    }


def test_states_of_one_layer_may_part(graph: Graph) -> None:
    plan = place(graph, [Picky("a", refuse_ops("no", "SSM_CONV")), Picky("b")])
    backends = where(plan)
    assert (backends["blk.0.ssm_conv"], backends["blk.0.gated_delta_net"]) == ("b", "a")
    # A node without weights follows its producer, away from the first in order.
    assert backends["blk.0.l2_norm"] == "b"
    by_name = {b.name: {t.name for t in plan.tensors_of(b, Kind.STATE)} for b in plan.backends}
    assert by_name["b"] == {f"blk.{i}.conv_state" for i in range(3)}
    assert by_name["a"].isdisjoint(by_name["b"])
    assert by_name["a"] | by_name["b"] == graph.states.keys()


def test_a_tied_weight_is_held_twice_only_if_it_must(graph: Graph) -> None:
    a = Picky("a", refuse_names("no head", "output"))
    plan = place(graph, [a, Picky("b")])
    assert (where(plan)["token_embd"], where(plan)["output"]) == ("a", "b")
    holders = [
        b.name
        for b in plan.backends
        if graph.weights["token_embd.weight"] in plan.tensors_of(b, Kind.WEIGHT)
    ]
    assert holders == ["a", "b"]


def test_a_node_that_nobody_takes_is_an_error(graph: Graph) -> None:
    a, b = Picky("a", refuse_names("tired", "blk.2.swiglu")), Picky("b", refuse_ops("x", "SWIGLU"))
    with pytest.raises(PlacementError) as caught:
        place(graph, [b, a])
    # Node 2 is the first that both refuse.
    assert str(caught.value) == "no backend supports SWIGLU blk.2.swiglu (b: x; a: tired)"


def test_a_state_that_nobody_can_hold_is_an_error(graph: Graph) -> None:
    a, b = Picky("a", refuse_ops("no", "ATTENTION")), Picky("b", refuse_ops("nor", "QK_NORM_ROPE"))
    with pytest.raises(PlacementError) as caught:
        place(graph, [a, b])
    message = str(caught.value)
    for part in ("blk.3.attention: a: no", "blk.3.qk_norm_rope: b: nor"):
        assert part in message


def test_strict_names_node_and_reason(graph: Graph) -> None:
    a, b = Picky("a", refuse_names("too wide", "blk.1.ffn_down")), Picky("b")
    with pytest.raises(PlacementError) as caught:
        place(graph, [a, b], strict=True)
    assert str(caught.value) == (
        "MUL_MAT blk.1.ffn_down: expected backend a (strict), got b: a: too wide"
    )
    # A backend that refuses what it isn't asked to run is no obstacle.
    refuses_all = Picky("none", lambda node: "no")
    assert place(graph, [Picky("a"), refuses_all], strict=True).backends[0].name == "a"


def test_strict_names_the_neighbour_that_moved_a_node(graph: Graph) -> None:
    """The group's first node is fine in itself; its state has to be elsewhere."""
    a = Picky("a", refuse_ops("heads of 256", "ATTENTION"))
    with pytest.raises(PlacementError, match=r"blk\.3\.qk_norm_rope.*blk\.3\.attention: a: heads"):
        place(graph, [a, Picky("b")], strict=True)


def chain(*nodes: str) -> Graph:
    """A product, then per letter: n(orm) or s(wiglu) of the last two results, p(roduct) of one."""
    graph = Graph(Capacity(4))
    weight, norm = graph.weight("w", (8, 8), F32), graph.weight("norm", (8,), F32)
    x = Tensor("x", (Dim(4, "n_tokens"), 8), F32, Kind.ACTIVATION)
    made = [mul_mat(graph, "first", x, weight)[0]]
    for i, kind in enumerate(nodes):
        name, last, before = f"{kind}{i}", made[-1], made[-2] if len(made) > 1 else made[-1]
        match kind:
            case "n":
                made.append(add_rms_norm(graph, name, last, before, norm, 1e-6)[0])
            case "p":
                made.append(mul_mat(graph, name, last, weight)[0])
            case "s":
                made += swiglu(graph, name, (last, before))
    graph.outputs["out"] = made[-1]
    return graph


def test_splits_copies_and_keeps() -> None:
    graph = chain("p", "s", "s", "p")
    a, b = Picky("a", refuse_ops("no", "SWIGLU")), Picky("b", refuse_ops("no", "MUL_MAT"))
    plan = place(graph, [a, b])
    first, p0, s1, s2, p3 = (node.outputs[0] for node in graph.nodes)
    assert [(s.backend.name, [n.name for n in s.nodes]) for s in plan.splits] == [
        ("a", ["first", "p0"]),
        ("b", ["s1", "s2"]),
        ("a", ["p3"]),
    ]
    # s1 reads p0 and first; s2 reads s1, which stays inside, and p0 again; p3 reads s2.
    assert [split.copies for split in plan.splits] == [[], [p0, first], [s2]]
    assert [split.keeps for split in plan.splits] == [[p0, first], [s2], [p3]]
    assert s1 not in plan.splits[1].keeps


def test_a_tensor_that_comes_back_is_kept_but_not_copied() -> None:
    graph = chain("p", "s", "n")
    a, b = Picky("a", refuse_ops("no", "SWIGLU")), Picky("b", refuse_ops("no", "ADD_RMS_NORM"))
    plan = place(graph, [a, b])
    _, p0, s1, _ = (node.outputs[0] for node in graph.nodes)
    assert [split.backend.name for split in plan.splits] == ["a", "b", "a"]
    # n2 = norm(s1 + p0) runs where p0 was made.
    assert plan.splits[2].copies == [s1]
    assert p0 in plan.splits[0].keeps


def test_each_split_that_reads_a_foreign_tensor_copies_it() -> None:
    graph = chain("s", "p", "s")
    a, b = Picky("a", refuse_ops("no", "SWIGLU")), Picky("b", refuse_ops("no", "MUL_MAT"))
    plan = place(graph, [a, b])
    _, s0, p1, s2 = (node.outputs[0] for node in graph.nodes)
    assert [split.backend.name for split in plan.splits] == ["a", "b", "a", "b"]
    # s2 reads p1 of backend a and s0, which is on b already.
    assert plan.splits[3].copies == [p1]
    assert plan.splits[2].copies == [s0]
    assert plan.splits[1].keeps == [s0]
    assert plan.splits[3].keeps == [s2]


def test_the_reference_backend_refuses_nothing(graph: Graph) -> None:
    backend = ReferenceBackend()
    assert {backend.supports(node) for node in graph.nodes} == {Support(True)}


def test_each_node_is_asked_about_before_anything_is_placed(graph: Graph) -> None:
    asked: list[Node] = []

    def refuses(node: Node) -> str:
        asked.append(node)
        return ""

    place(graph, [Picky("a", refuses)])
    assert asked == graph.nodes
