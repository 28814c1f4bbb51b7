"""Stop texts: which part of a text that comes in pieces is shown, and where the text ends.

The definition looks at the whole text after each piece. If it contains stop texts, it is cut before
the first one. Text that could still become a stop text is held back, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import Engine, SamplingParams
from engine.runtime.request import FinishReason, Request, StopTexts
from engine.sampling.chain import Sampler
from engine.text.tokenizer import Tokenizer
from tests.support.helpers import Cli


def shown(pieces: Sequence[str], stops: Sequence[str]) -> tuple[list[str], bool]:
    """The text shown after each piece (and at the end), and whether a stop text ended it."""
    texts, made = [], StopTexts(stops)
    for piece in pieces:
        text, stopped = made.push(piece)
        texts.append(text)
        if stopped:
            assert made.finish() == ""
            return texts, True
    return [*texts, made.finish()], False


def first_stop(text: str, stops: Sequence[str]) -> int:
    """Where the first stop text begins, or -1."""
    return min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=-1)


def could_begin_a_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the start of a stop text."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


letters = st.text("ab€", max_size=5)


@settings(max_examples=500, deadline=None)
@given(st.lists(letters, max_size=12), st.lists(st.text("ab€", min_size=1, max_size=5), max_size=3))
@example(["a", "a", "b"], ["aab"])
@example(["aab", "aac"], ["aabaac"])
@example(["abab", "ac"], ["abac"])
@example(["ab"], ["b", "ab"])
def test_shown_is_what_the_whole_text_says(pieces: list[str], stops: list[str]) -> None:
    texts, stopped = shown(pieces, stops)
    so_far, given_out = "", ""
    for i, (piece, text) in enumerate(zip(pieces, texts, strict=False)):
        so_far, given_out = so_far + piece, given_out + text
        at = first_stop(so_far, stops)
        if at >= 0:
            assert given_out == so_far[:at]
            assert (stopped, len(texts)) == (True, i + 1)
            break
        held = could_begin_a_stop(so_far, stops)
        assert given_out == so_far[: len(so_far) - held]
    else:
        assert not stopped
        assert "".join(texts) == "".join(pieces)
    assert first_stop("".join(texts), stops) == -1


@pytest.mark.parametrize(
    ("pieces", "stops", "texts", "stopped"),
    [
        # What only looks like the start of a stop text comes later.
        (["one <", "b", "> two"], ["<end>"], ["one ", "<b", "> two", ""], False),
        (["x<e", "n", "d"], ["<end>"], ["x", "", "", "<end"], False),
        (["x<e", "n", "d>", "more"], ["<end>"], ["x", "", ""], True),
        # The earliest counts, not the first in the list or the longest.
        (["a B c A"], ["A", "B"], ["a "], True),
        (["abcd"], ["bc", "abcd"], [""], True),
        (["abc"], ["bc", "abcd"], ["a"], True),
        (["a", "bc"], ["abcd", "bc"], ["", "a"], True),
        # A failed start may hold another one.
        (["aab", "aac"], ["aac"], ["aab", ""], True),
        (["aa", "aac"], ["aac"], ["", "aa"], True),
        (["naïv", "e 日", "本語"], ["日本"], ["naïv", "e ", ""], True),
        (["a", "", "b"], [], ["a", "", "b", ""], False),
        ([], ["x"], [""], False),
    ],
)
def test_stops_by_hand(
    pieces: list[str], stops: list[str], texts: list[str], stopped: bool
) -> None:
    assert shown(pieces, stops) == (texts, stopped)


# A request: tokens of bytes, cut anywhere.


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return Engine.load(tiny, n_ctx=64)


class Script(Sampler):
    """Samples the given tokens."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(SamplingParams().resolved({}))
        self._script = iter(tokens)

    def sample(self, logits: object) -> int:
        return next(self._script)


def spoken(
    tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str], max_tokens: int = -1
) -> Request:
    """A request after these tokens, or those up to its end."""
    params = SamplingParams(stop=tuple(stops), max_tokens=max_tokens)
    decoder = tokenizer.stream(at_start=False)
    request = Request([1], params, Script(tokens), decoder, tokenizer.eog_ids, 10**6)
    for _ in tokens:
        if request.finish_reason is None:
            request.accept_logits(None)  # type: ignore[arg-type]
    pieces = [token.text for token in request.ready]
    assert "".join(pieces) == request.text
    return request


