"""Bits: what continues from a kept state has those of the same pieces without a cache.

Pieces are what a prompt is cut into. On the CPU's vector kernels with `activations` 8, a row does
not depend on its piece, so a prompt has the same bits wherever it is cut. Where rows outside row
tiles are rounded less, cuts within 64 positions matter. numpy's matrix products depend on how many
rows they have: on the reference backend, cuts change the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import Engine, SamplingParams
from engine.backends.native import library as cpu_library
from engine.runtime.batch import Chunk
from tests.support.helpers import N_VOCAB, nmse, random_ids
from tests.support.talk import CACHE_RAM

Logits = NDArray[np.float32]
Rng = np.random.Generator
N_NEW = 4
# Other cuts: numpy's rounding to float32; and rows that are rounded to int8 or bfloat16 in one cut
# and next to not at all in the other (24 cuts of each model: up to 2e-2; where a choice of experts
# turned round, 0.13). What has nothing to do with the logits is 2 away from them.
REFERENCE_LIMIT, KINDS_LIMIT = 1e-8, 0.5
BACKENDS = [*({"cpu_isa": isa, "backend": "cpu", "activations": bits}
              for isa in cpu_library.usable() for bits in (8, 15)),
            {"backend": "reference"}]  # fmt: skip


@pytest.fixture(
    scope="module", params=BACKENDS, ids=lambda options: "-".join(map(str, options.values()))
)
def loaded(path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Each of the tiny models on each backend."""
    options: dict[str, Any] = {"n_ctx": 1024, "n_ubatch": 512, "cache_ram": CACHE_RAM}
    with Engine.load(path, **options, **request.param) as engine:
        yield engine


@pytest.fixture
def engine(loaded: Engine) -> Engine:
    """One that knows nothing."""
    loaded.cache.clear()
    return loaded


def is_row_by_row(engine: Engine) -> bool:
    """Whether a row has the same bits in every piece: all are rounded alike."""
    config = engine.config
    return config.backend == "cpu" and config.cpu_isa != "amx" and config.activations == 8


def check(engine: Engine, got: Logits, expected: Logits, cuts: Sequence[int]) -> None:
    """Compare logits [n_vocab] of a prompt cut at some positions with those of it in one piece."""
    is_cpu = engine.config.backend == "cpu"
    assert nmse(got, expected) < (KINDS_LIMIT if is_cpu else REFERENCE_LIMIT)
    if is_row_by_row(engine) or (is_cpu and all(at % 64 == 0 for at in cuts)):
        assert_bits([got], [expected])


def run(engine: Engine, pieces: Sequence[Sequence[int]]) -> list[Logits]:
    """The logits [n_vocab] after the last N_NEW pieces, on a sequence of its own."""
    seq = engine.memory.create()
    rows = [engine.step([Chunk(seq, piece)])[0].copy() for piece in pieces]
    engine.memory.free(seq)
    return rows[-N_NEW:]


def answer(engine: Engine, ids: Sequence[int], n_reused: int) -> tuple[list[Logits], list[int]]:
    """The logits of each token of an answer, and its tokens."""
    rows: list[Logits] = []

    def noting(before: Sequence[int], logits: Logits) -> Logits:
        rows.append(logits.copy())
        return logits

    params = SamplingParams(
        temperature=0, max_tokens=N_NEW, ignore_eos=True, logits_processors=noting
    )
    done = engine.generate(ids, params).wait()
    assert done.reuse.n_reused == n_reused
    return rows, done.tokens


def assert_bits(got: Sequence[Logits], expected: Sequence[Logits]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one == other).all(), nmse(one, other)


def test_a_piece_continues_with_the_bits_of_the_same_pieces(engine: Engine, rng: Rng) -> None:
    """From a prompt's state, from its logits, and from an answer's state."""
    ids = random_ids(rng, 240)
    for n in (64, int(rng.integers(1, 240))):
        engine.cache.clear()
        first, tokens = answer(engine, ids[:n], 0)
        single = [[token] for token in tokens]
        assert_bits(first, run(engine, [ids[:n], *single[:-1]]))
        # The prompt again: its last logits are known.
        assert_bits(answer(engine, ids[:n], n)[0], first)
        # Another one from its end.
        other = [*ids[:n], (tokens[0] + 1) % N_VOCAB, *ids[n:]]
        rows, said = answer(engine, other, n)
        assert_bits(rows, run(engine, [ids[:n], other[n:], *([t] for t in said[:-1])]))
        # The answer goes on: its last token is in no state.
        later = [*ids[:n], *tokens, *ids[n:]]
        n_held = n + N_NEW - 1
        rows, said = answer(engine, later, n_held)
        pieces = [ids[:n], *single[:-1], later[n_held:], *([t] for t in said[:-1])]
        assert_bits(rows, run(engine, pieces))


def test_a_long_prompt_continues_with_the_bits_of_its_pieces(engine: Engine, rng: Rng) -> None:
    """From a state on the way, at 256; a prompt of 400 is cut there whatever is known."""
    ids = random_ids(rng, 400)
    other = [*ids[:300], (ids[300] + 1) % N_VOCAB, *ids[301:]]
    expected, tokens = answer(engine, other, 0)
    assert_bits(expected, run(engine, [other[:256], other[256:], *([t] for t in tokens[:-1])]))
    engine.cache.clear()
    answer(engine, ids, 0)
    assert_bits(answer(engine, other, 256)[0], expected)


def test_cuts_elsewhere_change_no_bit_where_rows_are_alone(engine: Engine, rng: Rng) -> None:
    """At any position, and in steps of one row; where rows are of two kinds, at multiples of 64."""
    ids = random_ids(rng, 200)
    (expected,) = run(engine, [ids])
    at = sorted(rng.choice(np.arange(1, 200), 3, replace=False).tolist())
    cuts: list[list[int]] = [[64], [64, 128, 192], at, list(range(150, 200))]
    for cut in cuts:
        pieces = [ids[i:j] for i, j in zip([0, *cut], [*cut, 200], strict=True)]
        check(engine, run(engine, pieces)[-1], expected, cut)


def test_what_was_found_changes_no_bit_where_rows_are_alone(engine: Engine, rng: Rng) -> None:
    """An answer after any history is that of a run from nothing in one piece."""
    ids = random_ids(rng, 200)
    (expected,) = run(engine, [ids])
    anywhere = sorted(rng.choice(np.arange(1, 200), 4, replace=False).tolist())
    for history in (anywhere, [64, 192]):
        engine.cache.clear()
        held = 0
        for n in history:
            answer(engine, ids[:n], held)
            held = n
        check(engine, answer(engine, ids, held)[0][0], expected, history)
