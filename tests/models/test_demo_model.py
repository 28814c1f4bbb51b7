"""The model that comes with the engine answers held-out questions: what it says is right or wrong.

demo.json says how often the trainer found it right, for each task. Whatever the engine does to a
prompt on its way, cut, batched, restored, it has to be right as often, as far as the number of
questions can tell: see `least`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from math import comb
from typing import Any

import pytest

from engine import Engine
from engine.backends import missing
from engine.bench.perplexity import encode, perplexity
from engine.commands.main import main
from engine.engine import DEMO_MODEL
from tests.support.cuda_devices import DEVICES, MakeDevice, cuda_and_others, engine_on
from tools.train_demo.answers import GREEDY, n_right, questions
from tools.train_demo.heldout import EVALUATED, TOOLS, held_out, prompt

NO_GPU = pytest.mark.skipif(bool(missing("cuda")), reason=f"no GPU: {missing('cuda')}")
BACKENDS = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU]), "reference"]
# The numpy definition takes its time.
N_QUESTIONS = {"cpu": 20, "cuda": 100, "reference": 5}
# Of a thousand tokens each, and more.
N_FAR = {"cpu": 8, "cuda": 50, "reference": 1}
FAR = ("recall_far", "recall_2000")
# An engine that is as good as the trainer's model fails a test with at most this probability.
CHANCE = 1e-3
# In the trainer's own evaluation, with float32 weights. Calls of tools were to be at 0.95, too.
GOALS = {
    "add": 0.99, "subtract": 0.99, "multiply": 0.99, "compare": 0.99, "word_sum": 0.99,
    "copy": 0.99, "reverse": 0.99, "sort": 0.99, "sort_words": 0.99, "count": 0.99,
    "colors": 0.99, "story": 0.96, "recall": 0.95, "recall_far": 0.9, "recall_2000": 0.8,
    "memory": 0.95, "json": 0.95, "tool_call": 0.9, "tool_calls": 0.85,
    "tool_none": 0.95, "tool_answer": 0.95,
}  # fmt: skip
MAX_BYTES = 13_000_000
# The file is in eight bits, and the cpu and cuda backends round activations to eight, too.
MAX_PPL_DIFFERENCE = 0.005


@cache
def facts() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(DEMO_MODEL.with_name("demo.json").read_text())
    return result


def n_asked() -> int:
    """How many questions of each task the trainer asked."""
    n: int = facts()["questions"]
    return n


def least(rate: float, n: int) -> int:
    """The fewest right answers of n that are no surprise (CHANCE) where the trainer found `rate`.

    Its own questions were not all there are: of 200 right ones a better guess is 201 in 202.
    """
    p = (rate * n_asked() + 1) / (n_asked() + 2)
    fewer = 0.0
    for k in range(n):
        fewer += comb(n, k) * p**k * (1 - p) ** (n - k)
        if fewer > CHANCE:
            return k
    return n


def assert_right(n_found: int, n: int, *tasks: str, form: str = "chat") -> None:
    rates = [facts()["accuracy"][task][form] for task in tasks]
    expected = least(sum(rates) / len(rates), n)
    assert n_found >= expected, f"{n_found} of {n} are right, at least {expected} expected"


def load(backend: str, **options: Any) -> Engine:
    """With one thread: tests run side by side, and many would wait for each other."""
    n_threads = 1 if backend == "cpu" else None
    return Engine.load(backend=backend, n_threads=n_threads, **options)


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with load(request.param, n_ctx=8192, n_parallel=5) as engine:
        yield engine


def some(engine: Engine, task: str, form: str = "chat") -> list[tuple[str, str]]:
    """As many questions as there is time for."""
    n = (N_FAR if task in FAR else N_QUESTIONS)[engine.config.backend]
    return questions(task, n, form)


# What it is.


def test_it_is_small_and_says_what_it_is() -> None:
    assert DEMO_MODEL.stat().st_size <= MAX_BYTES
    with Engine.load(n_ctx=64) as engine:
        about = engine.file.metadata
    for key in ("name", "description", "license"):
        assert about[f"general.{key}"]
    assert "Python" in about["general.description"]
    assert "<|im_start|>" in about["tokenizer.chat_template"]


@pytest.mark.parametrize("task", GOALS)
def test_the_trainer_reached_its_goals(task: str) -> None:
    assert facts()["accuracy"][task]["chat"] >= GOALS[task]


def test_how_many_have_to_be_right() -> None:
    assert [least(1.0, n) for n in (5, 20, 200)] == [4, 18, 195]
    assert [least(0.84, n) for n in (5, 20, 200)] == [1, 11, 150]


# Perplexity. It takes longest, so it comes first.


def held_out_text(engine: Engine) -> list[int]:
    return encode(engine, DEMO_MODEL.with_name("heldout.txt").read_text())


def test_perplexity_is_the_trainers() -> None:
    """The trainer's is that of its weights in bfloat16, computed in float32."""
    told = facts()["perplexity"]
    with load("cpu", n_ctx=told["n_ctx"]) as engine:
        *_, last = perplexity(engine, held_out_text(engine), told["n_ctx"])
    assert last.n_scored == told["n_scored"]
    assert last.ppl == pytest.approx(told["value"], rel=MAX_PPL_DIFFERENCE)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_perplexity_of_other_backends(backend: str) -> None:
    """Of a part of the text; the cpu backend has all of it."""
    found = []
    for name in ("cpu", backend):
        with load(name, n_ctx=512) as engine:
            estimates = islice(perplexity(engine, held_out_text(engine)), 4)
            found.append([estimate.ppl for estimate in estimates][-1])
    assert found[1] == pytest.approx(found[0], rel=MAX_PPL_DIFFERENCE)


