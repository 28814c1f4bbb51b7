"""Distinct experts of a step of generation: those that the reference's ROUTER nodes choose."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.bench.measure import Case, measure, random_tokens, sequences
from engine.graph import Node
from engine.runtime.batch import Chunk
from tests.support.cuda_devices import ON_DEVICES, MakeDevice, cuda_and_others, engine_on
from tests.support.helpers import Cli, assert_all_free
from tests.support.presets import WITH_EXPERTS
from tools.presets import PRESETS
from tools.synth import write_model

Models = Callable[[str, str], Path]
Rng = np.random.Generator
CASE = Case(n_prompt=11, n_gen=5, n_seqs=6)
OPTIONS: dict[str, Any] = {
    "n_parallel": CASE.n_seqs, "n_checkpoints": CASE.n_seqs, "n_ctx": CASE.n_kv, "n_ubatch": 64,
    "cache_ram": 0,
}  # fmt: skip


@contextmanager
def chosen(engine: Engine) -> Iterator[dict[str, np.ndarray]]:
    """The experts [T, n_used] of every ROUTER in the step that runs, by the node's name."""
    found: dict[str, np.ndarray] = {}

    def watch(node: Node, outputs: Sequence[np.ndarray]) -> None:
        if node.op.name == "ROUTER":
            found[node.name] = outputs[0].copy()

    run = engine.loop.executable.run
    with pytest.MonkeyPatch.context() as patched:
        watched = lambda inputs, live, _: run(inputs, live, watch)  # noqa: E731
        patched.setattr(engine.loop.executable, "run", watched)
        yield found


def expected_experts(path: Path, case: Case, seed: int) -> float:
    """By the reference backend: a greedy completion of each prompt, whose tokens are then processed
    at once while the outputs of its ROUTER nodes are watched."""
    rng, n = np.random.default_rng(seed), case.n_gen
    with Engine.load(path, backend="reference", n_ctx=512, n_parallel=case.n_seqs) as engine:
        prompts = [random_tokens(engine, case.n_prompt, rng) for _ in range(case.n_seqs)]
        first = random_tokens(engine, case.n_seqs, rng)
        starts = [[*prompt, token] for prompt, token in zip(prompts, first, strict=True)]
        params = SamplingParams(temperature=0, max_tokens=n - 1, ignore_eos=True)
        done = engine.generate_batch(starts, params)
        layers: dict[str, list[np.ndarray]] = {}
        for start, completion in zip(starts, done, strict=True):
            with chosen(engine) as found:
                engine.logits([*start, *completion.tokens])
            for name, ids in found.items():
                layers.setdefault(name, []).append(ids[case.n_prompt :])
    per_layer = [np.stack(rows) for rows in layers.values()]  # [sequences, steps, n_used]
    assert all(ids.shape[:2] == (case.n_seqs, n) for ids in per_layer)
    counts = [len(set(ids[:, step].ravel().tolist())) for ids in per_layer for step in range(n)]
    return sum(counts) / len(counts)


def counted(case: Case, engine: Engine, seed: int) -> float:
    (m,) = measure(engine, [case], np.random.default_rng(seed), count_experts=True)
    assert_all_free(engine)
    (experts,) = m.experts
    return experts


def counts_of(engine: Engine, case: Case, rng: Rng) -> dict[int, float]:
    """By the seeds of prompts."""
    seeds = [int(seed) for seed in rng.integers(1 << 30, size=3)]
    return {seed: counted(case, engine, seed) for seed in seeds}


def check(path: Path, case: Case, counts: Mapping[int, float]) -> None:
    """Of three counts at least two are the reference's. Sums in another order turn a choice round
    now and then, and a token with it."""
    pairs = [(got, expected_experts(path, case, seed)) for seed, got in counts.items()]
    assert sum(got == pytest.approx(want, rel=1e-12) for got, want in pairs) >= 2, pairs


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("preset", WITH_EXPERTS)
def test_those_that_the_reference_chooses(
    models: Models, rng: Rng, preset: str, backend: str
) -> None:
    path = models(preset, "F32")
    with Engine.load(path, backend=backend, keep_experts=True, **OPTIONS) as engine:
        counts = counts_of(engine, CASE, rng)
    check(path, CASE, counts)


