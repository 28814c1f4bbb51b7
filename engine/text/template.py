"""Chat templates: from messages to the text that a model was trained to continue.

A template is a Jinja program in the model's file, so it is untrusted. It runs in a process of its
own, within limits.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from engine import checks
from engine.errors import EngineError
from engine.formats.gguf import GGUFFile
from engine.text import jinja_process

Message = Mapping[str, Any]

_log = logging.getLogger(__name__)
TEMPLATE_KEY = "tokenizer.chat_template"
# Of the templates in a file, so many are named where another one is asked for.
_NAMED = 8
_PROBE = "\ufdd1"  # No template contains it.
# Stands for what was sampled while a template runs: a lone surrogate, so no text contains it.
_MARK = "\udffe"
# Templates and models write thinking between these.
THINKING = _OPEN, _CLOSE = "<think>", "</think>"
# Variables of templates that have another source.
_RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")
_PLACE = re.compile(
    rf"(?P<thinking>(?P<opening>{_OPEN}\s*)?{_MARK}t[^{_MARK}]*)?{_MARK}(?P<i>\d+){_MARK}"
)
_ATOMS = frozenset({str, int, float, bool, type(None)})
# Values of `--chat-template NAME` that need no file.
BUILT_IN = {
    "chatml": (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
}


class ChatError(EngineError):
    """A chat template, or messages, that can't be used."""


class Sampled(str):
    """The content of an answer exactly as the model wrote it: no template changes it.

    n_thinking: characters up to where the thinking ends, with its closing tag; None if the answer
    does not begin with thinking. A template may leave so many out. tokens: the special tokens that
    the text may spell; see SamplingParams.preserved_tokens.
    """

    n_thinking: int | None
    tokens: Sequence[str]

    def __new__(cls, text: str, n_thinking: int | None = None, tokens: Sequence[str] = ()) -> Self:
        made = super().__new__(cls, text)
        made.n_thinking, made.tokens = n_thinking, tokens
        return made


class ChatTemplate:
    """A compiled template; `name` is for error texts, `source` its program, `variables` are the
    names that it reads."""

    def __init__(self, source: str, name: str = "chat template") -> None:
        checks.text(ChatError, name, source)
        self.name = name
        self.source = source
        try:
            self.variables = set(jinja_process.run(source).split())
        except jinja_process.JinjaError as error:
            raise self._error(str(error)) from None

    def __repr__(self) -> str:
        return f"<ChatTemplate {self.name}>"

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning: bool | None = None,
        add_generation_prompt: bool = True,
        special: Mapping[str, str] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_last: bool = False,
    ) -> str:
        """The text of a conversation, as transformers' apply_chat_template renders it.

        messages: each with `role`, `content` and what else the template reads. tools: JSON schemas.
        reasoning: its `enable_thinking` (None: its own default). special: texts by the names that
        templates use (`bos_token`, …). template_kwargs: more variables. A content that is Sampled
        is in the text as it is, with its thinking if the template leaves that. continue_last: the
        text ends where the content of the last message, an assistant's, ends. Raises ChatError if
        it fails or takes too much.
        """
        if continue_last:
            messages = [*messages[:-1], _open_ended(messages[-1])]
        given: dict[str, Any] = {"documents": None, **(template_kwargs or {}), "tools": tools}
        given |= {"messages": [_marked(i, message) for i, message in enumerate(messages)]}
        given |= {"add_generation_prompt": add_generation_prompt and not continue_last}
        given |= special or {}
        if reasoning is not None:
            given["enable_thinking"] = reasoning
        text = self._rendered(given)
        if continue_last:
            ends = [found.end() for found in _PLACE.finditer(text)]
            if not ends:
                raise self._error("it leaves out the answer that is to be continued")
            text = text[: ends[-1]]
        return _PLACE.sub(lambda found: _as_written(found, messages), text)

    def _rendered(self, given: Mapping[str, Any]) -> str:
        try:
            return jinja_process.run(self.source, _plain(given))
        except RecursionError:
            raise self._error("messages or tools that hold themselves") from None
        except jinja_process.JinjaError as error:
            raise self._error(str(error)) from None

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it writes the text of a content in parts, and not the list itself."""
        parts = [{"type": "text", "text": _PROBE}]
        given = {"messages": [{"role": "user", "content": parts}], "add_generation_prompt": True}
        try:
            text = self._rendered(given)
        except ChatError:
            return False
        return _PROBE in text and "'text'" not in text

    def _error(self, message: str) -> ChatError:
        """In a line that is safe to print: the template may have written the text."""
        words = "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in message[:2000])
        return ChatError(f"{self.name}: {' '.join(words.split())[:300]}")


def check_variables(template_kwargs: Any, reasoning: bool | None) -> None:
    """Raises ChatError if these are no variables for a template, or are set by something else."""
    if template_kwargs is None:
        return
    given = checks.mapping(ChatError, "template_kwargs", template_kwargs, "names and values")
    reserved = _RESERVED if reasoning is None else (*_RESERVED, "enable_thinking")
    for name in given:
        if not isinstance(name, str) or name in reserved:
            expected = f"names other than {', '.join(reserved)}"
            checks.refuse(ChatError, "template_kwargs", expected, name)


def _open_ended(message: Message) -> Message:
    """A message whose content may go on; without one, its thinking does."""
    content, thinking = message.get("content") or "", message.get("reasoning_content")
    if message["role"] != "assistant" or message.get("tool_calls"):
        raise ChatError("continue_last: expected an assistant's message without calls at the end")
    if isinstance(content, Sampled):
        return message
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content)
    if not content and isinstance(thinking, str):
        content = f"{_OPEN}\n{thinking}"
    if not content.lstrip().startswith(_OPEN):
        return {**message, "content": Sampled(content)}
    n_thinking = content.find(_CLOSE) + len(_CLOSE)
    is_closed = _CLOSE in content
    return {**message, "content": Sampled(content, n_thinking if is_closed else len(content))}


def _marked(i: int, message: Message) -> Message:
    """A message with marks in place of what was sampled, which the template may not change, and
    without what is None, which many templates would write as that word."""
    if not isinstance(message, Mapping):
        return message
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if not isinstance(content, Sampled):
        return message
    marks = {"content": f"{_MARK}{i}{_MARK}"}
    if content.n_thinking is not None:
        marks["reasoning_content"] = f"{_MARK}t"
    return {**message, **marks}


def _as_written(found: re.Match[str], messages: Sequence[Message]) -> str:
    """What replaces marks, and what a template wrote between them."""
    text = messages[int(found["i"])]["content"]
    if found["thinking"]:
        opening = found["opening"] or ""
        return str(text) if text.lstrip().startswith(_OPEN) else opening + text
    return str(text if text.n_thinking is None else text[text.n_thinking :].lstrip("\n"))


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends with the mark that opens thinking."""
    return prompt.rstrip().endswith(_OPEN)


