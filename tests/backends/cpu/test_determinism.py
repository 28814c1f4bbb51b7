"""Logits on the CPU depend on the tokens alone, to the last bit; and they are the reference's.

Not on the number of threads, nor on how a prompt is cut into steps, nor on what else is in a batch.
Where row tiles go through matrix units, or the other rows become 15-bit integers, cuts must leave
row tiles whole, as a scheduler's of 64 tokens and more do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from engine import Engine
from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library
from engine.runtime.batch import Chunk, Logits
from tests.support.helpers import float64_engine, nmse, random_ids
from tests.support.presets import TINY, WITH_LATENTS

Models = Callable[[str, str], Path]
Array = np.ndarray[Any, Any]
# Products in int8 with and without super-blocks. Of tiny-next alone the rows are whole blocks of
# Q4_K; the others get it where it fits, and IQ4_NL or F16 elsewhere.
TYPES = {"tiny": "Q4_K", "tiny-moe": "Q4_K", "tiny-next": "Q4_K"}
N_PROMPT = 203
# Of a few prompts the middle error counts: in one of a hundred a choice of experts turns round,
# which makes 1e-4 and more. Of 120 prompts 19 in 20 had at most 1e-10 (tiny-kimi, whose latent
# values all go through one cache, 4e-9 if that is F16) …
N_PROMPTS = 5
REFERENCE_LIMIT, LATENT_F16_LIMIT = 1e-9, 3e-8
# … and with attention and the delta rule on tiles 1e-7, 6e-5, 2e-7, 1e-2 and 9e-3.
TILES_LIMITS = {"tiny": 1e-6, "tiny-untied": 3e-4, "tiny-moe": 1e-6}


@pytest.fixture(scope="module", params=TINY)
def path(request: pytest.FixtureRequest, models: Models) -> Path:
    """Each architecture, quantized."""
    return models(request.param, TYPES.get(request.param, "Q8_0"))


@contextmanager
def with_kinds(matrix: bool, activations: int) -> Iterator[None]:
    """Whether row tiles are multiplied as tiles; bits of the other rows."""
    init: Any = CpuBackend.__init__

    def chosen(self: CpuBackend, *given: Any, **options: Any) -> None:
        init(self, *given, **options | {"matrix": matrix, "activations": activations})

    with patch.object(CpuBackend, "__init__", chosen):
        yield


@pytest.fixture(
    params=[(False, 8), (False, 15), (True, 8), (True, 15)],
    ids=["rows-8", "rows-15", "tiles-8", "tiles-15"],
)
def has_kinds(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether rows of row tiles are computed in another way than other rows."""
    matrix, activations = request.param
    with with_kinds(matrix, activations):
        yield matrix or activations == 15


@contextmanager
def engine_on(path: Path, **options: Any) -> Iterator[Engine]:
    """An engine that runs on the CPU backend alone."""
    options = dict[str, Any](backend="cpu", n_ctx=512, n_parallel=3, n_threads=2) | options
    with Engine.load(path, strict_backend=True, **options) as engine:
        yield engine


def same_bits(got: Array, want: Array) -> bool:
    return got.shape == want.shape and got.tobytes() == want.tobytes()


def test_threads_and_steps(path: Path, has_kinds: bool, rng: np.random.Generator) -> None:
    ids = random_ids(rng, N_PROMPT)
    with engine_on(path, n_threads=1) as engine:
        want = engine.logits(ids)
    assert np.isfinite(want).all()
    for options in (
        {"n_threads": 2},
        {"n_threads": 3, "n_ubatch": 128},
        {"n_ubatch": 64},
        {"n_ubatch": 100 if has_kinds else 7},
    ):
        with engine_on(path, **options) as engine:
            assert same_bits(engine.logits(ids), want), options
            # Nor on what was in the memory before.
            assert same_bits(engine.logits(ids), want), options


def test_token_by_token(path: Path, has_kinds: bool, rng: np.random.Generator) -> None:
    """What decoding computes is what a prompt has, or what chunks too short for row tiles have."""
    ids = random_ids(rng, 15 if has_kinds else 70)
    with engine_on(path) as engine:
        want, seq = engine.logits(ids), engine.memory.create()
        got = np.concatenate([engine.step([Chunk(seq, [token])]) for token in ids])
    assert same_bits(got, want)


def test_what_else_is_in_the_batch(path: Path, has_kinds: bool, rng: np.random.Generator) -> None:
    """Three prompts of different lengths, cut at different places, in every step together."""
    lengths = {0: (64, 70, 1, 3), 1: (1, 13, 50, 66), 2: (16, 5, 43, 1)}
    lengths = lengths if has_kinds else {0: (70, 1, 64, 3), 1: (1, 130, 1, 1), 2: (16, 5, 90, 1)}
    prompts = {i: random_ids(rng, sum(parts)) for i, parts in lengths.items()}
    with engine_on(path) as engine:
        want = {i: in_steps(engine, ids, lengths[i]) for i, ids in prompts.items()}
        if not has_kinds:
            assert all(same_bits(engine.logits(ids), want[i]) for i, ids in prompts.items())
        seqs = {i: engine.memory.create() for i in prompts}
        done, rows = dict.fromkeys(prompts, 0), {i: list[Any]() for i in prompts}
        for step in range(4):
            order = rng.permutation(3).tolist()
            cuts = {i: prompts[i][done[i] : done[i] + lengths[i][step]] for i in order}
            logits = engine.step([Chunk(seqs[i], cuts[i], Logits.ALL) for i in order])
            for i in order:
                rows[i].append(logits[: len(cuts[i])])
                logits, done[i] = logits[len(cuts[i]) :], done[i] + len(cuts[i])
    for i in prompts:
        assert same_bits(np.concatenate(rows[i]), want[i]), i


