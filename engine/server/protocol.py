"""Requests of OpenAI's protocol, with llama-server's fields: their types, and how a body is read.

A null means absent. Unknown fields are ignored; one that looks like sampling is logged once.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from engine import checks
from engine.server.errors import ApiError

_log = logging.getLogger(__name__)
S = TypeVar("S", bound=Struct)
# Most of each in one request.
MAX_MESSAGES, MAX_TOOLS, MAX_CHOICES = 10_000, 1_000, 32
MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_TOP_LOGPROBS = 64, 1_000, 4_096, 100
_NAMES = {
    "int": "an integer", "float": "a number", "str": "a text", "bool": "true or false",
    "array": "a list", "object": "an object", "null": "null",
}  # fmt: skip
_WRONG_TYPE = re.compile(r"Expected `([^`]*)`, got `([^`]*)`(?: - at `\$\.?(.*)`)?")
_SAMPLING = re.compile(r"temp|top_|min_|max_|penal|sampl|mirostat|dry|xtc|bias|typ|tokens|_p$|ban")
_SURROGATES = re.compile("[\ud800-\udfff]")
_logged: set[str] = set()
_MAX_LOGGED = 100


class StreamOptions(Struct):
    """include_usage: a last chunk has the usage."""

    include_usage: bool | None = None


class Sampling(Struct, kw_only=True):
    """What all requests for text may have; see SamplingParams for what the fields do."""

    model: Any = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n_predict: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str] | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    samplers: list[str] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, Any] | list[Any] | None = None
    n_probs: int | None = None
    cache_prompt: bool | None = None
    response_format: dict[str, Any] | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    user: Any = None


class ChatRequest(Sampling, kw_only=True):
    """A body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Sampling, kw_only=True):
    """A body of /v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: int | bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class TokenizeRequest(Struct):
    """A body of /tokenize, as llama-server's."""

    content: str
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(Struct):
    """A body of /detokenize."""

    tokens: list[int]


def read(body: bytes, kind: type[S]) -> S:
    """The request in a body. Raises ApiError for one that is no JSON, or of wrong types."""
    try:
        given = _decoded(body)
        if not isinstance(given, dict):
            raise ApiError(f"expected a JSON object, got {checks.shown(given)}")
        _log_unknown(given.keys() - set(kind.__struct_fields__))
        # Nulls of required fields are absent, too.
        return msgspec.convert({k: v for k, v in given.items() if v is not None}, kind)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ApiError(f"expected JSON, got a body that is none: {error}") from None


def _decoded(body: bytes) -> Any:
    """A body's JSON. Halves of surrogate pairs become U+FFFD: clients in JavaScript cut texts so,
    and send them again with each turn."""
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        if b"\\ud" not in body.lower():
            raise
    text = json.dumps(json.loads(body), ensure_ascii=False)
    return msgspec.json.decode(_SURROGATES.sub("\ufffd", text))


def _wrong_type(told: str) -> ApiError:
    if match := _WRONG_TYPE.match(told):
        expected = " or ".join(_NAMES.get(t, t) for t in match[1].split(" | ") if t != "null")
        where = match[3] or None
        begin = f"{where}: " if where else ""
        return ApiError(f"{begin}expected {expected}, got {_NAMES.get(match[2], match[2])}")
    if match := re.match("Object missing required field `(.*?)`", told):
        return ApiError(f"{match[1]}: expected a value, got none")
    return ApiError(" ".join(told.split()))


def _log_unknown(names: set[str]) -> None:
    for name in sorted(names - _logged):
        if _SAMPLING.search(name) and len(name) <= 64 and len(_logged) < _MAX_LOGGED:
            _logged.add(name)
            _log.warning("requests have the field %r, which has no effect here", name)


def at_most(name: str, n: int, most: int, what: str = "") -> None:
    """Raise ApiError if there are more than `most`."""
    if n > most:
        raise ApiError(f"{name}: expected at most {most}{what}, got {n}")


def check_chat(request: ChatRequest) -> None:
    """Raise ApiError for what no conversation may have."""
    at_most("messages", len(request.messages), MAX_MESSAGES)
    at_most("tools", len(request.tools or ()), MAX_TOOLS)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(f"top_logprobs: expected logprobs, too, got {request.top_logprobs} alone")


def check_common(request: Sampling) -> None:
    """The same for what all requests for text may have."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or ()
    at_most("stop", len(stops), MAX_STOPS, " texts")
    at_most("stop", max(map(len, stops), default=0), MAX_STOP_LENGTH, " characters")
    at_most("logit_bias", len(request.logit_bias or ()), MAX_BIASES, " tokens")
    n = 1 if request.n is None else request.n
    checks.integer(ApiError, "n", n, 1, MAX_CHOICES)
