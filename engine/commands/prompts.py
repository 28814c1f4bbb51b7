"""Many prompts from a file, one a line, as plain text or as JSON; results as JSON lines.

A line that starts with `{` or `"` is JSON: a string, or an object with `prompt` (text or token ids)
or `messages` (of a chat), and fields of SamplingParams. A line that can't be used gives a result
with finish_reason `error`.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tqdm import tqdm

from engine import checks
from engine.commands.summary import cache_line
from engine.engine import Engine
from engine.errors import EngineError
from engine.runtime.completion import Completion
from engine.runtime.request import FinishReason
from engine.sampling.grammar import FORMS, GrammarError
from engine.sampling.params import SamplingError, SamplingParams

# llama.cpp's server has other names for some fields of SamplingParams.
_ALIASES = {
    "n_predict": "max_tokens", "temp": "temperature", "typ_p": "typical_p", "n_probs": "logprobs",
}  # fmt: skip
_FIELDS = {f.name for f in fields(SamplingParams)} - {"logits_processors"} | FORMS.keys()
# Besides the prompt: what goes with the messages of a chat.
_CHAT = ("messages", "tools", "reasoning", "template_kwargs", "continue_last")
HELP = (
    "A line of --prompts is a text, or JSON: a string, or an object with `prompt` (a text or token "
    "ids) or `messages` (a chat's, with other keywords of Engine.chat: "
    f"{', '.join(_CHAT[1:])}), an `id`, and "
    f"parameters of its own: {', '.join(sorted(_FIELDS))}. A result has `line`, the `id`, `prompt` "
    "or `messages`, `text`, `tokens`, `finish_reason`, and `error` or `logprobs` if there are some."
)


class LineError(EngineError):
    """A line that is no prompt."""


@dataclass(frozen=True)
class PromptLine:
    """Line `number` (from 1) of a file: a prompt, or the keywords of a chat, with its parameters
    and its user's `own_id`; or the error in it, with the line as prompt."""

    number: int
    prompt: str | list[int]
    params: SamplingParams
    error: str = ""
    chat: Mapping[str, Any] | None = None
    own_id: Any = None


def read_prompts(lines: Iterable[str], params: SamplingParams) -> Iterator[PromptLine]:
    """The prompts of a file's lines; a line without parameters of its own gets `params`."""
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        try:
            yield _parse(number, text, params)
        except (LineError, SamplingError, GrammarError) as error:
            yield PromptLine(number, text, params, str(error))


def _parse(number: int, text: str, params: SamplingParams) -> PromptLine:
    if text.lstrip()[0] not in '{"':
        return PromptLine(number, text, params)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineError(f"expected JSON, got {error}") from None
    if isinstance(value, str):
        return PromptLine(number, value, params)
    options = {_ALIASES.get(key, key): v for key, v in value.items()}
    if len(options) < len(value):
        raise LineError(f"a parameter twice, by two names: {', '.join(value)}")
    own_id = options.pop("id", None)
    chat = {key: options.pop(key) for key in _CHAT if key in options and "messages" in value}
    prompt = options.pop("prompt", None)
    if (prompt is None) == (not chat) or not (chat or _is_prompt(prompt)):
        expected = '"prompt" with a text or token ids, or "messages" of a chat'
        raise LineError(f"expected {expected}{', got both' * (prompt is not None and bool(chat))}")
    for name in sorted(options.keys() - _FIELDS):
        near = checks.did_you_mean(name, {*_FIELDS, *_ALIASES})
        raise LineError(f"unknown option {name!r}{near}")
    forms = {name: value for name in FORMS if (value := options.pop(name, None)) is not None}
    if len(forms) > 1:
        raise LineError(f"expected one form of the output, got {' and '.join(forms)}")
    for name, value in forms.items():
        options["grammar"] = FORMS[name](value)
    own = replace(params, **{key: _value(key, v) for key, v in options.items()})
    return PromptLine(number, "" if chat else prompt, own, "", chat or None, own_id)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    return isinstance(value, str)