def in_steps(engine: Engine, ids: list[int], lengths: tuple[int, ...]) -> Array:
    """Logits of a sequence alone, processed in chunks of these lengths."""
    seq, ends = engine.memory.create(), np.cumsum(lengths).tolist()
    chunks = [ids[end - n : end] for n, end in zip(lengths, ends, strict=True)]
    rows = [engine.step([Chunk(seq, chunk, Logits.ALL)]) for chunk in chunks]
    engine.memory.free(seq)
    return np.concatenate(rows)


@pytest.mark.parametrize("types", [("f32", "f32"), ("f16", "f32"), ("f32", "f16")], ids="-".join)
@pytest.mark.parametrize("preset", TINY)
def test_the_reference_computes_the_same(
    models: Models, rng: np.random.Generator, preset: str, types: tuple[str, str]
) -> None:
    """With plain weights, and caches of the same types, all that differs is rounding."""
    prompts = [random_ids(rng, N_PROMPT // 2) for _ in range(N_PROMPTS)]
    options: dict[str, Any] = {"n_ctx": 128} | dict(zip(("type_k", "type_v"), types, strict=True))
    path = models(preset, "F32")
    with Engine.load(path, backend="reference", **options) as engine:
        want = [engine.logits(ids) for ids in prompts]
    latent_f16 = preset in WITH_LATENTS and types[0] == "f16"
    exact_limit = LATENT_F16_LIMIT if latent_f16 else REFERENCE_LIMIT
    for matrix, limit in ((False, exact_limit), (True, TILES_LIMITS.get(preset, 3e-2))):
        with with_kinds(matrix, 15), engine_on(path, **options) as engine:
            assert {b.name for b in engine.plan.backends} == {"cpu"}
            errors = [nmse(engine.logits(ids), w) for ids, w in zip(prompts, want, strict=True)]
        assert np.median(errors) <= limit, f"matrix={matrix}"


F32_CACHE = {"type_k": "f32", "type_v": "f32"}
# Of the middle one of five prompts: up to 5e-7 with 15 bits, and 2.5e-3 or more with 8.
FINE_LIMIT, COARSE_LEAST = 1e-5, 5e-4


@pytest.mark.parametrize("isa", cpu_library.usable())
@pytest.mark.parametrize("preset", ["tiny", "tiny-untied", "tiny-moe"])
def test_single_rows_of_15_bits_lose_next_to_nothing(
    models: Models, rng: np.random.Generator, preset: str, isa: str
) -> None:
    path = models(preset, "Q8_0")
    prompts = [random_ids(rng, 15) for _ in range(N_PROMPTS)]
    with float64_engine(path, n_ctx=64) as reference:
        want = [reference.logits(ids) for ids in prompts]
    errors = {}
    for activations in (8, 15):
        with engine_on(path, cpu_isa=isa, activations=activations, **F32_CACHE) as engine:
            got = [engine.logits(ids) for ids in prompts]
        pairs = zip(got, want, strict=True)
        errors[activations] = float(np.median([nmse(a, b) for a, b in pairs]))
    assert errors[15] < FINE_LIMIT, errors
    assert errors[8] > COARSE_LEAST, errors


@pytest.mark.parametrize("check", [False, True], ids=["whole programs", "node by node"])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_pieces_of_a_step_make_the_step(
    path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    check: bool,
    n_threads: int,
) -> None:
    """Every task runs once, also those of a program's first instruction: states are in place."""
    prompts = [random_ids(rng, n) for n in (40, 3, 21, 64)]
    results, n_pieces = [], [0, 0]
    for i, seconds in enumerate((60.0, 0.0)):
        monkeypatch.setattr("engine.backends.cpu.backend.PIECE_SECONDS", seconds)
        with engine_on(path, n_parallel=4, n_threads=n_threads, check=check) as engine:
            backend: Any = engine.plan.backends[0]

            def counted(*given: Any, run: Any = backend.library.run, i: int = i) -> int:
                n_pieces[i] += 1
                at: int = run(*given)
                return at

            with monkeypatch.context() as patched:
                patched.setattr(backend.library, "run", counted)
                seqs = [engine.memory.create() for _ in prompts]
                chunks = [Chunk(seq, ids) for seq, ids in zip(seqs, prompts, strict=True)]
                rows = [engine.step(chunks)]
                rows += [engine.step([Chunk(seq, [5]) for seq in seqs]) for _ in range(3)]
        results.append(np.concatenate(rows))
    assert same_bits(results[1], results[0])
    assert n_pieces[1] > n_pieces[0]
