"""Perplexity: every score against a float64 softmax, text chunks against llama.cpp's loops, and the
command."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import Engine
from engine.bench import perplexity as perplexity_module
from engine.bench.perplexity import (
    PerplexityError,
    ScoredChunk,
    chunks,
    encode,
    negative_log_likelihood,
    perplexity,
)
from engine.commands import output
from tests.support.helpers import STD, Cli, assert_all_free, float64_engine, random_ids
from tools.synth import write_model

Rng = np.random.Generator


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def scores(engine: Engine, ids: list[int], n_ctx: int, stride: int) -> list[NDArray[np.float64]]:
    """-log p of every scored token of each text chunk, by the loops of llama.cpp."""
    found = []
    if stride:
        calc_chunk = n_ctx + stride // 2
        n_chunk = (len(ids) - calc_chunk + stride - 1) // stride
        for i in range(n_chunk):
            window = ids[i * stride : i * stride + calc_chunk]
            logits = log_softmax(engine.logits(window).astype(np.float64))
            rows = range(calc_chunk - stride - 1, calc_chunk - 1)
            found.append(np.array([-logits[j, window[j + 1]] for j in rows]))
        return found
    for i in range(len(ids) // n_ctx):
        tokens = ids[i * n_ctx : (i + 1) * n_ctx]
        tokenizer = engine.tokenizer
        given: Any = [tokenizer.bos_id, *tokens[1:]] if tokenizer.add_bos else tokens
        logits = log_softmax(engine.logits(given).astype(np.float64))
        rows = range(n_ctx // 2, n_ctx - 1)
        found.append(np.array([-logits[j, tokens[j + 1]] for j in rows]))
    return found


SIZES = [(4, 0), (5, 0), (37, 0), (64, 0), (130, 0), (16, 1), (16, 16), (90, 33)]


@pytest.mark.parametrize(
    ("n_ctx", "stride", "n_ubatch"),
    [*((*sizes, 512) for sizes in SIZES), (37, 0, 5), (130, 0, 64), (90, 33, 64)],
)
def test_every_estimate(tiny: Path, rng: Rng, n_ctx: int, stride: int, n_ubatch: int) -> None:
    ids = random_ids(rng, 2 * n_ctx + 2 * stride + 1)
    with float64_engine(tiny, n_ctx=256, n_ubatch=n_ubatch) as engine:
        expected = scores(engine, ids, n_ctx, stride)
        got = list(perplexity(engine, ids, n_ctx, stride))
        assert_all_free(engine)
    assert len(got) == len(expected) >= 2
    for i, estimate in enumerate(got, 1):
        nll = np.concatenate(expected[:i])
        assert estimate.n_scored == len(nll)
        assert estimate.ppl == pytest.approx(math.exp(nll.mean()), rel=1e-6)
        if len(nll) == 1:
            assert math.isnan(estimate.error)
        else:
            error = math.exp(nll.mean()) * nll.std(ddof=1) / math.sqrt(len(nll))
            assert estimate.error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_agree(tiny: Path, rng: Rng, backend: str) -> None:
    ids = random_ids(rng, 300)
    with Engine.load(tiny, backend=backend, n_ctx=128) as engine:
        *_, got = perplexity(engine, ids, 128)
    with float64_engine(tiny, n_ctx=128) as engine:
        expected = np.mean(np.concatenate(scores(engine, ids, 128, 0)))
    assert math.log(got.ppl) == pytest.approx(expected, abs=0.02)


def test_bos_begins_every_chunk_but_is_not_scored(tmp_path: Path, rng: Rng) -> None:
    overrides = {"tokenizer.ggml.add_bos_token": True}
    path = write_model(tmp_path / "m.gguf", "tiny", std=STD, overrides=overrides)
    with float64_engine(path, n_ctx=64) as engine:
        ids = encode(engine, "the cat and the hat in the house of the mouse" * 3)
        assert ids[0] == engine.tokenizer.bos_id
        assert ids.count(ids[0]) == 1
        *_, got = perplexity(engine, ids, 20)
        with_bos = np.mean(np.concatenate(scores(engine, ids, 20, 0)))
        assert math.log(got.ppl) == pytest.approx(with_bos, rel=1e-7)
        engine.tokenizer.add_bos = False
        assert abs(np.mean(np.concatenate(scores(engine, ids, 20, 0))) - with_bos) > 1e-4


def test_special_tokens_in_a_text_are_text(tiny: Path) -> None:
    with Engine.load(tiny, n_ctx=64) as engine:
        assert not engine.tokenizer.eog_ids & set(encode(engine, "a<|im_end|>b"))


def test_chunks() -> None:
    assert chunks(10, 4) == [ScoredChunk(0, 4, 3), ScoredChunk(4, 4, 3)]
    assert chunks(15, 5) == [ScoredChunk(0, 5, 3), ScoredChunk(5, 5, 3), ScoredChunk(10, 5, 3)]
    # Windows of 4 and 3/2.
    assert chunks(12, 4, 3) == [ScoredChunk(0, 5, 2), ScoredChunk(3, 5, 2), ScoredChunk(6, 5, 2)]
    assert len(chunks(11, 4, 3)) == 2
    # All tokens after the first window's start are scored once.
    scored = [c.start + i for c in chunks(100, 8, 5) for i in range(c.first, c.n_tokens)]
    assert scored == list(range(5, 95))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((511, 512), "the text has 511 tokens: expected at least the 512 of one chunk"),
        ((0, 512), "the text has 0 tokens"),
        ((640, 512, 256), "the text has 640 tokens: expected at least the 641 of one chunk"),
        ((99, 3), "n_ctx: expected at least 4, got 3"),
        ((99, 8, 9), "stride: expected 0 to the 8 of n_ctx, got 9"),
        ((99, 8, -1), "stride: expected 0 to the 8 of n_ctx, got -1"),
    ],
)
def test_sizes_without_a_perplexity(sizes: tuple[int, ...], words: str) -> None:
    with pytest.raises(PerplexityError, match=re.escape(words)):
        chunks(*sizes)


def test_one_chunk_is_enough() -> None:
    assert len(chunks(512, 512)) == len(chunks(641, 512, 256)) == 1


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_negative_log_likelihood(rng: Rng, scale: float) -> None:
    # More rows than are exponentiated at a time.
    logits = (scale * rng.standard_normal((90, 50_000))).astype(np.float32)
    targets = rng.integers(0, 50_000, 90).tolist()
    expected = -log_softmax(logits.astype(np.float64))[np.arange(90), targets]
    got = negative_log_likelihood(logits, targets)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e30, 0], [-1e30, -1e30], [500, 400]], np.float32)
    got = negative_log_likelihood(logits, [0, 1, 1])
    np.testing.assert_allclose(got, [0, math.log(2), 100])


# The command.


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("the cat in the hat, and the mouse on the house: é\n" * 12, "utf-8")
    return path


@pytest.mark.parametrize("n_chunks", [None, -1, 2, 99])
@pytest.mark.parametrize("stride", [0, 20])
def test_the_command(
    cli: Cli,
    tiny: Path,
    text: Path,
    stride: int,
    n_chunks: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Estimates on one line, as llama-perplexity's: `[1]4.5555,[2]5.1234,`."""
    options = ("-c", 64, "--stride", stride, *(() if n_chunks is None else ("--chunks", n_chunks)))
    # How long it will take is said where that is long.
    monkeypatch.setattr("engine.commands.perplexity.SHORT_S", 0.0)
    result = cli("perplexity", "-m", tiny, "-f", text, *options)
    assert result.status == 0
    with Engine.load(tiny, n_ctx=128) as engine:
        # The last line's end is dropped.
        ids = encode(engine, text.read_text("utf-8")[:-1])
        got = list(perplexity(engine, ids, 64, stride))
    assert 3 < len(got) < 99
    if n_chunks == 2:
        got = got[:2]
    line = "".join(f"[{i}]{e.ppl:.4f}," for i, e in enumerate(got, 1))
    last = f"Final estimate: PPL = {got[-1].ppl:.4f} +/- {got[-1].error:.5f}"
    assert result.out == f"{line}\n{last}\n"
    size = 74 if stride else 64
    assert re.fullmatch(
        rf"{len(got)} chunks, the first in \d+\.\d\d s: about \d\d:\d\d for all\n"
        rf"{len(got)} chunks of {size} tokens, {got[-1].n_scored} tokens scored, in .* s "
        r"\(.* tokens per second\)\n",
        result.err,
    )
    piped = cli("perplexity", "-m", tiny, "-f", "-", *options, stdin=text.read_bytes())
    assert piped.out == result.out


