"""Files are written whole or not at all, whatever becomes of the disk or of who writes them.

`python -m tests.kvcache.test_store_writes --kills N` kills more often than a run of the tests does.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import EngineError
from engine.kvcache.store import Part, Reader, StoreError, write
from tests.kvcache.test_store import INFO, arrays, parts, path, read
from tests.support.session_files import tensors_of

__all__ = ["path"]  # The fixture.

# Errors while a file is written: what was there stays whole.


@contextmanager
def stays(path: Path) -> Iterator[None]:
    """Inside this context nothing happens to a file or beside it; the next write works."""
    before, beside = path.read_bytes(), set(path.parent.iterdir())
    yield
    assert path.read_bytes() == before
    assert set(path.parent.iterdir()) == beside
    write(path, {}, [])
    assert read(path) == ({}, {})


@pytest.mark.parametrize("error", [EngineError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_part_that_can_not_be_read(path: Path, error: BaseException) -> None:
    def fail() -> Any:
        raise error

    bad = Part("b", np.dtype(np.float32), (2,), lambda: [fail()])
    with stays(path), pytest.raises(type(error)) as caught:
        write(path, INFO, [Part.of("a", np.zeros(1 << 20)), bad])
    assert caught.value is error


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_is_full_at_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    def full(*given: Any) -> None:
        raise OSError(number, os.strerror(number))

    with stays(path), monkeypatch.context() as patched:
        patched.setattr(os, name, full)
        with pytest.raises(StoreError) as caught:
            write(path, INFO, parts(arrays()))
    assert str(caught.value) == f"{path}: can't be written: {os.strerror(number)}"


@pytest.mark.parametrize("n_bytes", [0, 100, 1 << 20])
def test_a_disk_that_is_full_in_the_middle(path: Path, n_bytes: int) -> None:
    """A limit of files' sizes fails as a full disk does: some bytes are written, then none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with stays(path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
        try:
            with pytest.raises(StoreError, match="can't be written: File too large"):
                write(path, INFO, [Part.of("a", np.zeros(1 << 19))])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_too_much_for_a_header(path: Path) -> None:
    """What no reader takes is not written."""
    with stays(path), pytest.raises(StoreError, match="100 MiB"):
        write(path, {"data": "x" * (101 << 20)}, [])


def test_places_that_can_not_be_written(path: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    places = ["absent/a", "a.session/a", "folder", "fifo", ".", "..", "folder/..", "x" * 255, "a\0"]
    for place in [*(tmp_path / name for name in places), Path("/"), Path("."), Path("\ud800")]:
        with pytest.raises(StoreError) as caught:
            write(place, INFO, parts(arrays()))
        assert "\n" not in str(caught.value), place
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.session", "fifo", "folder"]
    assert list((tmp_path / "folder").iterdir()) == []
    assert (tmp_path / "fifo").is_fifo()


def test_a_link_stays_one(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a.session")
    write(tmp_path / "link", {"now": 1}, [])
    assert (tmp_path / "link").is_symlink()
    assert read(path) == ({"now": 1}, {})


# Processes that write at once, and that are killed.

# For each line of its input it forks a process that writes a file again and again; each of its
# files has a number in all places, larger than that of the file before.
WRITERS = """
import os, sys
from pathlib import Path
import numpy as np
from engine.kvcache.store import Part, Reader, StoreError, write
path = Path(sys.argv[1])
def save(number):
    big, small = np.full(300_000, number, np.int32), np.full(3, number, np.int32)
    write(path, {"number": number}, [Part.of("a", small), Part.of("b", big)])
for line in sys.stdin:
    if line == "end\\n":
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    elif not (pid := os.fork()):
        number = Reader(path).info["number"] + 1 if path.exists() else 0
        while True:
            try:
                save(number)
                number += 1
            except StoreError as error:
                assert str(error) == f"{path}: another process writes it", error
    print(pid, flush=True)
"""


@contextmanager
def writers(path: Path) -> Iterator[Callable[[str], int]]:
    """Inside this context, `tell(line)` tells a process that forks the ones that write."""
    command = [sys.executable, "-c", WRITERS, str(path)]
    with subprocess.Popen(command, text=True, stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def tell(line: str) -> int:
            print(line, file=stdin, flush=True)
            return int(stdout.readline())

        yield tell
        _, err = process.communicate()
        assert (process.returncode, err) == (0, "")


def number_of(path: Path) -> int:
    """The number that a file has in all places."""
    reader = Reader(path)
    numbers = {int(n) for array in tensors_of(reader).values() for n in np.unique(array)}
    assert numbers == {reader.info["number"]}
    return numbers.pop()


def kill_writers(path: Path, n_kills: int, rng: random.Random) -> Counter[str]:
    """Kill a process that writes, at random moments; the file is whole each time, and the last one
    or a newer one."""
    last, seen = -1, Counter[str]()
    with writers(path) as tell:
        for _ in range(n_kills):
            tell("go")
            time.sleep(rng.random() * 0.03)
            tell("end")
            seen["in the midst"] += path.with_name(path.name + ".tmp").exists()
            if path.exists():
                number = number_of(path)
                assert number >= last
                seen["went on"] += number > last
                last = number
    write(path, {}, [])
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return seen


def test_a_process_that_is_killed_leaves_a_whole_file(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    seen = kill_writers(tmp_path / "a", 20, random.Random(int(rng.integers(2**32))))
    assert seen["in the midst"] > 0
    assert seen["went on"] > 0


def test_two_processes_write_one_path(tmp_path: Path) -> None:
    """Whoever reads meanwhile has a whole file; nobody fails but for the other one."""
    path = tmp_path / "a"
    with writers(path) as tell:
        pids = [tell("go"), tell("go")]
        end, n = time.monotonic() + 1, 0
        while time.monotonic() < end or n < 2:
            if path.exists():
                number_of(path)
                n += 1
        for pid in pids:
            os.kill(pid, 0)
        os.kill(pids[0], signal.SIGKILL)
        tell("end")


def test_a_second_writer_is_told_of_the_first(path: Path) -> None:
    def second() -> Any:
        with pytest.raises(StoreError) as caught:
            write(path, INFO, [])
        lines.append(str(caught.value))
        return np.zeros(2, np.float32)

    lines: list[str] = []
    write(path, {"first": 1}, [Part("a", np.dtype(np.float32), (2,), lambda: [second()])])
    assert lines == [f"{path}: another process writes it"]
    assert read(path)[0] == {"first": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = kill_writers(Path(folder) / "a", options.kills, random.Random(options.seed))
    print(f"seed {options.seed}:", dict(seen))


if __name__ == "__main__":
    main()
