"""Tokenizers: llama.cpp's own vocabulary tests, hand-checked splits, and made vocabularies.

The made ones are written as GGUF files: `bpe_metadata` has a token for every byte, `spm_metadata`
a few scored pieces over byte fallback. The vocabularies of llama.cpp lie outside of this
repository; without them their tests are skipped.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Sequence, Split

from engine import Engine, SamplingParams
from engine.errors import NotEnoughMemoryError
from engine.formats.gguf import GGUFFile
from engine.text import tokenizer as tokenizer_module
from engine.text.tokenizer import ESCAPE, Tokenizer, TokenizerError, pre_tokenizer
from tools.ggufwrite import write_gguf

ROOT = Path(__file__).resolve().parents[2]
VOCABS = ROOT.parent / "shared" / "data" / "vocab"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PRE_NAMES = ("default", "deepseek-llm", "gpt-2", "kimi-k2", "llama-bpe", "qwen2", "qwen35")

BOTH = settings(deadline=None, max_examples=200)
# st.text() has no surrogates: it draws from what UTF-8 can encode.
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)


def byte_chars() -> list[str]:
    """GPT-2's characters by byte, written down another way than the engine does."""
    chars, spare = [], 0x100
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            chars.append(chr(byte))
        else:
            chars.append(chr(spare))
            spare += 1
    return chars


MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "1 2", "12 3"]
BPE_EXTRA = {
    "Ġworld": NORMAL,  # no merge leads here
    "<|endoftext|>": CONTROL,
    "<|im_start|>": CONTROL,
    "<unk>": UNKNOWN,
    "<tool>": USER_DEFINED,
    "<tool><tool>": USER_DEFINED,
    "<unused>": UNUSED,
    "größe": USER_DEFINED,
}


