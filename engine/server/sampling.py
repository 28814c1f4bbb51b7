"""SamplingParams of a request's fields."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from engine import checks
from engine.engine import Engine
from engine.sampling.params import SamplingParams
from engine.sampling.steps import SAMPLER_NAMES
from engine.server.errors import ApiError
from engine.server.protocol import MAX_TOP_LOGPROBS, Sampling, at_most
from engine.text.tokenizer import Tokenizer

# Fields that mean the same here and in SamplingParams.
_SAME = {f.name for f in fields(SamplingParams)} & set(Sampling.__struct_fields__)
_SAME -= {"max_tokens", "stop", "samplers", "logit_bias", "grammar"}
Json = dict[str, Any]
_N_SEEDS, _MOST = 2**64, sys.float_info.max


def params(request: Sampling, engine: Engine, defaults: Json, n_top: int | None) -> SamplingParams:
    """The parameters. defaults: fields for what the request does not say; without a limit, an
    answer gets its share of the context. n_top: likeliest tokens whose log probabilities are
    wanted, None for none. Raises SamplingError and ApiError."""
    values = {name: getattr(request, name) for name in _SAME}
    given = {"max_tokens": engine.n_ctx // engine.config.n_parallel, **defaults}
    given |= {k: v for k, v in values.items() if v is not None}
    limits = (request.max_completion_tokens, request.max_tokens, request.n_predict)
    if (limit := next((n for n in limits if n is not None), None)) is not None:
        given["max_tokens"] = limit
    if request.stop is not None:  # Clients send empty texts for none.
        stops = [request.stop] if isinstance(request.stop, str) else request.stop
        given["stop"] = tuple(filter(None, stops))
    if request.samplers is not None:
        given["samplers"] = tuple(SAMPLER_NAMES.get(name, name) for name in request.samplers)
    if request.logit_bias:
        given["logit_bias"] = _biases(request.logit_bias, engine.tokenizer)
    n_top = request.n_probs or None if n_top is None else n_top
    if n_top is not None:
        at_most("top_logprobs", n_top, MAX_TOP_LOGPROBS)
        given["logprobs"] = n_top
    return SamplingParams(**given)


def seeds(first: int | None, n: int) -> list[int | None]:
    """The seeds of n choices: the first one's and those after it."""
    is_random = first is None or first == -1
    return [first if is_random else (first + i) % _N_SEEDS for i in range(n)]  # type: ignore[operator]


def _biases(given: dict[str, Any] | list[Any], tokenizer: Tokenizer) -> dict[int, float]:
    """Token -> what to add; a text stands for each of its tokens, false for a ban."""
    found: dict[int, float] = {}
    for token, value in _pairs(given):
        value = -math.inf if value is False or value == "-inf" else value
        if not checks.is_number(value) or not (value == -math.inf or abs(value) <= _MOST):
            checks.refuse(ApiError, "logit_bias", "numbers, or false", value)
        for i in _tokens(token, tokenizer):
            found[i] = found.get(i, 0.0) + value
    return found


def _pairs(given: dict[str, Any] | list[Any]) -> Iterable[tuple[Any, Any]]:
    if isinstance(given, dict):
        return given.items()
    for pair in given:
        if not isinstance(pair, list) or len(pair) != 2:
            checks.refuse(ApiError, "logit_bias", "pairs of a token and a number", pair)
    return [(token, value) for token, value in given]


def _tokens(token: Any, tokenizer: Tokenizer) -> list[int]:
    if isinstance(token, str) and not re.fullmatch("[0-9]{1,18}", token):
        return tokenizer.encode(token, add_special=False, parse_special=True)
    if not isinstance(token, str) and not checks.is_integer(token):
        checks.refuse(ApiError, "logit_bias", "token ids or texts", token)
    return [int(token)]
