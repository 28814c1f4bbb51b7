"""Files of what memory holds: what is written is read, and what was changed is refused.

The reference for the format is the `safetensors` library.
`python -m tests.kvcache.test_store --rounds N` makes more random changes than a run of the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.kvcache.store import FORMAT, VERSION, Part, Reader, StoreError, write
from tests.support.session_files import tensors_of

INFO: dict[str, Any] = {"states": [[3, "TURN"]], "é\ud800": [None, -1.5, {"deep": []}]}
Arrays = dict[str, np.ndarray[Any, Any]]
HASH = "sha256"


def arrays() -> Arrays:
    """One of each type; one without elements, and one with no dimension."""
    rng = np.random.default_rng(0)
    return {
        "tokens": np.arange(5, dtype=np.int32),
        "half": rng.normal(size=(2, 3, 4)).astype(np.float16),
        "float": np.array([np.nan, np.inf, -0.0, 1e-45], np.float32),
        "double": rng.normal(size=(3, 2)),
        "bytes": rng.integers(0, 256, (1, 7)).astype(np.uint8),
        "none": np.empty((0, 4), np.float32),
        "scalar": np.array(7, np.int32),
        "turned": rng.normal(size=(4, 3)).T,
    }


def parts(given: Arrays) -> list[Part]:
    return [Part.of(name, array) for name, array in given.items()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole file."""
    path = tmp_path / "a.session"
    assert write(path, INFO, parts(arrays())) == path.stat().st_size
    return path


def read(path: Path) -> tuple[Any, dict[str, tuple[Any, Any, bytes]]]:
    """All that a file has."""
    reader = Reader(path)
    found = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in tensors_of(reader).items()}
    return reader.info, found


