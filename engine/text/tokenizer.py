"""Text to token ids and back, for the tokenizers that GGUF files carry.

Byte-level BPE (`gpt2`) uses the `tokenizers` package, SentencePiece BPE (`llama`) uses
`sentencepiece`; a package is imported only where it is needed. Special tokens are cut out of the
text here, before the package sees it. The ids are llama.cpp's, except for two pre-tokenizers where
llama.cpp differs from the model's own regex (deepseek-llm at U+3000, kimi-k2).
"""

from __future__ import annotations

import codecs
import logging
import struct
from collections.abc import Container, Iterable
from typing import Any

from engine import checks
from engine.errors import NotEnoughMemoryError, has_memory
from engine.formats.gguf import GGUFError, GGUFFile, shown
from engine.text.vocab import (
    BYTE,
    BYTE_OF,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    TokenizerError,
    Vocab,
    metadata_error,
    read_vocab,
    strings,
)

__all__ = ["ESCAPE", "StreamDecoder", "Tokenizer", "TokenizerError"]

Special = bool | Container[str]
_log = logging.getLogger(__name__)
_KEY = "tokenizer.ggml."
# Put inside the spelling of a special token, it makes the spelling plain text. A lone surrogate is
# not Unicode, so no text contains it.
ESCAPE = "\udfff"

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_LINES_AND_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI = (
    r"[\p{Han}]+"
    + rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}"
    + rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    + r"|\p{N}{1,3}"
)
# Written as escapes: an editor that normalizes Unicode would change several of the characters.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-"
    "\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-"
    "\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d"
    "\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183"
    "\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-"
    "\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
# Value of `tokenizer.ggml.pre` -> its regexes; each splits the pieces that the one before left.
_PRE: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        # As \s+$, but a run of spaces that no end follows is looked at once, not from each space.
        r"(?<!\s)\s++$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}+",
    ),
    "gpt-2": (_GPT2,),
    "kimi-k2": (_KIMI + _SYMBOLS + _LINES_AND_SPACES,),
    "llama-bpe": (_CONTRACTION + _WORD + r"|\p{N}{1,3}" + _SYMBOLS + _LINES_AND_SPACES,),
    "qwen2": (_CONTRACTION + _WORD + r"|\p{N}" + _SYMBOLS + _LINES_AND_SPACES,),
    "qwen35": (
        _CONTRACTION
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        + r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        + _LINES_AND_SPACES,
    ),
}
_PRE_ALIASES = {
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), "qwen2"),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), "qwen2"),
    **dict.fromkeys(("phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"), "gpt-2"),
    **dict.fromkeys(
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"
    ),
}


# Texts from so many characters on are encoded only if there is memory for it.
_LONG = 1 << 16
# Bytes of memory that the packages were seen to take at most, for a token of a vocabulary and for a
# byte of a text (a digit: rare characters take less, though each makes several tokens).
_TOKEN_COST, _BYTE_COST = 640, 420


