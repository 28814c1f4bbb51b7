"""Chat templates: from messages to the text that a model was trained to continue.

A template is a Jinja program in the model's file, so it is untrusted. It runs in jinja2's sandbox
with the environment of transformers' `apply_chat_template`: trimmed blocks, `tojson` that leaves
HTML alone, `raise_exception`, `strftime_now`, loop controls, the tag `generation`.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, meta, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine import checks
from engine.errors import EngineError
from engine.formats.files import not_regular
from engine.formats.gguf import GGUFFile

Message = Mapping[str, Any]

_log = logging.getLogger(__name__)
TEMPLATE_KEY = "tokenizer.chat_template"
# Of the templates in a file, so many are named where another one is asked for.
_NAMED = 8
_PROBE = "\ufdd1"  # No template contains it.
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
        environment = _environment()
        try:
            self.variables = meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise self._error(f"line {error.lineno}: {error.message}") from None
        except Exception as error:  # Jinja makes Python of it, which may not compile.
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
        templates use (`bos_token`, …). Raises ChatError if it fails or the sandbox stops it.
        """
        # Copies: a template may append to the lists in them.
        try:
            given: dict[str, Any] = {"messages": _copied(messages)}
            given |= {"tools": _copied(tools), "documents": None}
        except RecursionError:
            raise self._error("messages or tools that hold themselves") from None
        given |= {"add_generation_prompt": add_generation_prompt, **(special or {})}
        if reasoning is not None:
            given["enable_thinking"] = reasoning
        return self._rendered(given)

    def _rendered(self, given: Mapping[str, Any]) -> str:
        try:
            return self._template.render(given)
        except Exception as error:  # An untrusted program may raise anything.
            said = str(error) if isinstance(error, jinja2.TemplateError) else repr(error)
            raise self._error(said or type(error).__name__) from None

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


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(v) for key, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list | tuple) else value


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
        if kind := not_regular(Path(choice)):
            raise ValueError(f"it is {kind}")
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


class _Sandbox(ImmutableSandboxedEnvironment):
    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As llama.cpp's, it lets templates append to lists, which are copies of a user's."""
        is_append = isinstance(obj, list) and attr == "append"
        return is_append or super().is_safe_attribute(obj, attr, value)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks a model's own text, for training; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own type)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables set inside are not visible outside.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
