"""The held-out questions: the same for the trainer's evaluation and the engine's tests."""

from __future__ import annotations

from random import Random

from tools.train_demo.recall import held_out_question
from tools.train_demo.tasks import TASKS, Question, draw

EVALUATED = (*(task for task in TASKS if task != "small"), "recall", "recall_far")
FORMS = ("chat", "plain")
_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_PLAIN = "Question: {}\nAnswer:"


def held_out(task: str, n: int, seed: int = 0) -> list[Question]:
    """`n` held-out questions of a task, the same in every run."""
    rng = Random(f"held out {task} {seed}")
    found: dict[str, Question] = {}
    while len(found) < n:
        if task.startswith("recall"):
            question = held_out_question(task, rng)
        else:
            question = draw(task, rng, held_out=True)
        found.setdefault(question.text, question)
    return list(found.values())


def prompt(question: str, form: str) -> str:
    """What the model gets to see, special tokens written out."""
    return (_CHAT if form == "chat" else _PLAIN).format(question)


def completion(answer: str, form: str) -> str:
    """What it has to go on with, up to the token that ends it."""
    return f"{answer}<|im_end|>" if form == "chat" else f" {answer}<|endoftext|>"
