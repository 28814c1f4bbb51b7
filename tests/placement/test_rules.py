"""-ngl, -ncmoe, -cmoe and --override-tensor: which nodes they keep from a GPU, and say so."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.backends.base import Traits
from engine.config import EngineConfig, capacity_of
from engine.errors import NotEnoughMemoryError
from engine.formats.gguf import GGUFFile
from engine.graph import Graph, Kind
from engine.models import BuildOptions, load_model
from engine.placement import estimate as memory_estimate
from engine.placement.place import Plan
from engine.placement.rules import Offload, OffloadError, place_where_it_fits
from tests.support.picky import Picky

Models = Callable[[str, str], Path]


class Gpu(Picky):
    """A backend with memory of its own."""

    traits = Traits(own_memory=True)

    def __init__(self, n_bytes: int = 1 << 40) -> None:
        super().__init__("cuda")
        self.n_bytes = n_bytes

    def free_bytes(self) -> int | None:
        return self.n_bytes


def graph_of(path: Path) -> Graph:
    config = EngineConfig(n_ubatch=64).resolved(Traits())
    capacity = capacity_of(config, 256, Traits())
    return load_model(GGUFFile(path)).build(BuildOptions(capacity))


@pytest.fixture(scope="module")
def graph(models: Models) -> Graph:
    return graph_of(models("tiny-untied", "Q8_0"))


@pytest.fixture(scope="module")
def experts(models: Models) -> Graph:
    return graph_of(models("tiny-moe", "Q8_0"))


def placed(graph: Graph, offload: Offload, n_bytes: int = 1 << 40) -> tuple[Plan, Gpu]:
    gpu = Gpu(n_bytes)
    return place_where_it_fits(graph, [gpu, Picky("cpu")], offload), gpu


def on_cpu(plan: Plan) -> list[str]:
    return [node.name for node, p in plan.placements.items() if p.backend.name == "cpu"]


def layers_on_cpu(plan: Plan) -> list[int]:
    names = {name.split(".")[1] for name in on_cpu(plan) if name.startswith("blk.")}
    return sorted(map(int, names))


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 99])
def test_the_last_layers_go_to_the_gpu_and_the_head_is_one_more(graph: Graph, n: int) -> None:
    n_layers = len(graph.layer_kinds)
    assert n_layers == 4
    plan, _ = placed(graph, Offload(n_gpu_layers=n))
    assert layers_on_cpu(plan) == list(range(max(0, n_layers + 1 - n)))[:n_layers]
    assert ("output" in on_cpu(plan)) == (n == 0)
    stay = [p for p in plan.placements.values() if p.backend.name == "cpu"]
    assert all(f"-ngl {n}" in p.reason for p in stay)


def test_more_layers_than_there_are_is_all_of_them(graph: Graph) -> None:
    """So `-ngl all` is a large number, which no reason shows."""
    rules = Offload(n_gpu_layers=1 << 20).rules(graph, [Gpu(), Picky("cpu")])
    assert {reason for _, reason in rules.values()} == {"-ngl 5"}


def test_a_tied_head_goes_to_the_gpu_while_the_table_stays(models: Models) -> None:
    plan, gpu = placed(graph_of(models("tiny", "Q8_0")), Offload(n_gpu_layers=1))
    assert "token_embd" in on_cpu(plan)
    assert "output" not in on_cpu(plan)
    assert "token_embd.weight" in [t.name for t in plan.tensors_of(gpu, Kind.WEIGHT)]


def test_without_options_all_is_on_the_gpu(graph: Graph) -> None:
    assert on_cpu(placed(graph, Offload())[0]) == []


@pytest.mark.parametrize("n", [0, 1, 2, 1 << 20])
def test_experts_of_the_first_layers_stay(experts: Graph, n: int) -> None:
    plan, _ = placed(experts, Offload(n_cpu_moe=n))
    products = [node for node in experts.nodes if node.op.name == "MUL_MAT_ID"]
    stay = {node.name for node in products if int(node.name.split(".")[1]) < n}
    assert stay <= set(on_cpu(plan))
    assert not ({node.name for node in products} - stay) & set(on_cpu(plan))


def test_an_expression_moves_the_whole_node(graph: Graph) -> None:
    plan, _ = placed(graph, Offload(overrides=(r"blk\.1\.ffn_up=cpu",)))
    (node,) = (n for n in graph.nodes if n.name == "blk.1.ffn_gate_up")
    assert plan.placements[node].backend.name == "cpu"
    assert "--override-tensor blk\\.1\\.ffn_up=cpu (blk.1.ffn_up.weight)" in (
        plan.placements[node].reason
    )


def test_an_expression_counts_more_than_the_number_of_layers(graph: Graph) -> None:
    plan, _ = placed(graph, Offload(0, overrides=("ffn_down=cuda",)))
    on_gpu = {n.name for n, p in plan.placements.items() if p.backend.name == "cuda"}
    assert on_gpu >= {f"blk.{i}.ffn_down" for i in range(4)}
    assert not any("ffn_gate_up" in name for name in on_gpu)


def test_the_first_expression_that_is_found_counts(graph: Graph) -> None:
    rules = Offload(overrides=("ffn=cuda", "ffn_down=cpu")).rules(graph, [Gpu(), Picky("cpu")])
    assert {backend for backend, _ in rules.values()} == {"cuda"}


@pytest.mark.parametrize("expression", ["(.|..)*!", "(.*)*!", ".*" * 40 + "!"])
def test_an_expression_that_takes_long_is_refused(graph: Graph, expression: str) -> None:
    """It would take from minutes to longer than the universe's age."""
    before, start = signal.getsignal(signal.SIGALRM), time.perf_counter()
    offload = Offload(overrides=(f"{expression}=cpu",))
    with pytest.raises(OffloadError, match=r"expected what is searched in"):
        offload.rules(graph, [Gpu(), Picky("cpu")])
    assert time.perf_counter() - start < 20
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("expression", ["(", "a{99999999999999999999}", "(" * 5000 + ")" * 5000])
def test_an_expression_that_is_none(graph: Graph, expression: str) -> None:
    with pytest.raises(OffloadError, match="no regular expression"):
        Offload(overrides=(f"{expression}=cpu",)).rules(graph, [Gpu(), Picky("cpu")])


