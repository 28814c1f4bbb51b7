"""The prefix cache on disk where things go wrong: damaged files, full disks, other processes.

The reference for an answer is an engine without a cache.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.config import ConfigError, EngineConfig
from engine.kvcache.store import Reader, StoreError
from engine.runtime import disk
from engine.runtime.disk import DiskCache
from tests.runtime.test_disk_cache import (
    GREEDY,
    MIB,
    ask,
    files,
    fill,
    folder,
    fresh,
    load,
    n_bytes,
    warnings,
    writes_at_once,
)
from tests.support.helpers import assert_all_free, random_ids
from tests.support.session_files import tensors_of
from tests.support.talk import assert_right

__all__ = ["folder", "fresh", "writes_at_once"]  # Fixtures.

Rng = np.random.Generator


def test_a_damaged_file_is_said_once(
    tiny: Path, fresh: Engine, folder: Path, rng: Rng, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not used, whatever is changed of it; the next time its prefix leaves memory it is
    written anew."""
    text = "the cat in the hat " * 90
    with load(tiny, folder, cache_ram=8) as engine:
        engine.generate(text, GREEDY).wait()
    (path,) = files(folder)
    whole = path.read_bytes()
    n_head = int.from_bytes(whole[:8], "little") + 8
    n_ids = Reader(path).shapes["tokens"][1][0]
    quiet = 0, 8, n_head // 2, n_head, n_head + 4 * n_ids - 4, -64, -33
    for at in (*quiet, n_head + 4 * n_ids + 99, -65, -32, -1):
        made = bytearray(whole)
        made[at] ^= 1
        path.unlink()
        path.write_bytes(made)
        with load(tiny, folder, cache_ram=8) as engine:
            for _ in range(3):
                done = engine.generate(text, GREEDY).wait()
                assert done.request.ids == fresh.encode_prompt(text)
                assert_right(done, fresh)
                engine.cache.clear()
                (folder / "other").write_bytes(b"")  # The directory changes.
                (folder / "other").unlink()
            assert len(warnings(caplog)) == (at not in quiet)
            engine.generate(text, GREEDY).wait()
        assert list(tensors_of(Reader(path)).items())
    # A file of another prefix by its name.
    other = path.with_name(f"{'0' * 64}.prefix")
    path.unlink()
    other.write_bytes(whole)
    with load(tiny, folder) as engine:
        assert engine.generate(text, GREEDY).wait().reuse.n_reused == 0
    assert warnings(caplog) == []


