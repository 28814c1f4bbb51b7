"""Files that are no readable model: cut, overwritten, of another format, or not there.

Whatever the bytes, the engine loads or raises an EngineError, and the commands say it in one line.
"""

from __future__ import annotations

import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine import Engine, EngineError
from engine.commands.main import main
from engine.formats.gguf import GGUFFile
from tests.support.helpers import Cli
from tools.synth import write_model

Rng = np.random.Generator
MAX_SECONDS = 2
COMMANDS = (["-p", "a", "-n", "1"], ["graph"], ["tokenize", "-p", "a"])
Refused = Callable[[Path], str]


@pytest.fixture
def refused(cli: Cli) -> Refused:
    """refused(path): the one line that all commands have for such a file."""

    def run(path: Path) -> str:
        start = time.process_time()
        lines = {cli(*command, "-m", path).refused() for command in COMMANDS}
        assert time.process_time() - start < MAX_SECONDS
        (line,) = lines
        assert line.startswith(f"{path}")
        return line.removeprefix(f"{path}").removeprefix(": ")

    return run


def test_missing_file(refused: Refused, tmp_path: Path) -> None:
    assert refused(tmp_path / "none.gguf") == "No such file or directory"
    assert refused(tmp_path / ("x" * 300)) == "File name too long"


def test_file_within_a_file(refused: Refused, tiny: Path) -> None:
    assert refused(tiny / "model.gguf") == "Not a directory"


def test_directory(refused: Refused, tmp_path: Path) -> None:
    assert refused(tmp_path) == "expected a GGUF file, got a directory"
    (tmp_path / "model.safetensors").touch()
    converter = "llama.cpp's convert_hf_to_gguf.py converts a model's directory"
    assert refused(tmp_path) == f"expected a GGUF file, got a directory; {converter}"
    (tmp_path / "model.safetensors").unlink()


def test_empty_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    assert refused(tmp_path / "m") == "expected a GGUF file, got an empty file"


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04 some archive", b"\x10\0\0\0\0\0\0\0{", b"GGML", b"a\n", b"\x89PNG\r\n\x1a\n" * 9,
     bytes(999)],
)  # fmt: skip
def test_other_formats(refused: Refused, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m"
    path.write_bytes(content)
    got = content[:4]
    line = f"not a GGUF file: expected magic b'GGUF', got {got!r}"
    hint = "; llama.cpp's convert_hf_to_gguf.py converts safetensors and PyTorch's files"
    assert refused(path) == line + hint * (content[:2] == b"PK" or content[8:9] == b"{")


def header(version: int = 3, n_tensors: int = 0, n_kv: int = 0, order: str = "<") -> bytes:
    return b"GGUF" + struct.pack(f"{order}IQQ", version, n_tensors, n_kv)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF", "truncated: the version needs 4 bytes at offset 4, 0 are left"),
        (header(1), "GGUF version 1; expected 2 or 3"),
        (header(4), "GGUF version 4; expected 2 or 3"),
        (header(2**32 - 1), "GGUF version 4294967295; expected 2 or 3"),
        (header(order=">"), "a big-endian GGUF file; only little-endian ones can be read"),
        (header(n_tensors=2**63), "9223372036854775808 tensors cannot fit in the 0 bytes"),
        (header(n_kv=2**64 - 1), "18446744073709551615 metadata entries cannot fit in the 0"),
        (header(n_tensors=10**6) + bytes(9), "1000000 tensors cannot fit in the 9 bytes"),
        (header(n_kv=1) + b"\xff" * 99, "truncated: a string of the key of metadata entry 0"),
        (header(), "general.architecture is missing"),
    ],
)
def test_headers(tmp_path: Path, cli: Cli, content: bytes, words: str) -> None:
    (tmp_path / "m").write_bytes(content)
    assert words in cli("graph", "-m", tmp_path / "m").refused()


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny, tmp_path / "m.gguf"))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def tensor_type_offset(path: Path, name: str) -> int:
    """Where the type of a tensor of two dimensions stands."""
    entry = path.read_bytes().index(struct.pack("<Q", len(name)) + name.encode())
    return entry + 8 + len(name) + 4 + 2 * 8