def test_no_token_that_ends(models: Models, rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the generation that is timed, where half of the vocabulary would end it."""
    steps: list[list[int]] = []
    with Engine.load(models("tiny-moe", "F32"), keep_experts=True, **OPTIONS) as engine:
        run = engine.step

        def step(chunks: Sequence[Chunk]) -> np.ndarray:
            steps.append([chunk.tokens[-1] for chunk in chunks])
            return run(chunks)

        monkeypatch.setattr(engine, "step", step)
        engine.tokenizer.eog_ids = frozenset(range(0, engine.model.n_vocab, 2))
        counted(CASE, engine, int(rng.integers(1 << 30)))
    generated = [token for tokens in steps[-CASE.n_gen + 1 :] for token in tokens]
    assert len(generated) == CASE.n_seqs * (CASE.n_gen - 1)
    assert all(token % 2 for token in generated)


@ON_DEVICES
@pytest.mark.parametrize("n_seqs", [1, 3, 6])
def test_those_of_captured_steps(
    models: Models, rng: Rng, make_device: MakeDevice, n_seqs: int
) -> None:
    case, path = replace(CASE, n_seqs=n_seqs), models("tiny-moe", "F32")
    backends = cuda_and_others(make_device(n_seqs))
    with engine_on(path, backends, keep_experts=True, **OPTIONS) as engine:
        counts = counts_of(engine, case, rng)
        ((_, program),) = engine.loop.executable._programs
        assert program.replays.captured  # type: ignore[attr-defined]
    check(path, case, counts)


@ON_DEVICES
@pytest.mark.parametrize("n_rows", [1, 2, 6])
def test_those_of_fused_kernels(
    models: Models, rng: Rng, make_device: MakeDevice, n_rows: int
) -> None:
    """Of a quantized file, whose feed-forward is fused, as of the same step node by node."""
    backends = cuda_and_others(make_device(0))
    with engine_on(models("tiny-moe", "Q8_0"), backends, keep_experts=True, **OPTIONS) as engine:
        tokens = random_tokens(engine, 20 * n_rows, rng)
        with sequences(engine, n_rows) as seqs:
            for i, seq in enumerate(seqs):
                engine.prefill(seq, tokens[20 * i : 20 * i + 19])
            chunks = [Chunk(seq, [tokens[20 * i + 19]]) for i, seq in enumerate(seqs)]
            ends = [engine.memory.checkpoint(seq) for seq in seqs]
            engine.step(chunks)
            kept = engine.loop.kept()
            for seq, end in zip(seqs, ends, strict=True):
                engine.memory.restore(seq, end)
                end.release()
            with chosen(engine) as found:
                engine.step(chunks)
        ((_, program),) = engine.loop.executable._programs
        assert "experts_hidden" in [i.kernel for i in program.instructions]
    for ids, expected in zip(kept, found.values(), strict=True):
        assert ids.tolist() == expected.tolist()


def test_by_chance(tmp_path: Path, rng: Rng) -> None:
    """Of 256 experts, of which a token uses 8, n unrelated sequences use 256 (1 - (31 / 32)^n)."""
    preset = replace(PRESETS["tiny-moe"], n_experts=256, n_experts_used=8, n_embd=512)
    path = write_model(tmp_path / "m.gguf", preset, "Q8_0", seed=3, vocab_size=20_000)
    cases = [Case(n_prompt=8, n_gen=12, n_seqs=n) for n in (1, 8, 32)]
    options = OPTIONS | {"n_parallel": 32, "n_checkpoints": 32, "n_ctx": cases[-1].n_kv}
    with Engine.load(path, backend="cpu", keep_experts=True, **options) as engine:
        for m in measure(engine, cases, rng, count_experts=True):
            expected = 256 * (1 - (31 / 32) ** m.case.n_seqs)
            assert m.experts == pytest.approx([expected], rel=0.05)


@ON_DEVICES
def test_it_costs_nothing_where_it_is_not_asked_for(
    models: Models, make_device: MakeDevice
) -> None:
    """A program keeps nothing then; with it, the same kernels run, in a little more memory."""
    taken, kernels = [], []
    for keep in (False, True):
        backends = cuda_and_others(make_device(0))
        path = models("tiny-moe", "Q8_0")
        with engine_on(path, backends, keep_experts=keep, **OPTIONS) as engine:
            ((split, program),) = engine.loop.executable._programs
            taken.append(sum(t.nbytes for t in program.outside))  # type: ignore[attr-defined]
            kernels.append([i.kernel for i in program.instructions])
            names = [t.name for t in split.keeps]
            routers = [n.name for n in engine.plan.graph.nodes if n.op.name == "ROUTER"]
            assert sorted(names) == sorted(["output", *routers] if keep else ["output"])
            assert keep or engine.loop.kept() == []
    n_used = PRESETS["tiny-moe"].n_experts_used
    assert taken[1] - taken[0] == len(routers) * OPTIONS["n_ubatch"] * n_used * 4
    assert kernels[0] == kernels[1]


def test_the_column(models: Models, cli: Cli) -> None:
    sizes = ("-m", models("tiny-moe", "F32"), "-npp", "4", "-ntg", "3", "-npl", "1,3")
    plain, with_it = (cli("batched-bench", *sizes, *more) for more in ((), ("--count-experts",)))
    assert (plain.status, with_it.status) == (0, 0)
    head, rule, *rows = with_it.out.splitlines()
    assert head == plain.out.splitlines()[0] + "  EXPERTS |"
    assert rule == plain.out.splitlines()[1] + "----------|"
    n_used, n_experts = (
        getattr(PRESETS["tiny-moe"], name) for name in ("n_experts_used", "n_experts")
    )
    one, three = (float(row.split("|")[-2]) for row in rows)
    assert one == n_used
    assert n_used <= three <= min(3 * n_used, n_experts)
    out = cli("batched-bench", *sizes, "--count-experts", "--output-format", "jsonl").out
    documents = [json.loads(line) for line in out.splitlines()]
    assert documents[0]["experts"] == n_used
    assert math.isclose(documents[1]["experts"], three, abs_tol=0.0051)
    out = cli("batched-bench", *sizes, "--output-format", "jsonl").out
    assert all("experts" not in json.loads(line) for line in out.splitlines())


def test_a_model_without_experts_is_refused(tiny: Path, cli: Cli) -> None:
    sizes = ("-npp", 4, "-ntg", 3, "-npl", 1)
    line = cli("batched-bench", "-m", tiny, *sizes, "--count-experts").refused()
    assert line == "--count-experts: expected a model with experts, got qwen35 Q8_0"
