"""Requests from prompts: what a prompt may be, its limit, its sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from engine import checks
from engine.errors import EngineError
from engine.formats.gguf import GGUFFile
from engine.runtime.request import Request
from engine.sampling.breakers import BreakerSearch
from engine.sampling.chain import Sampler
from engine.sampling.params import SamplingError, SamplingParams
from engine.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # A text, or token ids.

# Lists of DRY's breakers whose tokens are kept: to find them takes a look at the whole vocabulary.
_MAX_BREAKERS = 8


class PromptError(EngineError):
    """A prompt that can't be run."""


class Requests:
    """Makes requests of one model; n_ctx: positions of memory, which n_parallel requests share."""

    def __init__(
        self, file: GGUFFile, tokenizer: Tokenizer, n_vocab: int, n_ctx: int, n_parallel: int
    ) -> None:
        self._metadata, self._tokenizer, self._n_vocab = file.metadata, tokenizer, n_vocab
        self._n_ctx, self._n_parallel = n_ctx, n_parallel
        self._breakers = lru_cache(_MAX_BREAKERS)(BreakerSearch(tokenizer).find)

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt as llama.cpp makes them: special tokens added and parsed."""
        checks.text(PromptError, "prompt", prompt)
        return self._tokenizer.encode(prompt, add_special=True, parse_special=True)

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        n_past: int = 0,
        before: Sequence[int] = (),
    ) -> Request:
        """A request for what follows a prompt, which comes after `n_past` positions of memory.
        before: their tokens, for the penalties. Raises PromptError or SamplingError."""
        params = SamplingParams() if params is None else params
        checks.instance(SamplingError, "params", params, SamplingParams)
        ids = self.check(self._ids(prompt), n_past)
        return self._make(ids, params, n_past, before)

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            return self.encode(prompt)
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
        return self._make((), SamplingParams(), 0, ())

    def _make(
        self, ids: Sequence[int], params: SamplingParams, n_past: int, before: Sequence[int]
    ) -> Request:
        params = params.resolved(self._metadata)
        checks.token_ids(SamplingError, "logit_bias", list(params.logit_bias), self._n_vocab)
        ends = self._tokenizer.eog_ids
        texts = params.dry_sequence_breakers
        breakers = self._breakers(texts) if params.dry_multiplier else {}
        sampler = Sampler(params, ends if params.ignore_eos else (), breakers)
        # Without a limit of its own, a completion gets its share of the context, as in llama.cpp.
        end = n_past + len(ids)
        share = max(self._n_ctx // self._n_parallel, end)
        limit = end + params.max_tokens if params.max_tokens >= 0 else share
        sampler.accept(*before)
        decoder = self._tokenizer.stream(at_start=False)
        return Request(ids, params, sampler, decoder, ends, min(limit, self._n_ctx), n_past)

    def check(self, ids: Sequence[int], n_past: int = 0) -> list[int]:
        """The ids of a prompt. Raises PromptError if they are none, too many, or no tokens."""
        ids = checks.token_ids(PromptError, "prompt", ids, self._n_vocab)
        if not ids:
            raise PromptError("the prompt is empty: expected at least one token")
        if n_past + len(ids) > self._n_ctx:
            before = f" after position {n_past}" if n_past else ""
            raise PromptError(
                f"the prompt has {len(ids)} tokens{before}, the context {self._n_ctx}: "
                "shorten it or raise n_ctx (-c)"
            )
        return ids
