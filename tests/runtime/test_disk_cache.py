"""The prefix cache on disk: what leaves memory is found again, and nothing wrong ever is.

The reference for an answer is an engine without a cache.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from engine import ChatTemplate, Engine, SamplingParams
from engine.kvcache.store import Reader
from engine.runtime import disk
from engine.runtime.completion import Completion
from engine.runtime.disk import DiskCache
from engine.runtime.files import Held, inside
from tests.support.chats import CHATML, QWEN35_STYLE
from tests.support.cuda_devices import ON_DEVICES, MakeDevice, cuda_and_others, engine_on
from tests.support.helpers import STD, assert_all_free, exact_engine, random_ids
from tests.support.session_files import tensors_of
from tests.support.talk import assert_right, forced
from tools.synth import write_model

Models = Callable[[str, str], Path]
Rng = np.random.Generator
# The cache in memory has room for a few prompts of 600 tokens.
OPTIONS: dict[str, Any] = {"n_ctx": 1024, "cache_ram": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
MIB = 1 << 20


def load(path: Path, folder: Path | None, **options: Any) -> Engine:
    return exact_engine("cpu", path, cache_dir=folder, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def fresh(tiny: Path) -> Engine:
    return exact_engine("cpu", tiny, n_ctx=1024, cache_ram=0)


@pytest.fixture(autouse=True)
def writes_at_once() -> Iterator[None]:
    """What leaves memory while another file is written goes to the disk, too, in these tests."""

    def start(self: DiskCache, path: Path, held: Held) -> None:
        self._write(path, held, inside)
        self._files.drop(held)

    with patch.object(DiskCache, "_start", start):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files(folder: Path) -> list[Path]:
    """The cache's files; nothing half written is beside them."""
    found = set(folder.iterdir())
    named = {path for path in found if re.fullmatch(r"[0-9a-f]{64}\.prefix", path.name)}
    assert found - named <= {folder / "lock"}
    return sorted(named)


def n_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def ask(engine: Engine, fresh: Engine, prompt: list[int]) -> int:
    """How much a prompt reused; its answer is right."""
    done = engine.generate(prompt, GREEDY).wait()
    assert_right(done, fresh)
    return done.reuse.n_reused


