"""The finite check: a sequence with NaN ends alone, is named, and leaves no NaN in memory.

A NaN in one row of the token embedding affects only the sequences that use that token; a NaN in a
norm affects all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import Engine, SamplingParams
from engine.formats.gguf import GGUFFile
from engine.formats.quants import dequantize
from engine.runtime.batch import Chunk, Logits
from engine.runtime.completion import Completion, GenerationError
from engine.runtime.finite import NonFiniteError
from tests.support.helpers import ROW_BY_ROW, STD, assert_all_free, nmse, random_ids
from tools.synth import write_model

Rng = np.random.Generator
BAD = 200
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logit_bias={BAD: -np.inf})


def ids(rng: Rng, n: int) -> list[int]:
    """Tokens without the bad one."""
    return [i if i != BAD else 0 for i in random_ids(rng, n)]


def weight(path: Path, name: str) -> NDArray[Any]:
    file = GGUFFile(path)
    info = file.tensors[name]
    return np.array(dequantize(info.dtype, file.raw(name), info.shape))


def planted(models: Callable[[str, str], Path], path: Path, name: str, *where: Any) -> Path:
    """The tiny untied model with a value that is no number."""
    values = weight(models("tiny-untied", "F32"), name)
    index, value = where
    values[index] = value
    return write_model(path, "tiny-untied", "F32", std=STD, arrays={name: values})


@pytest.fixture(scope="module", params=[np.nan, np.inf], ids=str)
def bad_row(
    request: pytest.FixtureRequest,
    models: Callable[[str, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A model whose token BAD has no finite embedding."""
    path = tmp_path_factory.mktemp("guard") / "m.gguf"
    return planted(models, path, "token_embd.weight", (BAD, 3), request.param)


@pytest.fixture(scope="module", params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def row_by_row(backend: str) -> dict[str, Any]:
    return ROW_BY_ROW if backend == "cpu" else {}


@pytest.fixture(params=[False, True], ids=["logits only", "every node"])
def engine(bad_row: Path, request: pytest.FixtureRequest, backend: str) -> Iterator[Engine]:
    options: dict[str, Any] = {"n_ctx": 512, "n_parallel": 3, "n_ubatch": 192, "n_checkpoints": 2}
    options |= {"backend": backend, "check": request.param, **row_by_row(backend)}
    with Engine.load(bad_row, **options) as engine, np.errstate(all="ignore"):
        yield engine
        assert_all_free(engine)
        assert all(np.isfinite(a).all() for a in states(engine).values())


@pytest.fixture(scope="module")
def sane(models: Callable[[str, str], Path], backend: str) -> Engine:
    options: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 128, **row_by_row(backend)}
    return Engine.load(models("tiny-untied", "F32"), backend=backend, **options)


def states(engine: Engine) -> dict[Any, NDArray[Any]]:
    store: Any = engine.plan.backends[0].states
    arrays: dict[Any, NDArray[Any]] = store.arrays
    assert arrays
    return arrays


def where(engine: Engine, position: int, last: int) -> tuple[str, ...]:
    """What a message should name: the first node that sees it, or the logits that show it."""
    if engine.config.check:
        return ("token_embd (GET_ROWS)", f"position {position}")
    return ("the logits", f"position {last}")


def tokens_of(engine: Engine, prompt: list[int]) -> list[int]:
    (done,) = engine.generate_batch([prompt], GREEDY)
    assert done.finish_reason == "length", done.detail
    return done.tokens


def test_a_sequence_that_goes_wrong_ends_alone(engine: Engine, sane: Engine, rng: Rng) -> None:
    good = [ids(rng, 90), ids(rng, 3)]
    bad = [*ids(rng, 17), BAD, *ids(rng, 5)]
    a, failed, b = engine.generate_batch([good[0], bad, good[1]], GREEDY)
    assert (failed.finish_reason, failed.tokens, failed.text) == ("error", [], "")
    first, second = where(engine, 17, 22)
    assert failed.detail.startswith(f"non-finite values in {first}, sequence ")
    assert failed.detail.endswith(second)
    for completion, prompt in ((a, good[0]), (b, good[1])):
        assert completion.finish_reason == "length"
        assert completion.tokens == tokens_of(sane, prompt)


