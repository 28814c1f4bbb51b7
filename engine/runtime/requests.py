"""Requests from prompts: what a prompt may be, its limit, its sampler."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from engine import checks
from engine.errors import EngineError
from engine.formats.gguf import GGUFFile
from engine.kvcache.entries import Text
from engine.kvcache.prefix import packed, unpacked
from engine.runtime.request import Request
from engine.runtime.reuse import Answer, Reuse, Source
from engine.runtime.sessions import Session
from engine.sampling.breakers import BreakerSearch
from engine.sampling.chain import Sampler
from engine.sampling.grammar import Grammars
from engine.sampling.params import SamplingError, SamplingParams
from engine.text.template import THINKING, opens_thinking
from engine.text.tokenizer import ESCAPE, StreamDecoder, Tokenizer

Prompt = str | Sequence[int]  # A text, or token ids.
FindText = Callable[[str], tuple[int, Text | None]]  # PrefixCache.match_text.
# Characters on both sides of a place, to see whether tokens end there: so many, up to where words
# begin, but no more than the second number.
_WINDOW, _MOST_AROUND = 64, 4096
# No token has a word's end and the space after it, or a line's end and what follows it.
_WORD = re.compile(r"(?<=\S)(?= )|(?<=\n)(?=\S)")
_KIND = "text:"  # Before a prompt's text in the cache, where chats have theirs.
_N_LAST = 8  # Tokens that may spell a mark of thinking.

# Lists of DRY's breakers whose tokens are kept: to find them takes a look at the whole vocabulary.
_MAX_BREAKERS = 8


class PromptError(EngineError):
    """A prompt that can't be run."""


class PromptTooLongError(PromptError):
    """A prompt with more tokens than the context has positions."""