def fill(engine: Engine, rng: Rng) -> None:
    """Have other prompts push all out of memory."""
    for _ in range(8):
        engine.generate(random_ids(rng, 900), GREEDY).wait()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said since this was called last."""
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert all("\n" not in line for line in found)
    caplog.clear()
    return found


# What leaves memory is found again.


def test_prefixes_are_found_again(tiny: Path, fresh: Engine, folder: Path, rng: Rng) -> None:
    """In the same engine, and in a new one; of what begins like them, too."""
    prompt = random_ids(rng, 700)
    other = [*prompt[:650], *random_ids(rng, 100)]
    with load(tiny, folder) as engine:
        assert ask(engine, fresh, prompt) == 0
        fill(engine, rng)
        assert ask(engine, fresh, prompt) == 700
        engine.cache.clear()
        assert str(engine.generate(prompt, GREEDY).wait().reuse) == "reused 700 of 700 tokens"
        assert ask(engine, fresh, random_ids(rng, 700)) == 0
        assert_all_free(engine)
    with load(tiny, folder) as engine:
        assert ask(engine, fresh, [*prompt, 1, 2]) == 700
        assert engine.generate(prompt, GREEDY, cache_prompt=False).wait().reuse.n_reused == 0
        assert_all_free(engine)
    assert ask(load(tiny, folder), fresh, other) in (0, 512)


def test_close_writes_what_is_in_memory(tiny: Path, fresh: Engine, folder: Path, rng: Rng) -> None:
    prompts = [random_ids(rng, n) for n in (100, 511, 512, 600)]
    with load(tiny, folder, cache_ram=8) as engine:
        for prompt in prompts:
            ask(engine, fresh, prompt)
        assert files(folder) == []
    engine.close()
    with load(tiny, folder, cache_ram=8) as engine:
        assert [ask(engine, fresh, prompt) for prompt in prompts] == [0, 0, 512, 600]
    before = {path: path.read_bytes() for path in files(folder)}
    with load(tiny, folder, cache_ram=8):
        pass
    assert {path: path.read_bytes() for path in files(folder)} == before


@pytest.mark.parametrize("source", [CHATML, QWEN35_STYLE])
@pytest.mark.parametrize("is_closed", [False, True])
def test_texts_are_found_again(
    tiny: Path, fresh: Engine, folder: Path, rng: Rng, source: str, is_closed: bool
) -> None:
    """Of a chat whose answers have tokens that no tokenizer makes of their text. They end by their
    length, so that the last token is in no state."""
    template, said = ChatTemplate(source), "the cat in the hat"
    talk = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Well? " * 100}]
    expected = 0

    def next_turn(engine: Engine) -> Completion:
        return engine.chat([*talk, {"role": "user", "content": "?"}], GREEDY, template=template)

    with load(tiny, folder) as engine:
        n = len(engine.encode_chat(talk, template=template))
        answer = engine.chat(talk, forced(list(said.encode()), n), template=template).wait()
        talk.append({"role": "assistant", "content": answer.text})
        with load(tiny, None) as other:  # The same, all in memory.
            other.chat(talk[:2], forced(list(said.encode()), n), template=template).wait()
            expected = next_turn(other).wait().reuse.n_reused
        if not is_closed:
            fill(engine, rng)
            engine.cache.clear()
            again = next_turn(engine).wait()
            assert_right(again, fresh)
            assert again.reuse.n_reused == expected > 512
    with load(tiny, folder) as engine:
        again = next_turn(engine).wait()
        assert_right(again, fresh)
        assert again.reuse.n_reused >= expected
        if source == CHATML:
            assert again.request.ids[n:][: len(said)] == list(said.encode())


def test_a_block_is_written_once(tiny: Path, folder: Path, rng: Rng) -> None:
    """States of a prompt, also those on the way into it, are in the file of its answer's state, or
    in none."""
    with load(tiny, folder) as engine:
        fill(engine, rng)
        fill(engine, rng)
    begins = list[bytes]()
    for path in files(folder):
        begins.append(tensors_of(Reader(path))["tokens"][:64].tobytes())
    assert len(begins) == len(set(begins)) > 8


@ON_DEVICES
def test_what_leaves_the_tier_on_the_host(
    make_device: MakeDevice, models: Models, folder: Path, rng: Rng
) -> None:
    path, prompts = models("tiny", "F32"), [random_ids(rng, 150) for _ in range(3)]
    with (
        patch.object(disk, "LEAST", 64),
        engine_on(path, cuda_and_others(make_device(0), batch_invariant=True), n_ctx=256,
                  n_ubatch=64, cache_ram=1, cache_dir=folder) as engine,
    ):  # fmt: skip
        cache = engine.loop.scheduler.cache
        cache.room = replace(cache.room, n_states=1, n_blocks=3)
        expected = [engine.generate(p, GREEDY, cache_prompt=False).wait().tokens for p in prompts]
        done = [engine.generate(p, GREEDY).wait().tokens for p in prompts]
        assert cache.tier is not None
        assert cache.tier.n_bytes > 0
        for node in sorted(cache._entries, key=lambda node: -node.end):
            cache.on_leave(node)
            cache._give_up(node, 0.0)
        assert engine.cache.n_states == 0
        again = [engine.generate(p, GREEDY).wait() for p in prompts]
        assert [a.tokens for a in again] == done == expected
        assert [a.reuse.n_reused for a in again] == [128] * 3
        assert_all_free(engine)


def test_a_text_goes_on_with_an_answer_on_disk(tiny: Path, fresh: Engine, folder: Path) -> None:
    """Its ids are those that the state has read, though the tokenizer makes others of it."""
    text, said = "Once upon a time there was " * 40, "the cat in the hat"
    with load(tiny, folder) as engine:
        n = len(engine.encode_prompt(text))
        engine.generate(text, forced(list(said.encode()), n)).wait()
    with load(tiny, folder) as engine:
        again = engine.generate(text + said + " and the dog", GREEDY).wait()
        assert_right(again, fresh)
        assert again.request.ids[n : n + len(said)] == list(said.encode())
        assert again.reuse.n_reused == n + len(said) - 1


# The budget, and what is foreign.


def test_the_budget_is_kept(tiny: Path, fresh: Engine, folder: Path, rng: Rng) -> None:
    with load(tiny, folder, cache_disk=1) as engine:
        for _ in range(20):
            ask(engine, fresh, random_ids(rng, 900))
            assert n_bytes(folder) <= MIB
    assert n_bytes(folder) <= MIB
    assert len(files(folder)) > 1


def test_the_budget_is_of_whole_files(tiny: Path, folder: Path, rng: Rng) -> None:
    prompt = random_ids(rng, 600)
    with load(tiny, folder) as engine:
        engine.generate(prompt, GREEDY).wait()
    (path,) = files(folder)
    size = path.stat().st_size
    for budget in (size, size - 1):
        path.unlink()
        with load(tiny, folder) as engine:
            engine._disk._budget = budget  # type: ignore[union-attr]
            engine.generate(prompt, GREEDY).wait()
        assert path.exists() == (budget == size)
        path.touch()


def test_what_is_used_stays(tiny: Path, fresh: Engine, folder: Path, rng: Rng) -> None:
    """A file is new again when it is read, and when what was read leaves memory."""
    prompts = [random_ids(rng, 700) for _ in range(4)]
    for prompt in prompts:
        with load(tiny, folder) as engine:
            ask(engine, fresh, prompt)
    for path in files(folder):
        os.utime(path, ns=(0, 0))
    with load(tiny, folder) as engine:
        assert ask(engine, fresh, prompts[2]) == 700
        (used,) = (path for path in files(folder) if path.stat().st_mtime)
        os.utime(used, ns=(0, 0))
        assert ask(engine, fresh, prompts[2]) == 700  # In memory.
        fill(engine, rng)
        assert used.stat().st_mtime > 0
        engine.cache.clear()
        engine._disk._budget = n_bytes(folder)  # type: ignore[union-attr]
        assert ask(engine, fresh, prompts[1]) == 700
        fill(engine, rng)
    with load(tiny, folder) as engine:
        found = [ask(engine, fresh, prompt) for prompt in prompts]
    assert (found[0], found[3]) == (0, 0)
    assert 700 in found


def test_no_budget(tiny: Path, fresh: Engine, folder: Path, rng: Rng) -> None:
    prompt = random_ids(rng, 600)
    with load(tiny, folder, cache_disk=0) as engine:
        ask(engine, fresh, prompt)
    assert files(folder) == []


def test_what_is_foreign_is_left_alone(
    tiny: Path, models: Models, fresh: Engine, folder: Path, rng: Rng, tmp_path: Path
) -> None:
    folder.mkdir()
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    for name in ("notes.txt", "a.session", "b.prefix", "c.tmp", f"{'0' * 63}.prefix"):
        (folder / name).write_bytes(b"mine")
    (folder / "sub").mkdir()
    (folder / f"{'a' * 64}.prefix").mkdir()
    (folder / f"{'b' * 64}.prefix").symlink_to(target)
    os.mkfifo(folder / f"{'c' * 64}.prefix")
    before = set(folder.iterdir())
    with load(tiny, folder, cache_disk=1) as engine:
        fill(engine, rng)
        fill(engine, rng)
    assert before < set(folder.iterdir())
    assert all(p.read_bytes() == b"mine" for p in (*before, target) if p.is_file())
    assert sum(p.stat().st_size for p in set(folder.iterdir()) - before) <= MIB


def test_other_models_and_types(
    tiny: Path, models: Models, fresh: Engine, folder: Path, rng: Rng,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Their files are not used, and stay unless the budget needs their room."""
    prompt = random_ids(rng, 600)
    other = write_model(folder.parent / "m.gguf", "tiny", "Q8_0", std=STD, seed=9)
    with load(other, folder) as engine:
        engine.generate(prompt, GREEDY).wait()
    with load(tiny, folder, type_k="f32", type_v="f32") as engine:
        engine.generate(prompt, GREEDY).wait()
    theirs = {path: path.read_bytes() for path in files(folder)}
    assert len(theirs) == 2
    with load(tiny, folder) as engine:
        assert ask(engine, fresh, prompt) == 0
    assert {path: path.read_bytes() for path in theirs} == theirs
    assert len(files(folder)) == 3
    with load(tiny, folder, cache_disk=1) as engine:
        fill(engine, rng)
        fill(engine, rng)
    assert not any(path.exists() for path in theirs)
    assert warnings(caplog) == []
