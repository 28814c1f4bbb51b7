"""What a grammar allows, token by token and text by text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from engine.engine import DEMO_MODEL
from engine.formats.gguf import GGUFFile
from engine.sampling.grammar import Grammar, GrammarError, Grammars, Matcher
from engine.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_gguf(GGUFFile(DEMO_MODEL))
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.n_vocab)
TEXTS = [TOKENIZER.token_bytes(i) for i in range(TOKENIZER.n_vocab)]
# The tokens of single bytes.
BYTES = {text[0]: i for i, text in reversed(list(enumerate(TEXTS))) if len(text) == 1}


def allowed(matcher: Matcher) -> set[int]:
    try:
        return set(matcher.allowed(TOKENIZER.n_vocab).tolist())
    except GrammarError:
        return set()


def may_end(matcher: Matcher) -> bool:
    return bool(allowed(matcher) & TOKENIZER.eog_ids)


def accepts(grammar: Grammar, text: str, by_bytes: bool = True) -> bool:
    """Whether the whole text matches, byte by byte or as it is tokenized."""
    matcher = GRAMMARS.matcher(grammar)
    tokens = [BYTES[b] for b in text.encode()] if by_bytes else TOKENIZER.encode(text, False, True)
    for token in tokens:
        if token not in allowed(matcher):
            return False
        matcher.accept(token)
    return may_end(matcher)


def language(grammar: Grammar, alphabet: str, longest: int) -> set[str]:
    """All texts of an alphabet's characters, up to a length, that match."""
    inner: Any = GRAMMARS.matcher(grammar)._inner

    def found(inner: Any, text: str) -> Iterator[str]:
        if inner.is_accepting():
            yield text
        for c in alphabet if len(text) < longest else "":
            after = inner.deep_copy()
            if all(after.consume_token(BYTES[b]) for b in c.encode()):
                yield from found(after, text + c)

    return set(found(inner, ""))


def written(grammar: Grammar, rng: random.Random, n_tokens: int = 150) -> str | None:
    """A random text that follows a grammar; None if it is not at its end after so many tokens."""
    matcher, text = GRAMMARS.matcher(grammar), b""
    for _ in range(n_tokens):
        options = allowed(matcher)
        if options & TOKENIZER.eog_ids and (len(options) < 9 or rng.random() < 0.3):
            return text.decode()
        # Short tokens and marks more often: so it ends at some time.
        marks = [i for i in options if TEXTS[i] in (b'"', b"}", b"]", b",", b":", b"\n")]
        pool = marks if marks and rng.random() < 0.4 else sorted(options - TOKENIZER.eog_ids)
        token = rng.choice(pool)
        matcher.accept(token)
        text += TOKENIZER.token_bytes(token)
        if matcher.is_complete:
            return text.decode()
    return None
