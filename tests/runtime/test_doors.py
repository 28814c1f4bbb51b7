"""Every door of the Python API: values of a wrong type or range are refused in one line.

Nothing may be changed by them, and nothing may crash: ids that no vocabulary has reach no kernel.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine as package
from engine import ChatTemplate, Chunk, Engine, EngineError, Logits, SamplingParams, Tokenizer
from engine.backends.cuda.backend import CudaBackend
from engine.config import EngineConfig
from engine.text.template import BUILT_IN
from tests.support.helpers import assert_all_free

CHATML = ChatTemplate(BUILT_IN["chatml"])
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
USER = {"role": "user", "content": "a"}
N_VOCAB = 320


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Iterator[Engine]:
    with Engine.load(tiny, n_ctx=128, n_parallel=2) as engine:
        yield engine


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(EngineError) as raised:
        call()
    line = str(raised.value)
    assert "\n" not in line
    assert len(line) < 250
    return line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_ctx": "10"}, "n_ctx: expected an integer, got '10'"),
        ({"n_ctx": 10.0}, "n_ctx: expected an integer, got 10.0"),
        ({"n_ctx": True}, "n_ctx: expected an integer, got True"),
        ({"n_ctx": -1}, "n_ctx: expected at least 0, got -1"),
        ({"n_parallel": None}, "n_parallel: expected an integer, got None"),
        ({"n_parallel": 2**40}, f"n_parallel: expected at most {2**31 - 1}, got {2**40}"),
        ({"n_threads": 2**31}, f"n_threads: expected at most {2**31 - 1}, got {2**31}"),
        ({"type_v": np.array([1, 2])}, "type_v: expected one of f32, f16, got array([1, 2])"),
        ({"n_threads": "2"}, "n_threads: expected an integer, got '2'"),
        ({"backend": 5}, "backend: expected one of auto, cpu, cuda, reference, got 5"),
        ({"backend": ["cpu"]}, "backend: expected one of auto, cpu, cuda, reference, got ['cpu']"),
        ({"type_k": 16}, "type_k: expected one of f32, f16, got 16"),
        ({"cpu_isa": 2}, "cpu_isa: expected a text, got 2"),
        ({"activations": 8.0}, "activations: expected an integer, got 8.0"),
        ({"activations": 9}, "activations: expected 8 or 15, got 9"),
        ({"activations": 16}, "activations: expected 8 or 15, got 16"),
        ({"backend": "reference", "activations": 8},
         "activations (--activations): reference has no choice of them, got 8"),
        ({"strict_backend": "yes"}, "strict_backend: expected true or false, got 'yes'"),
        ({"check": 1}, "check: expected true or false, got 1"),
        ({"gpu_memory": 0}, "gpu_memory: expected at least 1, got 0"),
        ({"gpu_memory": "24G"}, "gpu_memory: expected an integer, got '24G'"),
        ({"override_tensor": 3}, "override_tensor: expected a sequence of texts, got 3"),
        ({"override_tensor": [3]}, "override_tensor: expected texts, got 3"),
        ({"n_contxt": 5}, "unknown option n_contxt (did you mean n_ctx?)"),
        ({"n_thread": 5}, "unknown option n_thread (did you mean n_threads?)"),
        ({"temperature": 0}, "unknown option temperature"),
    ],
)  # fmt: skip
def test_options_of_an_engine(tiny: Path, options: dict[str, Any], said: str) -> None:
    assert refused(lambda: Engine.load(tiny, **options)) == said


def test_activations_are_the_choice_of_a_cpu() -> None:
    """A GPU refuses them by its name; with `auto` they are for the nodes that a CPU runs."""
    line = refused(
        lambda: EngineConfig(backend="cuda", activations=15).resolved(CudaBackend.traits)
    )
    assert line == "activations (--activations): cuda has no choice of them, got 15"
    config = EngineConfig(activations=8).resolved(CudaBackend.traits)
    assert config.activations == 8


@pytest.mark.parametrize("path", [5, b"model.gguf", ["model.gguf"], object, ""])
def test_a_model_is_a_path(path: Any) -> None:
    assert refused(lambda: Engine.load(path)).startswith("model: expected a path, got ")
    for address in ("https://host/model.gguf", "hf://model"):
        line = refused(partial(Engine.load, address))
        assert line == f"model: expected a file (nothing is downloaded here), got '{address}'"


def test_numbers_of_numpy_are_numbers(tiny: Path) -> None:
    options: Any = {"n_ctx": np.int64(100), "n_parallel": np.int32(2), "check": np.bool_(False)}
    with Engine.load(tiny, **options) as engine:
        assert (engine.n_ctx, type(engine.config.n_ctx)) == (100, int)
        given: Any = {"temperature": np.float32(0), "max_tokens": np.int64(3)}
        params = SamplingParams(**given, logit_bias={5: -np.inf}, ignore_eos=True)
        prompt: Any = np.array([1, 2], np.int32)
        assert len(list(engine.generate(prompt, params))) == 3


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"stop": None}, "stop: expected a sequence of texts, got None"),
        ({"stop": (5,)}, "stop: expected texts, got 5"),
        ({"stop": b"a"}, "stop: expected a sequence of texts, got b'a'"),
        ({"stop": {"a"}}, "stop: expected a sequence of texts, got {'a'}"),
        ({"stop": ""}, "stop: expected texts that are not empty"),
        ({"dry_sequence_breakers": 1}, "dry_sequence_breakers: expected a sequence of "),
        ({"logit_bias": {"5": 1.0}}, "logit_bias: expected token ids, got '5'"),
        ({"logit_bias": {5: "1"}}, "logit_bias: expected numbers or -inf, got '1'"),
        ({"logit_bias": {5: np.nan}}, "logit_bias: expected numbers or -inf, got nan"),
        ({"logit_bias": {5: 10**400}}, "logit_bias: expected numbers or -inf, got 1000"),
        ({"logit_bias": {5: -(10**400)}}, "logit_bias: expected numbers or -inf, got -1000"),
        ({"max_tokens": -(10**5000)}, "max_tokens: expected at least -1, got a"),
        ({"temperature": 10**5000}, "temperature: expected a number, got a"),
        ({"samplers": [np.array([1, 2])]}, "samplers: expected one of "),
        ({"logit_bias": [5]}, "logit_bias: expected a mapping of token ids and numbers, got [5]"),
        ({"temperature": "0"}, "temperature: expected a number, got '0'"),
        ({"temperature": 1j}, "temperature: expected a number, got 1j"),
        ({"top_k": 2.5}, "top_k: expected an integer, got 2.5"),
        ({"max_tokens": None}, "max_tokens: expected an integer, got None"),
        ({"seed": "x"}, "seed: expected an integer, got 'x'"),
        ({"samplers": "top_k"}, "samplers: expected a sequence of names, got 'top_k'"),
        ({"samplers": [["top_k"]]}, "samplers: expected one of "),
        ({"ignore_eos": 1}, "ignore_eos: expected true or false, got 1"),
        ({"logprobs": -1}, "logprobs: expected 0 to "),
        ({"logprobs": True}, "logprobs: expected an integer, got True"),
        ({"logits_processors": 5}, "logits_processors: expected a sequence of functions, got 5"),
        ({"logits_processors": [5]}, "logits_processors: expected functions, got 5"),
    ],
)  # fmt: skip
def test_sampling_parameters(params: dict[str, Any], said: str) -> None:
    assert refused(lambda: SamplingParams(**params)).startswith(said)


def test_one_text_is_a_text_to_stop_at() -> None:
    assert SamplingParams(stop="ab").stop == SamplingParams(stop=["ab"]).stop == ("ab",)
    assert SamplingParams(dry_sequence_breakers="ab").dry_sequence_breakers == ("ab",)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([1.5, 2.0], "prompt: token 0: expected an integer, got 1.5"),
        (np.array([1.5]), "prompt: token 0: expected an integer, got "),
        (np.array([[1]]), "prompt: expected a sequence of token ids, or a text, got array([[1]])"),
        ([1, True], "prompt: token 1: expected an integer, got True"),
        ([1, None], "prompt: token 1: expected an integer, got None"),
        (b"a", "prompt: expected a sequence of token ids, or a text, got b'a'"),
        (None, "prompt: expected a sequence of token ids, or a text, got None"),
        (5, "prompt: expected a sequence of token ids, or a text, got 5"),
        (["a", "b"], "prompt: expected a text or a sequence of token ids (generate_batch takes s"),
        ([USER], "prompt: expected a text or a sequence of token ids (chat takes messages), got "),
        ({1: 2}, "prompt: expected a sequence of token ids, or a text, got {1: 2}"),
        (CYCLE, "prompt: token 0: expected an integer, got [[...]]"),
        ([-1], f"prompt: token id -1: expected 0 to {N_VOCAB - 1}"),
        ([N_VOCAB], f"prompt: token id {N_VOCAB}: expected 0 to {N_VOCAB - 1}"),
        ([10**5000], "prompt: token id a int: expected 0 to"),
        ([], "the prompt is empty: expected at least one token"),
    ],
)  # fmt: skip
def test_prompts(loaded: Engine, prompt: Any, said: str) -> None:
    assert refused(lambda: loaded.generate(prompt)).startswith(said)
    (completion,) = loaded.generate_batch([prompt])
    assert completion.finish_reason == "error"
    assert completion.detail.startswith(said)
    assert refused(lambda: loaded.logits(prompt)).startswith(said[:4])
    assert_all_free(loaded)


BAD_IDS = [
    -1, N_VOCAB, 10**6, 2**31, 2**40, 1.5, "1", None, True, np.float32(1), [1],
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_IDS, ids=repr)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ids_at_every_door(tiny: Path, backend: str, bad: Any) -> None:
    with Engine.load(tiny, backend=backend, n_ctx=128) as engine:
        seq = engine.memory.create()
        before = engine.step([Chunk(seq, [1, 2])])
        calls: list[Callable[[], Any]] = [
            lambda: engine.prefill(seq, [3, bad]),
            lambda: engine.prefill(seq, [bad], Logits.ALL),
            lambda: engine.step([Chunk(seq, [bad])]),
            lambda: engine.run([Chunk(seq, [3, bad])]),
            lambda: engine.run_timed([Chunk(seq, [bad])]),
            lambda: engine.logits([1, bad]),
            lambda: engine.generate([bad]),
            lambda: engine.tokenizer.decode([bad]),
            lambda: engine.tokenizer.token_bytes(bad),
            lambda: engine.tokenizer.text(bad),
            lambda: engine.tokenizer.stream().push(bad),
        ]
        for call in calls:
            assert "expected" in refused(call)
        assert engine.memory.n_tokens(seq) == 2
        engine.memory.free(seq)
        again = engine.memory.create()
        assert np.array_equal(engine.step([Chunk(again, [1, 2])]), before)


def test_batches(loaded: Engine) -> None:
    seq, engine = loaded.memory.create(), loaded
    bad: Any
    for bad, said in (
        (5, "chunks: expected a sequence of chunks, got 5"),
        ([5], "chunks: expected a Chunk, got 5"),
        ([(seq, [1])], "chunks: expected a Chunk, got "),
        ([Chunk("a", [1])], "sequence 'a' is not there"),  # type: ignore[arg-type]
        ([Chunk([], [1])], "sequence [] is not there"),  # type: ignore[arg-type]
        ([Chunk(seq, [1], "last")], "chunk: logits: expected a Logits, got 'last'"),  # type: ignore[arg-type]
        ([Chunk(seq, [1], n_snapshots=-1)], "chunk: n_snapshots: expected at least 0, got -1"),
        ([Chunk(seq, "ab")], "chunk: tokens: expected a sequence of token ids, got 'ab'"),  # type: ignore[arg-type]
        ([Chunk(seq, [])], "expected at least one token of each sequence, got none"),
        ([], "expected at least one token of each sequence, got none"),
    ):  # fmt: skip
        for call in (engine.run, engine.step, engine.run_timed):
            assert refused(partial(call, bad)).startswith(said)
    assert refused(lambda: engine.prefill(seq, [])).startswith("expected at least one token")
    assert refused(lambda: engine.prefill(99, [1])).startswith("sequence 99 is not there")
    engine.memory.free(seq)
    assert_all_free(engine)


def test_memory(loaded: Engine) -> None:
    memory: Any = loaded.memory
    seq = memory.create()
    loaded.step([Chunk(seq, [1, 2])])
    kept = memory.checkpoint(seq)
    bad: Any
    for bad in (99, -1, "a", None, [1]):
        for call in (memory.n_tokens, memory.fork, memory.checkpoint, memory.allocation,
                     memory.owned, memory.add_rollback_point):  # fmt: skip
            line = refused(partial(call, bad))
            assert line.endswith("is not there: it was freed, or never created")
        assert "is not there" in refused(partial(memory.truncate, bad, 1))
    for bad in ("a", None, [1]):
        assert "expected an integer" in refused(partial(memory.free, bad))
    for bad in (1.5, "1", None, -1):
        assert "n_tokens: expected" in refused(partial(memory.truncate, seq, bad))
    for bad in (1, "a", [1]):
        said = "expected a rollback point (none), got position "
        assert refused(partial(memory.checkpoint, seq, bad)).startswith(said)
        assert refused(partial(kept.rolled_back, bad)).startswith(said)
        assert "expected a Checkpoint" in refused(partial(memory.restore, seq, bad))
        generate: Any = partial(loaded.generate, [1], after=bad)
        assert "expected a Checkpoint" in refused(generate)
    assert memory.n_tokens(seq) == 2
    kept.release()
    memory.free(seq)
    assert_all_free(loaded)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "messages: expected a sequence of messages, got 'hello'"),
        (USER, "messages: expected a sequence of messages, got "),
        (None, "messages: expected a sequence of messages, got None"),
        ([], "the conversation is empty: expected at least one message"),
        (["hello"], "message 0: expected a role and a content, got 'hello'"),
        ([{"content": "a"}], "message 0: expected a role and a content, got "),
        ([USER, {"role": "user"}], "message 1: expected a content, got "),
        ([{"role": "user", "content": 5}], "message 0: content: expected a text, or a list"),
        ([{"role": "user", "content": CYCLE}], "message 0: content: expected parts of type text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "message 0: content: expected par",
        ),
        ([{**USER, "more": CYCLE}], "messages: expected values that don't hold themselves"),
        ([{**USER, "tool_calls": "x"}], "tool_calls: expected a list of calls, got 'x'"),
    ],
)
def test_messages(loaded: Engine, messages: Any, said: str) -> None:
    assert refused(lambda: loaded.chat(messages, template=CHATML)).startswith(said)


def test_what_goes_with_messages(loaded: Engine) -> None:
    for options, said in (
        ({"template": "chatml"}, "template: expected a ChatTemplate, got 'chatml'"),
        ({"template": CHATML, "tools": {"a": 1}}, "tools: expected a sequence of JSON schemas"),
        ({"template": CHATML, "tools": ["a"]}, "tools: expected a mapping of a JSON schema"),
        ({"template": CHATML, "tools": [{}]}, "chat template takes no tools: it reads no tools"),
        ({"template": CHATML, "reasoning": True}, "chat template takes no reasoning: it reads no"),
        ({"template": CHATML, "reasoning": "yes"}, "reasoning: expected true or false, got 'yes'"),
        ({"template": CHATML, "params": {}}, "params: expected a SamplingParams, got {}"),
    ):
        given: Any = options
        assert refused(partial(loaded.chat, [USER], **given)).startswith(said)
    template: Any = 5
    assert refused(lambda: ChatTemplate(template)) == "chat template: expected a text, got 5"


def test_a_batch_is_several_prompts(loaded: Engine) -> None:
    bad: Any
    for bad, said in (
        ("text", "prompts: expected a sequence of prompts, got 'text'"),
        (b"text", "prompts: expected a sequence of prompts, got b'text'"),
        (5, "prompts: expected a sequence of prompts, got 5"),
        ({"a": 1}, "prompts: expected a sequence of prompts, got {'a': 1}"),
    ):
        assert refused(partial(loaded.generate_batch, bad)) == said
    for bad, said in (
        ([SamplingParams()], "params: expected 2, one a prompt, got 1"),
        ([None, {}], "params: expected a SamplingParams, got {}"),
        ("ab", "params: expected a SamplingParams, got 'a'"),
        (5, "params: expected a SamplingParams, got 5"),
    ):
        assert refused(partial(loaded.generate_batch, [[1], [2]], bad)) == said
    for bad in (None, 5):
        wrong: Any = partial(loaded.generate_batch, [[1]], on_done=bad)
        assert refused(wrong) == f"on_done: expected a function, got {bad}"
    bad = {"temperature": 0}
    assert refused(lambda: loaded.generate([1], bad)).startswith("params: expected a Sampling")
    text: Any = 5
    assert refused(lambda: loaded.encode_prompt(text)) == "prompt: expected a text, got 5"
    assert refused(lambda: loaded.tokenizer.encode(text)) == "text: expected a text, got 5"
    assert refused(lambda: loaded.tokenizer.segments(text)) == "text: expected a text, got 5"
    assert "expected a GGUFFile" in refused(lambda: Tokenizer.from_gguf(text))
    assert "expected token ids" in refused(lambda: loaded.tokenizer.decode("12"))  # type: ignore[arg-type]
    assert_all_free(loaded)


# What help() and repr() show.


def test_load_has_the_options_of_the_config() -> None:
    shown = {
        name: (p.default, p.annotation)
        for name, p in inspect.signature(Engine.load).parameters.items()
        if name not in ("path", "unknown")
    }
    assert shown == {f.name: (f.default, f.type) for f in fields(EngineConfig)}


def test_help_tells_the_defaults() -> None:
    text = " ".join(str(SamplingParams.__doc__).split())
    for f in fields(SamplingParams):
        number: Any = f.metadata.get("number")
        if f.default is None and number and number.default is not None:
            assert f"{f.name} {number.default:g}" in text, f.name
    told = re.findall(r"\b(\w+)(?=[,: ])", str(Engine.load.__doc__))
    assert inspect.signature(Engine.load).parameters.keys() - {"path", "unknown"} <= set(told)


def test_parameters_keep_what_they_were_given() -> None:
    bias: Any = {5: -1, np.int64(6): np.float32(2)}
    params = SamplingParams(logit_bias=bias)
    bias[5] = "x"
    assert params.logit_bias == {5: -1.0, 6: 2.0}
    assert {type(v) for v in (*params.logit_bias, *params.logit_bias.values())} == {int, float}
    precise: Any = np.longdouble(0.5)
    assert type(SamplingParams(temperature=precise).temperature) is float


def test_nothing_is_taken_by_a_closed_engine(tiny: Path) -> None:
    engine = Engine.load(tiny, n_ctx=128)
    engine.close()
    for params in (SamplingParams(), SamplingParams(max_tokens=0)):
        assert refused(partial(engine.generate, [1], params)) == "the engine is closed"
    assert refused(engine.__enter__) == "the engine is closed"


def test_what_is_exported_is_there() -> None:
    assert package.__all__ == sorted(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for name in ("Nothing", "nothing", ""):
        assert not hasattr(package, name)


def test_reprs_are_one_short_line(loaded: Engine) -> None:
    completion = loaded.generate([1], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert repr(completion) == "<Completion not finished, 0 tokens: ''>"
    completion.wait()
    shown = repr(completion)
    assert shown.startswith("<Completion length, 2 tokens: ")
    assert repr(SamplingParams(top_k=5, stop="x")) == "SamplingParams(top_k=5, stop=('x',))"
    assert repr(SamplingParams()) == "SamplingParams()"
    kept = loaded.memory.checkpoint(loaded.memory.create())
    for thing in (loaded, loaded.memory, loaded.tokenizer, loaded.cache, CHATML, kept):
        assert " at 0x" not in repr(thing)
        assert repr(thing).count("\n") == 0
    assert loaded.file.path.name in repr(loaded)
    kept.release()
    assert repr(kept) == "<Checkpoint released>"
