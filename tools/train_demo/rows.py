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

from tools.train_demo import toolcalls
from tools.train_demo.dialog import Message, Tool, assistant, pieces, user
from tools.train_demo.heldout import completion, prompt
from tools.train_demo.questions import Question
from tools.train_demo.recall import training_text
from tools.train_demo.smalltalk import PAIRS
from tools.train_demo.tasks import SHARES, TASKS
from tools.train_demo.tokenizer import END_OF_TEXT, Encoder

CONTEXT, TEXT, ANSWER = range(3)  # what a token is, for its weight
KINDS_OF_TEXT = {"topics": 0.4, "docstrings": 0.4, "source": 0.2}  # shares of the text
SHARE_OF = {
    "text": 0.03, "recall": 0.22, "conversation": 0.32, "tools": 0.3, "memory": 0.05,
    "plain": 0.08,
}  # of all tokens  # fmt: skip
_SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "You are a small model.", "Be kind.")
_BATCH = 64
_MOST_RECALLED = 40
Part = tuple[str, int]
Python = Sequence[Sequence[str]]  # names of functions, and what they do


def _start(rng: Random) -> list[Message]:
    if rng.random() > 0.15:
        return []
    return [{"role": "system", "content": rng.choice(_SYSTEMS)}]


def _chat(rng: Random, messages: list[Message], tools: Sequence[Tool] = ()) -> list[Part]:
    """Half of them as if each answer were the first one after the user's text."""
    thinks, preserve = rng.random() < 0.35, rng.random() < 0.5
    if not thinks:
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
    written = pieces([*_start(rng), *messages], tools, thinks, preserve)
    return [(text, ANSWER if is_answer else CONTEXT) for text, is_answer in written]


def _any_question(rng: Random, python: Python) -> Question:
    kind = rng.random()
    if kind < 0.06:
        return Question("smalltalk", *rng.choice(PAIRS), key="")
    if kind < 0.12 and python:
        name, answer = rng.choice(python)
        asks = ("What does {} do?", "Explain {}.", "What is {} for?")
        return Question("python", rng.choice(asks).format(name), answer, key="")
    task = rng.choices(list(SHARES), list(SHARES.values()))[0]
    return TASKS[task](rng, False)


def _turn(question: Question) -> list[Message]:
    return [*question.messages(True), assistant(question.answer, question.thought)]


def conversation(rng: Random, python: Python) -> list[Part]:
    """A chat of one to six questions that have nothing to do with each other."""
    questions = [_any_question(rng, python) for _ in range(rng.choice((1, 1, 1, 2, 3, 4, 6)))]
    return _chat(rng, [message for question in questions for message in _turn(question)])


def memory_document(rng: Random, python: Python) -> list[Part]:
    """A chat whose last question is about what was said before."""
    return _chat(rng, _turn(TASKS["memory"](rng, False)))


def tools_document(rng: Random, python: Python) -> list[Part]:
    """A chat with functions at hand."""
    messages, tools = toolcalls.session(rng, lambda rng: _turn(_any_question(rng, python)))
    return _chat(rng, messages, tools)


def _plain(question: Question) -> list[Part]:
    return [(prompt(question, "plain"), CONTEXT), (completion(question, "plain"), ANSWER)]


def plain(rng: Random, python: Python) -> list[Part]:
    """One question and its answer without chat markup."""
    return _plain(_any_question(rng, python))


def recall_document(rng: Random, python: Python) -> list[Part]:
    """A text of facts, and questions about some of them, mostly as a chat."""
    in_chat = rng.random() < 0.85
    text, facts = training_text(rng, rng.randint(1, _MOST_RECALLED) if in_chat else 1)
    if not facts:
        return [(text, TEXT), ("<|endoftext|>", TEXT)]
    first = f"{text} {facts[0].question}"
    if not in_chat:
        return _plain(Question("recall", first, facts[0].answer, ""))
    asked = [first, *(fact.question for fact in facts[1:])]
    answers = [assistant(fact.answer) for fact in facts]
    pairs = zip(map(user, asked), answers, strict=True)
    return _chat(rng, [message for pair in pairs for message in pair])


_MAKERS: dict[str, Callable[[Random, Python], list[Part]]] = {
    "conversation": conversation, "plain": plain, "recall": recall_document,
    "tools": tools_document, "memory": memory_document,
}  # fmt: skip
Document = tuple[NDArray[np.uint16], NDArray[np.uint8]]  # ids, and what each is


class Rows:
    """An endless stream of rows of `length` tokens."""

    def __init__(
        self, tokenizer: Any, text: dict[str, NDArray[np.uint16]], python: Python, length: int,
        seed: str,
    ) -> None:  # fmt: skip
        self._encode, self._text, self._python = Encoder(tokenizer), text, python
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
        for name in names:
            if name == "text":
                document = self._crop(self._rng.randint(100, self._length))
            else:
                document = self._document(_MAKERS[name](self._rng, self._python))
            self._n_made[name][0] += 1
            self._n_made[name][1] += len(document[0])
            self._waiting.append(document)

    def _document(self, parts: list[Part]) -> Document:
        ids: list[int] = []
        kinds: list[int] = []
        for text, kind in parts:
            new = self._encode(text)
            ids += new
            kinds += [kind] * len(new)
        if ids[-1] != END_OF_TEXT:
            ids, kinds = [*ids, END_OF_TEXT], [*kinds, CONTEXT]
        n = self._length
        return np.array(ids[:n], np.uint16), np.array(kinds[:n], np.uint8)

    def _crop(self, n_tokens: int) -> Document:
        kind = self._rng.choices(list(KINDS_OF_TEXT), list(KINDS_OF_TEXT.values()))[0]
        text = self._text[kind]
        start = self._rng.randrange(len(text) - n_tokens)
        ids = text[start : start + n_tokens].copy()
        ids[-1] = END_OF_TEXT
        return ids, np.full(n_tokens, TEXT, np.uint8)


def load_text(corpus: Path) -> dict[str, NDArray[np.uint16]]:
    """The tokens of the corpus's text, by kind."""
    with np.load(corpus / "text.npz") as file:
        return {kind: file[kind] for kind in KINDS_OF_TEXT}
