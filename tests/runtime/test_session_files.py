"""Sessions that are refused, saved while others run, and read by other backends.

After a refusal nothing is taken: memory and cache are as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineError, SamplingParams
from engine.kvcache import store
from engine.kvcache.store import Part, Reader, StoreError
from engine.runtime.completion import Completion, GenerationError
from tests.support.cuda_devices import ON_DEVICES, MakeDevice, cuda_and_others, engine_on
from tests.support.helpers import STD, assert_all_free, float64_engine, nmse, random_ids
from tests.support.lazy_backend import lazy_engine
from tests.support.presets import WITH_LATENTS
from tests.support.session_files import tensors_of
from tests.support.talk import CACHE_RAM, kept_ends
from tools.synth import write_model

Models = Callable[[str, str], Path]
Rng = np.random.Generator
OPTIONS: dict[str, Any] = {"n_ctx": 1024, "n_parallel": 4, "cache_ram": CACHE_RAM}
LONG = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
F32_CACHE = {"type_k": "f32", "type_v": "f32"}


@pytest.fixture
def engine(tiny: Path) -> Iterator[Engine]:
    with Engine.load(tiny, backend="cpu", **OPTIONS) as engine:
        yield engine
        assert_all_free(engine)


@pytest.fixture
def saved(engine: Engine, tmp_path: Path, rng: Rng) -> Path:
    """A file of a completion that ended."""
    done = engine.generate(random_ids(rng, 100), LONG).wait()
    engine.save(done, tmp_path / "a.session")
    return tmp_path / "a.session"


@contextmanager
def nothing_taken(engine: Engine) -> Iterator[None]:
    def taken() -> Any:
        pools = engine.memory.blocks, engine.memory.slots
        return kept_ends(engine), [pool.n_free for pool in pools], engine.cache.n_bytes

    before = taken()
    yield
    assert taken() == before


def refusal(engine: Engine, path: Path) -> str:
    """The one line that names a file that is not restored."""
    with nothing_taken(engine), pytest.raises(StoreError) as caught:
        engine.restore(path)
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


# What can't be saved.


def not_saved(engine: Engine, completion: Any, path: Any, data: Any = None) -> str:
    with pytest.raises(StoreError) as caught:
        engine.save(completion, path, data)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_completions_that_can_not_be_saved(
    engine: Engine, tiny: Path, tmp_path: Path, rng: Rng
) -> None:
    path, prompt = tmp_path / "a", random_ids(rng, 600)
    waiting = engine.generate(prompt, LONG)
    expected = "expected the state of 600 tokens in the prefix cache, got one of 0"
    early = "its prompt is not processed yet"
    assert not_saved(engine, waiting, path) == f"{expected}: {early}"
    engine.advance()
    assert early in not_saved(engine, waiting, path)
    waiting.cancel()
    assert early in not_saved(engine, waiting, path)

    def failing(before: Any, logits: Any) -> Any:
        raise ValueError("no")

    failed = engine.generate([1, 2, 3], replace(LONG, logits_processors=failing))
    with pytest.raises(GenerationError):
        failed.wait()
    assert "without an error, got: ValueError('no')" in not_saved(engine, failed, path)
    off = engine.generate([1, 2, 3], LONG, cache_prompt=False).wait()
    assert "cache_prompt is off" in not_saved(engine, off, path)
    checkpoint = engine.memory.checkpoint(engine.memory.create())
    after = engine.generate([1, 2, 3], LONG, after=checkpoint).wait()
    assert "checkpoint" in not_saved(engine, after, path)
    checkpoint.release()
    gone = engine.generate([1, 2, 3], LONG).wait()
    engine.cache.clear()
    assert "got one of 0: raise cache_ram" in not_saved(engine, gone, path)
    with Engine.load(tiny, backend="cpu", n_ctx=64, cache_ram=0) as other:
        assert "no cache_ram" in not_saved(other, other.generate([1], LONG).wait(), path)
        theirs = other.generate([1, 2], LONG)
        next(theirs)
        assert "another one's" in not_saved(engine, theirs, path)
    assert "a Completion, got None" in not_saved(engine, None, path)
    assert list(tmp_path.iterdir()) == []


def test_paths_and_data_that_can_not_be_saved(engine: Engine, tmp_path: Path) -> None:
    done = engine.generate([1, 2, 3], LONG).wait()
    path = tmp_path / "a"
    bad: Any
    for bad in (None, 5, b"a", "", "http://a/b", ["a"]):
        assert "path: expected a" in not_saved(engine, done, bad)
        with pytest.raises(StoreError, match="path: expected a"):
            engine.restore(bad)
    places: list[Any] = [tmp_path, "/", ".", "a\0", "\ud800", tmp_path / "absent" / "a"]
    for bad in places:
        assert "can't be written" in not_saved(engine, done, bad)
        with pytest.raises(StoreError):
            engine.restore(bad)
    loop: list[Any] = []
    loop.append(loop)
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    for bad in (object(), {1, 2}, b"a", {"a": np.float32(1)}, {(1, 2): 3}, loop, deep, 1j):
        assert not_saved(engine, done, path, bad).startswith("data: expected what JSON has, got ")
    while isinstance(deep, list):  # To free it at once would recurse.
        deep = deep.pop()
    assert list(tmp_path.iterdir()) == []
    data = {"é\ud800": [1, 2.5, None, True, "\n"], "messages": [{"role": "user"}]}
    engine.save(done, path, data)
    assert engine.restore(path).data == data


def test_a_closed_engine(tiny: Path, tmp_path: Path) -> None:
    with Engine.load(tiny, backend="cpu", **OPTIONS) as engine:
        done = engine.generate([1, 2, 3], LONG).wait()
        engine.save(done, tmp_path / "a")
    for use in (lambda: engine.save(done, tmp_path / "b"), lambda: engine.restore(tmp_path / "a")):
        with pytest.raises(EngineError, match="closed"):
            use()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# What is not restored.


def test_files_of_other_models_and_types(
    saved: Path, models: Models, tiny: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "m.gguf", "tiny", "Q8_0", std=STD, seed=9)
    for path in (other, models("tiny", "F32"), models("tiny-untied", "Q8_0")):
        with Engine.load(path, backend="cpu", n_ctx=256, cache_ram=CACHE_RAM) as engine:
            assert refusal(engine, saved) == "expected a session of this model, got another one's"
    given: Any
    for given in {"type_k": "f16", "type_v": "f32"}, {"type_k": "f32", "type_v": "f16"}:
        with Engine.load(tiny, backend="cpu", cache_ram=CACHE_RAM, **given) as engine:
            assert "expected float" in (line := refusal(engine, saved))
            assert "float32" in line
            assert "float16" in line
    with float64_engine(tiny, **OPTIONS) as engine:
        assert "expected float64" in refusal(engine, saved)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """A file whose hashes are right, after `change(info, arrays)`."""
    reader = Reader(path)
    info, arrays = reader.info, tensors_of(reader)
    change(info, arrays)
    made = path.with_name("forged")
    store.write(made, info, [Part.of(name, array) for name, array in arrays.items()])
    return made


def test_a_file_that_no_engine_wrote(saved: Path, engine: Engine) -> None:
    def put(*keys: Any) -> Any:
        *way, last, value = keys

        def change(info: Any, arrays: Any) -> None:
            for key in way:
                info = info[key]
            info[last] = value

        return change

    def put_array(name: str, array: Any) -> Any:
        return lambda info, arrays: arrays.__setitem__(name, array)

    engine.cache.clear()
    n = Reader(saved).info["states"][0][0]
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    none: list[Any] = [None, [], "a", {}]
    changes: tuple[Any, ...] = (
        *(put("states", bad) for bad in ([], None, 5, "ab", [[5]], [[5, "NO"]], [[5, ["TURN"]]])),
        *(put("states", [[a, "TURN"], [b, "TURN"]]) for a, b in ((9, 9), (9, 5), (0, 9), (9, 999))),
        *(put("states", [[bad, "TURN"]]) for bad in (-1, 0, 2**31, 1.0, True, None, "5")),
        *(put("texts", [["a", 2, bad]]) for bad in (None, [[1, 2]], [[0, 0], [0, -1]], deep)),
        *(put("texts", bad) for bad in (None, 5, [5], [["a", -1, [[0, 0], [0, 0]]]])),
        put("model", None),
        lambda info, arrays: info.pop("completion"),
        *(put("completion", bad) for bad in none),
        *(put("completion", "params", bad) for bad in (*none[:3], {"no": 1}, {"top_p": 5})),
        put("completion", "params", {"logit_bias": [[1, 2, 3]]}),
        *(put("completion", "n_prompt", bad) for bad in (None, -1, 0, 1.5, "1", 10**6)),
        *(put("completion", "sampler", bad) for bad in (None, 5, "ab")),
        put_array("tokens", np.zeros(3, np.int32)),
        put_array("tokens", np.zeros((200, 2), np.int32)),
        put_array("tokens", np.zeros(200, np.float32)),
        put_array(f"logits.{n}", np.zeros(5, np.float32)),
        put_array(f"logits.{n}", np.zeros(320, np.int32)),
        lambda info, arrays: arrays.pop("tokens"),
        lambda info, arrays: arrays.popitem(),
    )
    for change in changes:
        assert "expected" in refusal(engine, rewritten(saved, change))


def _with_sampler(sampler: Any, info: dict[str, Any], arrays: Any) -> None:
    info["completion"]["sampler"] = sampler


def test_a_sampler_that_is_none(saved: Path, engine: Engine) -> None:
    bad: Any
    for bad in ({}, {"rng": 5, "uniforms": [], "mu": 0}, {"rng": {"bit_generator": "no"}}):
        change = partial(_with_sampler, bad)
        session = engine.restore(rewritten(saved, change))
        with pytest.raises(EngineError, match="a sampler's state"):
            engine.resume(session)


def test_a_damaged_file_takes_nothing(saved: Path, engine: Engine, rng: Rng) -> None:
    engine.cache.clear()
    whole = saved.read_bytes()
    for at in rng.integers(0, len(whole), 30).tolist():
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert "expected" in refusal(engine, saved)
    saved.write_bytes(whole)
    assert engine.restore(saved).n_kept == 111


def test_an_engine_without_room(saved: Path, tiny: Path) -> None:
    with Engine.load(tiny, backend="cpu", n_ctx=256, cache_ram=0) as engine:
        assert "no room for 111 tokens: raise cache_ram" in refusal(engine, saved)
    # A context that is shorter than the session.
    with Engine.load(tiny, backend="cpu", n_ctx=64, cache_ram=CACHE_RAM) as engine:
        session = engine.restore(saved)
        with pytest.raises(EngineError, match="the prompt has 112 tokens, the context 64"):
            engine.resume(session)


# While others run.


@pytest.mark.parametrize("make", [float64_engine, lazy_engine])
def test_saved_while_others_run(tiny: Path, tmp_path: Path, rng: Rng, make: Any) -> None:
    """At every step: no answer changes, and every file goes on right."""
    prompts = [random_ids(rng, int(n)) for n in rng.integers(1, 300, 3)]
    drawn = replace(LONG, temperature=1.2, seed=3)
    with make(tiny, **OPTIONS) as engine:
        expected = [engine.generate(p, drawn, cache_prompt=False).wait().tokens for p in prompts]
        running = [engine.generate(p, drawn) for p in prompts]
        saved = dict[Path, tuple[int, int]]()
        while engine.advance():
            for i, completion in enumerate(running):
                path = tmp_path / f"{i}-{len(completion.tokens)}"
                if completion.tokens and path not in saved:
                    engine.save(completion, path)
                    saved[path] = i, len(completion.tokens)
        assert [completion.tokens for completion in running] == expected
        assert len(saved) >= 20
        engine.cache.clear()
        for path in rng.permutation(list(map(str, saved)))[:10]:
            i, n = saved[Path(path)]
            after = engine.resume(engine.restore(path))
            assert after.wait().tokens[: 12 - n] == expected[i][n:]
        del running, completion, after
        assert_all_free(engine)


@pytest.mark.parametrize("make", [float64_engine, lazy_engine])
def test_threads_save_and_restore_while_steps_run(
    tiny: Path, tmp_path: Path, rng: Rng, make: Any
) -> None:
    prompts = [random_ids(rng, 60 + 40 * i) for i in range(3)]
    with make(tiny, **OPTIONS) as engine:
        expected = [engine.generate(p, LONG, cache_prompt=False).wait().tokens for p in prompts]
        engine.start()
        errors = list[BaseException]()

        def work(i: int) -> None:
            try:
                for turn in range(3):
                    asked = engine.generate(prompts[i], LONG)
                    for _ in range(3 + turn):
                        next(asked)
                    engine.save(asked, tmp_path / f"{i}")
                    session = engine.restore(tmp_path / f"{i}")
                    tokens = session.tokens[session.n_prompt :]
                    tokens += engine.resume(session).wait().tokens
                    assert tokens[:12] == expected[i]
                    assert asked.wait().tokens == expected[i]
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert_all_free(engine)


def test_a_restore_leaves_those_that_run_their_memory(tiny: Path, tmp_path: Path, rng: Rng) -> None:
    """The one that runs has not taken its memory yet; no step of it fails for want of it."""
    options: dict[str, Any] = {"n_ctx": 512, "n_checkpoints": 0, "cache_ram": 1}
    with float64_engine(tiny, **OPTIONS) as engine:
        done = engine.generate(random_ids(rng, 900), LONG).wait()
        engine.save(done, tmp_path / "a")
    with float64_engine(tiny, n_ubatch=64, **options) as engine:
        n_blocks = engine.memory.blocks.size
        # Little is left beside what one request needs.
        held = [engine.memory.create() for _ in range((n_blocks - 20) // 4)]
        for seq in held:
            engine.prefill(seq, random_ids(rng, 256))
        asked = engine.generate(random_ids(rng, 500), LONG)
        engine.advance()
        with pytest.raises(EngineError, match="expected memory for 911 tokens"):
            engine.restore(tmp_path / "a")
        assert len(asked.wait().tokens) == 12
        for seq in held:
            engine.memory.free(seq)
        assert_all_free(engine)


# Other backends.


def continued(engine: Engine, path: Path) -> tuple[list[np.ndarray[Any, Any]], list[int]]:
    """The logits of what comes after a session's tokens, and its tokens."""
    rows: list[np.ndarray[Any, Any]] = []

    def noting(before: Any, logits: Any) -> Any:
        rows.append(logits.copy())
        return logits

    session = engine.restore(path)
    after = engine.resume(session, replace(LONG, max_tokens=4, logits_processors=noting)).wait()
    assert after.reuse.n_reused == session.n_kept
    return rows, after.tokens


