"""Models in Ollama's local store, by the name that `ollama list` shows.

A manifest, `manifests/HOST/NAMESPACE/MODEL/TAG`, lists layers by digest; a layer's file is
`blobs/sha256-…`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from engine.errors import EngineError

PREFIX = "ollama:"
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_MODEL = "application/vnd.ollama.image.model"


class OllamaError(EngineError):
    """A name that is not in Ollama's store."""


def stores() -> Iterator[Path]:
    """The folders where models may be: Ollama's own variable, the user's, and the service's."""
    if given := os.environ.get("OLLAMA_MODELS"):
        yield Path(given)
    yield Path.home() / ".ollama" / "models"
    yield Path("/usr/share/ollama/.ollama/models")


def find(name: str) -> Path:
    """The GGUF file of `[HOST/][NAMESPACE/]MODEL[:TAG]`. Raises OllamaError."""
    model, _, tag = name.partition(":")
    parts = [part for part in model.split("/") if part]
    parts = [*(_HOST, _NAMESPACE)[: max(0, 3 - len(parts))], *parts, tag or _TAG]
    if len(parts) != 4 or any(part in (".", "..") or "/" in part for part in parts):
        raise OllamaError(f"{PREFIX}{name}: expected NAME or NAME:TAG, as `ollama list` shows it")
    for store in stores():
        manifest = store.joinpath("manifests", *parts)
        if manifest.is_file():
            return _blob(store, manifest, name)
    looked = ", ".join(map(str, stores()))
    raise OllamaError(f"{PREFIX}{name}: expected a model in Ollama's store ({looked}), got none")


def _blob(store: Path, manifest: Path, name: str) -> Path:
    try:
        layers = json.loads(manifest.read_bytes())["layers"]
        (digest,) = (str(x["digest"]) for x in layers if x["mediaType"] == _MODEL)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        expected = f"expected a manifest with one model in {manifest}"
        raise OllamaError(f"{PREFIX}{name}: {expected}") from None
    blob = store / "blobs" / digest.replace(":", "-")
    if blob.parent != store / "blobs":
        raise OllamaError(f"{PREFIX}{name}: expected a digest in {manifest}")
    return blob
