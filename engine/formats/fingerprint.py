"""A hash that tells a model from others: of all that its results depend on."""

from __future__ import annotations

import hashlib

from engine.formats.gguf import GGUFFile

_SAMPLE = 64 << 10  # Bytes of a tensor that are hashed, in pieces from its beginning to its end.
_N_PIECES = 4


def fingerprint(file: GGUFFile) -> str:
    """The hash of the architecture's metadata, the table of tensors, and 64 KiB of each tensor."""
    digest = hashlib.sha256()
    architecture = file.string("general.architecture", "")
    for key in sorted(file.metadata):
        if key.startswith(f"{architecture}."):
            digest.update(f"{key}={file.metadata[key]!r};".encode())
    for name, info in sorted(file.tensors.items()):
        digest.update(f"{name}:{info.dtype.name}:{info.shape}:{info.nbytes};".encode())
        n = min(info.nbytes, _SAMPLE // _N_PIECES)
        for i in range(_N_PIECES):
            begin = (info.nbytes - n) * i // (_N_PIECES - 1)
            digest.update(file.raw(name, begin, begin + n).data)
    return digest.hexdigest()
