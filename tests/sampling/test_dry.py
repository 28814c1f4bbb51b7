"""DRY, the repetition penalty, against a naive search through the text, with its breakers.

The definition compares every run of tokens with the end of the text, token by token, as llama.cpp
describes it; breakers are found in the bytes that tokens stand for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Engine, SamplingParams
from engine.formats.gguf import GGUFFile
from engine.sampling.breakers import BreakerSearch
from engine.sampling.chain import Sampler
from engine.sampling.params import SamplingError
from engine.sampling.recent import Breakers
from engine.sampling.steps import Candidates
from engine.text.tokenizer import Tokenizer
from tests.support.helpers import apply_sampler

N = 6


def dry(
    recent: Sequence[int], multiplier: float, base: float, allowed: int, breakers: Breakers
) -> list[float]:
    """The amount that each token's logit loses."""
    lost = [0.0] * N
    n, limit = len(recent), behind_the_last_breaker(recent, breakers)
    if n <= allowed or limit < allowed:
        return lost
    for end in range(n - 1):
        length = 0
        while length <= end and recent[end - length] == recent[n - 1 - length]:
            length += 1
        length, token = min(length, limit), recent[end + 1]
        if length >= allowed and () not in breakers.get(token, ()):
            lost[token] = max(lost[token], multiplier * base ** (length - allowed))
    return lost


def behind_the_last_breaker(recent: Sequence[int], breakers: Breakers) -> int:
    """The number of tokens after the last breaker; of several that begin there, the longest."""
    n = len(recent)
    for start in range(n - 1, -1, -1):
        lengths = [
            len(tail)
            for tail in breakers.get(recent[start], ())
            if list(recent[start + 1 :])[: len(tail)] == list(tail)
        ]
        if lengths:
            return n - start - 1 - max(lengths)
    return n


def applied(
    recent: Sequence[int], multiplier: float, base: float, allowed: int, breakers: Breakers
) -> list[float]:
    c = Candidates(np.arange(N)[::-1], np.zeros(N))
    got = apply_sampler(
        "dry", c, recent=recent, breakers=breakers, dry_multiplier=multiplier, dry_base=base,
        dry_allowed_length=allowed,
    )  # fmt: skip
    assert got.ids.tolist() == c.ids.tolist()
    return [-float(x) for x in got.logits[::-1]]


tokens = st.integers(0, N - 1)
breaker_maps = st.dictionaries(
    tokens, st.lists(st.lists(tokens, max_size=3).map(tuple), min_size=1, max_size=3), max_size=2
)


@settings(max_examples=600, deadline=None)
@given(
    st.one_of(
        st.lists(tokens, max_size=40),
        # Few tokens: long repetitions.
        st.lists(st.integers(0, 1), max_size=40),
        st.lists(st.integers(0, 2), min_size=2, max_size=6).map(lambda x: x * 5),
    ),
    st.integers(0, 5),
    st.one_of(st.just({}), breaker_maps),
)
def test_dry_is_the_naive_search(recent: list[int], allowed: int, breakers: Breakers) -> None:
    expected = dry(recent, 0.8, 1.75, allowed, breakers)
    assert applied(recent, 0.8, 1.75, allowed, breakers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recent", "lost"),
    [
        # llama.cpp's example: a b c c b c y a b c.
        ([0, 1, 2, 2, 1, 2, 3, 0, 1, 2], {2: 1.75**1, 3: 1.0}),
        ([0, 1, 0, 1], {0: 1.0}),
        ([0, 1, 2], {}),
        ([0, 1], {}),
        ([], {}),
        # The longest repetition that a token would prolong counts.
        ([0, 1, 2, 3, 1, 2, 3, 0, 1, 2], {3: 1.75}),
        ([4] * 6, {4: 1.75**3}),
    ],
)
def test_repetitions_by_hand(recent: list[int], lost: dict[int, float]) -> None:
    expected = [lost.get(t, 0.0) for t in range(N)]
    assert applied(recent, 1.0, 1.75, 2, {}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("breakers", "lost"),
    [
        ({}, 1.75**2),
        # What follows the breaker counts.
        ({5: [()]}, 1.75),
        ({0: [()]}, 1.0),
        ({1: [()]}, 0.0),
        ({2: [()]}, 0.0),
        # Of several tokens: only as a whole, the longest one.
        ({5: [(0,)]}, 1.0),
        ({5: [(1,)]}, 1.75**2),
        ({5: [(0, 1)]}, 0.0),
        ({5: [(), (0,)]}, 1.0),
        ({2: [(4,)]}, 1.75**2),
        # The token that would go on is a breaker itself: it is free. As the head of one it isn't.
        ({3: [()]}, 0.0),
        ({3: [(5,)]}, 1.75**2),
    ],
)
def test_breakers_by_hand(breakers: Breakers, lost: float) -> None:
    recent = [5, 0, 1, 2, 3, 4, 4, 5, 0, 1, 2]
    assert applied(recent, 1.0, 1.75, 2, breakers)[3] == pytest.approx(lost)


@pytest.mark.parametrize(("base", "most"), [(10.0, 10.0**38), (2.0, 2.0**127), (1.0, 1.0)])
def test_long_repetitions_stay_finite(base: float, most: float) -> None:
    """llama.cpp stops where float32 would end."""
    assert applied([1] * 5000, 1.0, base, 1, {})[1] == pytest.approx(most)


def test_many_tokens_take_linear_time() -> None:
    lost = applied([0, 1] * 50_000, 1.0, 1.00001, 2, {})
    assert lost[0] > 1
    assert lost[1] == 0