def test_a_file_that_is_cut_while_it_is_used(
    tiny: Path, fresh: Engine, folder: Path, rng: Rng, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_ids(rng, 700)
    with load(tiny, folder) as engine:
        ask(engine, fresh, prompt)
    (path,) = files(folder)
    with load(tiny, folder) as engine:
        os.truncate(path, 2000)
        assert [ask(engine, fresh, prompt) for _ in range(2)] == [0, 700]
        assert len(warnings(caplog)) == 1
    with load(tiny, folder) as engine:
        assert ask(engine, fresh, prompt) == 700
        engine.cache.clear()
        path.unlink()  # As another process does.
        assert ask(engine, fresh, prompt) == 0
        assert_all_free(engine)
    assert warnings(caplog) == []


def test_what_was_found_may_give_way_to_a_damaged_file(
    tiny: Path, fresh: Engine, folder: Path, rng: Rng
) -> None:
    """To read it takes the room of a shorter prefix in memory, of which then nothing is left."""
    prompt = random_ids(rng, 1000)
    with load(tiny, folder) as engine:
        ask(engine, fresh, prompt)
    (path,) = files(folder)
    whole = bytearray(path.read_bytes())
    whole[-100] ^= 1
    path.write_bytes(whole)
    with load(tiny, folder, cache_ram=1) as engine:
        cache = engine.loop.scheduler.cache
        ask(engine, fresh, prompt[:200])
        held = [engine.memory.create() for _ in range(engine.memory.slots.n_free)]
        n = len(cache._seqs)

        def make_room(has_room: Callable[[], bool], spared: Any) -> bool:
            cache.clear()
            return has_room()

        with patch.object(cache, "make_room", make_room):
            assert ask(engine, fresh, prompt) == 0
        assert n > 0
        for seq in held:
            engine.memory.free(seq)


def test_what_killed_processes_left_goes(tiny: Path, folder: Path, rng: Rng) -> None:
    folder.mkdir()
    (folder / f"{'a' * 64}.prefix.tmp").write_bytes(bytes(MIB))
    (folder / "mine.prefix.tmp").write_bytes(b"mine")
    with load(tiny, folder) as engine:
        engine.generate(random_ids(rng, 600), GREEDY).wait()
    (folder / "mine.prefix.tmp").unlink()
    assert len(files(folder)) == 1


@pytest.mark.parametrize("trouble", ["gone", "a file", "full", "unwritable"])
def test_a_directory_that_fails(
    tiny: Path, fresh: Engine, folder: Path, rng: Rng, trouble: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """One warning; requests go on, and what is there is still used."""

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    prompt = random_ids(rng, 700)
    with load(tiny, folder) as engine:
        ask(engine, fresh, prompt)
    with load(tiny, folder) as engine, pytest.MonkeyPatch.context() as patched:
        if trouble == "full":
            patched.setattr(os, "fsync", full)
        elif trouble == "unwritable":
            (folder / "lock").unlink()
            (folder / "lock").mkdir()  # The user of the tests may write anywhere.
        else:
            shutil.rmtree(folder)
        if trouble == "a file":
            folder.write_bytes(b"")
        assert ask(engine, fresh, prompt) == (700 if trouble in ("full", "unwritable") else 0)
        for _ in range(20):
            ask(engine, fresh, random_ids(rng, 700))
        engine.close()
        (line,) = warnings(caplog)
        assert line.startswith(f"{folder}: the cache on disk is off: ")
    if trouble == "full":
        assert len(files(folder)) == 1


def test_directories_that_can_not_be_used(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for bad in (tmp_path / "file", tmp_path / "file" / "a", "a\0"):
        with pytest.raises(StoreError, match="can't be used: ") as caught:
            load(tiny, bad)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="cache_dir: expected a prefix cache in memory, got none"):
        load(tiny, tmp_path / "a", cache_ram=0)


def test_ctrl_c_at_close(tiny: Path, folder: Path, rng: Rng) -> None:
    """The engine is closed all the same, and no half file has a place."""
    engine = load(tiny, folder)
    engine.generate(random_ids(rng, 600), GREEDY).wait()

    def interrupted(self: DiskCache) -> None:
        raise KeyboardInterrupt

    with patch.object(DiskCache, "_wait", interrupted), pytest.raises(KeyboardInterrupt):
        engine.close()
    with pytest.raises(Exception, match="the engine is closed"):
        engine.generate([1], GREEDY).wait()
    time.sleep(0.2)
    for path in files(folder):
        assert list(tensors_of(Reader(path)).items())


def test_a_fork_does_not_keep_the_lock(tiny: Path, fresh: Engine, folder: Path, rng: Rng) -> None:
    """A process that is forked while a file is written, and lives on, has the writer's lock."""
    with load(tiny, folder) as engine:
        children = list[int]()
        fsync = os.fsync

        def forking(number: int) -> None:
            if len(children) < 2:
                if not (pid := os.fork()):
                    time.sleep(10)
                    os._exit(0)
                children.append(pid)
            fsync(number)

        with patch.object(os, "fsync", forking):
            fill(engine, rng)
            fill(engine, rng)
        try:
            assert len(children) == 2
            # Nothing waited for them.
            assert {os.waitpid(pid, os.WNOHANG) for pid in children} == {(0, 0)}
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        assert len(files(folder)) >= 2


# Processes that share a directory.

# Asks prompts of a few, again and again; prints how many answers were right, and how many prompts
# were found.
ASKER = """
import sys, time
import numpy as np
from pathlib import Path
from unittest.mock import patch
from engine.runtime.disk import DiskCache
from tests.runtime.test_disk_cache import GREEDY, exact_engine, load
tiny, folder = map(Path, sys.argv[1:3])
rng, order = np.random.default_rng(1), np.random.default_rng(int(sys.argv[3]))
prompts = [rng.integers(0, 320, 600 + 30 * i).tolist() for i in range(12)]
with exact_engine("cpu", tiny, n_ctx=1024, cache_ram=0) as fresh:
    expected = [fresh.generate(prompt, GREEDY).wait().tokens for prompt in prompts]
n_right = n_found = 0
end = time.monotonic() + 2
while time.monotonic() < end:
    with load(tiny, folder, cache_disk=1) as engine:
        for i in order.integers(0, 12, 60):
            done = engine.generate(prompts[i], GREEDY).wait()
            assert done.tokens == expected[i], i
            n_right += 1
            n_found += done.reuse.n_reused > 0
print(n_right, n_found)
"""


def test_processes_share_a_directory(tiny: Path, folder: Path) -> None:
    """Under load, with room for a few of their prompts; one of them is killed."""
    command = [sys.executable, "-c", ASKER, str(tiny), str(folder)]
    started = [
        subprocess.Popen([*command, str(seed)], stdout=-1, stderr=-1, text=True)
        for seed in range(3)
    ]
    time.sleep(2)
    started[2].kill()
    for process in started:
        out, err = process.communicate()
        if process is not started[2]:
            assert (process.returncode, err) == (0, "")
            n_right, n_found = map(int, out.split())
            assert n_right >= 60
            assert n_found > 0
    assert 0 < sum(p.stat().st_size for p in folder.iterdir() if p.suffix == ".prefix") <= MIB
    for path in folder.glob("*.prefix"):
        assert list(tensors_of(Reader(path)).items())
    with load(tiny, folder, cache_disk=1) as engine:
        fill(engine, np.random.default_rng())
    assert n_bytes(folder) <= MIB  # And nothing else is there.


# Anything in any order.


def test_any_operations(tiny: Path, fresh: Engine, folder: Path, rng: Rng) -> None:
    """Prompts that begin alike, texts and chats, with files that go, come and are damaged, and
    engines that end, in a cache of a few files."""
    stems = [random_ids(rng, 300) for _ in range(3)]
    words = ["the cat in the hat. " * 20, "an apple and a bear. " * 20]
    params = SamplingParams(temperature=0, max_tokens=3)

    def prompt() -> Any:
        if rng.random() < 0.3:
            return "".join(rng.choice(words, int(rng.integers(1, 4))))
        stem = stems[rng.integers(3)][: int(rng.integers(100, 301))]
        return [*stem, *stems[rng.integers(3)], *random_ids(rng, int(rng.integers(20)))]

    n_found, engine = 0, load(tiny, folder)
    with patch.object(disk, "LEAST", 64):
        for _ in range(60):
            kind = rng.integers(12)
            if kind == 0:
                engine.close()
                engine = load(tiny, folder)
            elif kind == 1:
                engine.cache.clear()
            elif kind == 2 and (found := files(folder)):
                path = found[rng.integers(len(found))]
                data = bytearray(path.read_bytes())
                data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
                path.unlink()
                if rng.random() < 0.5:
                    path.write_bytes(data)
            else:
                engine._disk._budget = int(rng.integers(1, 4)) * 400_000  # type: ignore[union-attr]
                asked = [engine.generate(prompt(), params) for _ in range(rng.integers(1, 3))]
                for done in asked:
                    assert_right(done.wait(), fresh)
                    n_found += done.reuse.n_reused > 0
            engine._disk._wait()  # type: ignore[union-attr]
            assert n_bytes(folder) <= 1_200_000
        assert n_found > 5
        assert_all_free(engine)
        engine.close()


def test_a_budget_without_a_directory_is_refused() -> None:
    expected = r"^cache_disk \(--cache-disk\): expected cache_dir \(--cache-dir\), too$"
    with pytest.raises(ConfigError, match=expected):
        EngineConfig(cache_disk=100)
