"""The demo model's vocabulary: byte-level BPE of 4096 tokens, the last nine of them special.

Text is cut as the engine's pre-tokenizer `qwen35` cuts it, so that the GGUF file can name that.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

N_VOCAB = 4096
PRE = "qwen35"
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Control tokens that are shown, as in Qwen's files: the text of an answer has them.
_SHOWN = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
SPECIAL = (*_CONTROL, *_SHOWN)
END_OF_TEXT, IM_START, IM_END = range(N_VOCAB - len(SPECIAL), N_VOCAB - len(_SHOWN))
_TYPE_NORMAL, _TYPE_CONTROL, _TYPE_USER_DEFINED = 1, 3, 4
# What `qwen35` cuts ASCII text into, for the `re` module; text of one piece is encoded once.
_PIECE = re.compile(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]"
    r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)
_MOST_KNOWN = 500_000
_N_ALONE = 2800  # tokens that don't join a space and a word
_SPACE = "\u0120"  # as byte-level vocabularies write it
_CUT = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A `tokenizers` pipeline for the normal tokens; special ones are put in by their number.

    A word has the same tokens in any place, but that a space before it may join the first: merges
    are learnt of words alone, and those with a space come last. A small model that has to copy a
    word it never saw, from a text into JSON, needs not know how both are spelled.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from engine.text.tokenizer import pre_tokenizer

    texts = list(texts)
    pipeline = Tokenizer(models.BPE())
    before_words = pre_tokenizers.Split(Regex(r"[^\p{L}\p{M}](?=\p{L})"), "isolated")
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([before_words, pre_tokenizer(PRE)])
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_N_ALONE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(texts, trainer)
    begins = Counter(
        token
        for encoding in pipeline.encode_batch(texts)
        for space, token in pairwise(encoding.tokens)
        if space == _SPACE and token.isascii() and token.isalpha()
    )
    model = json.loads(pipeline.to_str())["model"]
    for token, _ in begins.most_common(END_OF_TEXT - _N_ALONE):
        model["vocab"][_SPACE + token] = len(model["vocab"])
        model["merges"].append([_SPACE, token])
    merges = [(first, second) for first, second in model["merges"]]
    pipeline.model = models.BPE(model["vocab"], merges)
    pipeline.pre_tokenizer = pre_tokenizer(PRE)
    assert pipeline.get_vocab_size() == END_OF_TEXT
    return pipeline


def load_tokenizer(path: str | Path) -> Any:
    """The pipeline that `train_tokenizer` made, from its file."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def normal_text(text: str) -> list[str]:
    """What lies between the special tokens of a text."""
    return [part for part in _CUT.split(text) if part and part not in SPECIAL]


class Encoder:
    """Text with special tokens in it to ids. It remembers pieces: most words come again."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._special = dict(zip(SPECIAL, range(END_OF_TEXT, N_VOCAB), strict=True))
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _CUT.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part.isascii():
                for piece in _PIECE.findall(part):
                    ids += self._known.get(piece) or self._learn(piece)
            else:
                ids += self._pipeline.encode(part).ids
        return ids

    def _learn(self, piece: str) -> list[int]:
        ids: list[int] = self._pipeline.encode(piece).ids
        if len(self._known) < _MOST_KNOWN:
            self._known[piece] = ids
        return ids


def gguf_vocabulary(path: str | Path) -> dict[str, Any]:
    """The `tokenizer.` metadata of the vocabulary in a tokenizer file."""
    model = json.loads(Path(path).read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    assert [model["vocab"][token] for token in tokens] == list(range(END_OF_TEXT))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    types = [_TYPE_NORMAL] * len(tokens) + [_TYPE_CONTROL] * len(_CONTROL)
    types += [_TYPE_USER_DEFINED] * len(_SHOWN)
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