class Tokenizer:
    """The tokenizer of one GGUF file. `add_special` puts bos_id and eos_id around a text if
    `add_bos` and `add_eos` are set; eog_ids are the tokens that end a generation."""

    def __init__(self, file: GGUFFile) -> None:
        """As `from_gguf`, but errors of the metadata may be GGUFError."""
        self._vocab = vocab = read_vocab(file)
        self.n_vocab = len(vocab.tokens)
        _check_memory(_TOKEN_COST * self.n_vocab)
        self.bos_id, self.eos_id, self.eog_ids = vocab.bos_id, vocab.eos_id, vocab.eog_ids
        self._encoder: _ByteLevelBPE | _SentencePiece
        if vocab.model == "gpt2":
            pre = _pre_name(file)
            self._encoder = _ByteLevelBPE(file, vocab, pre)
            self._space_prefix = False
            self.add_bos = file.boolean(_KEY + "add_bos_token", pre == "llama-bpe")
        else:
            self._space_prefix = file.boolean(_KEY + "add_space_prefix", True)
            self._encoder = _SentencePiece(file, vocab, self._space_prefix)
            self.add_bos = file.boolean(_KEY + "add_bos_token", True)
        self.add_eos = file.boolean(_KEY + "add_eos_token", False)
        for name in ("bos", "eos"):
            if getattr(self, f"add_{name}") and getattr(self, f"{name}_id") is None:
                raise TokenizerError(f"{file.path}: a {name} token is to be added, but has no id")
        self._specials = vocab.specials()
        self._always_cut = [(t, i) for t, i in self._specials if vocab.types[i] == USER_DEFINED]

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer in the metadata of `file`; TokenizerError if it cannot be used."""
        checks.instance(TokenizerError, "file", file, GGUFFile)
        try:
            return cls(file)
        except GGUFError as error:
            raise TokenizerError(_one_line(error)) from None

    def encode(
        self, text: str, add_special: bool = False, parse_special: bool = False
    ) -> list[int]:
        """The ids of `text`. User-defined tokens in it are always recognized, control and unknown
        tokens only with `parse_special`. Raises TokenizerError for text with lone surrogates."""
        _check_unicode(text)
        segments = self._cut(text, self._specials if parse_special else self._always_cut)
        ids = [token_id for _, part in segments for token_id in part]
        if add_special and self.add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def escape_special_tokens(self, text: str) -> str:
        """`text` with an ESCAPE in each control or unknown token that it spells, so that `segments`
        takes the spelling as text. Raises TokenizerError for text with lone surrogates."""
        _check_unicode(text)
        for special, token_id in self._specials:
            # A single character can't be escaped: nothing fits inside it.
            if special in text and self._vocab.types[token_id] != USER_DEFINED and special[1:]:
                text = text.replace(special, special[0] + ESCAPE + special[1:])
        return text

    def segments(self, text: str, continues: bool = False) -> list[tuple[str, list[int]]]:
        """(text, ids) of `text`, which may have ESCAPEs, cut at its special tokens. The ids are
        `encode`'s with parse_special; a text that `continues` another gets no space before it."""
        _check_unicode(checks.text(TokenizerError, "text", text).replace(ESCAPE, ""))
        return self._cut(text, self._specials, continues)

    def has_special_across(self, text: str, at: int) -> bool:
        """Whether a special token begins before character `at` of a text and ends after it."""
        sizes = ((special, len(special) - 1) for special, _ in self._specials)
        return any(s in text[max(0, at - n) : max(0, at + n)] for s, n in sizes)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Control and unknown tokens
        are left out unless `special`. Raises TokenizerError for an id out of range."""
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            checks.refuse(TokenizerError, "ids", "token ids", ids)
        pieces = [self.token_bytes(token_id, special) for token_id in ids]
        if pieces and self._space_prefix:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces).decode("utf-8", "replace")

    def stream(self, special: Special = False, at_start: bool = True) -> StreamDecoder:
        """A decoder for ids that come one by one; `at_start` of a text, `encode`'s space goes.
        special: whether control tokens are text, or those that are, as the file spells them."""
        return StreamDecoder(self, special, at_start and self._space_prefix)

    def token_bytes(self, token_id: int, special: bool = False) -> bytes:
        """The bytes of a token; they may begin or end inside a character."""
        return self._vocab.piece(self._checked(token_id), special)

    def text(self, token_id: int) -> str:
        """The token as the file spells it, in the vocabulary's own alphabet."""
        return self._vocab.tokens[self._checked(token_id)]

    def _checked(self, token_id: int) -> int:
        if not checks.is_integer(token_id) or not 0 <= token_id < self.n_vocab:
            came = checks.shown(token_id)
            raise TokenizerError(f"token id {came}: expected 0 to {self.n_vocab - 1}")
        return token_id

    def __repr__(self) -> str:
        return f"<Tokenizer {self._vocab.model}: {self.n_vocab} tokens>"

    def _cut(
        self, text: str, specials: list[tuple[str, int]], continues: bool = False
    ) -> list[tuple[str, list[int]]]:
        """(text, ids) of the special tokens in a text and of what is between them."""
        parts: list[str | int] = [text] if text else []
        for special, token_id in specials:
            if special in text:
                parts = [piece for part in parts for piece in _split(part, special, token_id)]
        found: list[tuple[str, list[int]]] = []
        for part in parts:
            if isinstance(part, int):
                found.append((self._vocab.tokens[part], [part]))
            else:
                plain = part.replace(ESCAPE, "")
                if len(plain) >= _LONG:
                    _check_memory(_BYTE_COST * len(plain.encode()))
                ids = self._encoder.encode(plain, continues and not found)
                found.append((part, ids))
        return found


class StreamDecoder:
    """Decodes ids one by one into text that never ends inside a character."""

    def __init__(self, tokenizer: Tokenizer, special: Special, strip_space: bool) -> None:
        self._tokenizer, self._special, self._strip_space = tokenizer, special, strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        special = self._special
        if not isinstance(special, bool):
            special = self._tokenizer.text(token_id) in special
        piece = self._tokenizer.token_bytes(token_id, special)
        if self._strip_space:
            piece = piece.removeprefix(b" ")
            self._strip_space = False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """U+FFFD if the last character is incomplete, else an empty text."""
        return self._utf8.decode(b"", final=True)


