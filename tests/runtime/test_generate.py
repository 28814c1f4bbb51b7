"""Generation: the tokens that sampling from the logits gives, where they end, and their text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.config import ConfigError
from engine.errors import EngineError
from engine.planning import plan_only
from engine.runtime.request import Token
from engine.runtime.requests import PromptError
from tests.support.helpers import N_VOCAB, ROW_BY_ROW, STD, assert_all_free, random_ids
from tools.makevocab import made_vocabulary
from tools.synth import write_model

Rng = np.random.Generator
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
# Flat enough that two seeds can't agree by chance.
WILD: Any = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 30}
PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    with Engine.load(tiny, n_ctx=128) as engine:
        yield engine


def ids_of(tokens: Iterator[Token]) -> list[int]:
    return [token.token for token in tokens]


@pytest.mark.parametrize("n_ubatch", [3, 512])
def test_greedy_is_the_highest_logit_step_by_step(path: Path, rng: Rng, n_ubatch: int) -> None:
    with Engine.load(path, n_ctx=128, n_ubatch=n_ubatch, **ROW_BY_ROW) as engine:
        ids = random_ids(rng, 20)
        allowed = np.ones(N_VOCAB, bool)
        allowed[list(engine.tokenizer.eog_ids)] = False
        for token in engine.generate(ids, GREEDY):
            logits = np.where(allowed, engine.logits(ids)[-1], -np.inf)
            second, first = np.sort(logits)[-2:]
            # Rounding may decide between two that are this close.
            assert token.token == logits.argmax() or logits[token.token] > first - 1e-3
            ids.append(token.token)
        assert len(ids) == 32
        assert second < first


def test_str_and_ids_are_the_same_prompt(engine: Engine) -> None:
    prompt = "Hello<|im_end|> the world"
    ids = engine.tokenizer.encode(prompt, add_special=True, parse_special=True)
    assert engine.encode_prompt(prompt) == ids
    assert engine.tokenizer.eos_id in ids
    expected = ids_of(engine.generate(ids, GREEDY))
    assert ids_of(engine.generate(prompt, GREEDY)) == expected
    array: Any = np.array(ids)
    assert ids_of(engine.generate(array, GREEDY)) == expected


def test_special_tokens_are_added_to_a_prompt(tmp_path: Path) -> None:
    overrides = {"tokenizer.ggml.add_bos_token": True}
    with Engine.load(write_model(tmp_path / "m", "tiny", overrides=overrides)) as engine:
        assert engine.encode_prompt("a") == [engine.tokenizer.bos_id, ord("a")]
        # Alone it makes an empty text a prompt.
        assert len(ids_of(engine.generate("", GREEDY))) == 12


@pytest.mark.parametrize("n", [0, 1, 2, 30])
def test_max_tokens(engine: Engine, n: int) -> None:
    params = SamplingParams(max_tokens=n, ignore_eos=True)
    completion = engine.generate(PROMPT, params)
    assert len(ids_of(completion)) == n
    t = completion.timings
    # Without a token to generate, nothing is computed.
    assert (t.n_prompt, t.n_eval) == (len(PROMPT) if n else 0, max(0, n - 1))
    assert_all_free(engine)


@pytest.mark.parametrize("n_prompt", [1, 63, 64, 126, 127, 128])
@pytest.mark.parametrize("max_tokens", [-1, 1000])
def test_a_full_context_ends_a_generation(engine: Engine, n_prompt: int, max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    completion = engine.generate([5] * n_prompt, params)
    # The last token needs no position: nothing is computed after it.
    assert len(ids_of(completion)) == 128 - n_prompt + 1
    # Other lengths ran before it: what they left is reused.
    n_prompt_run = completion.reuse.n_reused + completion.timings.n_prompt
    assert (n_prompt_run, completion.timings.n_eval) == (n_prompt, 128 - n_prompt)
    assert completion.finish_reason == "length"
    assert "128" in completion.detail


def test_context_sizes(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One beyond what the model was trained on gets a warning."""
    short = write_model(tmp_path / "m", "tiny", overrides={"qwen35.context_length": 100})
    for path, n_ctx, expected in (
        (tiny, None, 4096), (tiny, 0, 4096), (tiny, 10, 10), (tiny, 5000, 5000),
        (short, None, 100), (short, 0, 100), (short, 200, 200),
    ):  # fmt: skip
        caplog.clear()
        with Engine.load(path, n_ctx=n_ctx) as engine:
            assert engine.n_ctx == expected
        trained = 100 if path == short else 4096
        warned = (
            f"n_ctx (-c): a context of {n_ctx} tokens, but the model was trained on {trained}: "
        )
        assert [warned in line for line in caplog.messages] == [True] * (expected > trained)
    caplog.clear()
    # Sequences share the memory.
    Engine.load(short, n_ctx=200, n_parallel=2).close()
    assert caplog.messages == []
    Engine.load(short, n_ctx=202, n_parallel=2).close()
    assert "a context of 101 tokens" in caplog.text


