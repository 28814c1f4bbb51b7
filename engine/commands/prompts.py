"""Many prompts from a file, one a line, as plain text or as JSON; results as JSON lines.

A line that starts with `{` or `"` is JSON: a string, or an object with `prompt` (text or token ids)
and fields of SamplingParams. A line that can't be used gives a result with finish_reason `error`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from engine.errors import EngineError
from engine.runtime.completion import Completion
from engine.runtime.request import FinishReason
from engine.sampling.params import SamplingError, SamplingParams

# llama.cpp's server has other names for some fields of SamplingParams.
_ALIASES = {"n_predict": "max_tokens", "temp": "temperature", "typ_p": "typical_p"}
_FIELDS = {f.name for f in fields(SamplingParams)}
_TUPLES = {"stop", "samplers", "dry_sequence_breakers"}


class LineError(EngineError):
    """A line that is no prompt."""


@dataclass(frozen=True)
class PromptLine:
    """Line `number` (from 1) of a file: a prompt with its parameters, or the error in it."""

    number: int
    prompt: str | list[int]
    params: SamplingParams
    error: str = ""


def read_prompts(lines: Iterable[str], params: SamplingParams) -> Iterator[PromptLine]:
    """The prompts of a file's lines; a line without parameters of its own gets `params`."""
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        try:
            prompt, own = _parse(text, params)
            yield PromptLine(number, prompt, own)
        except (LineError, SamplingError) as error:
            yield PromptLine(number, "", params, f"line {number}: {error}")


def _parse(text: str, params: SamplingParams) -> tuple[str | list[int], SamplingParams]:
    if text.lstrip()[0] not in '{"':
        return text, params
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineError(f"expected JSON, got {error}") from None
    if isinstance(value, str):
        return value, params
    options = {_ALIASES.get(key, key): v for key, v in value.items()}
    prompt = options.pop("prompt", None)
    if not _is_prompt(prompt):
        raise LineError('expected "prompt" with a text or token ids')
    if unknown := options.keys() - _FIELDS:
        raise LineError(f"unknown option {min(unknown)!r}")
    return prompt, replace(params, **{key: _value(key, v) for key, v in options.items()})


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    return isinstance(value, str)


def _value(key: str, value: Any) -> Any:
    """A JSON value as a field of SamplingParams has it."""
    if key in _TUPLES:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise LineError(f"{key}: expected a list of texts, got {value!r}")
        return tuple(values)
    if key == "logit_bias":
        if not isinstance(value, Mapping):
            raise LineError(f"{key}: expected an object of token ids and numbers, got {value!r}")
        try:
            # In llama.cpp's server, false bans a token.
            return {int(t): -math.inf if b is False else float(b) for t, b in value.items()}
        except (TypeError, ValueError, OverflowError):
            raise LineError(f"{key}: expected token ids and numbers, got {value!r}") from None
    return value


def result_line(line: PromptLine, completion: Completion | None) -> str:
    document: dict[str, Any] = {"line": line.number, "prompt": line.prompt}
    if completion is None:
        document |= {"finish_reason": "error", "error": line.error}
    else:
        reason = completion.finish_reason
        document |= {"text": completion.text, "tokens": completion.tokens, "finish_reason": reason}
        if reason is FinishReason.ERROR:
            document["error"] = completion.detail
    return json.dumps(document, ensure_ascii=False)