class _ByteLevelBPE:
    def __init__(self, file: GGUFFile, vocab: Vocab, pre: str) -> None:
        from tokenizers import Tokenizer as Pipeline

        self._pipeline = Pipeline(_bpe(file, vocab, ignore_merges=pre == "llama-bpe"))
        self._pipeline.pre_tokenizer = pre_tokenizer(pre)
        self._missing = {byte for char, byte in BYTE_OF.items() if char not in vocab.ids}

    def encode(self, text: str, continues: bool) -> list[int]:
        """The ids of a non-empty text without special tokens. `continues`: see `segments`."""
        # The package would drop such bytes silently.
        if self._missing and (lost := self._missing.intersection(text.encode())):
            raise TokenizerError(
                f"text cannot be encoded: the vocabulary has no token for byte 0x{min(lost):02X}"
            )
        ids: list[int] = self._pipeline.encode(text, add_special_tokens=False).ids
        return ids


class _SentencePiece:
    def __init__(self, file: GGUFFile, vocab: Vocab, space_prefix: bool) -> None:
        from sentencepiece import SentencePieceProcessor

        self._prefix = " " if space_prefix else ""
        try:
            self._processor = SentencePieceProcessor(model_proto=_model_proto(vocab))
        except RuntimeError as error:
            raise TokenizerError(
                f"{file.path}: sentencepiece refuses the vocabulary: {_one_line(error)[:200]}"
            ) from None

    def encode(self, text: str, continues: bool) -> list[int]:
        # Any other text begins or follows a special token, so it gets the prefix.
        prefix = "" if continues else self._prefix
        ids: list[int] = self._processor.encode(prefix + text, out_type=int)
        return ids


def _check_memory(n_bytes: int) -> None:
    """Raise NotEnoughMemoryError if the packages, which abort the process then, lack `n_bytes`."""
    n_bytes += 8 << 20
    if not has_memory(n_bytes):
        raise NotEnoughMemoryError(f"out of memory: the tokenizer needs {n_bytes >> 20} MiB")


def _check_unicode(text: str) -> None:
    checks.text(TokenizerError, "text", text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text cannot be encoded: lone surrogate {text[error.start]!r} at character "
            f"{error.start}"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _split(part: str | int, special: str, token_id: int) -> list[str | int]:
    if isinstance(part, int):
        return [part]
    out: list[str | int] = []
    for piece in part.split(special):
        out += [token_id, piece] if piece else [token_id]
    return out[1:]


def _pre_name(file: GGUFFile) -> str:
    name = file.string(_KEY + "pre", "")
    if not name:
        _log.warning("%s: metadata %spre is missing, taking 'default'", file.path, _KEY)
        return "default"
    pre = _PRE_ALIASES.get(name, name)
    if pre not in _PRE:
        raise TokenizerError(
            f"{file.path}: unknown pre-tokenizer {shown(name)}; known are "
            f"{', '.join([*_PRE, *_PRE_ALIASES])}"
        )
    return pre


def pre_tokenizer(pre: str) -> Any:
    """The package's pre-tokenizer for a name of _PRE: it cuts a text into the pieces within which
    BPE merges."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits = [Split(Regex(regex), "isolated") for regex in _PRE[pre]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _bpe(file: GGUFFile, vocab: Vocab, ignore_merges: bool) -> Any:
    from tokenizers.models import BPE

    # Of equal merges llama.cpp uses the first, the package the last.
    merges = list(dict.fromkeys(strings(file, "merges")))
    cuts = ((merge, merge.find(" ", 1)) for merge in merges)
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]
    try:
        return BPE(vocab.ids, pairs, ignore_merges=ignore_merges)
    except Exception:  # the package raises nothing narrower
        for merge, pair in zip(merges, pairs, strict=True):
            if any(token not in vocab.ids for token in (*pair, "".join(pair))):
                expected = "expected two tokens that make a third"
                raise metadata_error(file, f"merges: {expected}, got {shown(merge)}") from None
        raise


def _model_proto(vocab: Vocab) -> bytes:
    """The vocabulary as sentencepiece's ModelProto, in protobuf's wire format."""
    assert vocab.scores is not None
    out = bytearray()
    unknown = vocab.types.index(UNKNOWN) if UNKNOWN in vocab.types else -1
    for i, (text, score) in enumerate(zip(vocab.tokens, vocab.scores.tolist(), strict=True)):
        # The package takes one unknown token; none of them is made by a merge.
        kind = CONTROL if vocab.types[i] == UNKNOWN and i != unknown else vocab.types[i]
        # As in llama.cpp, all others merge by score: user-defined tokens are cut out before.
        kind = kind if kind in (UNKNOWN, CONTROL, BYTE) else NORMAL
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind)
        out += _field(1, piece)
    trainer = _field(3, 2) + _field(35, int(BYTE in vocab.types))  # BPE, byte_fallback
    # add_dummy_prefix 0 (the prefix is added here), remove_extra_whitespaces 0, spaces as U+2581.
    normalizer = _field(1, b"identity") + _field(3, 0) + _field(4, 0) + _field(5, 1)
    return bytes(out) + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: int | bytes) -> bytes:
    """A protobuf field: a varint, or bytes after their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
