"""The layer for drafts in the demo's trainer: its drafts, its training, its file, and chained runs.

Weights are drawn anew in every run; the seed is printed by a failure.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch: install the parity extra")

import torch

from engine import Engine
from engine.formats.gguf import GGUFFile
from tests.support.numpy_mtp import NumpyMtp, draft
from tools.ggufwrite import write_gguf
from tools.makevocab import made_vocabulary, padded_vocabulary
from tools.train_demo import golden
from tools.train_demo.convert import gguf_tensors, metadata, tensor_specs
from tools.train_demo.delta import CHUNK
from tools.train_demo.drafts import continued, n_accepted
from tools.train_demo.model import DemoModel, Sizes
from tools.train_demo.mtp import DEPTH, PREFIX, Mtp
from tools.train_demo.optim import Optimizer
from tools.train_demo.stages import DEPTH_WEIGHTS, MtpStage, TrunkStage, draft_loss
from tools.train_demo.tokenizer import N_VOCAB as N_DEMO_VOCAB
from tools.train_demo.train import Run, options

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
N_VOCAB = 352
NO_COMPILE = ["--no-compile"]
SIZES = Sizes(n_vocab=N_VOCAB, n_embd=64, n_layers=4, n_ff=96, n_heads=4, n_linear_heads=2)
Models = tuple[DemoModel, Mtp]


def disturbed(model: torch.nn.Module) -> None:
    """No parameter keeps its default: a norm of ones would hide an error."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def made(sizes: Sizes) -> Models:
    seed = torch.seed() % 2**32
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    trunk, mtp = DemoModel(sizes), Mtp(sizes)
    disturbed(trunk)
    disturbed(mtp)
    return trunk, mtp


@pytest.fixture
def models() -> Models:
    return made(SIZES)


def gguf(path: Path, trunk: DemoModel, mtp: Mtp | None) -> GGUFFile:
    """The models as convert.py writes them, in float32."""
    weights = {name: p.numpy() for name, p in trunk.state_dict().items()}
    if mtp is not None:
        weights |= {PREFIX + name: p.numpy() for name, p in mtp.state_dict().items()}
    values = metadata(trunk.sizes.to_json(), "F32", "", int(mtp is not None))
    values |= padded_vocabulary(made_vocabulary(), trunk.sizes.n_vocab)
    write_gguf(path, values, tensor_specs(gguf_tensors(weights), "F32"))
    return GGUFFile(path)


def ids_of(n: int) -> list[int]:
    return torch.randint(0, N_VOCAB, (n,)).tolist()


# Drafts.


def test_parallel_drafts_are_those_of_a_loop(models: Models, tmp_path: Path) -> None:
    """From every row, all drafts with a cache that later rows overwrite; tokens are given."""
    trunk, mtp = models
    loop = NumpyMtp(gguf(tmp_path / "m.gguf", trunk, mtp))
    _, double = golden.load(GGUFFile(tmp_path / "m.gguf"))
    ids, h = ids_of(20), torch.randn(20, SIZES.n_embd).double()
    embedded = torch.from_numpy(loop.embedding)[ids][None]
    with torch.no_grad():
        got = double(embedded, h[None])[:, 0].numpy()
    assert got.shape == (DEPTH, 20, SIZES.n_embd)
    for i in range(20):
        before = h[i - 1].numpy() if i else np.zeros(SIZES.n_embd)
        for k in range(min(DEPTH, 20 - i)):
            before = loop.row(ids[i + k], before, i + k)
            assert np.allclose(got[k, i + k], before, rtol=0, atol=1e-10), (i, k)
        loop.row(ids[i], h[i - 1].numpy() if i else np.zeros(SIZES.n_embd), i)