def _value(key: str, value: Any) -> Any:
    """A JSON value as a field of SamplingParams has it."""
    if key != "logit_bias" or not isinstance(value, Mapping):
        return value
    # In llama.cpp's server, false bans a token.
    named = {False: -math.inf, "-inf": -math.inf}
    biases = ((int(t) if re.fullmatch("[0-9]{1,18}", t) else t, b) for t, b in value.items())
    return {t: named.get(b, b) if isinstance(b, str | bool) else b for t, b in biases}


def run(
    engine: Engine, lines: Sequence[str], params: SamplingParams, chat: Mapping[str, Any],
    verbose: bool = False,
) -> int:  # fmt: skip
    """Complete every line; results in order of the lines, each as soon as it can be printed.

    chat: keywords of Engine.encode_chat for lines with messages. verbose: say what each line reused
    of earlier ones. Returns the exit status: 1 if a line could not be completed.
    """
    prompts = [_encoded(engine, line, chat) for line in read_prompts(lines, params)]
    valid = [p for p in prompts if not p.error]
    results: dict[int, str] = {}
    waiting = deque(p.number for p in prompts)

    def show(line: PromptLine, completion: Completion | None, error: str) -> None:
        if error:
            print(f"error: line {line.number}: {error}", file=sys.stderr)
        results[line.number] = result_line(line, completion)
        while waiting and waiting[0] in results:
            print(results.pop(waiting.popleft()), flush=True)

    def done(index: int, completion: Completion) -> None:
        is_failed = completion.finish_reason is FinishReason.ERROR
        show(valid[index], completion, completion.detail if is_failed else "")
        if verbose and not is_failed:
            bar.write(f"line {valid[index].number}: {completion.reuse}", sys.stderr)
        bar.update()

    for line in prompts:
        if line.error:
            show(line, None, line.error)
    start = time.perf_counter()
    with tqdm(total=len(valid), unit="prompt", disable=None) as bar:
        finished = engine.generate_batch([p.prompt for p in valid], [p.params for p in valid], done)
    good = [c for c in finished if c.finish_reason is not FinishReason.ERROR]
    n_bad = len(prompts) - len(good)
    print(_totals(finished, len(prompts), n_bad, time.perf_counter() - start), file=sys.stderr)
    if verbose:
        print(cache_line(engine), file=sys.stderr)
    return 1 if n_bad else 0


def _encoded(engine: Engine, line: PromptLine, chat: Mapping[str, Any]) -> PromptLine:
    """A line with the token ids of its chat, if it is one."""
    if line.chat is None:
        return line
    try:
        return replace(line, prompt=engine.encode_chat(**{**chat, **line.chat}))
    except EngineError as error:
        return replace(line, error=str(error))


def _totals(finished: Sequence[Completion], n: int, n_bad: int, seconds: float) -> str:
    n_prompt = sum(c.timings.n_prompt for c in finished)
    n_new = sum(len(c.tokens) for c in finished)
    return (
        f"{n} prompts{f' ({n_bad} failed)' if n_bad else ''}: {n_prompt} tokens processed, {n_new} "
        f"generated in {seconds:.2f} s ({(n_prompt + n_new) / max(seconds, 1e-9):.2f} tokens/s)"
    )


def _finite(logprob: float) -> float:
    """JSON has no infinity: as in OpenAI's protocol, -9999 stands for a probability of 0."""
    return max(logprob, -9999.0)


def result_line(line: PromptLine, completion: Completion | None) -> str:
    document: dict[str, Any] = {"line": line.number}
    if line.own_id is not None:
        document["id"] = line.own_id
    document |= (
        {"prompt": line.prompt} if line.chat is None else {"messages": line.chat["messages"]}
    )
    if completion is None:
        document |= {"finish_reason": "error", "error": line.error}
    else:
        reason = completion.finish_reason
        document |= {"text": completion.text, "tokens": completion.tokens, "finish_reason": reason}
        if completion.logprobs:
            document["logprobs"] = [
                {"logprob": _finite(p), "top": [(i, _finite(q)) for i, q in top]}
                for p, top in completion.logprobs
            ]
        if reason is FinishReason.ERROR:
            document["error"] = completion.detail
    text = json.dumps(document, ensure_ascii=False)
    # Half of a character can only be written as an escape.
    return json.dumps(document) if re.search("[\ud800-\udfff]", text) else text