ENDS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "</s>", "[EOS]", "[EOT]",
    "<|end_of_text|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip


def first_new(tokens: list[int]) -> int:
    """Index of the first token from the third on that has not been there before."""
    return next(i for i in range(2, len(tokens)) if tokens[i] not in tokens[:i])


@pytest.fixture(scope="module")
def greedy(engine: Engine) -> list[int]:
    return ids_of(engine.generate(PROMPT, GREEDY))


@pytest.mark.parametrize("key", ["eos", "eot", "eom"])
def test_ends_at_the_token_that_the_metadata_names(
    greedy: list[int], tmp_path: Path, key: str
) -> None:
    n = first_new(greedy)
    overrides = {f"tokenizer.ggml.{key}_token_id": greedy[n]}
    path = write_model(tmp_path / "m", "tiny", "Q8_0", std=STD, overrides=overrides)
    ends_after(path, n, greedy)


@pytest.mark.parametrize("name", ENDS)
def test_ends_at_a_token_of_that_name(greedy: list[int], tmp_path: Path, name: str) -> None:
    n = first_new(greedy)
    texts = list(made_vocabulary()["tokenizer.ggml.tokens"])
    if name not in texts:
        texts[texts.index("<|im_start|>")] = name
    here, there = greedy[n], texts.index(name)
    texts[here], texts[there] = texts[there], texts[here]
    overrides = {"tokenizer.ggml.tokens": texts}
    path = write_model(tmp_path / "m", "tiny", "Q8_0", std=STD, overrides=overrides)
    ends_after(path, n, greedy)


def ends_after(path: Path, n: int, greedy: list[int]) -> None:
    """The model of `path` says the first n tokens of `greedy`, then the end."""
    with Engine.load(path) as engine:
        assert greedy[n] in engine.tokenizer.eog_ids
        params = SamplingParams(temperature=0, max_tokens=12)
        completion = engine.generate(PROMPT, params)
        assert ids_of(completion) == greedy[:n]
        assert completion.timings.n_eval == n
        assert completion.finish_reason == "stop"
        assert_all_free(engine)
        # With ignore_eos the second best comes instead, and it goes on.
        ignoring = ids_of(engine.generate(PROMPT, GREEDY))
        assert ignoring[:n] == greedy[:n]
        assert len(ignoring) == 12
        assert not engine.tokenizer.eog_ids & set(ignoring)


def test_ignore_eos_never_draws_an_end(engine: Engine) -> None:
    for seed in range(4):
        params = SamplingParams(temperature=1e6, top_k=0, top_p=1, min_p=0, seed=seed)
        with_ends = ids_of(engine.generate(PROMPT, params))
        assert len(with_ends) <= 124
        ignoring = replace(params, ignore_eos=True)
        drawn = ids_of(engine.generate(PROMPT, ignoring))
        assert len(drawn) == 124
        assert not engine.tokenizer.eog_ids & set(drawn)