def test_golden_values_are_numpys_and_the_engines(models: Models, tmp_path: Path) -> None:
    """What golden.py computes of a file, against the layer in numpy and the engine's logits."""
    file = gguf(tmp_path / "m.gguf", *models)
    double, loop = golden.load(file), NumpyMtp(file)
    with Engine.load(tmp_path / "m.gguf", backend="reference") as engine:
        for n in (3, CHUNK, 70):
            ids = ids_of(n)
            found = golden.drafted(double, ids)
            logits = engine.logits(ids)[-1]
            assert found["next"] == logits.argmax()
            scale = np.abs(found["logits"][0]).max()
            assert np.allclose(logits[found["best"][0]], found["logits"][0], atol=1e-4 * scale)
            h = found["all_h"].astype(np.float64)
            assert np.array_equal(found["h"], found["all_h"][-2:])
            tokens, states, logits = draft(loop, [*ids, int(found["next"])], h, DEPTH)
            assert tokens == found["drafts"].tolist()
            assert np.allclose(states, found["states"], rtol=0, atol=1e-5)
            for best, values, expected in zip(
                found["best"][1:], found["logits"][1:], logits, strict=True
            ):
                assert np.allclose(values, expected[best], rtol=0, atol=1e-5 * scale)
                assert values[-1] >= np.sort(expected)[-golden.N_BEST] - 1e-5 * scale


def test_the_engine_skips_the_layer(models: Models, tmp_path: Path) -> None:
    trunk, mtp = models
    ids, found = ids_of(70), []
    for name, layer in (("with", mtp), ("without", None)):
        file = gguf(tmp_path / f"{name}.gguf", trunk, layer)
        assert file.metadata["qwen35.block_count"] == SIZES.n_layers + (layer is not None)
        with Engine.load(tmp_path / f"{name}.gguf", backend="reference") as engine:
            found.append(engine.logits(ids))
    assert np.array_equal(found[0], found[1])


def test_accepted_drafts_are_those_that_a_loop_accepts(tmp_path: Path) -> None:
    """Also that the continuation is the greedy one, by the engine."""
    pairs: list[tuple[list[int], list[int]]] = [(ids_of(n), []) for n in (5, 9, 14)]
    kinds: set[bool] = set()
    while kinds != {True, False}:  # Some are accepted, and some are not.
        trunk, mtp = models = made(replace(SIZES, n_vocab=N_DEMO_VOCAB))
        with torch.no_grad():
            trunk.model.embed_tokens.weight[5:8] *= 9  # Few tokens have a chance.
        counts = n_accepted(models, pairs, "cpu")
        kinds = {n > 0 for row in counts for n in row}
    with torch.no_grad():
        ids, ends = continued(trunk, pairs, "cpu")
        h = trunk.model(ids).double().numpy()
    loop = NumpyMtp(gguf(tmp_path / "m.gguf", trunk, mtp))
    with Engine.load(tmp_path / "m.gguf", backend="reference") as engine:
        for row, (first, end), found, states in zip(ids.tolist(), ends, counts, h, strict=True):
            logits = engine.logits(row[: end - 1])[first - 1 :]
            assert logits.argmax(-1).tolist() == row[first:end]
            assert len(found) == end - first - 1
            for i, n in list(enumerate(found, first))[::7]:
                tokens, _, _ = draft(loop, row[: i + 1], states[:i], DEPTH)
                right = [a == b for a, b in zip(tokens, row[i + 1 : end], strict=False)]
                assert n == [*right, False].index(False)


# Training.


def test_the_loss_is_the_mean_divergence(models: Models) -> None:
    drafts, target = torch.randn(DEPTH, 2, 6, 64), torch.randn(2, 6, 64)
    embedding, weights = torch.randn(30, 64) / 8, torch.rand(2, 6)
    expected = 0.0
    for k, depth_weight in enumerate(DEPTH_WEIGHTS):
        for b in range(2):
            for i in range(k, 6):
                p, q = ((x @ embedding.T).softmax(-1) for x in (target[b, i], drafts[k, b, i]))
                divergence = float((p * (p / q).log()).sum())
                expected += depth_weight / sum(DEPTH_WEIGHTS) * divergence * float(weights[b, i])
    assert float(draft_loss(drafts, target, embedding, weights)) == pytest.approx(expected, 1e-4)


def test_training_drafts_leaves_the_trunk_as_it_was(models: Models) -> None:
    trunk, mtp = models
    before = {name: p.clone() for name, p in trunk.state_dict().items()}
    stage, optimizer = MtpStage(trunk, mtp, torch.float32), Optimizer(mtp)
    ids, kinds = torch.randint(0, N_VOCAB, (5, 2 * CHUNK + 1)), torch.ones(5, 2 * CHUNK + 1).byte()
    losses = []
    for _ in range(12):
        losses.append(float(stage.gradients(ids, kinds)))
        assert all(p.grad is not None for p in mtp.parameters())
        optimizer.step(0.5)
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in trunk.state_dict().items())
    assert all(p.grad is None for p in trunk.parameters())