# Answers.


@pytest.mark.parametrize("task", EVALUATED)
def test_answers_of_every_backend(engine: Engine, task: str) -> None:
    asked = some(engine, task)
    assert_right(n_right(engine, asked), len(asked), task)


@pytest.mark.parametrize(
    ("task", "form"),
    [(task, "plain") for task in ("add", "story", "sort")]
    + [(task, "think") for task in ("chain", "tool_call")]
    + [("tool_call", "shuffled")],
)
def test_answers_in_other_forms(engine: Engine, task: str, form: str) -> None:
    asked = some(engine, task, form)
    assert_right(n_right(engine, asked), len(asked), task, form=form)


def test_the_order_of_functions_does_not_matter() -> None:
    """By more than a third of the questions may differ by chance, twice the standard error."""
    for task in TOOLS:
        found = facts()["accuracy"][task]
        p = (found["chat"] + found["shuffled"]) / 2
        assert abs(found["chat"] - found["shuffled"]) <= 2 * (2 * p * (1 - p) / n_asked()) ** 0.5


def test_thinking_helps() -> None:
    found = facts()["accuracy"]["chain"]
    assert found["think"] >= found["chat"] + 0.2


@pytest.mark.parametrize("task", EVALUATED)
def test_chats_of_the_engine_are_what_the_model_was_trained_on(engine: Engine, task: str) -> None:
    for question, thinks in itertools.product(held_out(task, 2), (False, True)):
        ids = engine.encode_chat(
            question.messages(thinks), tools=question.tools or None, reasoning=thinks
        )
        text = prompt(question, "think" if thinks else "chat")
        assert ids == engine.tokenizer.encode(text, parse_special=True)


@pytest.mark.parametrize("n_ubatch", [5, 64, 200])
def test_answers_from_prompts_in_pieces(n_ubatch: int) -> None:
    """Of 100 tokens and more each, one after another."""
    with load("cpu", n_ubatch=n_ubatch) as engine:
        for task in ("recall", "copy"):
            asked = some(engine, task)[:12]
            assert_right(n_right(engine, asked), len(asked), task)


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_of_prompts_together(backend: str) -> None:
    """Prompts of several tasks in one batch, each with its own state."""
    tasks = ("recall", "sort", "add", "story")
    with load(backend, n_ctx=8192, n_parallel=16) as engine:
        groups = [some(engine, task)[:10] for task in tasks]
        mixed = [pair for group in zip(*groups, strict=True) for pair in group]
        assert_right(n_right(engine, mixed), len(mixed), *tasks)