class Requests:
    """Makes requests of one model; n_ctx: positions of memory, which n_parallel requests share."""

    def __init__(
        self, file: GGUFFile, tokenizer: Tokenizer, n_vocab: int, n_ctx: int, n_parallel: int,
        find: FindText,
    ) -> None:  # fmt: skip
        self._metadata, self._tokenizer, self._n_vocab = file.metadata, tokenizer, n_vocab
        self._n_ctx, self._n_parallel, self._find = n_ctx, n_parallel, find
        self._grammars = Grammars(tokenizer, n_vocab)
        self._breakers = lru_cache(_MAX_BREAKERS)(BreakerSearch(tokenizer).find)

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt as llama.cpp makes them: special tokens added and parsed."""
        checks.text(PromptError, "prompt", prompt)
        return self._tokenizer.encode(prompt, add_special=True, parse_special=True)

    def make(
        self, prompt: Prompt | Source, params: SamplingParams | None, unused: str, n_past: int = 0
    ) -> Request:
        """A request for what follows a prompt, which comes after `n_past` positions of memory.
        unused: why the cache is not used; empty if it is. Raises PromptError or SamplingError."""
        params = SamplingParams() if params is None else params
        checks.instance(SamplingError, "params", params, SamplingParams)
        source = self._source(prompt, bool(unused))
        if not isinstance(prompt, str | Source):
            source.ids = checks.token_ids(PromptError, "prompt", source.ids, self._n_vocab)
        self._check_length(source.ids, n_past)
        request = self._make(source.ids, params, n_past)
        request.stops = source.marks
        if unused:
            request.reuse = Reuse(len(source.ids), reason=unused)
        else:
            request.source, request.packed = source, packed(source.ids)
        return request

    def resume(self, session: Session, params: SamplingParams | None, unused: str) -> Request:
        """A request that goes on with what a session's completion generated."""
        checks.instance(PromptError, "session", session, Session)
        request = self.make(session.tokens, session.params if params is None else params, unused)
        if params is None or params.seed in (None, -1, session.params.seed):
            request.sampler.state = session.sampler
        request.replay(session.tokens[session.n_prompt :])
        return request

    def _source(self, prompt: Prompt | Source, is_new: bool) -> Source:
        if isinstance(prompt, Source):
            return prompt
        if isinstance(prompt, str):
            return self._text_source(prompt, is_new)
        return Source(list(self._ids(prompt)))

    def _text_source(self, text: str, is_new: bool) -> Source:
        """A text's ids. Those of the longest text that is known and that it starts with are taken
        from there, if it may be cut after it."""
        if self._tokenizer.add_eos:  # What follows a text would follow its end token.
            return Source(self.encode(text))
        is_new |= ESCAPE in text  # `encode` refuses it.
        end, known = (0, None) if is_new else self._find(_KIND + text)
        end -= len(_KIND)
        if known is None or not self._is_cut(text, end):
            ids = self.encode(text)
        else:
            ids = unpacked(known.ids) + self._following(text[end:])
        return Source(ids, _KIND + text, answer=self._answer)

    def _is_cut(self, text: str, at: int) -> bool:
        """Whether what is before and after character `at` of a text has its own tokens in it, to
        judge by the words around; False where they are too long."""
        first, last = max(0, at - _MOST_AROUND), min(len(text), at + _MOST_AROUND)
        words = (m.start() for m in _WORD.finditer(text, first, max(0, at - _WINDOW)))
        begin = max(words, default=first)
        following = (m.start() for m in _WORD.finditer(text, min(at + _WINDOW, last), last))
        end = next(following, last)
        if begin == first > 0 or end == last < len(text):
            return False
        around = self.encode(text[begin:end])
        return around == self.encode(text[begin:at]) + self._following(text[at:end])

    def _following(self, text: str) -> list[int]:
        """Ids of a text that goes on with another."""
        segments = self._tokenizer.segments(text, continues=True)
        return [token for _, ids in segments for token in ids]

    def _answer(self, answer: Answer) -> str | None:
        """The text of what was generated, if its tokens have no other one."""
        return answer.text if spelled(self._tokenizer, answer) == answer.text else None

    def _ids(self, prompt: Sequence[int]) -> Sequence[int]:
        first = prompt[0] if isinstance(prompt, list | tuple) and prompt else None
        expected = "a text or a sequence of token ids"
        if isinstance(first, str | Mapping):
            other = (
                "generate_batch takes several" if isinstance(first, str) else "chat takes messages"
            )
            checks.refuse(PromptError, "prompt", f"{expected} ({other})", prompt)
        return checks.sequence(PromptError, "prompt", prompt, "token ids, or a text")

    def empty(self) -> Request:
        """A request without a prompt, which can't run."""
        return self._make((), SamplingParams(), 0)

    def _make(self, ids: Sequence[int], params: SamplingParams, n_past: int) -> Request:
        params = self._after_thinking(params.resolved(self._metadata), ids)
        checks.token_ids(SamplingError, "logit_bias", list(params.logit_bias), self._n_vocab)
        ends = self._tokenizer.eog_ids
        texts = params.dry_sequence_breakers
        breakers = self._breakers(texts) if params.dry_multiplier else {}
        matcher = None if params.grammar is None else self._grammars.matcher(params.grammar)
        sampler = Sampler(params, ends if params.ignore_eos else (), breakers, matcher)
        # Without a limit of its own, a completion gets its share of the context, as in llama.cpp.
        end = n_past + len(ids)
        share = max(self._n_ctx // self._n_parallel, end)
        limit = end + params.max_tokens if params.max_tokens >= 0 else share
        decoder = _decoder(self._tokenizer, params)
        return Request(ids, params, sampler, decoder, ends, min(limit, self._n_ctx), n_past)

    def _after_thinking(self, params: SamplingParams, ids: Sequence[int]) -> SamplingParams:
        """A grammar holds from the end of the thinking on that the prompt begins."""
        grammar = params.grammar
        if grammar is None or grammar.after:
            return params
        if not opens_thinking(ending(self._tokenizer, ids)):
            return params
        return replace(params, grammar=replace(grammar, after=THINKING[1]))

    def check(self, ids: Sequence[int], n_past: int = 0) -> list[int]:
        """The ids of a prompt. Raises PromptError if they are none, too many, or no tokens."""
        ids = checks.token_ids(PromptError, "prompt", ids, self._n_vocab)
        self._check_length(ids, n_past)
        return ids

    def _check_length(self, ids: Sequence[int], n_past: int) -> None:
        if not ids:
            raise PromptError("the prompt is empty: expected at least one token")
        if n_past + len(ids) > self._n_ctx:
            before = f" after position {n_past}" if n_past else ""
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens{before}, the context {self._n_ctx}: "
                "shorten it or raise n_ctx (-c)"
            )


def spelled(tokenizer: Tokenizer, answer: Answer) -> str:
    """The text of all tokens of an answer."""
    decoder = _decoder(tokenizer, answer.params)
    return "".join(map(decoder.push, answer.tokens)) + decoder.finish()


def ending(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of a prompt's last tokens, for `opens_thinking`."""
    return tokenizer.decode(ids[-_N_LAST:], special=True)


def _decoder(tokenizer: Tokenizer, params: SamplingParams) -> StreamDecoder:
    return tokenizer.stream(params.preserved_tokens, at_start=False)
