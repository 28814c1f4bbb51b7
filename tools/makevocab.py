"""Vocabularies of synthetic models, as `tokenizer.` metadata: made, copied, or padded.

Used by tools/synth.py; needs only numpy, and the engine's GGUF reader to copy a vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# Merges of frequent English pairs, in order of rank; Ġ is the space in GPT-2's alphabet.
_MERGES = (
    "Ġ t,Ġ a,h e,i n,r e,o n,Ġt he,e r,Ġ s,a t,Ġ w,Ġ o,e n,Ġ c,i t,i s,a n,o r,e s,Ġ b,e d,Ġ f,"
    "in g,Ġ p,o u,Ġa n,a l,a r,Ġt o,Ġ m,Ġo f,Ġ in,Ġ d,Ġ h,Ġan d,i c,a s,l e,Ġt h,i on,o m,l l,"
    "en t,Ġ n,Ġ l,s t,Ġ re,v e,Ġ e,r o,l y,Ġb e,Ġ g,Ġt h,c t,i d,o t,Ġ I,Ġ is,u t,e t,o l"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5


class VocabError(Exception):
    """The vocabulary cannot be copied or padded, told in one line."""


def made_vocabulary() -> dict[str, Any]:
    """A small byte-level BPE vocabulary: token b is byte b, then the merges, then the specials."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    alphabet = [chr(b if b in printable else next(rest)) for b in range(256)]
    merges = list(dict.fromkeys(_MERGES.split(",")))
    words = [merge.replace(" ", "") for merge in merges]
    n_normal = len(alphabet) + len(words)
    types = [_NORMAL] * n_normal + [_CONTROL] * len(_SPECIAL)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": [*alphabet, *words, *_SPECIAL],
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": n_normal,
        "tokenizer.ggml.eos_token_id": n_normal + 2,
        "tokenizer.ggml.padding_token_id": n_normal,
        "tokenizer.ggml.add_bos_token": False,
    }


def copied_vocabulary(path: str | Path) -> dict[str, Any]:
    """All `tokenizer.` keys of another GGUF."""
    from engine.formats.gguf import GGUFError, GGUFFile, Strings

    try:
        source = GGUFFile(path).metadata
    except GGUFError as error:
        raise VocabError(str(error)) from None
    vocabulary = {k: v for k, v in source.items() if k.startswith("tokenizer.")}
    if not isinstance(vocabulary.get("tokenizer.ggml.tokens"), Strings):
        raise VocabError(f"{path}: expected a vocabulary, got no tokenizer.ggml.tokens")
    return vocabulary


def padded_vocabulary(vocabulary: dict[str, Any], size: int) -> dict[str, Any]:
    """The vocabulary with unused tokens `[PAD…]` appended up to `size`."""
    tokens = vocabulary["tokenizer.ggml.tokens"]
    if size < len(tokens):
        raise VocabError(f"--vocab-size {size}: the vocabulary has {len(tokens)} tokens already")
    n_pad = size - len(tokens)
    types = vocabulary.get("tokenizer.ggml.token_type", np.full(len(tokens), _NORMAL, np.int32))
    padded = dict(vocabulary)
    padded["tokenizer.ggml.tokens"] = [*tokens, *(f"[PAD{i}]" for i in range(len(tokens), size))]
    padded["tokenizer.ggml.token_type"] = np.append(types, np.full(n_pad, _UNUSED, types.dtype))
    if (scores := vocabulary.get("tokenizer.ggml.scores")) is not None:
        padded["tokenizer.ggml.scores"] = np.append(scores, np.zeros(n_pad, scores.dtype))
    return padded