@pytest.mark.parametrize("kind", [4, 5, 9, 15, 24, 31, 36, 99, 2**32 - 1])
def test_unknown_tensor_types(refused: Refused, copy: Path, kind: int) -> None:
    """Among them types that ggml had, or has for activations."""
    overwrite(copy, tensor_type_offset(copy, "blk.0.ffn_up.weight"), struct.pack("<I", kind))
    line = refused(copy)
    assert line.startswith(
        f"tensor blk.0.ffn_up.weight: unknown tensor type {kind}; known are F32, F16, BF16, Q4_0"
    )


def test_types_that_rows_do_not_fit(refused: Refused, copy: Path) -> None:
    overwrite(copy, tensor_type_offset(copy, "blk.0.ffn_up.weight"), struct.pack("<I", 12))
    assert refused(copy) == (
        "tensor blk.0.ffn_up.weight: rows of 64 are no whole Q4_K blocks of 256"
    )


def boundaries(path: Path) -> tuple[list[int], int]:
    """Offsets of all entries and tensors as the gguf package finds them; where the data starts."""
    reader = gguf.GGUFReader(path)
    entries = [field.offset for field in reader.fields.values()]
    entries += [t.field.offset for t in reader.tensors]
    return entries + [int(t.data_offset) for t in reader.tensors], int(reader.data_offset)


def test_truncated_files(tiny: Path, tmp_path: Path, refused: Refused, rng: Rng) -> None:
    data, path = tiny.read_bytes(), tmp_path / "m"
    cuts, start = boundaries(tiny)
    cuts += [*rng.integers(1, start, 40), *rng.integers(start, len(data), 20), len(data) - 1]
    for cut in sorted(map(int, cuts)):
        path.write_bytes(data[:cut])
        line = refused(path)
        assert "truncated" in line or "cannot fit" in line, (cut, line)


def damage(data: bytearray, rng: Rng, end: int) -> None:
    """A change somewhere before `end`: a bit, a byte, or a number of four or eight bytes."""
    at, kind = int(rng.integers(end)), rng.integers(4)
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[at] = int(rng.choice([0, 1, 0x20, 0x7F, 0x80, 0xFF]))
    else:
        number = int(rng.choice([0, 1, 2**31, 2**32 - 1])).to_bytes(4, "little") * int(kind - 1)
        data[at : at + len(number)] = number


def loads(path: Path) -> bool:
    """Whether the engine takes a file; if not, the error must be a line of ours."""
    try:
        Engine.load(path).close()
    except EngineError as refused:
        error = refused
    else:
        return True
    assert str(error).isprintable(), repr(str(error))
    return False


def test_damaged_headers(tiny: Path, tmp_path: Path, rng: Rng) -> None:
    """Half of the damage spares the long lists of the vocabulary, which take most of a header."""
    original, path = tiny.read_bytes(), tmp_path / "m"
    start = boundaries(tiny)[1]
    short = original.index(b"tokenizer.ggml.tokens")
    n_loaded, began = 0, time.process_time()
    for i in range(300):
        data = bytearray(original)
        damage(data, rng, short if i % 2 else start)
        path.write_bytes(data)
        n_loaded += loads(path)
    assert time.process_time() - began < 20
    # Most damage is found, but not every bit matters.
    assert 0 < n_loaded < 250


STRANGE_VALUES: list[Any] = [
    None, True, 0, 1, 3, 2**31, 2**40, np.uint64(2**64 - 1), -1, np.int64(-(2**63)), 0.0, -1.5,
    1e30, np.nan, np.inf, 1e-30, "", "text\nand more", "x" * 5000, [], ["a"], ["a b", "b a"],
    ["a"] * 320, np.ones(4, bool), np.zeros(4, np.int32), np.full(4, np.nan, np.float32),
    np.array([-1, 2**40, 0, 1]), np.ones(320, np.int32), np.full(320, 9, np.uint8),
]  # fmt: skip


