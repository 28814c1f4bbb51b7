"""Rows of tokens to train on: documents of text and tasks, packed without cutting an answer.

A document is a list of (text or special token, what it is); what it is decides how much its tokens
count in the loss. A stream is decided by its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.train_demo.heldout import prompt
from tools.train_demo.recall import training_text
from tools.train_demo.smalltalk import PAIRS
from tools.train_demo.tasks import SHARES, draw
from tools.train_demo.tokenizer import END_OF_TEXT, IM_END, IM_START

CONTEXT, TEXT, ANSWER = range(3)  # what a token is, for its weight
KINDS_OF_TEXT = {"topics": 0.4, "docstrings": 0.4, "source": 0.2}  # shares of the text
SHARE_OF = {"text": 0.2, "recall": 0.3, "conversation": 0.32, "plain": 0.18}  # of all tokens
_SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "You are a small model.", "Be kind.")
_BATCH = 64
Part = tuple[str | int, int]
Python = Sequence[Sequence[str]]  # names of functions, and what they do


def _turn(question: str, answer: str) -> list[Part]:
    return [
        (IM_START, CONTEXT), (f"user\n{question}", CONTEXT), (IM_END, CONTEXT), ("\n", CONTEXT),
        (IM_START, CONTEXT), ("assistant\n", CONTEXT), (answer, ANSWER), (IM_END, ANSWER),
        ("\n", CONTEXT),
    ]  # fmt: skip


def _start(rng: Random) -> list[Part]:
    if rng.random() > 0.15:
        return []
    text = f"system\n{rng.choice(_SYSTEMS)}"
    return [(IM_START, CONTEXT), (text, CONTEXT), (IM_END, CONTEXT), ("\n", CONTEXT)]


def _any_question(rng: Random, python: Python) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.06:
        return rng.choice(PAIRS)
    if kind < 0.14 and python:
        name, answer = rng.choice(python)
        asks = ("What does {} do?", "Explain {}.", "What is {} for?")
        return rng.choice(asks).format(name), answer
    task = rng.choices(list(SHARES), list(SHARES.values()))[0]
    question = draw(task, rng, held_out=False)
    return question.text, question.answer


def conversation(rng: Random, python: Python) -> list[Part]:
    """A chat of one to six questions that have nothing to do with each other."""
    parts = _start(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4, 6))):
        parts += _turn(*_any_question(rng, python))
    return parts


def plain(rng: Random, python: Python) -> list[Part]:
    """One question and its answer without chat markup."""
    question, answer = _any_question(rng, python)
    return [(prompt(question, "plain"), CONTEXT), (f" {answer}", ANSWER), (END_OF_TEXT, ANSWER)]


def recall_document(rng: Random, python: Python) -> list[Part]:
    """A text of facts, and questions about some of them, mostly as a chat."""
    in_chat = rng.random() < 0.75
    text, facts = training_text(rng, 8 if in_chat else 1)
    if not facts:
        return [(text, TEXT), (END_OF_TEXT, TEXT)]
    first = f"{text} {facts[0].question}"
    if not in_chat:
        answer = f" {facts[0].answer}"
        return [(prompt(first, "plain"), CONTEXT), (answer, ANSWER), (END_OF_TEXT, ANSWER)]
    parts = _start(rng) + _turn(first, facts[0].answer)
    for fact in facts[1:]:
        parts += _turn(fact.question, fact.answer)
    return parts


_MAKERS: dict[str, Callable[[Random, Python], list[Part]]] = {
    "conversation": conversation, "plain": plain, "recall": recall_document,
}  # fmt: skip
Document = tuple[NDArray[np.uint16], NDArray[np.uint8]]  # ids, and what each is


class Rows:
    """An endless stream of rows of `length` tokens."""

    def __init__(
        self, tokenizer: Any, text: dict[str, NDArray[np.uint16]], python: Python, length: int,
        seed: str,
    ) -> None:  # fmt: skip
        self._tokenizer, self._text, self._python = tokenizer, text, python
        self._length, self._rng = length, Random(seed)
        self._waiting: list[Document] = []
        # Documents and tokens so far, by kind: their mean length turns shares into frequencies.
        self._n_made = {kind: [1, 100] for kind in SHARE_OF}

    def __iter__(self) -> Iterator[Document]:
        while True:
            yield self._row()

    def _row(self) -> Document:
        documents: list[Document] = []
        space = self._length
        while space:
            if len(self._waiting) < _BATCH:
                self._make()
            # The longest waited first; what doesn't fit stays for another row.
            fitting = (i for i, d in enumerate(self._waiting[:_BATCH]) if len(d[0]) <= space)
            i = next(fitting, None)
            document = self._crop(space) if i is None else self._waiting.pop(i)
            documents.append(document)
            space -= len(document[0])
        ids, kinds = zip(*documents, strict=True)
        return np.concatenate(ids), np.concatenate(kinds)

    def _make(self) -> None:
        weights = [SHARE_OF[kind] * n / tokens for kind, (n, tokens) in self._n_made.items()]
        names = self._rng.choices(list(SHARE_OF), weights, k=_BATCH)
        made = [_MAKERS[n](self._rng, self._python) if n in _MAKERS else [] for n in names]
        texts = [part for parts in made for part, _ in parts if isinstance(part, str)]
        encoded = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False))
        for name, parts in zip(names, made, strict=True):
            if name == "text":
                document = self._crop(self._rng.randint(100, self._length))
            else:
                document = _document(parts, encoded, self._length)
            self._n_made[name][0] += 1
            self._n_made[name][1] += len(document[0])
            self._waiting.append(document)

    def _crop(self, n_tokens: int) -> Document:
        kind = self._rng.choices(list(KINDS_OF_TEXT), list(KINDS_OF_TEXT.values()))[0]
        text = self._text[kind]
        start = self._rng.randrange(len(text) - n_tokens)
        ids = text[start : start + n_tokens].copy()
        ids[-1] = END_OF_TEXT
        return ids, np.full(n_tokens, TEXT, np.uint8)


def _document(parts: list[Part], encoded: Iterator[Any], length: int) -> Document:
    ids: list[int] = []
    kinds: list[int] = []
    for part, kind in parts:
        new = [part] if isinstance(part, int) else next(encoded).ids
        ids += new
        kinds += [kind] * len(new)
    if ids[-1] != END_OF_TEXT:
        ids, kinds = [*ids, END_OF_TEXT], [*kinds, CONTEXT]
    return np.array(ids[:length], np.uint16), np.array(kinds[:length], np.uint8)


def load_text(corpus: Path) -> dict[str, NDArray[np.uint16]]:
    """The tokens of the corpus's text, by kind."""
    with np.load(corpus / "text.npz") as file:
        return {kind: file[kind] for kind in KINDS_OF_TEXT}
