"""The demo model's vocabulary: byte-level BPE of 4096 tokens, the last three of them special.

Text is cut as the engine's pre-tokenizer `qwen35` cuts it, so that the GGUF file can name that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

N_VOCAB = 4096
PRE = "qwen35"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = range(N_VOCAB - len(SPECIAL), N_VOCAB)
_NORMAL, _CONTROL = 1, 3


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A `tokenizers` pipeline for the normal tokens; special ones are put in by their number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from engine.text.tokenizer import pre_tokenizer

    pipeline = Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizer(PRE)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=END_OF_TEXT,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(texts, trainer)
    assert pipeline.get_vocab_size() == END_OF_TEXT
    return pipeline


def load_tokenizer(path: str | Path) -> Any:
    """The pipeline that `train_tokenizer` made, from its file."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def cut_specials(text: str) -> list[str | int]:
    """The text in parts, and between them the numbers of the special tokens in it."""
    parts: list[str | int] = [text]
    for number, special in enumerate(SPECIAL, END_OF_TEXT):
        cut: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                cut.append(part)
                continue
            for i, piece in enumerate(part.split(special)):
                cut += [number] * (i > 0) + [piece] * bool(piece)
        parts = cut
    return parts


def encode(pipeline: Any, text: str) -> list[int]:
    """The ids of a text with special tokens in it."""
    ids: list[int] = []
    for part in cut_specials(text):
        ids += [part] if isinstance(part, int) else pipeline.encode(part).ids
    return ids


def gguf_vocabulary(path: str | Path) -> dict[str, Any]:
    """The `tokenizer.` metadata of the vocabulary in a tokenizer file."""
    model = json.loads(Path(path).read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    assert [model["vocab"][token] for token in tokens] == list(range(END_OF_TEXT))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    types = [_NORMAL] * len(tokens) + [_CONTROL] * len(SPECIAL)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE,
        "tokenizer.ggml.tokens": [*tokens, *SPECIAL],
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": END_OF_TEXT,
        "tokenizer.ggml.eos_token_id": IM_END,
        "tokenizer.ggml.padding_token_id": END_OF_TEXT,
        "tokenizer.ggml.add_bos_token": False,
    }