def test_states_on_the_way_of_a_prompt_that_goes_wrong_are_forgotten(
    engine: Engine, sane: Engine, rng: Rng
) -> None:
    """A state of its prompt is kept at 256, before any logit shows what is wrong."""
    begin = ids(rng, 400)
    bad = [*begin[:100], BAD, *begin[101:]]
    for _ in range(2):
        (failed,) = engine.generate_batch([bad], GREEDY)
        assert failed.finish_reason == "error"
        assert (engine.cache.n_states, failed.reuse.n_reused) == (0, 0)
    assert all(np.isfinite(a).all() for a in states(engine).values())
    assert tokens_of(engine, begin) == tokens_of(sane, begin)
    # What a prompt began with may be what is wrong, and goes, too; what is not on its way stays.
    n_states = engine.cache.n_states
    (failed,) = engine.generate_batch([[*begin, BAD]], GREEDY)
    assert failed.finish_reason == "error"
    assert failed.reuse.n_reused == 400
    assert 0 < engine.cache.n_states < n_states
    assert tokens_of(engine, begin) == tokens_of(sane, begin)


def test_the_others_logits_are_those_of_a_batch_without_it(engine: Engine, rng: Rng) -> None:
    good, bad = ids(rng, 40), [BAD]
    with_it, without = list[Any](), list[Any]()
    for rows, partner in ((with_it, bad), (without, [1])):
        a, b = engine.memory.create(), engine.memory.create()
        logits, failures = engine.run([Chunk(a, good), Chunk(b, partner)])
        assert bool(failures) == (partner == bad)
        rows.append(logits[0])
        for token in (5, 6, 7):
            rows.append(engine.step([Chunk(a, [token])])[0])
        engine.memory.free(a)
        engine.memory.free(b)
    for got, expected in zip(with_it, without, strict=True):
        assert (got == expected).all()


def test_the_message_names_sequence_and_position(engine: Engine, rng: Rng) -> None:
    a, b, c = (engine.memory.create() for _ in range(3))
    engine.step([Chunk(a, ids(rng, 6)), Chunk(b, ids(rng, 11))])
    chunks = [Chunk(b, [1, BAD, 2]), Chunk(a, [3, 4], Logits.ALL), Chunk(c, [BAD, BAD])]
    logits, failures = engine.run(chunks)
    assert sorted(failures) == [0, 2]
    for index, seq, places in ((0, b, (12, 13)), (2, c, (0, 1))):
        what, place = where(engine, *places)
        assert failures[index] == f"non-finite values in {what}, sequence {seq}, {place}"
    assert np.isfinite(logits[1:3]).all()
    for seq in (a, b, c):
        engine.memory.free(seq)


def test_step_raises_what_run_reports(engine: Engine) -> None:
    seq = engine.memory.create()
    with pytest.raises(NonFiniteError, match=f"sequence {seq}, position 0"):
        engine.step([Chunk(seq, [BAD])])
    with pytest.raises(NonFiniteError, match="non-finite values in "):
        engine.logits([1, 2, 3, BAD])
    assert engine.memory.n_tokens(seq) == 0
    engine.memory.free(seq)


def test_its_states_are_zeros_and_nobody_elses(engine: Engine, rng: Rng) -> None:
    memory = engine.memory
    a, b = memory.create(), memory.create()
    engine.step([Chunk(a, ids(rng, 70)), Chunk(b, ids(rng, 70))])
    slots = {seq: memory.allocation(seq).state.slot for seq in (a, b)}
    blocks = {seq: list(memory.allocation(seq).table.blocks) for seq in (a, b)}
    kept = {t: (v[slots[a]].copy(), v[blocks[a]].copy()) for t, v in snapshot(engine, 2)}
    _, failures = engine.run([Chunk(b, [BAD])])
    assert list(failures) == [0]
    for tensor, array in states(engine).items():
        slot_wise = is_slot_wise(engine, array)
        index_b: Any = slots[b] if slot_wise else blocks[b]
        assert (array[index_b] == 0).all(), tensor
        before = kept[tensor][0 if slot_wise else 1]
        index_a: Any = slots[a] if slot_wise else blocks[a]
        assert (array[index_a] == before).all(), tensor
        assert before.any(), tensor
    assert (memory.n_tokens(a), memory.n_tokens(b)) == (70, 0)
    memory.free(a)
    memory.free(b)


def is_slot_wise(engine: Engine, array: NDArray[Any]) -> bool:
    assert engine.memory.slots.size != engine.memory.blocks.size
    return len(array) == engine.memory.slots.size


