"""Chat templates: from messages to the text that a model was trained to continue.

A template is a Jinja program in the model's file, so it is untrusted. It runs in a process of its
own, within limits.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

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


class ChatTemplate:
    """A compiled template; `name` is for error texts, `variables` are the names that it reads."""

    def __init__(self, source: str, name: str = "chat template") -> None:
        checks.text(ChatError, name, source)
        self.name = name
        self._source = source
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
    ) -> str:
        """The text of a conversation, as transformers' apply_chat_template renders it.

        messages: each with `role`, `content` and what else the template reads. tools: JSON schemas.
        reasoning: its `enable_thinking` (None: its own default). special: texts by the names that
        templates use (`bos_token`, …). Raises ChatError if it fails or takes too much.
        """
        given: dict[str, Any] = {"messages": messages, "tools": tools, "documents": None}
        given |= {"add_generation_prompt": add_generation_prompt, **(special or {})}
        if reasoning is not None:
            given["enable_thinking"] = reasoning
        return self._rendered(given)

    def _rendered(self, given: Mapping[str, Any]) -> str:
        try:
            return jinja_process.run(self._source, _plain(given))
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
        checks.refuse(ChatError, "messages or tools", "texts, numbers, lists and mappings", value)
    if isinstance(value, str):
        return str.__str__(value)  # Of an enumeration, too, its text and not its name.
    return int(value) if isinstance(value, int) else float(value)


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