def test_texts_joined_are_the_decoded_tokens(engine: Engine) -> None:
    broken = 0
    for seed in range(8):
        params = SamplingParams(**WILD, seed=seed)
        tokens = list(engine.generate(PROMPT, params))
        text = "".join(token.text for token in tokens)
        assert text == engine.tokenizer.decode([token.token for token in tokens])
        broken += "\ufffd" in text
    # Random bytes are rarely UTF-8: incomplete characters have been among them.
    assert broken


def test_a_character_in_several_tokens_comes_whole(engine: Engine) -> None:
    """é is two byte tokens; the first one alone has no text yet."""
    prompt, first, second = "x", *"é".encode()
    decoder = engine.tokenizer.stream(at_start=False)
    assert (decoder.push(first), decoder.push(second)) == ("", "é")
    ids = engine.encode_prompt(prompt + "é")
    assert ids[-2:] == [first, second]


@pytest.mark.parametrize("max_tokens", [0, 12], ids=["max_tokens", "end token"])
def test_an_incomplete_character_at_the_end_is_replaced(
    tmp_path: Path, greedy: list[int], max_tokens: int
) -> None:
    """The last token before the end gets the byte that opens a character."""
    n, texts = first_new(greedy), list(made_vocabulary()["tokenizer.ggml.tokens"])
    last, opening = greedy[n - 1], 0xC3
    texts[last], texts[opening] = texts[opening], texts[last]
    overrides = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.eos_token_id": greedy[n]}
    path = write_model(tmp_path / "m", "tiny", "Q8_0", std=STD, overrides=overrides)
    params = SamplingParams(temperature=0, max_tokens=max_tokens or n)
    with Engine.load(path) as engine:
        tokens = list(engine.generate(PROMPT, params))
        text = "".join(token.text for token in tokens)
        assert text.endswith("\ufffd")
        assert text == engine.tokenizer.decode(greedy[:n])


def test_a_completion_keeps_its_first_space(tmp_path: Path) -> None:
    """SentencePiece puts a space before a text, but a completion is not the start of one."""
    words = [f"\u2581w{i}" for i in range(317)]
    overrides = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *words],
        "tokenizer.ggml.token_type": np.array([2, 3, 3, *[1] * 317], np.int32),
        "tokenizer.ggml.scores": np.zeros(320, np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": None,
    }
    path = write_model(tmp_path / "m", "tiny", "Q8_0", std=STD, overrides=overrides)
    with Engine.load(path) as engine:
        tokens = list(engine.generate(PROMPT, GREEDY))
        assert [token.text for token in tokens] == [f" w{token.token - 3}" for token in tokens]


def test_seeds(engine: Engine) -> None:
    runs = {}
    for seed in (0, 1, 2**64 - 1):
        params = SamplingParams(**WILD, seed=seed)
        runs[seed] = ids_of(engine.generate(PROMPT, params))
        assert ids_of(engine.generate(PROMPT, params)) == runs[seed]
    assert len(set(map(tuple, runs.values()))) == 3
    for unset in (None, -1):
        params = SamplingParams(**WILD, seed=unset)
        assert ids_of(engine.generate(PROMPT, params)) != ids_of(engine.generate(PROMPT, params))


def test_the_prompt_is_penalized_too(tiny: Path) -> None:
    """With a penalty no token can withstand, greedy generation repeats none, once or ever."""
    prompt = np.random.default_rng(0).permutation(317)[:280].tolist()
    penalty = replace(GREEDY, repeat_penalty=1e6, repeat_last_n=-1)
    with Engine.load(tiny) as engine:
        tokens = prompt + ids_of(engine.generate(prompt, penalty))
        assert len(set(tokens)) == len(tokens) == 292
        for off in (replace(penalty, repeat_last_n=0), replace(penalty, repeat_penalty=1.0)):
            plain = ids_of(engine.generate(prompt, GREEDY))
            assert ids_of(engine.generate(prompt, off)) == plain
            assert set(plain) & set(prompt)