def test_answers_after_checkpoint_and_restore(engine: Engine) -> None:
    """A text is read once; every question about it goes on from there, in any order."""
    asked = some(engine, "recall")
    found = 0
    for text, answer in asked:
        start, question = text.rsplit(". ", 1)
        seq = engine.memory.create()
        engine.prefill(seq, engine.encode_prompt(start + "."))
        checkpoint = engine.memory.checkpoint(seq)
        engine.prefill(seq, engine.encode_prompt(" Something else happened."))
        engine.memory.restore(seq, checkpoint)
        engine.memory.free(seq)
        once, again = (
            "".join(piece.text for piece in engine.generate(f" {question}", GREEDY, checkpoint))
            for _ in range(2)
        )
        assert once == again
        found += once == answer
        checkpoint.release()
    assert_right(found, len(asked), "recall")


def test_answers_of_a_chat(engine: Engine) -> None:
    """Ten turns, each a question of another task. A turn processes its own tokens and those of the
    answer before it, which stands in the text without the block of thoughts."""
    engine.cache.clear()  # Other tests ask alike.
    tasks = ["add", "sort", "copy", "compare", "colors", "subtract", "count", "reverse", "multiply",
             "word_sum"]  # fmt: skip
    messages: list[dict[str, str]] = []
    found, before = 0, ""
    for task in tasks:
        question = held_out(task, 1)[0]
        messages.append({"role": "user", "content": question.text})
        own = before + prompt(question, "chat")
        answer = engine.chat(messages, GREEDY)
        list(answer)
        found += answer.text == question.answer
        assert answer.timings.n_prompt == len(engine.tokenizer.encode(own, parse_special=True))
        assert answer.reuse.n_reused == answer.reuse.n_known
        messages.append({"role": "assistant", "content": answer.text})
        before = f"{answer.text}<|im_end|>\n"
    assert_right(found, len(tasks), *tasks)


@pytest.mark.parametrize("make_device", DEVICES)
def test_answers_of_a_chat_on_cuda_devices(make_device: MakeDevice) -> None:
    """Also the emulated one, which takes its time; its steps run ahead of the host."""
    asked = [("What is 27 plus 48?", "75"), ("The cup is blue. What color is the cup?", "blue")]
    with engine_on(DEMO_MODEL, cuda_and_others(make_device(0)), n_ctx=256, n_ubatch=64) as engine:
        assert engine.loop.runner.overlaps
        messages: list[dict[str, str]] = []
        for question, right in asked:
            messages.append({"role": "user", "content": question})
            answer = engine.chat(messages, GREEDY)
            list(answer)
            assert answer.text == right
            assert answer.reuse.n_reused == answer.reuse.n_known
            messages.append({"role": "assistant", "content": answer.text})
        # The first question, up to the answer.
        assert answer.reuse.n_reused == 18


# Without a name.


def test_command_line_runs_it_without_a_model_named(capsys: pytest.CaptureFixture[str]) -> None:
    asked = "Question: What is 20 plus 30?\nAnswer:"
    assert main(["-p", asked, "--no-display-prompt", "-n", "8"]) == 0
    assert capsys.readouterr().out == " 50\n"


def test_a_bare_question_gets_a_hint_at_the_chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that is no chat and no "Question:" goes on as documents do, or ends at once."""
    monkeypatch.setattr("sys.stdin", None)
    assert main(["-p", "What is 27 plus 48?", "-t", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == "What is 27 plus 48?\n"
    assert "-cnv" in err
    assert main(["-cnv", "-p", "What is 27 plus 48?", "-t", "1"]) == 0
    assert capsys.readouterr().out == "75\n"
