"""Files that are no regular ones, that are cut or changed while they are read, or that lie.

What a map would answer with SIGBUS is one line here.
"""

from __future__ import annotations

import gc
import os
import socket
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from engine import Engine
from engine.errors import NotEnoughMemoryError
from engine.formats.gguf import GGUFError, GGUFFile
from tests.formats.test_gguf import entry, raw_file, refused, some_tensors, tensor
from tests.support.helpers import Cli
from tools.ggufwrite import f32_tensor, write_gguf
from tools.synth import write_model

MIB = 1 << 20


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_fifo_is_refused_and_not_waited_for(fifo: Path, cli: Cli, tiny: Path) -> None:
    expected = f"{fifo}: expected a GGUF file, got a FIFO"
    assert refused(fifo) == expected
    assert cli("-m", fifo, "-p", "a").refused() == expected


def test_a_template_may_come_through_a_fifo(fifo: Path, cli: Cli, tiny: Path) -> None:
    """As a shell makes one of `<(…)`."""
    writer = threading.Thread(target=fifo.write_text, args=("{{ messages[0].content }}:",))
    writer.start()
    chat = ("-m", tiny, "-st", "-p", "a", "-n", 1, "--temp", 0)
    assert cli(*chat, "--chat-template-file", fifo).status == 0
    writer.join()


def test_devices_and_sockets_are_refused(tmp_path: Path) -> None:
    assert refused(Path("/dev/zero")) == "/dev/zero: expected a GGUF file, got a character device"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert refused(tmp_path / "s") == f"{tmp_path / 's'}: expected a GGUF file, got a socket"


def cut(path: Path) -> None:
    os.truncate(path, 200)


def overwrite(path: Path) -> None:
    """Other bytes, of the same number; the time is set, as it may be the same tick."""
    with path.open("r+b") as file:
        file.write(b"GGUF")
    os.utime(path, ns=(0, 0))


CUT = "cut while it was read: tensor c needs 1260 bytes at offset"
CHANGED = "changed while it was read: load it again"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, CUT),
        (overwrite, CHANGED),
        (lambda path: os.truncate(path, MIB), CHANGED),
        (lambda path: os.utime(path, ns=(0, 0)), CHANGED),
    ],
)
def test_a_file_that_changes_is_refused(
    tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {}, some_tensors())
    file = GGUFFile(path)
    assert file.raw("c").nbytes == 1260
    change(path)
    with pytest.raises(GGUFError) as error:
        file.raw("c")
    assert str(error.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("change", [cut, overwrite])
def test_an_engine_whose_file_changes_is_refused(
    tmp_path: Path, backend: str, change: Callable[[Path], object]
) -> None:
    path = write_model(tmp_path / "m.gguf", "tiny", "Q8_0")

    def changed(size: int) -> None:
        change(path)

    # The first thing after the header: the tokenizer asks for memory.
    with (
        patch("engine.text.tokenizer._check_memory", changed),
        pytest.raises(GGUFError, match=f"^{path}: (cut|changed) while it was read: "),
    ):
        # The reference backend reads a weight when a step needs it.
        Engine.load(path, backend=backend).logits([1])


def test_a_file_that_another_one_replaces_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {}, [f32_tensor("x", np.ones(3))])
    file = GGUFFile(path)
    write_gguf(tmp_path / "new", {}, [f32_tensor("x", np.zeros(3))])
    (tmp_path / "new").replace(path)
    assert file.raw("x").view(np.float32).tolist() == [1, 1, 1]


def test_short_reads_are_continued(tmp_path: Path) -> None:
    """Linux reads less than 2 GiB at a time, and what a signal interrupts."""
    path, preadv = tmp_path / "m.gguf", os.preadv
    write_gguf(path, {"l": ["a", "b"] * 99}, some_tensors())
    with patch("os.preadv", lambda fd, into, at: preadv(fd, [into[0][:7]], at)):
        file = GGUFFile(path)
        assert list(file.metadata["l"]) == ["a", "b"] * 99
        assert all(file.raw(t.name).tobytes() == b"".join(t.data()) for t in some_tensors())


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {}, some_tensors())
    file = GGUFFile(path)
    with (
        patch("os.preadv", side_effect=OSError(5, "Input/output error")),
        pytest.raises(GGUFError, match=f"^{path}: Input/output error$"),
    ):
        file.raw("c")
    message = f"^{path}: out of memory: tensor c needs 0.0 MiB$"
    with (
        patch("numpy.empty", side_effect=MemoryError),
        pytest.raises(NotEnoughMemoryError, match=message),
    ):
        file.raw("c")


def test_files_are_closed(tmp_path: Path) -> None:
    def n_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    path, before = tmp_path / "m.gguf", n_open()
    write_gguf(path, {}, some_tensors())
    file = GGUFFile(path)
    assert n_open() == before + 1
    del file
    assert n_open() == before
    refused(path, b"GGUF")
    gc.collect()  # pytest's record of the error is part of a cycle.
    assert n_open() == before


@pytest.mark.parametrize("offset", [0, 32, 4064])
def test_overlapping_tensors_are_refused(tmp_path: Path, offset: int) -> None:
    """In whatever order the table has them. Gaps between tensors cost nothing."""
    big, small = entry(b"big", (32, 32)), entry(b"small", (8,), offset=offset)
    for entries in ((big, small), (small, big)):
        message = refused(tmp_path / "m.gguf", raw_file(*entries, data=8192))
        assert "overlaps tensor" in message
        assert "big" in message
    beside = (entry(b"big", (32, 32)), entry(b"small", (8,), offset=4096 + offset))
    (tmp_path / "m.gguf").write_bytes(raw_file(*beside, data=16384))
    assert [*GGUFFile(tmp_path / "m.gguf").tensors] == ["big", "small"]


def test_the_refusal_of_an_overlap(tmp_path: Path) -> None:
    contents = raw_file(entry(b"a", (32,)), entry(b"b", offset=96))
    assert refused(tmp_path / "m.gguf", contents).endswith(
        ": tensor b overlaps tensor a: expected an offset in the file of at least 224, got 192"
    )


def test_short_strings_take_no_more_memory_than_in_the_file(tmp_path: Path) -> None:
    path, n = tmp_path / "m.gguf", 200_000
    texts = [f"{i % 1000:03d}" for i in range(n)]
    write_gguf(path, {"texts": texts}, [])
    size = path.stat().st_size
    tracemalloc.start()
    try:
        file = GGUFFile(path)
        now, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now < 1.1 * size
    # The header as it is read, with room to grow, beside the array.
    assert most < 2.5 * size + 4 * MIB
    assert list(file.metadata["texts"]) == texts


def test_strings_across_the_pieces_in_which_a_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    texts = ["x" * n for n in (0, MIB, 1, 3 * MIB - 7, 2)]
    write_gguf(path, {"a": "y" * MIB, "texts": texts, "b": "z"}, [tensor("t", (5, 32), "Q4_0")])
    file = GGUFFile(path)
    assert list(file.metadata["texts"]) == texts
    assert (file.string("a"), file.string("b")) == ("y" * MIB, "z")
    assert file.tensors["t"].shape == (5, 32)