def test_the_files_sampling_metadata_is_the_default(tmp_path: Path, greedy: list[int]) -> None:
    overrides = {"general.sampling.temp": 0.0}
    path = write_model(tmp_path / "m", "tiny", "Q8_0", std=STD, overrides=overrides)
    with Engine.load(path) as engine:
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        assert ids_of(engine.generate(PROMPT, params)) == greedy
        hot = SamplingParams(**WILD, ignore_eos=True)
        assert ids_of(engine.generate(PROMPT, hot))[:12] != greedy


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty: expected at least one token"),
        ([], "the prompt is empty: expected at least one token"),
        ([1] * 129, "the prompt has 129 tokens, the context 128: shorten it or raise n_ctx (-c)"),
        ([1, 320], "prompt: token id 320: expected 0 to 319"),
        ([1, -1], "prompt: token id -1: expected 0 to 319"),
    ],
)
def test_prompts_that_cannot_be_run(engine: Engine, prompt: str | list[int], message: str) -> None:
    # At once, not when the first token is asked for.
    with pytest.raises(PromptError) as error:
        engine.generate(prompt)
    assert one_line(error.value) == message
    if isinstance(prompt, list):
        with pytest.raises(PromptError) as error:
            engine.logits(prompt)
        assert str(error.value) == message
    assert_all_free(engine)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_ctx": -1}, "n_ctx: expected at least 0, got -1"),
        ({"n_ctx": 2**31}, "n_ctx: expected at most 2147483647, got 2147483648"),
        ({"n_ctx": 2**62}, "n_ctx: expected at most 2147483647, got 4611686018427387904"),
        ({"n_batch": -1}, "n_batch: expected at least 0, got -1"),
        ({"n_ubatch": -1}, "n_ubatch: expected at least 0, got -1"),
        ({"n_parallel": 0}, "n_parallel: expected at least 1, got 0"),
        ({"n_checkpoints": -1}, "n_checkpoints: expected at least 0, got -1"),
        ({"n_threads": 0}, "n_threads: expected at least 1, got 0"),
        ({"type_k": "q8_0"}, "type_k: expected one of f32, f16, got q8_0"),
        ({"type_v": ""}, "type_v: expected one of f32, f16, got "),
        ({"gdn": "fused"}, "gdn: expected one of auto, scan, chunk, decomposed, got fused"),
        ({"backend": "tpu"}, "backend: expected one of auto, cpu, cuda, reference, got tpu"),
        ({"n_ctxt": 5}, "unknown option n_ctxt"),
    ],
)  # fmt: skip
def test_options_out_of_range(tiny: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Engine.load(tiny, **options)
    assert words in one_line(error.value)


def test_a_closed_engine_refuses(tiny: Path) -> None:
    with Engine.load(tiny) as engine:
        tokens = engine.generate(PROMPT, GREEDY)
        next(tokens)
    uses = (lambda: next(tokens), lambda: engine.logits([1]), lambda: engine.generate([1]))
    for use in (*uses, engine.advance, engine.start):
        with pytest.raises(EngineError, match="the engine is closed"):
            use()
    engine.close()  # a second time is no error


@pytest.mark.parametrize("n_tokens", [1, 2, 512])
def test_graphs(engine: Engine, n_tokens: int) -> None:
    path = engine.file.path
    fused = plan_only(path, n_tokens).graph
    decomposed = plan_only(path, n_tokens, "decomposed").graph
    assert fused.capacity.n_tokens == n_tokens
    ops = [node.op.name for node in fused.nodes]
    assert ops.count("GATED_DELTA_NET") == 3
    assert ops.count("ATTENTION") == 1
    assert len(ops) == len(engine.plan.graph.nodes)
    assert "GATED_DELTA_NET" not in [node.op.name for node in decomposed.nodes]
    assert len(decomposed.nodes) > len(ops)
    assert list(fused.outputs) == ["logits"]
    assert fused.outputs["logits"].shape[1] == N_VOCAB
    per_layer = [sum(n.name.startswith(f"blk.{i}.") for n in fused.nodes) for i in range(4)]
    assert max(per_layer) <= 14