def refusal(path: Path) -> str:
    """The one line that names a file that is refused: soon, and without much memory."""
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(StoreError) as caught:
            read(path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 2
    n_bytes = min(path.stat().st_size, 16 << 20) if path.exists() else 0
    assert most < (4 << 20) + 8 * n_bytes
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


# What is written is read.


def test_a_row_larger_than_a_piece(path: Path) -> None:
    whole = tensors_of(Reader(path))
    for n_bytes in (1, 7, 64):
        for name, array in tensors_of(Reader(path), n_bytes).items():
            assert array.tobytes() == whole[name].tobytes()


def test_the_library_reads_the_same(path: Path) -> None:
    found, expected = load_file(path), arrays()
    assert len(found.pop(HASH)) == 2
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    info, own = read(path)
    assert info == INFO
    assert own == {n: (a.dtype.str, a.shape, a.tobytes()) for n, a in expected.items()}
    with path.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        said = json.loads(file.read(n))["__metadata__"]
    assert (said["format"], said["version"]) == (FORMAT, str(VERSION))
    assert n % 8 == 0


def test_the_same_is_the_same_file(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "b", INFO, parts(arrays()))
    assert (tmp_path / "b").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.session", "b"]


# Other files.


def test_a_cut_or_longer_file(path: Path) -> None:
    whole = path.read_bytes()
    for n in [*range(120), *range(120, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:n])
        assert "expected a" in refusal(path), n
    for more in (b"\0", whole):
        path.write_bytes(whole + more)
        assert refusal(path).startswith("expected a")


def test_other_files(path: Path, tmp_path: Path) -> None:
    def other(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    assert refusal(other("empty", b"")) == "expected a session, got no safetensors file"
    assert "no safetensors" in refusal(other("text", b"Once upon a time. " * 99))
    save_file({"a": np.zeros(99)}, tmp_path / "b")
    assert refusal(tmp_path / "b") == "expected a session, got another file"
    assert refusal(tmp_path) == "expected a session, got a directory"
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == "expected a session, got a FIFO"
    assert refusal(tmp_path / "absent") == "No such file or directory"
    assert refusal(path / "under a file") == "Not a directory"
    huge = other("huge", (1 << 40).to_bytes(8, "little"))
    os.truncate(huge, 1 << 41)  # Sparse.
    assert "no safetensors" in refusal(huge)


def forged(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file whose hashes are right, whatever its header is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    hashes = hashlib.new(HASH, head).digest() + hashlib.new(HASH, data).digest()
    path.write_bytes(head + data + hashes)
    return path


def header(*entries: tuple[str, Any, Any, Any], **said: Any) -> dict[str, Any]:
    """A header with some entries, each (name, type, shape, offsets), and what it says."""
    given = {"format": FORMAT, "version": str(VERSION), "info": "{}"} | said
    made = {n: {"dtype": d, "shape": s, "data_offsets": o} for n, d, s, o in entries}
    end = max((o[1] for _, _, _, o in entries if isinstance(o, list) and len(o) == 2), default=0)
    hashes = {"dtype": "U8", "shape": [2, 32], "data_offsets": [end, end + 64]}
    return {"__metadata__": given, **made, HASH: hashes}


def test_what_is_forged_right_is_read(tmp_path: Path) -> None:
    made = header(("a", "I32", [2], [0, 8]), ("b", "U8", [], [8, 9]))
    _, found = read(forged(tmp_path / "f", made, bytes(9)))
    assert found == {"a": ("<i4", (2,), bytes(8)), "b": ("|u1", (), b"\0")}


DEEP = b'{"__metadata__":"gdn-engine session","a":' + b"[" * 100_000


@pytest.mark.parametrize(
    "given",
    [
        b'"gdn-engine session"',
        b'["gdn-engine session"]',
        b"7            gdn-engine session",
        b'{"__metadata__":{"format":"gdn-engine session"}}',
        b'{"gdn-engine session":\xff}',
        DEEP,
        DEEP + b"]" * 100_000 + b"}",
        header(info=3),
        header(info="["),
        header(info='{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
        {"__metadata__": {"format": FORMAT, "version": "1", "info": "{}"}},
        header() | {"a": 5},
        header() | {"a": {"dtype": "I32", "shape": [2]}},
        header() | {"a": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8], "more": 1}},
        header(("a", "I32", [-2], [0, 8])),
        header(("a", "I32", [-1, -2], [0, 8])),
        header(("a", "I32", [2.0], [0, 8])),
        header(("a", "I32", [True, 2], [0, 8])),
        header(("a", "I32", "2", [0, 8])),
        header(("a", "I32", {"2": 2}, [0, 8])),
        header(("a", "I32", {}, [0, 4])),
        header(("a", "I32", "", [0, 4])),
        header(("a", "I32", None, [0, 8])),
        header(("a", "I32", 2, [0, 8])),
        header(("a", "I32", [1] * 100, [0, 4])),
        header(("a", "I32", [0, 2**70], [0, 0])),
        header(("a", "I32", [0, *[2**40] * 7], [0, 0])),
        header(("a", "I32", [2**70], [0, 8])),
        header(("a", "I32", [10**4000] * 2000, [0, 8])),
        header(("a", "I32", [1] * 1_000_000, [0, 4])),
        header(("a", "I32", [2**30], [0, 2**32])),
        header(("a", "I64", [1], [0, 8])),
        header(("a", ["I32"], [2], [0, 8])),
        header(("a", "I32", [2], [0, 8]), ("b", "I32", [1], [4, 8])),
        header(("a", "I32", [2], [0, 8]), ("b", "I32", [2], [0, 8])),
        header(("a", "I32", [1], [4, 8])),
        header(("a", "I32", [2], [8, 0])),
        header(("a", "I32", [2], [-8, 0])),
        header(("a", "I32", [2], [0, 9])),
        header(("a", "I32", [2], [0.0, 8.0])),
        header(("a", "I32", [2], [0])),
        header(("a", "I32", [2], "08")),
        header(("a", "I32", [2], None)),
        header(("a", "I32", [1], [0, 4])),
        header(("a", "I32", [3], [0, 12])),
    ],
    ids=lambda given: (given if isinstance(given, bytes) else json.dumps(given).encode())[-40:],
)
def test_a_forged_header_is_refused(tmp_path: Path, given: Any) -> None:
    assert refusal(forged(tmp_path / "f", given, bytes(8))).startswith("expected a")


@pytest.mark.parametrize("version", ["2", "", "1\n2", "9" * 9999, 1, None, ["1"]])
@pytest.mark.parametrize("more", [{}, {"info": 5}])
def test_another_version_is_refused_by_its_name(tmp_path: Path, version: Any, more: Any) -> None:
    """Whatever else is otherwise in it."""
    made = header(("a", "BF16", [4], [0, 8]), version=version, **more)
    line = refusal(forged(tmp_path / "f", made, bytes(8)))
    assert line.startswith("expected version 1 of the format, got ")
    assert len(line) < 200


# Random changes.


def changed(data: bytes, rng: random.Random) -> bytes:
    """A file after one to four changes: of bits, bytes and runs, more of them in its header."""
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(rng.choice([9, 700, len(made)])) % max(1, len(made))
        n = rng.choice([1, 1, 4, 64, 300])
        kind = rng.randrange(7)
        if kind == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at] = rng.choice([0, 255, *b'0123456789-.[]{}",:eE \n'])
        elif kind == 2:
            made[at : at + n] = rng.randbytes(n)
        elif kind == 3:
            del made[at : at + n]
        elif kind == 4:
            made[at:at] = made[at : at + n]
        elif kind == 5:
            other = rng.randrange(len(made))
            made[at : at + n] = made[other : other + n]
        else:
            made[at : at + n] = made[at : at + n][::-1]
        made = made or bytearray(b"\0")
    return bytes(made)


def with_right_hashes(data: bytes) -> bytes:
    """The same, with hashes of what is there now, as far as it has places for them."""
    n, end = int.from_bytes(data[:8], "little"), len(data) - 64
    if not 8 + n <= end:
        return data
    hashes = [hashlib.new(HASH, data[i:j]).digest() for i, j in ((0, 8 + n), (8 + n, end))]
    return data[:end] + b"".join(hashes)


def fuzz(folder: Path, rounds: int, seed: int) -> Counter[str]:
    """Change a file at random. It is refused, or read as it was; with hashes made right, it is
    refused, or read as it is now."""
    path, rng, seen = folder / "a", random.Random(seed), Counter[str]()
    write(path, INFO, parts(arrays()))
    whole, expected = path.read_bytes(), read(path)
    for i in range(rounds):
        data = changed(whole, rng)
        if is_forged := bool(i % 2):
            data = with_right_hashes(data)
        path.write_bytes(data)
        try:
            found = read(path)
        except StoreError as error:
            line = str(error)
            assert line.startswith(f"{path}: "), line
            assert line.isprintable(), line
            seen["refused"] += 1
            continue
        if is_forged:
            seen["forged and read"] += 1
        else:
            assert data == whole
            assert found == expected
            seen["the same"] += 1
    return seen


def test_random_changes(tmp_path: Path, rng: np.random.Generator) -> None:
    seen = fuzz(tmp_path, 3000, int(rng.integers(2**32)))
    assert seen["refused"] > 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"seed {options.seed}:", dict(fuzz(Path(folder), options.rounds, options.seed)))


if __name__ == "__main__":
    main()