@pytest.mark.parametrize(("last_n", "free"), [(-1, False), (0, True), (4, False), (3, True)])
def test_dry_looks_back_so_far(last_n: int, free: bool) -> None:
    """0 1 0 1 is a repetition of two, seen in four tokens and not in three."""
    params = SamplingParams(temperature=0, dry_multiplier=9.0, dry_penalty_last_n=last_n)
    made = Sampler(params.resolved({}))
    for token in (3, 4, 0, 1, 0, 1):
        made.accept(token)
    assert made.sample(np.array([1, 0.5, 0, 0, 0], np.float32)) == (0 if free else 1)


# Breakers of a vocabulary.


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(tiny))


def naive_breakers(tokenizer: Tokenizer, text: str) -> dict[int, set[tuple[int, ...]]]:
    """Tokens that contain the text, or end with its start: token -> the rest of the text."""
    data, found = text.encode(), dict[int, set[tuple[int, ...]]]()
    for token in range(tokenizer.n_vocab):
        piece = tokenizer.token_bytes(token, special=True)
        if data in piece:
            found[token] = {()}
            continue
        overlaps = [n for n in range(1, len(data)) if piece[-n:] == data[:n]]
        tails = {tuple(tokenizer.encode(data[n:].decode())) for n in overlaps}
        if tails:
            found[token] = tails
    return found


@pytest.mark.parametrize("text", ["\n", ":", '"', "*", "the", " th", "e t", "hello", "\n\n", "aaa"])
def test_breakers_are_found_in_tokens(tokenizer: Tokenizer, text: str) -> None:
    got = {t: set(tails) for t, tails in BreakerSearch(tokenizer).find([text]).items()}
    assert got == naive_breakers(tokenizer, text)
    assert got


def test_several_breakers_are_found_together(tokenizer: Tokenizer) -> None:
    search = BreakerSearch(tokenizer)
    for texts in (
        ["the", "\n"],
        ["the", "he", "e", "that", "hello", " a"],
        ["aa", "aaa", "aab"],
        [],
    ):
        expected: dict[int, set[tuple[int, ...]]] = {}
        for text in texts:
            for token, tails in naive_breakers(tokenizer, text).items():
                expected.setdefault(token, set()).update(tails)
        assert {token: set(tails) for token, tails in search.find(texts).items()} == expected


def test_long_tails_are_cut(tokenizer: Tokenizer) -> None:
    found = BreakerSearch(tokenizer).find(["q" + "zxvj" * 20])
    assert max(len(tail) for tails in found.values() for tail in tails) == 20


class Pieces:
    """A tokenizer whose tokens are given."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces, self.n_vocab = pieces, len(pieces)

    def token_bytes(self, token: int, special: bool) -> bytes:
        return self.pieces[token]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def test_tokens_that_are_no_text() -> None:
    """The byte that ends tokens in the search, alone and inside of one."""
    pieces = [b"\xff", b"a\xff", b"a\xffb", b"", b"xa", b"\xffab", b"b"]
    found = BreakerSearch(cast(Tokenizer, Pieces(pieces))).find(["ab"])
    assert found == {4: ((98,),), 5: ((),)}


def test_breakers_of_a_large_vocabulary_take_no_seconds(rng: np.random.Generator) -> None:
    """0.5 s; token by token it was a second for each breaker, and a minute for a long one."""
    letters = np.frombuffer(b" etaoinshr", np.uint8)
    text, lengths = rng.choice(letters, 3_000_000).tobytes(), rng.integers(1, 12, 248_320)
    pieces = [text[end - n : end] for n, end in zip(lengths, np.cumsum(lengths), strict=True)]
    search = BreakerSearch(cast(Tokenizer, Pieces(pieces)))
    texts = [rng.choice(letters, 40).tobytes().decode() for _ in range(128)]
    start = time.process_time()
    found = search.find(texts)
    assert time.process_time() - start < 5
    assert len(found) > 100_000
    with pytest.raises(SamplingError, match="expected at most 128 texts, got 129"):
        search.find([*texts, "a"])


def test_a_long_breaker_is_cut(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """To 40 bytes, as in llama.cpp, and to whole characters."""
    search = BreakerSearch(tokenizer)
    assert search.find(["é" * 5000]) == search.find(["é" * 20])
    assert search.find(["a" + "é" * 20]) == search.find(["a" + "é" * 19])
    cut = r"dry_sequence_breakers: '\S+ is cut to 40 bytes"
    assert len(caplog.messages) == 2
    assert all(re.fullmatch(cut, message) for message in caplog.messages)


def test_a_breaker_that_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(SamplingError, match=r"dry_sequence_breakers: .* cannot be encoded"):
        BreakerSearch(tokenizer).find(["\ud800"])


def test_a_breaker_ends_a_repetition_in_a_model(tiny: Path) -> None:
    """A prompt that repeats itself, with a breaker in between or without."""
    base = {"temperature": 0, "max_tokens": 1, "dry_multiplier": 1e6, "dry_allowed_length": 2}
    with Engine.load(tiny) as engine:
        prompt = engine.encode_prompt("xqzj kvw:xqz")
        z, j = prompt[-1], engine.encode_prompt("j")[-1]
        # Only a token that would go on repeating has a chance here.
        bias = {t: -1e4 for t in range(320) if t not in (j, z)}
        given: dict[str, Any] = {**base, "logit_bias": bias | {j: 1e3}}

        def first(**params: Any) -> int:
            chosen = SamplingParams(**{**given, **params})
            return engine.generate_batch([prompt], chosen)[0].tokens[0]

        assert first(dry_multiplier=0.0) == j
        assert first(dry_sequence_breakers=()) != j
        assert first(dry_sequence_breakers=("z",)) == j
        assert first(dry_sequence_breakers=("w:",)) != j
        assert first(dry_sequence_breakers=("w:x", "v")) != j
        assert first(dry_sequence_breakers=("w:xq",)) == j