def bpe_metadata(**changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary; keys of `changes` are without `tokenizer.ggml.`, None removes."""
    tokens = [*byte_chars(), *(m.replace(" ", "") for m in MERGES), *BPE_EXTRA]
    types = [NORMAL] * (256 + len(MERGES)) + list(BPE_EXTRA.values())
    metadata = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "merges": MERGES,
        "eos_token_id": tokens.index("<|endoftext|>"),
        "bos_token_id": tokens.index("<|im_start|>"),
    }
    return with_changes(metadata, changes)


PIECES = {"▁": -5.0, "a": -6.0, "b": -7.0, "ab": -2.0, "▁a": -1.0, "ba": -2.0, "bab": -3.0}


def spm_metadata(**changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(PIECES)
    tokens += ["<mark>", "<gone>"]
    types += [USER_DEFINED, UNUSED]
    scores = [0.0] * 259 + [*PIECES.values(), 0.0, 0.0]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "scores": np.array(scores, np.float32),
    }
    return with_changes(metadata, changes)


def with_changes(metadata: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    metadata = metadata | changes
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def test_a_second_unknown_token_changes_nothing(load: Any) -> None:
    """Phi-3's vocabulary has two; the package takes one."""
    one, two = load(spm_metadata()), spm_metadata()
    types = two["tokenizer.ggml.token_type"].copy()
    types[-1] = UNKNOWN
    two = load(two | {"tokenizer.ggml.token_type": types})
    for text in ("", "the cat", "naïve 日本", "<gone>"):
        assert two.encode(text) == one.encode(text)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load_metadata(metadata: dict[str, Any]) -> Tokenizer:
        write_gguf(tmp_path / "made.gguf", metadata, [])
        return Tokenizer.from_gguf(GGUFFile(tmp_path / "made.gguf"))

    return load_metadata


def made(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocab") / "made.gguf"
    write_gguf(path, metadata, [])
    return Tokenizer.from_gguf(GGUFFile(path))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return made(tmp_path_factory, bpe_metadata())


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return made(tmp_path_factory, spm_metadata())


@pytest.fixture(scope="module", params=PRE_NAMES)
def any_bpe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return made(tmp_path_factory, bpe_metadata(pre=request.param))


def texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.text(i) for i in ids]


# llama.cpp's cases


@pytest.mark.parametrize(
    ("name", "n_cases"), [("qwen2", 46), ("llama-spm", 46), ("qwen35", 50)], ids=str
)
def test_llama_cpp_vocabulary(name: str, n_cases: int) -> None:
    path = VOCABS / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip("the vocabularies of llama.cpp are not beside this checkout")
    tokenizer = Tokenizer.from_gguf(GGUFFile(path))
    pieces = Path(f"{path}.inp").read_bytes().split(b"\n__ggml_vocab_test__\n")
    cases = [piece.decode() for piece in pieces[:-1]]
    expected = Path(f"{path}.out").read_text().splitlines()
    assert len(cases) == len(expected) == n_cases
    for text, line in zip(cases, expected, strict=True):
        ids = tokenizer.encode(text)
        assert ids == [int(number) for number in line.split()], text
        assert tokenizer.decode(ids) == text


# Pre-tokenizers: text, and its pieces by hand for every name

QWEN = ("qwen2", "qwen35", "llama-bpe")
SPLITS: list[tuple[str, dict[tuple[str, ...], list[str]]]] = [
    (
        "I'm we'LL",
        {
            QWEN: ["I", "'m", " we", "'LL"],
            ("kimi-k2",): ["I'm", " we'LL"],
            ("gpt-2",): ["I", "'m", " we", "'", "LL"],
            ("default", "deepseek-llm"): ["I", "'", "m", " we", "'", "LL"],
        },
    ),
    (
        "1234567 x12 345",
        {
            ("qwen2", "qwen35"): [*"1234567", " x", "1", "2", " ", "3", "4", "5"],
            ("llama-bpe", "kimi-k2"): ["123", "456", "7", " x", "12", " ", "345"],
            ("gpt-2",): ["1234567", " x", "12", " 345"],
            ("default",): ["123", "456", "7", " x", "12", " ", "345"],
            ("deepseek-llm",): ["1234567", " x", "12", " ", "345"],
        },
    ),
    (
        "漢字kana かな,カナ",
        {
            QWEN: ["漢字kana", " かな", ",カナ"],
            ("kimi-k2",): ["漢字", "kana", " かな", ",カナ"],
            ("gpt-2", "default"): ["漢字kana", " かな", ",", "カナ"],
            ("deepseek-llm",): ["漢字", "kana", " ", "かな", ",", "カナ"],
        },
    ),
    ("a漢Ab", {("kimi-k2",): ["a", "漢", "Ab"], (*QWEN, "gpt-2", "default"): ["a漢Ab"]}),
    # U+3005 is a letter of the Han script outside of the ideograph blocks.
    ("人々a", {("kimi-k2",): ["人々", "a"], QWEN: ["人々a"], ("gpt-2", "default"): ["人々a"]}),
    (
        "e\u0301a n\u0303",
        {
            ("qwen2", "llama-bpe"): ["e", "\u0301a", " n", "\u0303"],
            ("qwen35", "kimi-k2"): ["e\u0301a", " n\u0303"],
            ("gpt-2", "default", "deepseek-llm"): ["e", "\u0301", "a", " n", "\u0303"],
        },
    ),
    (
        "a\r\n\n  b \n",
        {
            (*QWEN, "kimi-k2"): ["a", "\r\n\n", " ", " b", " \n"],
            ("gpt-2", "default"): ["a", "\r\n\n ", " b", " \n"],
            ("deepseek-llm",): ["a", "\r", "\n", "\n", " ", " b", " ", "\n"],
        },
    ),
    ("hi   ", {PRE_NAMES: ["hi", "   "]}),
    ("hi   x", {PRE_NAMES: ["hi", "  ", " x"]}),
    (
        "(a)!!\n$5",
        {
            (*QWEN, "kimi-k2"): ["(a", ")!!\n", "$", "5"],
            ("gpt-2", "default", "deepseek-llm"): ["(", "a", ")!!", "\n", "$", "5"],
        },
    ),
    (
        "helloWorldABC",
        {
            ("kimi-k2",): ["hello", "World", "ABC"],
            (*QWEN, "gpt-2", "default", "deepseek-llm"): ["helloWorldABC"],
        },
    ),
    ("", {PRE_NAMES: []}),
]


def split_cases() -> Iterator[Any]:
    for text, by_names in SPLITS:
        for names, pieces in by_names.items():
            for name in names:
                yield pytest.param(name, text, pieces, id=f"{name}-{text!a}")


def pretokenize(pre: str, text: str) -> list[str]:
    return [text[slice(*span)] for _, span in pre_tokenizer(pre).pre_tokenize_str(text)]


@pytest.mark.parametrize(("pre", "text", "pieces"), list(split_cases()))
def test_pretokenize(pre: str, text: str, pieces: list[str]) -> None:
    assert pretokenize(pre, text) == pieces


@pytest.mark.parametrize("pre", PRE_NAMES)
@given(text=TEXT)
@settings(deadline=None, max_examples=50)
def test_pretokenize_loses_nothing(pre: str, text: str) -> None:
    pieces = pretokenize(pre, text)
    assert "".join(pieces) == text
    assert all(pieces)


# A character of each class, a longer unit, and what may follow.
@pytest.mark.parametrize(
    "unit", [*" \t\u00a0\u3000\n\r1aAé!'\u4e2d\u0301\u05d0", " \n", "a1", "'s"]
)
@pytest.mark.parametrize("pre", PRE_NAMES)
def test_pretokenize_takes_linear_time(pre: str, unit: str) -> None:
    split = pre_tokenizer(pre).pre_tokenize_str
    for end in ("1", "a", ""):
        # 10 ms; a regex that looks at each space's followers takes 5 s.
        start = time.process_time()
        split(unit * (20_000 // len(unit)) + end)
        assert time.process_time() - start < 1.5, end


@given(text=st.text(st.sampled_from(" \t\n\r\f\u00a0\u0085\u2028\u30001a中。.é"), max_size=20))
@BOTH
def test_deepseek_splits_at_the_last_spaces(text: str) -> None:
    r"""As llama.cpp's regex, which is \s+$, does."""
    splits = [Split(Regex(regex), "isolated") for regex in tokenizer_module._PRE["deepseek-llm"]]
    ours = Sequence(splits).pre_tokenize_str(text)
    splits[3] = Split(Regex(r"\s+$"), "isolated")
    assert ours == Sequence(splits).pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("alias", "pre"),
    [("llama3", "llama-bpe"), ("megrez", "qwen2"), ("phi-2", "gpt-2")]
    + [(name, "qwen2") for name in ("bailingmoe", "bailingmoe2", "llada-moe")],
)
def test_pre_tokenizer_aliases(load: Any, alias: str, pre: str) -> None:
    text = "I'M 12345 Ġworld hello world"
    named, aliased = load(bpe_metadata(pre=pre)), load(bpe_metadata(pre=alias))
    assert aliased.encode(text, add_special=True) == named.encode(text, add_special=True)


def test_missing_pre_tokenizer_is_default(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = load(bpe_metadata(pre=None))
    assert "tokenizer.ggml.pre is missing, taking 'default'" in caplog.text
    # Cut into "121" and "23"; gpt-2 would leave it whole, giving "12" and "123".
    assert texts(tokenizer, tokenizer.encode("12123")) == ["12", "1", "2", "3"]


# Byte-level BPE


def test_merges_by_rank(bpe: Tokenizer) -> None:
    # "or" is ranked above "Ġwor", and nothing leads from "Ġwor" to "Ġworld".
    assert texts(bpe, bpe.encode("hello world")) == ["hello", "Ġwor", "l", "d"]
    assert texts(bpe, bpe.encode("lll")) == ["ll", "l"]
    assert texts(bpe, bpe.encode("é")) == ["Ã", "©"]


@pytest.mark.parametrize(
    ("pre", "expected"), [("llama-bpe", ["Ġworld"]), ("qwen2", ["Ġwor", "l", "d"])]
)
def test_ignore_merges(load: Any, pre: str, expected: list[str]) -> None:
    tokenizer = load(bpe_metadata(pre=pre))
    assert texts(tokenizer, tokenizer.encode(" world")) == expected


def test_first_of_equal_merges_counts(load: Any) -> None:
    # Ranks: "l l" before "h e"; the second "l l" must not push the first one back.
    merges = ["l l", "e l", "l l", *MERGES]
    tokens = [*bpe_metadata()["tokenizer.ggml.tokens"], "el"]
    tokenizer = load(bpe_metadata(merges=merges, tokens=tokens, token_type=None))
    assert texts(tokenizer, tokenizer.encode("ell")) == ["e", "ll"]


@given(text=TEXT)
@BOTH
def test_round_trip(any_bpe: Tokenizer, text: str) -> None:
    assert any_bpe.decode(any_bpe.encode(text)) == text


@given(text=st.text(st.sampled_from("<tool>größe<|im_start|>unk "), max_size=40))
@BOTH
def test_round_trip_with_specials(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text, parse_special=True)
    assert bpe.decode(ids, special=True) == text


SPELLED = ("<tool>", "<|im_start|>", "<unk>", "<s>", "<mark>", "<", "a", " ", "b", "é")


@given(text=st.lists(st.sampled_from(SPELLED)).map("".join))
@BOTH
def test_segments_are_the_text_and_escapes_make_it_text(
    bpe: Tokenizer, spm: Tokenizer, text: str
) -> None:
    for tokenizer in (bpe, spm):
        for given_text, parse_special in (
            (text, True),
            (tokenizer.escape_special_tokens(text), False),
        ):
            segments = tokenizer.segments(given_text)
            assert "".join(segment for segment, _ in segments) == given_text
            ids = [i for _, ids in segments for i in ids]
            assert ids == tokenizer.encode(text, parse_special=parse_special)


def test_segments_that_continue_a_text_have_no_prefix_space(bpe: Tokenizer, spm: Tokenizer) -> None:
    assert [texts(spm, ids) for _, ids in spm.segments("ab<s>a", continues=True)] == [
        ["ab"], ["<s>"], ["▁a"]]  # fmt: skip
    assert [texts(spm, ids) for _, ids in spm.segments("<s>a", continues=True)] == [["<s>"], ["▁a"]]
    assert bpe.segments("ab", continues=True) == bpe.segments("ab")
    for tokenizer in (bpe, spm):
        with pytest.raises(TokenizerError, match="lone surrogate"):
            tokenizer.segments("a\ud800")


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\udc80<tool>"])
def test_lone_surrogates_are_refused(bpe: Tokenizer, spm: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, spm):
        with pytest.raises(TokenizerError, match=r"lone surrogate .* at character"):
            tokenizer.encode(text)


def test_byte_without_token_is_refused(load: Any) -> None:
    tokens = bpe_metadata()["tokenizer.ggml.tokens"]
    tokens[tokens.index("Ã")] = "something else"
    tokenizer = load(bpe_metadata(tokens=tokens))
    assert tokenizer.decode(tokenizer.encode("plain")) == "plain"
    with pytest.raises(TokenizerError, match="no token for byte 0xC3"):
        tokenizer.encode("é")


def test_normal_token_outside_of_the_byte_alphabet(load: Any) -> None:
    tokens = bpe_metadata()["tokenizer.ggml.tokens"]
    tokens[0] = "中 x"
    assert load(bpe_metadata(tokens=tokens)).token_bytes(0) == "中 x".encode()


# Special tokens


def test_control_tokens_need_parse_special(bpe: Tokenizer) -> None:
    text = "<|im_start|>hello<unk><|endoftext|>"
    ids = bpe.encode(text, parse_special=True)
    assert texts(bpe, ids) == ["<|im_start|>", "hello", "<unk>", "<|endoftext|>"]
    assert bpe.decode(ids) == "hello"
    assert bpe.decode(ids, special=True) == text
    plain = bpe.encode(text)
    assert not set(plain) & set(ids) - {ids[1]}
    assert bpe.decode(plain) == text


def test_user_defined_tokens_are_always_cut(bpe: Tokenizer) -> None:
    for parse_special in (False, True):
        ids = bpe.encode("a<tool>b größe", parse_special=parse_special)
        assert texts(bpe, ids) == ["a", "<tool>", "b", "Ġ", "größe"]
        assert bpe.decode(ids) == "a<tool>b größe"


def test_longest_special_first(bpe: Tokenizer) -> None:
    assert texts(bpe, bpe.encode("<tool><tool><tool>")) == ["<tool><tool>", "<tool>"]


def test_a_special_token_across_a_place(bpe: Tokenizer) -> None:
    """The reference: the text's segments. A spelling with an ESCAPE in it is none."""
    text = "a<tool>b<|im_start|><" + ESCAPE + "|im_start|>"
    across, end = list[int](), 0
    for part, ids in bpe.segments(text):
        is_special = texts(bpe, ids) == [part] and len(part) > 1
        across += range(end + 1, end + len(part)) if is_special else ()
        end += len(part)
    assert len(across) == len("<tool><|im_start|>") - 2
    assert [at for at in range(end + 1) if bpe.has_special_across(text, at)] == across


def test_length_of_specials_is_in_bytes(load: Any) -> None:
    # "c中" has fewer characters than "abc" and more bytes.
    tokens = [*bpe_metadata()["tokenizer.ggml.tokens"], "abc", "c中"]
    types = np.array([NORMAL] * (len(tokens) - 2) + [USER_DEFINED] * 2, np.int32)
    tokenizer = load(bpe_metadata(tokens=tokens, token_type=types))
    assert texts(tokenizer, tokenizer.encode("abc中")) == ["a", "b", "c中"]


def test_unused_tokens_decode_to_nothing(bpe: Tokenizer) -> None:
    unused = next(i for i in range(bpe.n_vocab) if bpe.text(i) == "<unused>")
    assert bpe.token_bytes(unused) == bpe.token_bytes(unused, special=True) == b""
    assert unused not in bpe.encode("<unused>", parse_special=True)


def test_tokens_that_end_a_turn_are_control_tokens(load: Any) -> None:
    tokens = [*bpe_metadata()["tokenizer.ggml.tokens"], "<|im_end|>", "<|fim_prefix|>"]
    types = np.array([NORMAL] * (len(tokens) - 2) + [USER_DEFINED] * 2, np.int32)
    tokenizer = load(bpe_metadata(tokens=tokens, token_type=types))
    end, fim = len(tokens) - 2, len(tokens) - 1
    assert tokenizer.encode("<|im_end|><|fim_prefix|>", parse_special=True) == [end, fim]
    assert not {end, fim} & set(tokenizer.encode("<|im_end|><|fim_prefix|>"))
    assert tokenizer.decode([end, fim]) == ""


# Beginning and end of text


@pytest.mark.parametrize(
    ("changes", "n_before", "n_after"),
    [
        ({}, 0, 0),
        ({"pre": "llama-bpe"}, 1, 0),
        ({"pre": "llama-bpe", "add_bos_token": False}, 0, 0),
        ({"add_bos_token": True}, 1, 0),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 1),
        ({"add_eos_token": True}, 0, 1),
    ],
)
def test_add_special_bpe(load: Any, changes: dict[str, Any], n_before: int, n_after: int) -> None:
    tokenizer = load(bpe_metadata(**changes))
    assert (tokenizer.add_bos, tokenizer.add_eos) == (bool(n_before), bool(n_after))
    bos, eos = [tokenizer.bos_id] * n_before, [tokenizer.eos_id] * n_after
    for text in ("hello", ""):
        plain = tokenizer.encode(text)
        assert tokenizer.encode(text, add_special=True) == [*bos, *plain, *eos]


def test_default_ids(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = load(bpe_metadata(bos_token_id=None, eos_token_id=None))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (11, 11)
    assert 11 in tokenizer.eog_ids
    assert "eos_token_id is missing: token 11, 'ċ', ends the text" in caplog.text
    few = bpe_metadata(
        tokens=byte_chars()[97:103], token_type=None, merges=[], bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    assert load(few).bos_id is load(few).eos_id is None
    with pytest.raises(TokenizerError, match="a bos token is to be added, but has no id"):
        load(few | {"tokenizer.ggml.add_bos_token": True})


def test_end_of_generation(load: Any) -> None:
    names = ["</s>", "[EOT]", "[EOS]", "<|fim_pad|>", "[PAD]", "<|repo_name|>", "<|file_sep|>"]
    names += ["<|role_end|>"]
    tokens = [*bpe_metadata()["tokenizer.ggml.tokens"], *names]
    tokenizer = load(bpe_metadata(tokens=tokens, token_type=None, eot_token_id=3, eom_token_id=4))
    expected = {"</s>", "[EOT]", "[EOS]", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"}
    expected |= {"<|role_end|>", tokens[3], tokens[4], "<|endoftext|>"}  # eot, eom, eos
    assert {tokenizer.text(i) for i in tokenizer.eog_ids} == expected
    given_pad = load(bpe_metadata(tokens=tokens, token_type=None, fim_pad_token_id=5))
    assert 5 in given_pad.eog_ids
    assert tokens.index("<|fim_pad|>") not in given_pad.eog_ids


# SentencePiece


def spm_reference(text: str) -> list[str]:
    """Merge the best pair, the leftmost of equals, until none is a piece; bytes for the rest."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [
            (PIECES[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in PIECES
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    out = []
    for symbol in symbols:
        out += [symbol] if symbol in PIECES else [f"<0x{b:02X}>" for b in symbol.encode()]
    return out


@given(text=st.text(st.sampled_from("aaabbb  é▁\n\t😀\0"), min_size=1, max_size=24))
@BOTH
def test_spm_merges_as_the_reference(spm: Tokenizer, text: str) -> None:
    ids = spm.encode(text)
    assert texts(spm, ids) == spm_reference(" " + text)
    assert spm.decode(ids) == text.replace("▁", " ")


@given(text=TEXT.filter(lambda text: "▁" not in text and "<mark>" not in text))
@BOTH
def test_spm_round_trip(spm: Tokenizer, text: str) -> None:
    assert spm.decode(spm.encode(text)) == text


def test_spm_prefix_space(spm: Tokenizer) -> None:
    assert spm.encode("") == []
    assert texts(spm, spm.encode("ab")) == ["▁a", "b"]
    assert texts(spm, spm.encode(" ab")) == ["▁", "▁a", "b"]
    assert texts(spm, spm.encode("ab<mark>ab")) == ["▁a", "b", "<mark>", "▁a", "b"]
    ids = spm.encode("<s>ab</s><s>a", parse_special=True)
    assert texts(spm, ids) == ["<s>", "▁a", "b", "</s>", "<s>", "▁a"]
    assert spm.decode(spm.encode("  ab")) == "  ab"
    # Only the first token loses its space, as in llama_detokenize.
    assert spm.decode(ids) == " ab a"
    assert spm.decode(ids, special=True) == "<s> ab</s><s> a"


def test_spm_without_prefix_space(load: Any) -> None:
    tokenizer = load(spm_metadata(add_space_prefix=False))
    assert texts(tokenizer, tokenizer.encode("ab<mark>ab")) == ["ab", "<mark>", "ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


def test_spm_user_defined_piece_merges_by_score(load: Any) -> None:
    # It has a U+2581, so it never occurs in a text as it is; sentencepiece alone would take it
    # before anything else, llama.cpp after "▁a", whose score is higher.
    tokens = spm_metadata()["tokenizer.ggml.tokens"]
    scores = spm_metadata()["tokenizer.ggml.scores"]
    mark = tokens.index("<mark>")
    tokens[mark], scores[mark] = "▁▁", -8.0
    tokenizer = load(spm_metadata(tokens=tokens, scores=scores))
    assert texts(tokenizer, tokenizer.encode(" a")) == ["▁", "▁a"]
    assert texts(tokenizer, tokenizer.encode("  a")) == ["▁▁", "▁a"]


def test_spm_byte_fallback(spm: Tokenizer) -> None:
    assert texts(spm, spm.encode("é\n")) == ["▁", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert spm.token_bytes(3 + 0xC3) == b"\xc3"


def test_spm_add_special(load: Any, spm: Tokenizer) -> None:
    assert (spm.bos_id, spm.eos_id, spm.add_bos, spm.add_eos) == (1, 2, True, False)
    assert spm.encode("", add_special=True) == [1]
    assert texts(spm, spm.encode("a", add_special=True)) == ["<s>", "▁a"]
    other = load(spm_metadata(add_bos_token=False, add_eos_token=True, eos_token_id=1))
    assert texts(other, other.encode("a", add_special=True)) == ["▁a", "<s>"]


def test_spm_plain_text_never_gives_control_tokens(spm: Tokenizer) -> None:
    assert not {0, 1, 2} & set(spm.encode("<s></s><unk>"))
    assert spm.eog_ids == {2}


# Decoding


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_ids_out_of_range(bpe: Tokenizer, token_id: int) -> None:
    for use in (lambda i: bpe.decode([i]), bpe.text, bpe.token_bytes, bpe.stream().push):
        with pytest.raises(TokenizerError, match=f"^token id {token_id}: expected 0 to "):
            use(token_id)


@pytest.mark.parametrize("text", ["👍🏽", "👨‍👩‍👧", "é", "한", "a\u0301"])
def test_stream_waits_for_whole_characters(bpe: Tokenizer, text: str) -> None:
    stream = bpe.stream()
    for char in text:
        *first, last = char.encode()  # ids below 256 are bytes
        assert [stream.push(byte) for byte in first] == [""] * len(first)
        assert stream.push(last) == char
    assert stream.finish() == ""


def test_stream_of_broken_bytes(bpe: Tokenizer) -> None:
    stream = bpe.stream()
    assert stream.push(0xFF) == "\ufffd"
    assert [stream.push(0xF0), stream.push(0x9F)] == ["", ""]
    assert stream.push(ord("a")) == "\ufffda"
    assert [stream.push(0xF0), stream.push(0x9F)] == ["", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_stream_holds_a_character_across_hidden_tokens(bpe: Tokenizer) -> None:
    ids = [0xC3, bpe.eos_id or 0, 0xA9]
    assert [bpe.stream().push(ids[0]), bpe.decode(ids)] == ["", "é"]


def test_stream_of_a_continuation_keeps_its_space(spm: Tokenizer) -> None:
    ids = spm.encode("ab")
    assert [spm.stream().push(ids[0]), spm.stream(at_start=False).push(ids[0])] == ["a", " a"]


@given(data=st.data(), special=st.booleans())
@BOTH
def test_stream_equals_decode(
    bpe: Tokenizer, spm: Tokenizer, data: st.DataObject, special: bool
) -> None:
    for tokenizer in (bpe, spm):
        ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1), max_size=30))
        whole = tokenizer.decode(ids, special)
        stream = tokenizer.stream(special)
        text = ""
        for token_id in ids:
            text += stream.push(token_id)
            assert whole.startswith(text)
        assert text + stream.finish() == whole


# Bad input

TOKENS: list[str] = bpe_metadata()["tokenizer.ggml.tokens"]
N = len(TOKENS)
BAD_BPE = {
    "no model": ({"model": None}, "tokenizer.ggml.model is missing"),
    "model": ({"model": "bert"}, "unknown tokenizer model 'bert'; known are gpt2, llama"),
    "model type": ({"model": 3}, "tokenizer.ggml.model: expected a string, got 3"),
    "pre": ({"pre": "qwen9"}, "unknown pre-tokenizer 'qwen9'; known are default, .*qwen35"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    "empty tokens": ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
    "tokens type": ({"tokens": "a"}, "tokenizer.ggml.tokens: expected an array of strings"),
    "double token": ({"tokens": [*TOKENS[:-1], "a"]}, f"'a' appears twice, as 97 and {N - 1}"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges is missing"),
    "merge of one": ({"merges": [*MERGES, "he"]}, "merges: expected two tokens .*, got 'he'"),
    "merge of unknown": ({"merges": ["h zz"]}, "merges: expected two tokens .*, got 'h zz'"),
    "merge to unknown": ({"merges": ["h h"]}, "merges: expected two tokens .*, got 'h h'"),
    "merge with line": ({"merges": ["h\n e"]}, r"merges: expected two tokens .*, got 'h\\n e'"),
    "few types": (
        {"token_type": np.ones(5, np.int32)},
        f"token_type: expected {N} entries, one for each token, got 5",
    ),
    "float types": ({"token_type": np.ones(N, np.float32)}, "token_type: expected an array of"),
    "type 7": ({"token_type": np.full(N, 7, np.int32)}, "expected 1 to 6 for token 0, got 7"),
    "type 0": ({"token_type": np.zeros(N, np.int32)}, "expected 1 to 6 for token 0, got 0"),
    "byte text": ({"token_type": np.full(N, BYTE, np.int32)}, "byte token 0: expected a text"),
    "eos": ({"eos_token_id": N}, f"eos_token_id: expected an id below {N}, got {N}"),
    "bos": ({"bos_token_id": np.int32(-1)}, f"bos_token_id: expected an id below {N}, got -1"),
    "eot": ({"eot_token_id": 10**9}, "eot_token_id: expected an id below"),
    "fim": ({"fim_sep_token_id": 10**9}, "fim_sep_token_id: expected an id below"),
    "add_bos": ({"add_bos_token": 1}, "add_bos_token: expected true or false, got 1"),
    "array for an id": ({"eos_token_id": np.arange(5000)}, "eos_token_id: expected an integer"),
}
M = len(spm_metadata()["tokenizer.ggml.tokens"])
BAD_SPM = {
    "no scores": ({"scores": None}, "tokenizer.ggml.scores is missing"),
    "few scores": ({"scores": np.zeros(3, np.float32)}, f"scores: expected {M} entries"),
    "nan": ({"scores": np.full(M, np.nan, np.float32)}, "finite number for token 0, got nan"),
    "no types": ({"token_type": None}, "tokenizer.ggml.token_type is missing"),
    "no unknown": ({"token_type": np.ones(M, np.int32)}, "sentencepiece refuses the vocabulary"),
}


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [pytest.param(bpe_metadata, *case, id=f"gpt2 {name}") for name, case in BAD_BPE.items()]
    + [pytest.param(spm_metadata, *case, id=f"llama {name}") for name, case in BAD_SPM.items()],
)
def test_bad_metadata(load: Any, make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        load(make(**changes))
    assert "\n" not in str(caught.value)
    assert "made.gguf: " in str(caught.value)


def test_empty_tokens_get_a_name(load: Any) -> None:
    tokenizer = load(bpe_metadata(tokens=[*TOKENS, "", ""], token_type=None))
    assert texts(tokenizer, [N, N + 1]) == [f"[EMPTY_{N}]", f"[EMPTY_{N + 1}]"]


@pytest.mark.parametrize(("model", "unused"), [("gpt2", "sentencepiece"), ("llama", "tokenizers")])
def test_imports_only_what_it_needs(tmp_path: Path, model: str, unused: str) -> None:
    path = tmp_path / "made.gguf"
    write_gguf(path, bpe_metadata() if model == "gpt2" else spm_metadata(), [])
    code = (
        "import sys; from engine.formats.gguf import GGUFFile; "
        "from engine.text.tokenizer import Tokenizer; "
        f"Tokenizer.from_gguf(GGUFFile({str(path)!r})); sys.exit({unused!r} in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Memory.


def test_a_text_too_long_for_the_memory_is_refused_alone(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packages would abort the process. Only what goes to them in one piece counts."""
    long, cut = "ab" * 40_000, "hello<|im_end|>" * 8_000
    with Engine.load(tiny, n_ctx=128) as engine:
        want = engine.tokenizer.encode(cut, parse_special=True)

        def refuse(fileno: int, length: int) -> Any:
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr("engine.errors.mmap.mmap", refuse)
        assert engine.tokenizer.encode(cut, parse_special=True) == want
        with pytest.raises(NotEnoughMemoryError, match=r"the tokenizer needs \d+ MiB"):
            engine.tokenizer.encode(long)
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        first, failed, last = engine.generate_batch(["a", long, "b"], params)
        assert [len(c.tokens) for c in (first, failed, last)] == [2, 0, 2]
        assert "the tokenizer needs" in failed.detail


@pytest.mark.parametrize("n_mib", [128, 256, 384])
def test_a_text_of_rare_characters_counts_by_its_bytes(tmp_path: Path, n_mib: int) -> None:
    """Each of these digits takes a kilobyte, more than the package can have here."""
    write_gguf(tmp_path / "made.gguf", bpe_metadata(), [])
    code = (
        "import resource, sys; from engine.formats.gguf import GGUFFile; "
        "from engine.text.tokenizer import NotEnoughMemoryError, Tokenizer\n"
        f"tokenizer = Tokenizer.from_gguf(GGUFFile({str(tmp_path / 'made.gguf')!r}))\n"
        "n_pages = int(open('/proc/self/statm').read().split()[0])\n"
        f"limit = n_pages * resource.getpagesize() + ({n_mib} << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try: tokenizer.encode('\\U0001d7ce' * 400_000)\n"
        "except NotEnoughMemoryError: sys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 3
