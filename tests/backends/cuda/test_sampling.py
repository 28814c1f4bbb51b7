"""Drawing on CUDA against the samplers of steps.py; completions by steps that run ahead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import ChatTemplate, Engine, SamplingParams
from engine.backends.cuda.device import Device, Memory
from engine.backends.cuda.sampling import MAX_VOCAB, CudaSampler, CudaStepHandle, specs_input
from engine.backends.cuda.weights import CudaWeights
from engine.backends.native import library
from engine.formats.quants import F32, I32
from engine.graph import Dim, Kind, Live, Tensor
from engine.kvcache.prefix import packed
from engine.runtime.batch import Chunk
from engine.sampling.spec import MAX_BANNED, MAX_TOP_K, SampleSpec
from engine.sampling.steps import Candidates
from tests.support.chats import CHATML, QWEN35_STYLE
from tests.support.cuda_devices import DEVICES, cuda_and_others, engine_on
from tests.support.helpers import apply_sampler, assert_all_free, nmse, random_ids
from tests.support.lazy_backend import sampled_token

Rng = np.random.Generator
Logits = NDArray[np.float32]
INF, NAN = math.inf, math.nan
# The device's sums are float32: near a boundary it may take the neighbour.
NEAR = 1e-5


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    made: Device = request.param()
    return made


class Rows:
    """A decoder whose program has given logits."""

    def __init__(self, device: Device, n_rows: int, n_vocab: int) -> None:
        self.device, self.weights = device, CudaWeights(device, library.load())
        self.sample_specs = specs_input(n_rows)
        self.tokens = Tensor("tokens", (Dim(n_rows, "n_tokens"),), I32, Kind.INPUT)
        shape = (Dim(n_rows, "n_outputs"), n_vocab)
        self.logits = Tensor("logits", shape, F32, Kind.ACTIVATION)
        self._memory: dict[Tensor, Memory] = {
            t: device.allocate(t.nbytes) for t in (self.sample_specs, self.tokens, self.logits)
        }
        self._counts = device.allocate(20)
        self.inputs = SimpleNamespace(live_address=self._counts.address)
        host: Any = self
        self._decoder = CudaSampler(host, self.launch, [self.tokens], self.logits)

    def fixed(self, tensor: Tensor) -> int:
        return self._memory[tensor].address

    def write(self, tensor: Tensor, values: NDArray[Any]) -> None:
        self.device.upload(self.fixed(tensor), values)

    def begin(self, live: Live) -> None:
        n = live.n_outputs
        self.device.upload(self._counts.address, np.array([0, n, n, n + 1, n], np.int32))

    def launch(self, live: Live) -> None:
        """The logits are there."""

    def start(
        self, logits: Logits, draws: list[SampleSpec], feed: list[int], tokens: list[int]
    ) -> CudaStepHandle:
        self.write(self.logits, np.ascontiguousarray(logits, np.float32))
        n = len(draws)
        inputs = {"tokens": np.array(tokens, np.int32)}
        return self._decoder.launch(inputs, Live(n, n, n), draws, feed)

    def draw(self, logits: Logits, draws: list[SampleSpec]) -> list[int]:
        n = len(draws)
        return self.start(logits, draws, [-1] * n, [0] * n).wait()[0]

    def draw_masked(
        self, logits: Logits, draws: list[SampleSpec], masks: list[Any]
    ) -> tuple[list[int], Logits]:
        n = len(draws)
        handle = self.start(logits, draws, [-1] * n, [0] * n)
        handle.sample(masks)
        return handle.wait()

    def fed(self, n: int) -> list[int]:
        values = np.empty(n, np.int32)
        self.device.download(self.fixed(self.tokens), values)
        return values.tolist()


def random_logits(rng: Rng, n_rows: int, n_vocab: int) -> Logits:
    """Of several kinds: flat, peaked, with many equal ones, rising."""
    kinds = [
        lambda: rng.normal(0, 1, n_vocab),
        lambda: rng.normal(0, 5, n_vocab),
        lambda: rng.integers(-3, 3, n_vocab),
        lambda: np.sort(rng.normal(0, 3, n_vocab)) * rng.choice([-1, 1]),
        lambda: np.zeros(n_vocab),
    ]
    return np.array([kinds[rng.integers(len(kinds))]() for _ in range(n_rows)], np.float32)


def random_draw(rng: Rng, n_vocab: int) -> SampleSpec:
    return SampleSpec(
        tuple(rng.choice(n_vocab, rng.integers(MAX_BANNED + 1), replace=False).tolist()),
        int(rng.choice([1, 2, 40, 127, MAX_TOP_K])),
        float(rng.choice([1.0, 0.95, 0.5, 0.0])),
        float(rng.choice([0.0, 0.05, 0.5, 1.0])),
        float(rng.choice([1.0, 0.8, 0.1, 3.0])),
        float(rng.random()),
    )


def acceptable(logits: Logits, draw: SampleSpec, mask: Any = None) -> set[int]:
    """What the definition gives for this draw and for those that differ from it by rounding."""
    found = set()
    for d_uniform in (-NEAR, 0, NEAR):
        for factor in (1 - NEAR, 1, 1 + NEAR):
            near = draw._replace(
                uniform=min(max(draw.uniform + d_uniform, 0.0), 1 - 1e-12),
                top_p=min(draw.top_p * factor, 1.0),
                min_p=min(draw.min_p * factor, 1.0),
            )
            found.add(sampled_token(logits, near, mask))
    return found


@pytest.mark.parametrize("n_vocab", [33, 320, 4096, 4097, 20001])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_draws_are_those_of_the_samplers(
    device: Device, rng: Rng, n_rows: int, n_vocab: int
) -> None:
    rows = Rows(device, n_rows, n_vocab)
    for _ in range(8):
        logits = random_logits(rng, n_rows, n_vocab)
        draws = [random_draw(rng, n_vocab) for _ in range(n_rows)]
        for row, draw, token in zip(logits, draws, rows.draw(logits, draws), strict=True):
            assert token in acceptable(row, draw), draw


def test_the_largest_vocabulary(device: Device, rng: Rng) -> None:
    rows, logits = Rows(device, 2, MAX_VOCAB), random_logits(rng, 2, MAX_VOCAB)
    logits[0, -1] = 99.0
    draws = [SampleSpec(), SampleSpec((), MAX_TOP_K, 0.99, 0.01, 1.5, 0.7)]
    first, second = rows.draw(logits, draws)
    assert first == MAX_VOCAB - 1
    assert second in acceptable(logits[1], draws[1])


def test_every_candidate_gets_its_share(device: Device, rng: Rng) -> None:
    """Uniform numbers in order go through the tokens in order of their probabilities."""
    rows, logits = Rows(device, 1, 320), rng.normal(0, 1, (1, 320)).astype(np.float32)
    values = logits[0].astype(np.float64)
    c = apply_sampler("top_k", Candidates(np.arange(320), values), top_k=20)
    edges = np.cumsum(apply_sampler("temperature", c, temperature=0.7).probabilities())
    for i, edge in enumerate(edges[:-1]):
        for uniform, index in ((edge - 1e-4, i), (edge + 1e-4, i + 1)):
            draw = SampleSpec((), 20, 1.0, 0.0, 0.7, float(uniform))
            assert rows.draw(logits, [draw]) == [c.ids[index]]
    last = float(np.nextafter(1, 0))
    assert rows.draw(logits, [SampleSpec((), 20, 1.0, 0.0, 0.7, last)]) == [c.ids[-1]]


@pytest.mark.parametrize("n_vocab", [320, 5000])
def test_equal_logits_come_by_their_ids(device: Device, n_vocab: int) -> None:
    rows, logits = Rows(device, 1, n_vocab), np.full((1, n_vocab), -0.0, np.float32)
    logits[0, 7:] = 0.0
    assert rows.draw(logits, [SampleSpec()]) == [0]
    assert rows.draw(logits, [SampleSpec((0, 1, 3))]) == [2]
    for i in range(0, 100, 9):
        assert rows.draw(logits, [SampleSpec((), 100, uniform=(i + 0.5) / 100)]) == [i]


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 319, 4095, 4096, 4999])
def test_what_is_not_finite_is_no_token(device: Device, rng: Rng, bad: float, at: int) -> None:
    logits = random_logits(rng, 3, 5000)
    logits[1, at] = bad
    draws = [SampleSpec((at,)), SampleSpec((at,)), SampleSpec((), 40, uniform=0.3)]
    ids = Rows(device, 3, 5000).draw(logits, draws)
    assert ids[1] == -1
    assert ids[0] >= 0
    assert ids[2] in acceptable(logits[2], draws[2])
    logits[1, at::31] = bad
    draws[1] = SampleSpec((), MAX_TOP_K)
    assert Rows(device, 3, 5000).draw(logits, draws)[1] == -1


def test_nothing_to_draw_is_no_token(device: Device) -> None:
    logits = np.zeros((1, 5), np.float32)
    assert Rows(device, 1, 5).draw(logits, [SampleSpec(tuple(range(5)), 40)]) == [-1]
    assert Rows(device, 1, 5).draw(logits, [SampleSpec((0, 1, 2, 4), 40, uniform=0.9)]) == [3]


def packed_bits(allowed: NDArray[np.bool_], rng: Rng) -> NDArray[np.uint32]:
    """A mask; its bits behind the vocabulary are set by chance, and a word more is there."""
    n = -(-len(allowed) // 32) * 32 + 32
    bits = rng.integers(0, 2, n).astype(bool)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("n_vocab", [33, 4096, 4097, 20001])
@pytest.mark.parametrize("share", [0.9, 0.02, 0.0])
def test_masks_come_before_all_else(device: Device, rng: Rng, n_vocab: int, share: float) -> None:
    """Beside rows without a mask; a mask that is late leaves the row to the host."""
    rows = Rows(device, 4, n_vocab)
    for _ in range(4):
        logits = random_logits(rng, 4, n_vocab)
        draws = [random_draw(rng, n_vocab) for _ in range(4)]
        draws = [d._replace(is_masked=i != 1) for i, d in enumerate(draws)]
        allowed = rng.random((4, n_vocab)) < share
        for i, d in enumerate(draws):  # One is left beside those that are banned.
            allowed[i, rng.choice(np.setdiff1d(np.arange(n_vocab), d.banned))] = True
        masks: list[Any] = [packed_bits(row, rng) for row in allowed]
        masks[1] = masks[3] = None
        ids, by_host = rows.draw_masked(logits, draws, masks)
        for i in (0, 2):
            assert allowed[i, ids[i]]
            assert ids[i] in acceptable(logits[i], draws[i], masks[i]), draws[i]
        assert ids[1] in acceptable(logits[1], draws[1])
        assert np.array_equal(by_host, logits[3:])


def test_masks_hide_nothing_that_is_not_finite(device: Device, rng: Rng) -> None:
    logits, allowed = random_logits(rng, 2, 500), np.zeros(500, np.bool_)
    allowed[7], logits[0, 9] = True, NAN
    draws = [SampleSpec(is_masked=True), SampleSpec((7,), 40, is_masked=True)]
    masks: list[Any] = [packed_bits(allowed, rng)] * 2
    assert Rows(device, 2, 500).draw_masked(logits, draws, masks)[0] == [-1, -1]


def test_extreme_logits(device: Device) -> None:
    logits = np.array([[3e38, -3e38, 1e-45, -1e-45, 3.4028235e38, -3.4028235e38]], np.float32)
    rows = Rows(device, 1, 6)
    assert rows.draw(logits, [SampleSpec((), 1)]) == [4]
    assert rows.draw(logits, [SampleSpec((4, 0))]) == [2]
    assert rows.draw(logits, [SampleSpec((4, 0, 2), 40, uniform=0.999)]) == [3]
    assert rows.draw(logits, [SampleSpec((4, 0, 2, 3), 40, uniform=0.999)]) == [1]


def test_rows_do_not_see_each_other(device: Device, rng: Rng) -> None:
    logits = random_logits(rng, 5, 5000)
    draws = [random_draw(rng, 5000) for _ in range(5)]
    together = Rows(device, 5, 5000).draw(logits, draws)
    order = rng.permutation(5)
    again = Rows(device, 5, 5000).draw(logits[order], [draws[i] for i in order])
    assert again == [together[i] for i in order]
    alone = Rows(device, 1, 5000)
    assert [alone.draw(logits[i : i + 1], [draws[i]])[0] for i in range(5)] == together


def test_tokens_are_fed(device: Device) -> None:
    """From the rows named, or what the host says; a row without a token gives token 0."""
    rows, logits = Rows(device, 4, 40), np.zeros((4, 40), np.float32)
    logits[range(4), (11, 22, 33, 9)] = 1.0
    logits[3, 0] = NAN
    first = rows.start(logits, [SampleSpec()] * 4, [-1] * 4, [1, 2, 3, 4])
    assert rows.fed(4) == [1, 2, 3, 4]
    second = rows.start(logits[1:], [SampleSpec()] * 3, [2, -1, 3], [7, 8, 9])
    assert rows.fed(3) == [33, 8, 0]
    rows.start(logits[:2], [SampleSpec()] * 2, [1, 0], [0, 0])
    assert rows.fed(2) == [33, 22]
    assert first.wait()[0] == [11, 22, 33, -1]
    assert second.wait()[0] == [22, 33, -1]


# Completions.

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.5, top_k=60, max_tokens=10, seed=3)
Models = Callable[[str, str], Path]


def generate(engine: Engine, prompts: list[list[int]], each: list[SamplingParams]) -> list[Any]:
    done = engine.generate_batch(prompts, each)
    assert_all_free(engine)
    return [(c.tokens, c.text, c.finish_reason, c.detail) for c in done]


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_completions_are_those_of_the_host_s_draws(
    device: Device, models: Models, rng: Rng, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runs = models(preset, "Q8_0"), []
    prompts = [random_ids(rng, int(n)) for n in rng.integers(1, 80, 5)]
    each = [GREEDY, DRAWN, replace(DRAWN, seed=5, max_tokens=4), replace(GREEDY, max_tokens=3),
            replace(DRAWN, seed=6, ignore_eos=True)]  # fmt: skip
    # Bits don't depend on who else is in a step, so neither do tokens.
    for is_ahead in (True, False):
        if not is_ahead:
            monkeypatch.setattr(
                "engine.backends.cuda.backend.CudaBackend.device_sampler", lambda *args: None
            )
        backends = cuda_and_others(device, batch_invariant=True)
        with engine_on(path, backends, n_ctx=512, n_ubatch=128, n_parallel=3) as engine:
            assert engine.loop.runner.overlaps == is_ahead
            runs.append(generate(engine, prompts, each))
    assert runs[0] == runs[1]


def test_checkpoints_while_a_step_runs_ahead(device: Device, models: Models) -> None:
    path = models("tiny", "Q8_0")
    with engine_on(path, cuda_and_others(device), n_ctx=512, n_ubatch=128) as engine:
        (whole,) = engine.generate_batch([[5, 6, 7]], [GREEDY])
        completion = engine.generate([5, 6, 7], GREEDY)
        for _ in range(4):
            next(completion)
        checkpoint = engine.memory.checkpoint(completion.request.seq)
        assert checkpoint.n_tokens == 6
        assert [t.token for t in completion] == whole.tokens[4:]
        rest = replace(GREEDY, max_tokens=6)
        again = engine.generate(whole.tokens[3:4], rest, checkpoint)
        assert [t.token for t in again] == whole.tokens[4:]
        checkpoint.release()
        seq = engine.memory.create()
        engine.step([Chunk(seq, [1])])
        engine.memory.free(seq)
        assert_all_free(engine)


# Chats: the turns of test_chats.py, on a device.


@pytest.mark.parametrize("source", [CHATML, QWEN35_STYLE], ids=["chatml", "thinking"])
def test_turns_go_on_from_the_tokens_that_came(device: Device, models: Models, source: str) -> None:
    """The row that runs on when a turn ends or is stopped leaves nothing in what is kept."""
    template, messages, n_held = ChatTemplate(source), list[dict[str, str]](), 0
    with engine_on(models("tiny", "F32"), cuda_and_others(device), n_ctx=1024) as engine:
        assert engine.loop.runner.overlaps
        for turn in range(3):
            messages.append({"role": "user", "content": f"turn {turn}"})
            answer = engine.chat(messages, GREEDY, template=template)
            for i, _ in enumerate(answer):
                if i == 5 and turn == 1:
                    answer.stop()
            messages.append({"role": "assistant", "content": answer.text})
            ids = [*answer.request.ids, *answer.tokens]
            # Without its thinking, an answer is not what the state has read.
            if turn > 0 and source == QWEN35_STYLE:
                assert 0 < answer.reuse.n_reused < n_held
            else:
                assert answer.reuse.n_reused == answer.reuse.n_known == n_held
            n_held = len(ids) - 1
            assert len(answer.tokens) == (6 if turn == 1 else 10)
            # What comes next after all but the last token, which no step has read.
            node = engine.cache._cache.match(packed(ids), len(ids)).node
            assert node is not None
            assert node.kept is not None
            assert node.end == n_held
            seq = engine.memory.fork(node.kept.seq)
            after_turn = engine.step([Chunk(seq, ids[-1:])])
            engine.memory.free(seq)
            assert nmse(after_turn, engine.logits(ids)[-1:]) < 1e-5
        assert_all_free(engine)