class Time:
    """A clock that a batch moves by a second, and the batches: each decided by its number."""

    def __init__(self, start: int) -> None:
        self.n, self.start = start, start

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.n += 1
        rng = torch.Generator().manual_seed(self.n)
        ids = torch.randint(0, 20, (8, CHUNK + 1), generator=rng, dtype=torch.int32)
        return ids, (ids % 3).byte()

    def clock(self) -> float:
        return float(self.n - self.start)

    def facts(self) -> dict[str, int]:
        return {}


def train(out: Path, n_steps: tuple[int, int], start: int, *more: str) -> Run:
    """Run a process of a tiny training, which begins at the batch with that number."""
    out.mkdir(exist_ok=True)
    corpus = out / "corpus.json"
    corpus.write_text("{}")
    argv = f"--corpus {out} --out {out} --rows 8 --length {CHUNK} --layers 4 --width 32"
    argv += f" --minutes {n_steps[0] / 60} --mtp-minutes {n_steps[1] / 60}"
    args: Namespace = options([*argv.split(), *NO_COMPILE, *more])
    time = Time(start)
    run = Run(args, time, time.clock)
    run.begin_process()
    run.train()
    run.write()
    return run


@pytest.mark.parametrize("stops", [(3,), (5, 11), (8, 14)], ids=str)
def test_a_run_in_parts_is_a_run_at_once(tmp_path: Path, stops: tuple[int, ...]) -> None:
    """Stopped within the trunk's training, between, and within that of the layer for drafts."""
    n_steps = 8, 8
    whole = train(tmp_path / "whole", n_steps, 0)
    start = 0
    more: list[str] = []
    for stop in stops:
        part = train(
            tmp_path / "parts", n_steps, start, *more, "--stop-after", f"{stop - start + 8}"
        )
        assert sum(p.step for p in part.progress.values()) == stop
        start, more = stop, ["--resume"]
    last = train(tmp_path / "parts", n_steps, start, "--resume")
    for run in (whole, last):
        assert [p.step for p in run.progress.values()] == list(n_steps)
        assert run.state["phase"] == "evaluate"
    for name in ("trunk", "mtp"):
        for key, value in whole.state[name].items():
            assert torch.equal(last.state[name][key], value), key
    facts = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert len(facts["processes"]) == len(stops) + 1
    assert (facts["steps"], facts["mtp"]["step"]) == n_steps
    assert facts["tokens"] == 8 * 8 * CHUNK


def test_a_loss_that_is_not_finite_leads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last save, with half the rate."""
    monkeypatch.setattr("tools.train_demo.train.SAVE_EVERY", 1.0)
    monkeypatch.setattr("tools.train_demo.train.LOG_STEPS", 2)
    spoil: Callable[..., Any] = Time.next

    def spoiled(self: Time) -> tuple[torch.Tensor, torch.Tensor]:
        batch = spoil(self)
        if self.n == 6:
            for p in run_of[0].stage.trained.parameters():
                p.data.fill_(torch.nan)
        return batch

    run_of: list[Run] = []
    load = Run._load

    def noted(self: Run, phase: str) -> None:
        run_of.append(self)
        load(self, phase)

    monkeypatch.setattr(Run, "_load", noted)
    monkeypatch.setattr(Time, "next", spoiled)
    run = train(tmp_path, (12, 0), 0)
    assert run.progress["trunk"].rate == 0.5
    assert all(p.isfinite().all() for p in run.state["trunk"].values())
    assert '"not finite' in (tmp_path / "log.jsonl").read_text()


def test_a_compiler_that_fails_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: TrunkStage) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(TrunkStage, "compile", fail)
    with monkeypatch.context() as patch:
        patch.setattr("tests.parity.test_train_mtp.NO_COMPILE", [])
        run = train(tmp_path / "plain", (3, 0), 0)
    expected = train(tmp_path / "expected", (3, 0), 0)
    assert run.facts["compiled"] is False
    assert "no compiler" in (tmp_path / "plain" / "log.jsonl").read_text()
    for name, value in expected.state["trunk"].items():
        assert torch.equal(run.state["trunk"][name], value), name