def test_stops_across_tokens_and_characters(engine: Engine) -> None:
    """é and 日 are two and three byte tokens."""
    tokens = list("aé日b<end>c".encode())
    for stop, text, n in (
        ("é", "a", 3), ("日", "aé", 6), ("é日", "a", 6), ("b<", "aé日", 8), ("<end>", "aé日b", 12),
        ("a", "", 1), ("日b<end>c", "aé", 13),
    ):  # fmt: skip
        request = spoken(engine.tokenizer, tokens, [stop])
        assert (request.finish_reason, request.detail) == ("stop", "stop text")
        assert (request.text, len(request.tokens)) == (text, n)


def test_what_is_held_back_comes_at_the_end(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    (end, *_) = sorted(tokenizer.eog_ids)
    held = list(b"abc<en")
    for tokens, max_tokens, reason in (
        (held, len(held), FinishReason.LENGTH),
        ([*held, end], -1, FinishReason.STOP),
    ):
        request = spoken(tokenizer, tokens, ["<end>"], max_tokens)
        assert (request.finish_reason, request.text) == (reason, "abc<en")
        assert request.tokens == held
    # While it goes on, it isn't shown; tokens are.
    request = spoken(tokenizer, held, ["<end>"])
    assert (request.finish_reason, request.text) == (None, "abc")
    assert [t.token for t in request.ready] == held
    assert [t.text for t in request.ready] == ["a", "b", "c", "", "", ""]


def test_a_stop_text_at_the_last_token_is_the_reason(engine: Engine) -> None:
    request = spoken(engine.tokenizer, list(b"ab"), ["b"], max_tokens=2)
    assert (request.finish_reason, request.text) == ("stop", "a")


def test_half_a_character_at_the_end_is_no_stop_text_for_long(engine: Engine) -> None:
    request = spoken(engine.tokenizer, list("ab日".encode())[:-1], ["日"], max_tokens=4)
    assert (request.finish_reason, request.text) == ("length", "ab\ufffd")


@settings(max_examples=100, deadline=None)
@given(
    st.text("ab日é", max_size=20),
    st.lists(st.text("ab日é", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_request_shows_the_text_before_the_first_stop(
    engine: Engine, text: str, stops: list[str]
) -> None:
    tokens = list(text.encode())
    request = spoken(engine.tokenizer, tokens, stops, max_tokens=len(tokens))
    # Characters come one at a time, so the first stop text is the one that is complete first.
    ends = [at + len(s) for s in stops if (at := text.find(s)) >= 0]
    if not text:
        assert request.finish_reason is None
    elif not ends:
        assert (request.finish_reason, request.text) == ("length", text)
    else:
        seen = text[: min(ends)]
        assert (request.finish_reason, request.text) == ("stop", seen[: first_stop(seen, stops)])
    assert first_stop(request.text, stops) == -1


# With a model, and on the command line.


def test_a_model_stops_at_any_part_of_its_text(engine: Engine) -> None:
    params: Any = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    (whole,) = engine.generate_batch(["Once upon"], SamplingParams(**params))
    assert len(whole.text) > 10
    for start in range(0, len(whole.text) - 3, 2):
        stop = whole.text[start : start + 3]
        completion = engine.generate("Once upon", SamplingParams(**params, stop=(stop,)))
        text = "".join(token.text for token in completion)
        assert text == completion.text == whole.text[: whole.text.index(stop)]
        assert completion.finish_reason == "stop"


def test_the_prompt_is_not_searched(engine: Engine) -> None:
    params: Any = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
    plain, stopping = engine.generate_batch(
        ["Once"] * 2, [SamplingParams(**params), SamplingParams(**params, stop=("Once", "nce"))]
    )
    assert plain.text == stopping.text


def test_reverse_prompts(cli: Cli, tiny: Path) -> None:
    options = ("-m", tiny, "-p", "Once upon", "--temp", 0, "-n", 30, "--ignore-eos")
    whole = cli(*options, "--no-display-prompt").out
    stop = whole[8:10]
    text = whole[: whole.index(stop)]
    for names in (("-r", stop), ("--reverse-prompt", stop), ("-r", "\x00never", "-r", stop)):
        result = cli(*options, *names)
        assert result.out == f"Once upon{text}\n"
        assert result.err.splitlines()[-1].strip() == "ended : stop (stop text)"
    assert cli(*options, "-r", "").refused() == "stop: expected texts that are not empty"
