"""Ollama's files: the same models in other words, found by name in its store.

Each test writes a model as llama.cpp's converter does, and once more as Ollama has it; logits are
equal to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineError
from engine.formats.gguf import GGUFFile
from engine.formats.quants import F32
from engine.models import load_model
from tests.models.test_packings import Stored, read_tensors, write_tensors
from tests.support.helpers import assert_same, float64_engine, random_ids

Models = Callable[[str, str], Path]
DIGEST = "sha256:" + "ab" * 32


def as_ollama(source: Path, path: Path, **changes: Any) -> Path:
    """The model of a file in Ollama's form; changes: metadata without the prefix, None: missing."""
    file, tensors = GGUFFile(source), read_tensors(source)
    model, arch = load_model(file), file.string("general.architecture")
    metadata = dict(file.metadata)
    linear: list[bool] = model.linear  # type: ignore[attr-defined]
    n_heads, n_kv = (metadata[f"{arch}.attention.{k}"] for k in ("head_count", "head_count_kv"))
    metadata[f"{arch}.attention.head_count"] = np.where(linear, 0, n_heads).astype(np.uint32)
    metadata[f"{arch}.attention.head_count_kv"] = np.where(linear, 0, n_kv).astype(np.uint32)
    metadata.pop(f"{arch}.attention.recurrent_layers", None)
    # What llama.cpp takes where it finds neither would be wrong.
    metadata[f"{arch}.full_attention_interval"] = np.uint32(1)
    if (sections := metadata.get(f"{arch}.rope.dimension_sections")) is not None:
        assert sections[3] == 0
        metadata[f"{arch}.rope.dimension_sections"] = sections[:3]
        metadata[f"{arch}.ssm.v_head_reordered"] = True
    for key, value in changes.items():
        metadata[f"{arch}.{key.replace('__', '.')}"] = value
    metadata = {key: value for key, value in metadata.items() if value is not None}
    for i, is_linear in enumerate(linear):
        if is_linear:
            tensors[f"blk.{i}.ssm_dt"] = tensors.pop(f"blk.{i}.ssm_dt.bias")
    for name in ("v.patch_embd.weight", "mm.0.weight", "mtp.fc.weight"):
        tensors[name] = Stored(F32, 8, np.zeros((4, 32), np.uint8))
    return write_tensors(path, metadata, tensors)


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe", "tiny-next"])
def test_the_same_logits(
    models: Models, tmp_path: Path, preset: str, rng: np.random.Generator,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    source = models(preset, "F32")
    path = as_ollama(source, tmp_path / "blob")
    ids = random_ids(rng, 70)
    with float64_engine(source) as ours, float64_engine(path) as theirs:
        assert_same(theirs.logits(ids), ours.logits(ids))
    said = [m for m in caplog.messages if "are skipped" in m]
    assert said == [f"{path}: 3 tensors for images and for drafts are skipped"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # Some imports of Qwen3-Next have no sections, and heads in another order.
        (
            {"rope__dimension_sections": None},
            "rope.dimension_sections: expected 4 integers, got no",
        ),
        ({"rope__dimension_sections": np.array([11, 11], np.int32)}, "got an array of 2 int32"),
        ({"ssm__v_head_reordered": False}, "ssm.v_head_reordered: expected true, got False"),
        ({"attention__head_count": np.zeros(8, np.uint32)}, "head_count: expected "),
    ],
)
def test_other_forms_are_refused(
    models: Models, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = as_ollama(models("tiny", "F32"), tmp_path / "blob", **changes)
    with pytest.raises(EngineError, match=said):
        Engine.load(path)


def test_a_model_without_attention_needs_no_heads(models: Models, tmp_path: Path) -> None:
    """All layers are linear: no layer says how long a head is."""
    changes: dict[str, Any] = dict.fromkeys(("attention__key_length", "attention__value_length"))
    for key in ("attention__head_count", "attention__head_count_kv"):
        changes[key] = np.zeros(4, np.uint32)
    path = as_ollama(models("tiny", "F32"), tmp_path / "blob", **changes)
    # The model in the file has attention in its last layer.
    with pytest.raises(EngineError, match=r"missing tensors: blk\.3\.attn_qkv\.weight"):
        Engine.load(path)


@pytest.fixture
def store(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with one model, under several names."""
    root = tmp_path / "store"
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / DIGEST.replace(":", "-")).symlink_to(models("tiny", "F32"))
    layers = [{"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:00"},
              {"mediaType": "application/vnd.ollama.image.model", "digest": DIGEST}]  # fmt: skip
    names = ("library/qwen3.5/latest", "library/qwen3.5/4b", "me/own/latest")
    for name in (*(f"registry.ollama.ai/{n}" for n in names), "hf.co/me/repo-GGUF/Q4_K_M"):
        (root / "manifests" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "manifests" / name).write_text(json.dumps({"layers": layers}))
    monkeypatch.setenv("OLLAMA_MODELS", str(root))
    return root


@pytest.mark.parametrize(
    "name", ["qwen3.5", "qwen3.5:4b", "me/own", "me/own:latest", "hf.co/me/repo-GGUF:Q4_K_M"]
)
def test_a_model_is_found_by_name(store: Path, name: str) -> None:
    assert GGUFFile(f"ollama:{name}").path == store / "blobs" / DIGEST.replace(":", "-")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3.5:9b", "expected a model in Ollama's store ("),
        ("", "expected NAME or NAME:TAG"),
        ("a/b/c/d", "expected NAME or NAME:TAG"),
        ("../x", "expected NAME or NAME:TAG"),
        ("x:..", "expected NAME or NAME:TAG"),
        ("x:../y", "expected NAME or NAME:TAG"),
        ("broken", "expected a manifest with one model in "),
        ("two", "expected a manifest with one model in "),
        ("outside", "expected a digest in "),
        ("gone", "No such file or directory"),
    ],
)
def test_names_that_are_not_there(store: Path, name: str, said: str) -> None:
    library = store / "manifests" / "registry.ollama.ai" / "library"
    model = {"mediaType": "application/vnd.ollama.image.model", "digest": DIGEST}
    for own, content in (
        ("broken", "{"), ("two", json.dumps({"layers": [model, model]})),
        ("outside", json.dumps({"layers": [model | {"digest": "../../secret"}]})),
        ("gone", json.dumps({"layers": [model | {"digest": "sha256:cd"}]})),
    ):  # fmt: skip
        (library / own).mkdir()
        (library / own / "latest").write_text(content)
    with pytest.raises(EngineError, match=said.replace("(", "\\(")):
        GGUFFile(f"ollama:{name}")
