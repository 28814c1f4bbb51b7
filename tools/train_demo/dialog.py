"""Conversations as the model reads them: what chat.jinja renders, with what is learnt set apart.

Written apart from the template, since training needs to know which of the text is an answer; a
test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Message = dict[str, Any]  # As in OpenAI's protocol; thoughts are `reasoning_content`.
Tool = dict[str, Any]
Piece = tuple[str, bool]  # A text, and whether the model has to write it.
TEMPLATE = (Path(__file__).parent / "chat.jinja").read_text()
_CALLS = (
    "Call a function like this:\n<tool_call>\n<function=name>\n<parameter=key>\nvalue\n"
    "</parameter>\n</function>\n</tool_call>"
)


def user(text: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str, thought: str = "") -> Message:
    """An answer."""
    return {"role": "assistant", "content": text, "reasoning_content": thought}


def calls(*called: tuple[str, dict[str, Any]], thought: str = "") -> Message:
    """An answer that calls functions: names and arguments."""
    made = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in called]
    return {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": made}


def tool_result(text: str) -> Message:
    """What a function returned."""
    return {"role": "tool", "content": text}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def written(message: Message) -> str:
    """What the model writes for a message: its text and its calls."""
    made = []
    for call in message.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        values = "".join(
            f"<parameter={k}>\n{v if isinstance(v, str) else _json(v)}\n</parameter>\n"
            for k, v in arguments.items()
        )
        made.append(f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>")
    return "\n\n".join(part for part in (message["content"], "\n".join(made)) if part)


def _opening(messages: Sequence[Message], tools: Sequence[Tool]) -> str:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if tools:
        listed = "".join("\n" + _json(tool) for tool in tools)
        head = f"# Tools\n\n<tools>{listed}\n</tools>\n\n{_CALLS}"
        system = f"{head}\n\n{system}" if system else head
    return f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""


def _answer(message: Message, thinks: bool, has_block: bool) -> list[Piece]:
    thought, text = message.get("reasoning_content", ""), written(message)
    if not has_block:
        block: list[Piece] = []
    elif thinks:
        block, text = [("<think>\n", False)], f"{thought}\n</think>\n\n{text}"
    else:
        block = [(f"<think>\n{thought}\n</think>\n\n", False)]
    return [("<|im_start|>assistant\n", False), *block, (f"{text}<|im_end|>", True), ("\n", False)]


def pieces(
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    thinks: bool = False,
    preserve: bool = False,
) -> list[Piece]:
    """The text of a conversation in pieces; thinks: the thoughts have to be written, too.

    preserve: earlier answers keep their blocks of thoughts (the template's `preserve_thinking`).
    """
    query = max(i for i, message in enumerate(messages) if message["role"] == "user")
    out: list[Piece] = [(_opening(messages, tools), False)]
    was_tool = False
    for i, message in enumerate(messages):
        role, is_tool = message["role"], message["role"] == "tool"
        if was_tool and not is_tool:
            out.append(("<|im_end|>\n", False))
        if role == "assistant":
            out += _answer(message, thinks, preserve or i > query)
        elif role == "user":
            out.append((f"<|im_start|>user\n{message['content']}<|im_end|>\n", False))
        elif is_tool:
            start = "" if was_tool else "<|im_start|>user"
            result = f"\n<tool_response>\n{message['content']}\n</tool_response>"
            out.append((start + result, False))
        was_tool = is_tool
    return out + [("<|im_end|>\n", False)] * was_tool


def prompt(messages: Sequence[Message], tools: Sequence[Tool] = (), thinks: bool = False) -> str:
    """What the next answer goes on with."""
    start = "<think>\n" if thinks else "<think>\n\n</think>\n\n"
    text = "".join(piece for piece, _ in pieces(messages, tools))
    return f"{text}<|im_start|>assistant\n{start}"
