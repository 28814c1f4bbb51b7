"""The held-out questions: the same for the trainer's evaluation and the engine's tests."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from tools.train_demo import dialog
from tools.train_demo.questions import Question
from tools.train_demo.recall import held_out_question
from tools.train_demo.tasks import TASKS

RECALL = ("recall", "recall_far", "recall_2000")
EVALUATED = (*(task for task in TASKS if task != "small"), *RECALL)
TOOLS = ("tool_call", "tool_calls", "tool_none", "tool_answer")
# As a chat that answers at once, as one that thinks first, with the functions in another order, and
# as text without markup.
FORMS = ("chat", "think", "shuffled", "plain")
_PLAIN = "Question: {}\nAnswer:"


def forms(task: str) -> tuple[str, ...]:
    """The forms in which a task is evaluated."""
    if task in TOOLS:
        return ("chat", "shuffled", "think")
    if task == "chain":
        return ("chat", "think", "plain")
    return ("chat",) if task == "memory" else ("chat", "plain")


def held_out(task: str, n: int, seed: int = 0) -> list[Question]:
    """`n` held-out questions of a task, the same in every run."""
    rng = Random(f"held out {task} {seed}")
    found: dict[str, Question] = {}
    while len(found) < n:
        is_recall = task in RECALL
        question = held_out_question(task, rng) if is_recall else TASKS[task](rng, True)
        found.setdefault(question.key, question)
    return list(found.values())


def shuffled(question: Question) -> Question:
    """The question with its functions in another order, always the same one."""
    tools = Random(question.key).sample(question.tools, len(question.tools))
    return replace(question, tools=tuple(tools))


def prompt(question: Question, form: str) -> str:
    """What the model gets to see, special tokens written out."""
    if form == "plain":
        return _PLAIN.format(question.text)
    if form == "shuffled":
        question = shuffled(question)
    thinks = form == "think"
    return dialog.prompt(question.messages(thinks), question.tools, thinks)


def completion(question: Question, form: str) -> str:
    """What it has to go on with, up to the token that ends it."""
    if form == "plain":
        return f" {question.answer}<|endoftext|>"
    thought = f"{question.thought}\n</think>\n\n" if form == "think" else ""
    return f"{thought}{question.answer}<|im_end|>"