def is_text_part(part: Any) -> bool:
    """Whether a part of a content is `{"type": "text", "text": …}`."""
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
    )


def _plain(value: Any) -> Any:
    """A value as one that another process can read: in types of JSON, no subclasses of them."""
    if type(value) in _ATOMS:
        return value
    if isinstance(value, Mapping):
        return {_atom(key): _plain(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_plain(v) for v in value]
    return _atom(value)


def _atom(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if type(value) in _ATOMS:
        return value
    if not isinstance(value, str | int | float):
        checks.refuse(
            ChatError,
            "messages, tools or template_kwargs",
            "texts, numbers, lists and mappings",
            value,
        )
    if isinstance(value, str):
        return str.__str__(value)  # Of an enumeration, too, its text and not its name.
    return int(value) if isinstance(value, int) else float(value)


def name_for(file: GGUFFile, tools: Any) -> str | None:
    """The name of the template in a model's file for a request with `tools`: as in transformers, a
    file may have one of its own for tools. None stands for the file's first."""
    return "tool_use" if tools and f"{TEMPLATE_KEY}.tool_use" in file.metadata else None


def find_template(file: GGUFFile, choice: str | None = None) -> ChatTemplate:
    """The template of a model's file, or the one that `choice` names.

    choice: a name of BUILT_IN, the name of another template in the model's file, or a path. A
    model without a template gets chatml, with a warning. Raises ChatError, GGUFError.
    """
    if choice is None:
        if source := file.string(TEMPLATE_KEY, ""):
            return ChatTemplate(source, f"{file.path}: chat template")
        _log.warning("%s has no chat template: taking chatml", file.path)
        choice = "chatml"
    if source := BUILT_IN.get(choice, "") or file.string(f"{TEMPLATE_KEY}.{choice}", ""):
        return ChatTemplate(source, f"chat template {choice}")
    try:
        source = Path(choice).read_bytes().decode()
    except UnicodeDecodeError as error:
        came = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise ChatError(f"chat template {choice}: expected UTF-8, got {came}") from None
    except (OSError, ValueError) as error:
        prefix = f"{TEMPLATE_KEY}."
        in_file = [k.removeprefix(prefix)[:64] for k in file.metadata if k.startswith(prefix)]
        known = ", ".join([*BUILT_IN, *in_file[:_NAMED]])
        raise ChatError(
            f"chat template {choice}: expected a file or one of {known} "
            f"({getattr(error, 'strerror', None) or error})"
        ) from None
    return ChatTemplate(source, f"chat template {choice}")
