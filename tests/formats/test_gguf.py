"""The GGUF reader: agreement with the gguf package on good files, one-line refusals of bad ones.

Good files are written by one implementation and read by the other. Bad ones are a small valid
file with bytes cut off or changed: whatever comes, only GGUFError may leave the reader.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.formats.gguf import GGUFError, GGUFFile
from engine.formats.quants import BY_GGML_ID, WEIGHT_TYPES, dequantize
from tests.support.decoding import decode
from tools.ggufwrite import TensorSpec, f32_tensor, write_gguf, write_split

VOCAB = Path(__file__).resolve().parents[3] / "shared" / "data" / "vocab"
VOCAB /= "ggml-vocab-qwen35.gguf"
SCALARS = {
    "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1,
    "int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 1e300,
    "bool": True,
}  # fmt: skip
F32 = 0


def every_metadata_type() -> dict[str, Any]:
    """One key per value type of the format, as a scalar and as an array."""
    values: dict[str, Any] = {"text": "naïve 日本", "empty": "", "texts": ["a", "", "ü"]}
    for kind, value in SCALARS.items():
        values[f"one.{kind}"] = np.dtype(kind).type(value)
        values[f"many.{kind}"] = np.array([value, 0, 1], kind)
        values[f"none.{kind}"] = np.array([], kind)
    return values


def tensor(name: str, shape: tuple[int, ...], kind: str, seed: int = 0) -> TensorSpec:
    """A tensor of random bytes."""
    dtype = WEIGHT_TYPES[kind]
    nbytes = int(np.prod(shape[:-1])) * dtype.row_bytes(shape[-1])
    data = np.random.default_rng(seed).bytes(nbytes)
    return TensorSpec(name, shape, dtype.ggml_id, nbytes, lambda: [data])


def some_tensors() -> list[TensorSpec]:
    """Tensors of one to four dimensions, none of whose sizes is a multiple of the alignment."""
    return [
        f32_tensor("a", np.arange(3, dtype=np.float32)),
        tensor("b", (5, 32), "Q4_0"),
        tensor("c", (2, 3, 256), "Q6_K"),
        tensor("d", (2, 1, 3, 5), "F16"),
        tensor("e", (7, 3), "BF16"),
    ]


def small_file(path: Path, metadata: dict[str, Any] | None = None) -> bytes:
    """A valid file of a few hundred bytes; returns its contents."""
    default = {"general.name": "n", "list": ["p", "q"], "numbers": np.arange(3, dtype=np.int16)}
    specs = [f32_tensor("blk.0.x", np.ones((2, 8), np.float32)), tensor("y", (1, 32), "Q8_0")]
    write_gguf(path, default if metadata is None else metadata, specs)
    return path.read_bytes()


def kv(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def entry(
    name: bytes = b"t", dims: tuple[int, ...] = (4,), kind: int = F32, offset: int = 0
) -> bytes:
    """A row of the tensor table."""
    packed = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return struct.pack("<Q", len(name)) + name + packed


def raw_file(
    *entries: bytes, kvs: tuple[bytes, ...] = (), n_tensors: int | None = None,
    n_kv: int | None = None, version: int = 3, data: int = 4096,
) -> bytes:  # fmt: skip
    """A file put together by hand, with `data` bytes behind the table."""
    n_tensors = len(entries) if n_tensors is None else n_tensors
    n_kv = len(kvs) if n_kv is None else n_kv
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv) + b"".join(kvs + entries)
    return head + bytes(-len(head) % 32 + data)


def refused(path: Path, contents: bytes | None = None) -> str:
    """The message with which the file is refused: one line that names the file."""
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400
    return message


def test_metadata_of_every_type_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path, values = tmp_path / "m.gguf", every_metadata_type()
    write_gguf(path, values | {"int": 7, "negative": -7, "float": 0.25, "yes": True}, [])
    ours, theirs = GGUFFile(path).metadata, gguf.GGUFReader(path).fields
    assert [*ours] == [key for key in theirs if not key.startswith("GGUF.")]
    for key, value in values.items():
        assert theirs[key].contents() == (value.tolist() if hasattr(value, "tolist") else value)
        if isinstance(value, np.ndarray):
            assert ours[key].dtype == value.dtype
            np.testing.assert_array_equal(ours[key], value)
        elif isinstance(value, list):
            assert (list(ours[key]), len(ours[key])) == (value, len(value))
        else:
            assert ours[key] == value
            assert type(ours[key]) in (bool, int, float, str)
    assert (ours["int"], ours["negative"], ours["float"], ours["yes"]) == (7, -7, 0.25, True)


@pytest.mark.parametrize("alignment", [32, 1, 64, 4096])
def test_tensors_are_what_the_gguf_package_reads(tmp_path: Path, alignment: int) -> None:
    path, specs = tmp_path / "m.gguf", some_tensors()
    write_gguf(path, {"general.alignment": alignment}, specs)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert [*ours.tensors] == [t.name for t in theirs.tensors] == [s.name for s in specs]
    for spec, their in zip(specs, theirs.tensors, strict=True):
        info = ours.tensors[spec.name]
        assert info.shape == spec.shape == tuple(their.shape.tolist()[::-1])
        assert info.dtype.ggml_id == int(their.tensor_type)
        assert (info.offset, info.nbytes) == (their.data_offset, their.n_bytes)
        assert ours.raw(spec.name).tobytes() == their.data.tobytes() == b"".join(spec.data())
        assert ours.raw(spec.name, 1, 9).tobytes() == b"".join(spec.data())[1:9]


def test_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen35")
    writer.add_block_count(4)
    writer.add_layer_norm_rms_eps(0.5)
    writer.add_token_list(["a", "ß"])
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_array("flags", [True, False])
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    q = gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("x", x)
    writer.add_tensor("q", q, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    assert file.string("general.architecture") == "qwen35"
    assert file.integer("qwen35.block_count") == 4
    assert file.number("qwen35.attention.layer_norm_rms_epsilon") == 0.5
    assert list(file.metadata["tokenizer.ggml.tokens"]) == ["a", "ß"]
    assert file.metadata["qwen35.rope.dimension_sections"].tolist() == [11, 11, 10, 0]
    assert file.metadata["flags"].tolist() == [True, False]
    assert (file.raw("x").view(np.float32).reshape(3, 4) == x).all()
    assert file.tensors["q"].shape == (2, 64)
    assert file.raw("q").tobytes() == q.tobytes()


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_file(entry(), version=2))
    assert GGUFFile(path).tensors["t"].shape == (4,)


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_types_are_those_of_the_gguf_package(kind: str) -> None:
    dtype = WEIGHT_TYPES[kind]
    if kind not in ("Q1_0", "Q2_0"):  # It does not have them yet.
        theirs = gguf.GGMLQuantizationType[kind]
        assert dtype.ggml_id == theirs
        assert (dtype.block_elems, dtype.block_bytes) == gguf.GGML_QUANT_SIZES[theirs]
    assert BY_GGML_ID[dtype.ggml_id] is dtype
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, dtype.row_bytes(512)), np.uint8)
    with np.errstate(all="ignore"):  # random scales may be NaN or infinite
        ours = dequantize(dtype, raw.reshape(-1), (2, 3, 512))
        expected = decode(kind, raw)
    assert (ours.dtype, ours.shape) == (np.dtype(np.float32), (2, 3, 512))
    np.testing.assert_array_equal(ours, expected)


def test_typed_getters_check_the_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    scalars = {"i": 3, "f": 1.5, "nan": np.float32("nan"), "s": "x\n" * 1000, "b": True}
    write_gguf(path, scalars | {"l": ["x"] * 9, "a": np.zeros(2000)}, [])
    file = GGUFFile(path)
    assert (file.integer("i"), file.number("i"), file.number("f")) == (3, 3.0, 1.5)
    assert (file.string("s"), file.boolean("b")) == (scalars["s"], True)
    assert (file.integer("none", 5), file.number("none", 5)) == (5, 5.0)
    assert (file.string("none", "d"), file.boolean("none", False)) == ("d", False)
    for get, good in (
        (file.integer, "i"), (file.number, "i f"), (file.string, "s"), (file.boolean, "b"),
    ):  # fmt: skip
        for key in file.metadata.keys() - set(good.split()):
            with pytest.raises(GGUFError, match=f"{path}: metadata {key}: expected .*, got") as e:
                get(key)
            assert str(e.value).isprintable()
            assert len(str(e.value)) < len(str(path)) + 130
        with pytest.raises(GGUFError, match=f"{path}: metadata none is missing"):
            get("none")


def test_split_files_are_joined(tmp_path: Path) -> None:
    specs, values = some_tensors(), every_metadata_type()
    for n in (1, 2, 3, len(specs)):
        paths = write_split(tmp_path / "m.gguf", values, specs, n)
        file = GGUFFile(paths[0])
        assert [*file.tensors] == [s.name for s in specs]
        assert file.metadata["text"] == values["text"]
        assert {t.file_index for t in file.tensors.values()} == set(range(n))
        assert all(file.raw(s.name).tobytes() == b"".join(s.data()) for s in specs)
        assert file.size == sum(path.stat().st_size for path in paths)


def broken_split(tmp_path: Path, change: Callable[[list[Path]], object]) -> str:
    paths = write_split(tmp_path / "m.gguf", {}, some_tensors(), 3)
    change(paths)
    with pytest.raises(GGUFError) as caught:
        GGUFFile(paths[0])
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_broken_splits_are_refused(tmp_path: Path) -> None:
    missing = broken_split(tmp_path, lambda paths: paths[2].unlink())
    assert missing == f"{tmp_path}/m-00003-of-00003.gguf: No such file or directory"
    swapped = broken_split(tmp_path, lambda paths: paths[2].replace(paths[1]))
    assert "expected split.no = 1, got 2" in swapped
    doubled = broken_split(
        tmp_path, lambda p: write_gguf(p[1], {"split.no": 1, "split.count": 3}, some_tensors())
    )
    assert "tensor a is in another split file too" in doubled
    unrelated = broken_split(tmp_path, lambda paths: write_gguf(paths[1], {}, []))
    assert "expected split.no = 1, got nothing" in unrelated
    array = broken_split(tmp_path, lambda p: write_gguf(p[1], {"split.no": np.arange(2)}, []))
    assert "expected split.no = 1, got an array of 2" in array
    fewer = broken_split(
        tmp_path, lambda p: write_gguf(p[2], {"split.no": 2, "split.count": 3}, [])
    )
    assert "expected 5 tensors in 3 split files, got" in fewer


def test_only_the_first_split_file_under_its_name_is_opened(tmp_path: Path) -> None:
    paths = write_split(tmp_path / "m.gguf", {}, some_tensors(), 3)
    assert "split file 2 of 3; open the first one" in refused(paths[1])
    renamed = paths[0].rename(tmp_path / "m.gguf")
    assert "-00001-of-00003.gguf" in refused(renamed)


def test_absurd_split_counts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-99999.gguf"
    write_gguf(path, {"split.count": 99999, "split.no": 0}, [])
    with pytest.raises(GGUFError, match=r"m-00002-of-99999\.gguf: No such file"):
        GGUFFile(path)
    write_gguf(path, {"split.count": np.uint64(2**64 - 1)}, [])
    refused(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "missing.gguf")
    assert "directory" in refused(tmp_path)
    assert "empty" in refused(tmp_path / "empty.gguf", b"")
    with pytest.raises(GGUFError, match="null byte"):
        GGUFFile("a\0b")


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_file(tmp_path / "m.gguf")
    # Root may read every file, so permissions alone would not do.
    error = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("os.open", Mock(side_effect=error))
    assert "Permission denied" in refused(tmp_path / "m.gguf")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = small_file(tmp_path / "whole.gguf")
    # The padding after the last tensor is not needed.
    needed = max(t.offset + t.nbytes for t in GGUFFile(tmp_path / "whole.gguf").tensors.values())
    path = tmp_path / "cut.gguf"
    for n in range(needed):
        message = refused(path, whole[:n])
        assert n == 0 or "truncated" in message or "cannot fit" in message, message
    path.write_bytes(whole[:needed])
    assert len(GGUFFile(path).tensors) == 2


HUGE = struct.pack("<Q", 2**63)
BAD_FILES = {
    "text": (b"hello, world" * 10, "not a GGUF file: expected magic b'GGUF', got b'hell'"),
    "version 1": (raw_file(version=1), "GGUF version 1; expected 2 or 3"),
    "version 4": (raw_file(version=4), "GGUF version 4; expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
    "n_tensors": (raw_file(n_tensors=2**63), "9223372036854775808 tensors cannot fit"),
    "n_kv": (raw_file(n_kv=2**63), "9223372036854775808 metadata entries cannot fit"),
    "n_tensors, a few too many": (raw_file(entry(), n_tensors=100), "t"),
    "key length": (raw_file(kvs=(HUGE + bytes(8),)), "truncated"),
    "string length": (raw_file(kvs=(kv(b"k", 8, HUGE),)), "truncated: a string of k needs"),
    "name length": (raw_file(HUGE + bytes(32)), "truncated"),
    "array length": (raw_file(kvs=(kv(b"k", 9, struct.pack("<I", 4) + HUGE),)), "truncated"),
    "array of strings": (raw_file(kvs=(kv(b"k", 9, struct.pack("<I", 8) + HUGE),)), "truncated"),
    "value type": (raw_file(kvs=(kv(b"k", 13, bytes(8)),)), "k: unknown value type 13"),
    "nested array": (
        raw_file(kvs=(kv(b"k", 9, struct.pack("<IQ", 9, 1) + bytes(12)),)),
        "k: unknown value type 9",
    ),
    "same key twice": (raw_file(kvs=(kv(b"k", 0, b"1"),) * 2), "key k appears twice"),
    "same tensor twice": (raw_file(entry(), entry()), "tensor t appears twice"),
    "key not UTF-8": (raw_file(kvs=(kv(b"\xff\xfe", 0, b"1"),)), "expected UTF-8"),
    "name not UTF-8": (raw_file(entry(b"\xc3")), "expected UTF-8"),
    "tensor type": (raw_file(entry(kind=4)), "tensor t: unknown tensor type 4; known are F32"),
    "integer tensor": (raw_file(entry(kind=26)), "tensor t: unknown tensor type 26"),
    "no dimensions": (raw_file(entry(dims=())), "t: expected 1 to 4 dimensions, got 0"),
    "five dimensions": (raw_file(entry(dims=(1,) * 5)), "t: expected 1 to 4 dimensions, got 5"),
    "zero dimension": (raw_file(entry(dims=(4, 0))), r"t: shape (0, 4) has no elements"),
    "huge dimensions": (raw_file(entry(dims=(2**62,) * 4)), "truncated: tensor t needs"),
    "wrapping size": (raw_file(entry(dims=(2**32, 2**32))), "truncated: tensor t needs"),
    "part of a block": (raw_file(entry(dims=(33,), kind=2)), "rows of 33 are no whole Q4_0"),
    "outside the file": (raw_file(entry(offset=4096)), "truncated: tensor t needs 16 bytes"),
    "huge offset": (raw_file(entry(offset=2**64 - 32)), "truncated: tensor t needs 16 bytes"),
    "unaligned": (raw_file(entry(offset=16)), "offset 16 is no multiple of 32"),
}
ALIGNMENT = b"general.alignment"
BAD_FILES |= {
    f"alignment {bad}": (
        raw_file(entry(), kvs=(kv(ALIGNMENT, kind, value),)),
        "general.alignment: expected a power of two",
    )
    for bad, kind, value in (
        ("0", 4, struct.pack("<I", 0)),
        ("24", 4, struct.pack("<I", 24)),
        ("-8", 5, struct.pack("<i", -8)),
        ("0.5", 6, struct.pack("<f", 0.5)),
        ("true", 7, b"\1"),
        ("x", 8, struct.pack("<Q", 1) + b"x"),
        ("[32]", 9, struct.pack("<IQI", 4, 1, 32)),
    )
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, what: str) -> None:
    contents, expected = BAD_FILES[what]
    start = time.process_time()
    assert expected in refused(tmp_path / "m.gguf", contents)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "a\u2028b", "long" * 1000])
def test_names_that_spoil_a_message_are_refused(tmp_path: Path, name: str) -> None:
    path, encoded = tmp_path / "m.gguf", name.encode()
    for contents in (raw_file(entry(encoded)), raw_file(kvs=(kv(encoded, 0, b"1"),))):
        message = refused(path, contents)
        longest = 63 if "tensor" in message else 256
        assert f"expected at most {longest} printable characters, got '" in message
        assert message.isprintable()


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    contents = small_file(folder / "whole.gguf", {"general.alignment": 32, "s": ["x", "y"]})
    return folder / "m.gguf", contents


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_changed_bytes_raise_nothing_else(valid: tuple[Path, bytes], data: st.DataObject) -> None:
    path, contents = valid
    changed = bytearray(contents)
    edits = st.lists(
        st.tuples(st.integers(0, len(contents) - 1), st.integers(0, 255)), min_size=1, max_size=6
    )
    for position, byte in data.draw(edits):
        changed[position] = byte
    path.write_bytes(changed)
    file = message = None
    try:
        file = GGUFFile(path)
    except GGUFError as error:
        message = str(error)
    if file is None:
        assert message is not None
        assert message.startswith(f"{path}: ")
        assert len(message.splitlines()) == 1
        return
    for name, info in file.tensors.items():
        assert file.raw(name).nbytes == info.nbytes


@pytest.mark.skipif(not VOCAB.exists(), reason=f"{VOCAB.name} is not there")
def test_real_vocabulary_is_read_quickly() -> None:
    start = time.process_time()
    file = GGUFFile(VOCAB)
    seconds = time.process_time() - start
    tokens = list(file.metadata["tokenizer.ggml.tokens"])
    assert (len(tokens), tokens[0], len(file.tensors)) == (151936, "!", 0)
    assert len(file.metadata["tokenizer.ggml.merges"]) == 151387
    assert seconds < 3


def test_a_string_that_is_not_utf8_spoils_itself_alone(tmp_path: Path) -> None:
    def packed(*texts: bytes) -> bytes:
        return b"".join(struct.pack("<Q", len(text)) + text for text in texts)

    array = struct.pack("<IQ", 8, 2) + packed(b"a", b"\xff")
    path = tmp_path / "m"
    path.write_bytes(
        raw_file(
            kvs=(kv(b"bad", 8, packed(b"\x80")), kv(b"good", 8, packed(b"x")), kv(b"l", 9, array))
        )
    )
    file = GGUFFile(path)
    assert file.string("good") == "x"
    assert list(file.metadata["l"]) == ["a", b"\xff"]
    with pytest.raises(GGUFError, match=r"metadata bad: expected a string, got b'\\x80'"):
        file.string("bad")