def test_expressions_of_another_thread(graph: Graph) -> None:
    """Python handles signals in the main thread only."""
    offload, backends = Offload(overrides=("ffn_down=cpu",)), [Gpu(), Picky("cpu")]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(offload.rules, graph, backends).result() == offload.rules(
            graph, backends
        )


def test_strict_placement_takes_rules_for_no_fallback(graph: Graph) -> None:
    plan = place_where_it_fits(graph, [Gpu(), Picky("cpu")], Offload(n_gpu_layers=0), strict=True)
    assert len(on_cpu(plan)) == len(graph.nodes)


def test_as_many_layers_as_fit(graph: Graph) -> None:
    whole, gpu = placed(graph, Offload())
    need = memory_estimate.estimate(whole, [gpu]).total
    seen = []
    for n_bytes in range(need, 0, -need // 20):
        plan, gpu = placed(graph, Offload(), n_bytes)
        used = memory_estimate.estimate(plan, [gpu] if gpu in plan.backends else [])
        n = len(graph.layer_kinds) - len(layers_on_cpu(plan))
        assert n == 0 or used.total <= n_bytes
        seen.append(n)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 4
    assert len(set(seen)) >= 3


def test_more_layers_than_fit_are_refused_if_they_were_asked_for(graph: Graph) -> None:
    plan, _ = placed(graph, Offload(n_gpu_layers=5), n_bytes=1000)
    with pytest.raises(NotEnoughMemoryError, match=r"^not enough memory on cuda: "):
        memory_estimate.check(plan)