def snapshot(engine: Engine, n_blocks: int) -> list[tuple[Any, NDArray[Any]]]:
    """Copies, padded so that both a slot and a block index are valid in each."""
    return [(t, np.concatenate([a, a])) for t, a in states(engine).items()]


@pytest.mark.parametrize("holder", ["fork", "checkpoint"])
def test_what_others_share_of_it_stays(engine: Engine, sane: Engine, rng: Rng, holder: str) -> None:
    """100 tokens are a full block, which stays shared, and a part of one."""
    memory, past = engine.memory, ids(rng, 100)
    a = memory.create()
    engine.step([Chunk(a, past)])
    if holder == "fork":
        b = memory.fork(a)
    else:
        checkpoint = memory.checkpoint(a)
    _, failures = engine.run([Chunk(a, [BAD])])
    assert failures
    assert memory.n_tokens(a) == 0
    if holder == "checkpoint":
        b = a
        memory.restore(b, checkpoint)
        checkpoint.release()
    got = engine.step([Chunk(b, [7])])
    assert nmse(got, sane.logits([*past, 7])[-1:]) < 1e-9
    for seq in {a, b}:
        memory.free(seq)


def test_the_engine_goes_on_with_clean_memory(engine: Engine, sane: Engine, rng: Rng) -> None:
    """The blocks and slots of the failed sequence are used again."""
    for _ in range(2):
        done = engine.generate_batch([[BAD], [1, BAD], [*ids(rng, 80), BAD]], GREEDY)
        assert {c.finish_reason for c in done} == {"error"}
        prompt = ids(rng, 100)
        assert tokens_of(engine, prompt) == tokens_of(sane, prompt)


def test_a_token_that_was_drawn_can_be_the_bad_one(engine: Engine) -> None:
    """The bad token fails one step after it is sampled; the tokens before it stay."""
    tempted = SamplingParams(temperature=0, max_tokens=8, logit_bias={BAD: 1e4})
    completion = engine.generate([1, 2, 3], tempted)
    assert next(completion).token == BAD
    with pytest.raises(GenerationError, match="position 3"):
        next(completion)
    assert (completion.finish_reason, completion.tokens) == ("error", [BAD])


# A weight that everybody uses.

NAMES = {
    "blk.1.ssm_norm.weight": "blk.1.rms_norm_gated (RMS_NORM_GATED)",
    "blk.3.attn_output.weight": "blk.3.attn_output (MUL_MAT)",
    "output_norm.weight": "output_norm (ADD_RMS_NORM)",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", [False, True])
def test_a_wrong_weight_fails_everybody(
    models: Callable[[str, str], Path], tmp_path: Path, name: str, check: bool, backend: str
) -> None:
    shape = weight(models("tiny-untied", "F32"), name).shape
    path = planted(models, tmp_path / "m", name, tuple(0 for _ in shape), np.nan)
    options: Any = {"backend": backend, "n_parallel": 2, "check": check}
    with np.errstate(all="ignore"), Engine.load(path, **options) as engine:
        done = engine.generate_batch([[1] * 5, [2] * 70, [3]], GREEDY)
        layer = name.removesuffix(".weight").rsplit(".", 1)[0]
        for completion in done:
            assert (completion.finish_reason, completion.tokens) == ("error", [])
            assert_names(completion, layer if check else "the logits")
        assert len({c.detail.split("sequence ")[1] for c in done}) == 3
        assert_all_free(engine)
        assert all(np.isfinite(a).all() for a in states(engine).values())


def assert_names(completion: Completion, words: str) -> None:
    assert completion.detail.startswith(f"non-finite values in {words}"), completion.detail


def test_check_changes_no_results(
    models: Callable[[str, str], Path], rng: Rng, backend: str
) -> None:
    path, prompt = models("tiny-untied", "Q8_0"), ids(rng, 100)
    with (
        Engine.load(path, backend=backend) as plain,
        Engine.load(path, backend=backend, check=True) as checking,
    ):
        assert (plain.logits(prompt) == checking.logits(prompt)).all()


def test_a_nan_is_an_error_and_no_warning(
    models: Callable[[str, str], Path], tmp_path: Path, backend: str
) -> None:
    """One clear error is enough: numpy's own warnings, errors here, would only be noise."""
    path = planted(models, tmp_path / "m", "token_embd.weight", (BAD, 3), np.nan)
    with Engine.load(path, backend=backend, n_ctx=256) as engine:
        (done,) = engine.generate_batch([[1, BAD, 2]], GREEDY)
        assert done.finish_reason == "error"