def test_strange_metadata(tmp_path: Path, rng: Rng) -> None:
    """Every key of a file with another value, sometimes two keys at once."""
    path = tmp_path / "m"
    keys = list(GGUFFile(write_model(path, "tiny", "Q8_0")).metadata)
    keys += [f"qwen35.{key}" for key in ("nextn_predict_layers", "rope.scaling.type")]
    keys += [f"general.{key}" for key in ("sampling.temp", "sampling.top_k")]
    keys += ["split.count", "split.no", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.scores"]
    n_loaded = 0
    for key in keys * 6:
        changed = {key, rng.choice(keys)} if rng.integers(2) else {key}
        overrides = {k: STRANGE_VALUES[rng.integers(len(STRANGE_VALUES))] for k in changed}
        write_model(path, "tiny", "Q8_0", overrides=overrides)
        n_loaded += loads(path)
    assert 0 < n_loaded < 200


# What a file may be named, or hold, that a message quotes.
LONG = {"letters": "x" * 10**6, "escapes": "\x1b[31m\n" * 200_000}
QUOTED = [
    "architecture", "type", "tokenizer", "pre-tokenizer", "token twice", "merge", "eos token",
    "byte token", "scaling", "number", "size", "template's error", "template's tag", "key",
    "templates", "tensor",
]  # fmt: skip


def changes(what: str, text: str, tokens: list[str]) -> dict[str, Any]:
    """Metadata that makes a message quote `text`."""
    ggml, n = "tokenizer.ggml.", len(tokens)
    token = [*tokens[:11], text, *tokens[12:]]
    byte = {"model": "llama", "token_type": np.full(n, 6, np.int32), "scores": np.ones(n, "f4")}
    values: dict[str, dict[str, Any]] = {
        "architecture": {"general.architecture": text},
        "type": {"general.type": text},
        "tokenizer": {f"{ggml}model": text},
        "pre-tokenizer": {f"{ggml}pre": text},
        "token twice": {f"{ggml}tokens": [*token[:-1], text]},
        "merge": {f"{ggml}merges": [text]},
        "eos token": {f"{ggml}tokens": token, f"{ggml}eos_token_id": None, f"{ggml}merges": []},
        "byte token": {f"{ggml}tokens": [text, *tokens[1:]]}
        | {ggml + key: value for key, value in byte.items()},
        "scaling": {"qwen35.rope.scaling.type": text},
        "number": {"qwen35.embedding_length": text},
        "size": {"general.size_label": text},
        "template's error": {"tokenizer.chat_template": "{{ raise_exception(%r) }}" % text},  # noqa: UP031
        "template's tag": {"tokenizer.chat_template": "{% " + text},
        "key": {text: 1},
        "templates": {f"tokenizer.chat_template.{i:0200}": "x" for i in range(999)},
        "tensor": {},
    }
    return values[what]


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("what", QUOTED)
def test_what_is_said_of_a_file_is_short(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    what: str,
    text: str,
) -> None:
    tokens = list(GGUFFile(tiny).metadata["tokenizer.ggml.tokens"])
    arrays = {text: np.zeros(3)} if what == "tensor" else None
    path = tmp_path / "m"
    write_model(path, "tiny", "Q8_0", overrides=changes(what, text, tokens), arrays=arrays)
    chosen = ["--chat-template", "none"] * (what == "templates")
    status = main(["-m", str(path), "-cnv", "-st", "-p", "a", "-n", "1", *chosen])
    said = "\n".join([*caplog.messages, capsys.readouterr().err])
    assert status == (0 if what in ("eos token", "size") else 1)
    assert len(said) < 1000
    for line in said.splitlines():
        assert line.isprintable()
    quoted = "0" * 64 if what == "templates" else "xxx" if text.startswith("x") else "31m"
    assert quoted in said or "unexpected char '\\x1b'" in said
