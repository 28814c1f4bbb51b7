"""The vocabulary of a GGUF file: token texts, types, scores, special ids and the bytes of a token.

`read_vocab` checks everything; ids, types and lengths are trusted afterwards. As in llama.cpp,
tokens whose text ends a turn or marks fill-in-the-middle are control tokens whatever their type.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.formats.gguf import GGUFFile, Strings, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # SentencePiece's character for a space
MODELS = ("gpt2", "llama")

_log = logging.getLogger(__name__)
_KEY = "tokenizer.ggml."
_BYTE_TEXT = re.compile("<0x[0-9A-F]{2}>")
# BOS and EOS of files without these ids.
_DEFAULT_BOS_EOS = {"gpt2": (11, 11), "llama": (1, 2)}
_ENDS_GENERATION = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[", "<|role_end|>",
)  # fmt: skip
# Of several names that exist, the first one is the token. fim_pad, fim_rep and fim_sep also end
# generation.
_FILL_IN_THE_MIDDLE = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>",
                "▁<PRE>", "<|code_prefix|>", "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>",
                "▁<SUF>", "<|code_suffix|>", "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>",
                "▁<MID>", "<|code_middle|>", "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip


class TokenizerError(EngineError):
    """A file's tokenizer, a text or a token id that can't be used."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: the byte itself if printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


@dataclass(frozen=True)
class Vocab:
    """`tokens`, `types` and `scores` by id; `ids` by text. `model` is one of MODELS."""

    model: str
    tokens: list[str]
    ids: dict[str, int]
    types: list[int]
    scores: NDArray[np.float32] | None  # only llama has any
    bos_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]

    def specials(self) -> list[tuple[str, int]]:
        """Text and id of the special tokens, longest first."""
        cut = {USER_DEFINED, CONTROL, UNKNOWN}
        found = [(self.tokens[i], i) for i, kind in enumerate(self.types) if kind in cut]
        return sorted(found, key=lambda special: -len(special[0].encode()))

    def piece(self, token_id: int, special: bool) -> bytes:
        """The bytes of a token; of control and unknown tokens only with `special`."""
        text, kind = self.tokens[token_id], self.types[token_id]
        if kind == UNUSED or (kind in (CONTROL, UNKNOWN) and not special):
            return b""
        if kind == BYTE:
            return bytes.fromhex(text[3:5])
        if kind == NORMAL and self.model == "llama":
            text = text.replace(SPACE, " ")
        elif kind == NORMAL:
            try:
                return bytes(map(BYTE_OF.__getitem__, text))
            except KeyError:  # Not in the byte alphabet: the text is the token.
                pass
        return text.encode()