def written(engine: Engine, path: Path, prompt: list[int]) -> None:
    engine.cache.clear()
    completion: Completion = engine.generate(prompt, LONG)
    while len(completion.tokens) < 5:
        next(completion)
    engine.save(completion, path)
    completion.close()


@ON_DEVICES
@pytest.mark.parametrize("preset", ["tiny", *WITH_LATENTS])
def test_backends_read_each_others_files(
    make_device: MakeDevice, models: Models, tmp_path: Path, rng: Rng, preset: str
) -> None:
    path, prompt = models(preset, "F32"), random_ids(rng, 100)
    options: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "cache_ram": 8, **F32_CACHE}
    cuda = cuda_and_others(make_device(0))
    with (
        Engine.load(path, backend="cpu", **options) as cpu,
        Engine.load(path, backend="reference", **options) as reference,
        engine_on(path, cuda, **options) as device,
    ):
        engines = {"cpu": cpu, "reference": reference, "cuda": device}
        for writer, its in engines.items():
            written(its, tmp_path / writer, prompt)
            expected, tokens = continued(its, tmp_path / writer)
            for reader, engine in engines.items():
                engine.cache.clear()
                rows, said = continued(engine, tmp_path / writer)
                assert said[0] == tokens[0]
                error = nmse(rows[0], expected[0])
                assert error < 1e-8, (writer, reader)
                if reader == writer:
                    assert error == 0
                print(f"{preset}: {writer} -> {reader}: NMSE {error:.1e}")
