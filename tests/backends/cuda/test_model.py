"""Whole models on CUDA: against the reference backend, spread over both sides, captured and eager.

They run on the emulated device everywhere, and on the GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.backends.cuda.device import Device
from engine.backends.cuda.lower import mul_mat_id
from engine.backends.cuda.lower.mul_mat import FEW_ROWS
from engine.backends.cuda.program import CudaProgram
from engine.graph import Live, Node
from engine.runtime.batch import Chunk, Logits
from tests.support.cuda_devices import DEVICES, GPU, MakeDevice, cuda_and_others, engine_on
from tests.support.cuda_emulator import device as emulated
from tests.support.cuda_emulator.device import EmulatedDevice
from tests.support.helpers import nmse, random_ids
from tests.support.presets import WITH_LATENTS

Array = np.ndarray[Any, Any]
Models = Callable[[str, str], Path]
Rng = np.random.Generator
# Attention of prompts is in float16 products, through all layers of models whose random weights
# magnify rounding; a wrong mask, slot or weight gives 1e-2 and more.
LIMIT = 1e-5
# Where a choice of experts turned round: seen up to 7e-4.
FLIPPED_LIMIT = 0.05
# Quantized weights: products round activations of prompts, as the CPU's do with 8 bits, and may be
# as far off.
SHARE_OF_CPU = 4.0
OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 128, "n_parallel": 4}


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    make: MakeDevice = request.param
    return make(0)


def walk(engine: Engine, ids: list[int]) -> list[Array]:
    """Logits of a prompt in chunks, of two sequences together, of decode steps, of a return, and of
    decode steps alone."""
    memory = engine.memory
    one, two = memory.create(), memory.create()
    found = [engine.step([Chunk(one, ids[:70], Logits.ALL)])]
    found.append(engine.step([Chunk(one, ids[70:75]), Chunk(two, ids[:33], Logits.ALL)]))
    checkpoint = memory.checkpoint(one)
    for i in range(75, 80):
        found.append(engine.step([Chunk(one, [ids[i]]), Chunk(two, [ids[i + 9]])]))
    memory.restore(one, checkpoint)
    checkpoint.release()
    found.append(engine.step([Chunk(one, ids[80:83], Logits.ALL)]))
    found += [engine.step([Chunk(one, [token])]) for token in ids[83:86]]
    for seq in (one, two):
        memory.free(seq)
    return found


def worst(got: list[Array], expected: list[Array]) -> float:
    return max(nmse(a, b) for a, b in zip(got, expected, strict=True))


def pooled(got: list[Array], expected: list[Array]) -> float:
    """Of all rows together: int8 may turn a row's choice of experts around."""
    return nmse(np.concatenate(got), np.concatenate(expected))


DENSE = ("tiny", "tiny-untied")
MODELS = [("tiny", "Q8_0"), ("tiny-untied", "F32"), ("tiny-moe", "Q8_0"), ("tiny-next", "F32")]
MODELS += [(preset, dtype) for preset in WITH_LATENTS for dtype in ("Q8_0", "F32")]


@pytest.mark.parametrize(("preset", "dtype"), MODELS)
def test_models_give_the_reference_s_logits(
    device: Device, models: Models, rng: Rng, preset: str, dtype: str
) -> None:
    """Of models with experts the middle one of three prompts counts, as a choice may turn round."""
    path, quantized = models(preset, dtype), dtype != "F32"
    prompts = [random_ids(rng, 100) for _ in range(1 if preset in DENSE else 3)]

    def errors(engine: Engine) -> float:
        error = pooled if quantized else worst
        return float(np.median([error(walk(engine, p), e) for p, e in expected]))

    with Engine.load(path, backend="reference", type_k="f16", type_v="f16", **OPTIONS) as engine:
        expected = [(ids, walk(engine, ids)) for ids in prompts]
    limit = LIMIT
    if quantized:
        with Engine.load(path, backend="cpu", activations=8, **OPTIONS) as engine:
            limit = max(LIMIT, SHARE_OF_CPU * errors(engine))
    with engine_on(path, cuda_and_others(device), strict_backend=True, **OPTIONS) as engine:
        assert {b.name for b in engine.plan.backends} == {"cuda"}
        assert errors(engine) <= limit