def test_estimates_come_one_by_one(
    cli: Cli, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is printed before the next text chunk runs; the line ends whatever happens."""
    shown: list[str] = []
    score = perplexity_module._score

    def noted(*operands: Any) -> Any:
        if len(shown) == 3:
            raise KeyboardInterrupt
        shown.append("".join(written))
        return score(*operands)

    written: list[str] = []
    plain = output.write

    def write(part: str) -> None:
        written.append(part)
        plain(part)

    monkeypatch.setattr(perplexity_module, "_score", noted)
    monkeypatch.setattr("engine.commands.perplexity.write", write)
    result = cli("perplexity", "-m", tiny, "-f", text, "-c", 64)
    assert result.status == 130
    first, second, third = re.findall(r"\[\d\][\d.]+,", result.out)
    assert shown == ["", first, first + second]
    assert result.out == f"{first}{second}{third}\n"


def test_a_first_chunk_that_fails_prints_nothing(
    cli: Cli, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PerplexityError("broken")

    monkeypatch.setattr(perplexity_module, "_score", fail)
    assert cli("perplexity", "-m", tiny, "-f", text, "-c", 64).refused() == "broken"


def test_the_default_chunk_is_512(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "long").write_text("ab" * 600)
    result = cli("perplexity", "-m", tiny, "-f", tmp_path / "long")
    assert "2 chunks of 512 tokens, 510 tokens scored" in result.err


def test_texts_that_cannot_be_measured(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    def refused(data: bytes | None, *options: object) -> str:
        path = tmp_path / "text"
        if data is not None:
            path.write_bytes(data)
        line = cli("perplexity", "-m", tiny, "-f", path, *options).refused()
        return line.removeprefix(f"{path}: ")

    assert refused(None) == "No such file or directory"
    assert refused(b"") == refused(b"\n") == "expected a text, got nothing"
    assert refused(b"a\xffb") == "expected UTF-8, got byte 0xff at offset 1"
    assert refused(b"GGUF\0\0") == "expected a text, got a NUL at character 4"
    assert refused(b"abc") == (
        "the text has 3 tokens: expected at least the 512 of one chunk (-c is its size)"
    )
    assert refused(b"q" * 18, "-c", 12, "--stride", 12).startswith("the text has 18 tokens: expe")
    assert cli("perplexity", "-m", tmp_path / "none", "-f", tiny).refused()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), "the following arguments are required: -f/--file"),
        (("-f", "x", "-c", 3), "argument -c/--ctx-size: expected at least 4, got 3"),
        (("-f", "x", "--stride", -1),
         "argument --stride/--ppl-stride: expected at least 0, got -1"),
        (("-f", "x", "--stride", 513),
         "argument --stride: expected at most the 512 of -c, got 513"),
        (("-f", "x", "--chunks", 0),
         "argument --chunks: expected at least 1, or -1 for all, got 0"),
        (("-f", "x", "--chunks", -2), "argument --chunks: expected at least -1, got -2"),
        (("-f", "x", "-np", 2), "-np is no option of this command, but of cli.py, cli.py serve"),
    ],
)  # fmt: skip
def test_usage(cli: Cli, tiny: Path, options: tuple[object, ...], line: str) -> None:
    result = cli("perplexity", "-m", tiny, *options)
    name = "cli.py perplexity"
    assert result == (2, "", f"{name}: {line} (see {name} --help)\n")