def read_vocab(file: GGUFFile) -> Vocab:
    """The vocabulary of `file`; TokenizerError or GGUFError where it is missing or inconsistent."""
    model = file.string(_KEY + "model")
    if model not in MODELS:
        raise TokenizerError(
            f"{file.path}: unknown tokenizer model {shown(model)}; known are {', '.join(MODELS)}"
        )
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(strings(file, "tokens"))]
    if not tokens:
        raise metadata_error(file, "tokens is empty")
    ids = {text: i for i, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise _doubled(file, tokens)
    scores = _scores(file, len(tokens)) if model == "llama" else None
    kinds = _types(file, tokens, required=model == "llama")
    fim = _fill_in_the_middle(file, ids)
    named = {ids[text] for text in _ENDS_GENERATION if text in ids}
    kinds[[*named, *(i for key, i in fim.items() if not _has_id(file, key))]] = CONTROL
    bos_id, eos_id = _bos_eos(file, model, tokens)
    eot_id, eom_id = (_special_id(file, name, len(ids)) for name in ("eot", "eom"))
    ends = {eos_id, eot_id, eom_id, *map(fim.get, ("fim_pad", "fim_rep", "fim_sep"))}
    eog_ids = frozenset(named | {i for i in ends if i is not None})
    return Vocab(model, tokens, ids, kinds.tolist(), scores, bos_id, eos_id, eog_ids)


def metadata_error(file: GGUFFile, message: str) -> TokenizerError:
    """An error of the tokenizer's metadata; `message` begins with the key."""
    return TokenizerError(f"{file.path}: metadata {_KEY}{message}")


def _required(file: GGUFFile, key: str) -> Any:
    value = file.metadata.get(_KEY + key)
    if value is None:
        raise metadata_error(file, f"{key} is missing")
    return value


def strings(file: GGUFFile, key: str) -> list[str]:
    value = _required(file, key)
    if not isinstance(value, Strings):
        raise metadata_error(file, f"{key}: expected an array of strings, got {shown(value)}")
    texts: list[Any] = list(value)
    if bytes in map(type, texts):
        i, text = next((i, text) for i, text in enumerate(texts) if isinstance(text, bytes))
        raise metadata_error(file, f"{key}: {i}: expected UTF-8, got {shown(text)}")
    return texts


def _doubled(file: GGUFFile, tokens: list[str]) -> TokenizerError:
    first: dict[str, int] = {}
    i = next(i for i, text in enumerate(tokens) if first.setdefault(text, i) != i)
    return metadata_error(
        file, f"tokens: {shown(tokens[i])} appears twice, as {first[tokens[i]]} and {i}"
    )


def _numbers(file: GGUFFile, key: str, kinds: str, n_tokens: int) -> NDArray[np.generic]:
    """A required array of numbers, one for each token, whose numpy kind is among `kinds`."""
    value = _required(file, key)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
        raise metadata_error(file, f"{key}: expected an array of numbers")
    if len(value) != n_tokens:
        expected = f"expected {n_tokens} entries, one for each token"
        raise metadata_error(file, f"{key}: {expected}, got {len(value)}")
    return value


def _scores(file: GGUFFile, n_tokens: int) -> NDArray[np.float32]:
    scores = _numbers(file, "scores", "fiu", n_tokens).astype(np.float32)
    for i in np.flatnonzero(~np.isfinite(scores)):
        expected = f"expected a finite number for token {i}"
        raise metadata_error(file, f"scores: {expected}, got {scores[i]}")
    return scores


def _types(file: GGUFFile, tokens: list[str], required: bool) -> NDArray[np.int64]:
    if not required and _KEY + "token_type" not in file.metadata:
        return np.full(len(tokens), NORMAL, np.int64)
    kinds = _numbers(file, "token_type", "iu", len(tokens)).astype(np.int64)
    for i in np.flatnonzero((kinds < NORMAL) | (kinds > BYTE)):
        expected = f"expected {NORMAL} to {BYTE} for token {i}"
        raise metadata_error(file, f"token_type: {expected}, got {kinds[i]}")
    for i in np.flatnonzero(kinds == BYTE):
        if not _BYTE_TEXT.fullmatch(tokens[i]):
            expected = f"byte token {i}: expected a text like <0x0A>"
            raise metadata_error(file, f"tokens: {expected}, got {shown(tokens[i])}")
    return kinds


def _has_id(file: GGUFFile, name: str) -> bool:
    return f"{_KEY}{name}_token_id" in file.metadata


def _special_id(file: GGUFFile, name: str, n_tokens: int) -> int | None:
    if not _has_id(file, name):
        return None
    value = file.integer(f"{_KEY}{name}_token_id")
    if not 0 <= value < n_tokens:
        expected = f"expected an id below {n_tokens}"
        raise metadata_error(file, f"{name}_token_id: {expected}, got {value}")
    return value


def _bos_eos(file: GGUFFile, model: str, tokens: list[str]) -> tuple[int | None, int | None]:
    bos_id, eos_id = (_special_id(file, name, len(tokens)) for name in ("bos", "eos"))
    bos, eos = (i if i < len(tokens) else None for i in _DEFAULT_BOS_EOS[model])
    if eos_id is None and eos is not None:
        _log.warning(
            "%s: metadata %seos_token_id is missing: token %d, %s, ends the text",
            file.path, _KEY, eos, shown(tokens[eos]),
        )  # fmt: skip
    return bos if bos_id is None else bos_id, eos if eos_id is None else eos_id


def _fill_in_the_middle(file: GGUFFile, ids: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for name, texts in _FILL_IN_THE_MIDDLE.items():
        token_id = _special_id(file, name, len(ids))
        if token_id is None:
            token_id = next((ids[text] for text in texts if text in ids), None)
        if token_id is not None:
            found[name] = token_id
    return found