REFUSALS: dict[str, Callable[[Node], str]] = {
    "attention": lambda n: "no" if n.op.name in ("ATTENTION", "QK_NORM_ROPE") else "",
    "delta rule": lambda n: "no" if n.op.name == "GATED_DELTA_NET" else "",
    "conv": lambda n: "no" if n.op.name == "SSM_CONV" else "",
    "every other layer": lambda n: "no" if ".1." in n.name or ".3." in n.name else "",
    "products": lambda n: "no" if n.op.name in ("MUL_MAT", "MUL_MAT_ID") else "",
    "experts": lambda n: "no" if n.op.name in ("MUL_MAT_ID", "ROUTER") else "",
}


@pytest.mark.parametrize("refused", list(REFUSALS))
@pytest.mark.parametrize(("preset", "dtype"), [("tiny", "F32"), ("tiny-moe", "F32")])
def test_models_on_both_sides_are_right(
    device: Device, models: Models, rng: Rng, preset: str, dtype: str, refused: str
) -> None:
    """Of models with experts the middle one of three prompts counts, as a choice may turn round."""
    # With a cache in float32: rounding to float16 turns more choices.
    options: dict[str, Any] = OPTIONS | {"type_k": "f32", "type_v": "f32"}
    path = models(preset, dtype)
    prompts = [random_ids(rng, 100) for _ in range(1 if preset in DENSE else 3)]
    with Engine.load(path, backend="reference", **options) as engine:
        expected = [(ids, walk(engine, ids)) for ids in prompts]
    with engine_on(path, cuda_and_others(device, REFUSALS[refused]), **options) as engine:
        is_split = any(REFUSALS[refused](node) for node in engine.plan.graph.nodes)
        assert ({b.name for b in engine.plan.backends} == {"cuda", "cpu"}) == is_split
        errors = [worst(walk(engine, ids), e) for ids, e in expected]
        assert np.median(errors) <= LIMIT
        assert max(errors) <= FLIPPED_LIMIT


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe", *WITH_LATENTS])
def test_captured_steps_are_eager_ones_bit_for_bit(
    device: Device, models: Models, rng: Rng, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ids = models(preset, "Q8_0"), random_ids(rng, 100)
    runs = []
    for captured in (True, False):
        if not captured:
            monkeypatch.setattr("engine.backends.cuda.launches.bucket_of", lambda live: None)
        with engine_on(path, cuda_and_others(device), **OPTIONS) as engine:
            runs.append(walk(engine, ids))
            (program,) = (p for _, p in engine.loop.executable._programs)
            assert isinstance(program, CudaProgram)
            assert bool(program.replays.captured) == captured
    for got, expected in zip(*runs, strict=True):
        np.testing.assert_array_equal(got, expected)


REHEARSED = {"stage_rows", "router", "experts_hidden", "mul_mat_id_rows"}
REHEARSED |= {f"mul_mat_rows_{n}" for n in (4, 8, 16)}


@pytest.mark.skipif(bool(emulated.missing()), reason=emulated.missing())
@pytest.mark.parametrize(
    ("preset", "dtype"), [("tiny-moe", "Q8_0"), ("tiny-moe", "F32"), ("tiny", "Q4_K")]
)
def test_rehearsals_write_nothing(models: Models, rng: Rng, preset: str, dtype: str) -> None:
    """The device runs them by themselves, and compares all memory."""
    device = EmulatedDevice(rehearsed=frozenset(REHEARSED))
    options = OPTIONS | {"n_parallel": 12}
    with engine_on(models(preset, dtype), cuda_and_others(device), **options) as engine:
        sequences = [engine.memory.create() for _ in range(12)]
        for n in (12, 6, 3, 1):
            engine.step([Chunk(s, random_ids(rng, 1)) for s in sequences[:n]])
        kernels = {
            program.instructions[i].kernel
            for _, program in engine.loop.executable._programs
            if isinstance(program, CudaProgram)
            for n in (1, 3, 6, 12)
            for i in program._chosen(Live(n, n, n))
        }
        assert kernels & REHEARSED


# Activations that differ in their last bit may be rounded to another integer.
FUSED_LIMIT = 1e-4


@pytest.mark.parametrize("preset", ["tiny", *WITH_LATENTS])
def test_fused_launches_compute_what_single_ones_do(
    device: Device, models: Models, rng: Rng, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with experts the middle one of five prompts counts, as a choice may turn round."""
    path = models(preset, "Q8_0")
    # Fused, the projections of more rows are rounded less.
    monkeypatch.setattr(mul_mat_id, "PANEL_TOKENS", FEW_ROWS)
    prompts = [random_ids(rng, 100) for _ in range(1 if preset in DENSE else 5)]
    runs, n_launches = [], []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr("engine.backends.cuda.program.FUSIONS", ())
        with engine_on(path, cuda_and_others(device), **OPTIONS) as engine:
            runs.append([walk(engine, ids) for ids in prompts])
            ((_, program),) = engine.loop.executable._programs
            assert isinstance(program, CudaProgram)
            n_launches.append(len(program._chosen(Live(1, 1, 1))))
    assert n_launches[0] < n_launches[1]
    assert np.median([worst(*pair) for pair in zip(*runs, strict=True)]) <= FUSED_LIMIT


def test_a_watched_program_has_every_node_s_outputs(
    device: Device, models: Models, rng: Rng
) -> None:
    path, ids = models("tiny", "Q8_0"), random_ids(rng, 30)
    runs = []
    for check in (True, False):
        with engine_on(path, cuda_and_others(device), check=check, **OPTIONS) as engine:
            seq = engine.memory.create()
            runs.append([engine.prefill(seq, ids), engine.step([Chunk(seq, [5])])])
    assert worst(*runs) <= FUSED_LIMIT


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe", *WITH_LATENTS])
def test_batch_invariance(device: Device, models: Models, rng: Rng, preset: str) -> None:
    path = models(preset, "Q8_0")
    prompts = [random_ids(rng, int(n)) for n in rng.integers(1, 33, 4)]
    backends = cuda_and_others(device, batch_invariant=True)
    with engine_on(path, backends, **OPTIONS) as engine:
        alone = [_steps(engine, [prompt])[0] for prompt in prompts]
        together = _steps(engine, prompts)
    for got, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got, expected)


def _steps(engine: Engine, prompts: list[list[int]]) -> list[Array]:
    """Logits of each prompt's last row, and of 5 greedy steps, all prompts together."""
    seqs = [engine.memory.create() for _ in prompts]
    pending, found = prompts, []
    for _ in range(6):
        chunks = [Chunk(seq, ids) for seq, ids in zip(seqs, pending, strict=True)]
        logits = engine.step(chunks)
        found.append(logits)
        pending = [[int(row.argmax())] for row in logits]
    for seq in seqs:
        engine.memory.free(seq)
    return list(np.stack(found, axis=1))


def test_the_same_every_time(device: Device, models: Models, rng: Rng) -> None:
    path, ids = models("tiny-moe", "Q8_0"), random_ids(rng, 100)
    with engine_on(path, cuda_and_others(device), **OPTIONS) as engine:
        for got, expected in pairwise(walk(engine, ids) for _ in range(2)):
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)


def test_pieces_of_a_prompt(device: Device, models: Models, rng: Rng) -> None:
    path, ids = models("tiny", "F32"), random_ids(rng, 200)
    runs = []
    for n_ubatch in (64, 128):
        options = OPTIONS | {"n_ubatch": n_ubatch}
        with engine_on(path, cuda_and_others(device), **options) as engine:
            runs.append(engine.logits(ids))
    assert nmse(*runs) <= LIMIT


@pytest.mark.parametrize("device", [GPU], indirect=True)
@pytest.mark.parametrize("preset", ["tiny", *WITH_LATENTS])
def test_drift_over_a_thousand_tokens(
    device: Device, models: Models, rng: Rng, preset: str
) -> None:
    path, ids = models(preset, "F32"), random_ids(rng, 1000)
    options = OPTIONS | {"n_ctx": 1024}
    runs = []
    with Engine.load(path, backend="reference", type_k="f16", type_v="f16", **options) as engine:
        runs.append(engine.logits(ids))
    with engine_on(path, cuda_and_others(device), **options) as engine:
        runs.append(
            np.concatenate([engine.step([Chunk(0, [i])]) for i in _with_sequence(engine, ids)])
        )
    for part in (slice(0, 100), slice(900, 1000)):
        assert nmse(runs[1][part], runs[0][part]) <= LIMIT


def _with_sequence(engine: Engine, ids: list[int]) -> list[int]:
    assert engine.memory.create() == 0
    return ids


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_generation_is_greedy_steps(device: Device, models: Models, rng: Rng, preset: str) -> None:
    path, ids = models(preset, "Q8_0"), random_ids(rng, 20)
    with engine_on(path, cuda_and_others(device), **OPTIONS) as engine:
        seq = engine.memory.create()
        logits, expected = engine.prefill(seq, ids), []
        for _ in range(12):
            expected.append(int(logits[-1].argmax()))
            logits = engine.step([Chunk(seq, [expected[-1]])])
        engine.memory.free(seq)
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        completion = engine.generate(ids, params)
        assert [token.token for token in completion][: len(expected)] == completion.tokens
        eog = engine.tokenizer.eog_ids
        if not any(token in eog for token in expected):
            assert completion.tokens == expected
