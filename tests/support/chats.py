"""Conversations that tests of chat templates render, and the templates of templates/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).parent / "templates"
QWEN35_STYLE = (_TEMPLATES / "qwen35_style.jinja").read_text()
# The other ways to write calls.
JSON_STYLE = (_TEMPLATES / "json_style.jinja").read_text()
KIMI_STYLE = (_TEMPLATES / "kimi_style.jinja").read_text()
LING_STYLE = (_TEMPLATES / "ling_style.jinja").read_text()
CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
# Everything that transformers offers to a template.
FEATURES = """\
  {# lstrip_blocks, trim_blocks #}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% elif message.role == 'stop' %}
        {% break %}
    {% endif %}
    {% generation %}{% set inner = message.role %}[{{ message.content }}]{% endgeneration %}
{{ inner is defined }} {{ message | tojson }} {{ message | tojson(indent=2) }}
{% endfor %}
{{ {'b': ['<é&>', 1.5, none], 'a': true} | tojson(ensure_ascii=true, sort_keys=true) }}
{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }} {{ tools | tojson }} {{ documents is none }}
{{ bos_token }}|{{ eos_token }}|{{ nothing }}|{{ strftime_now('%Y') | length }}
{% if add_generation_prompt %}go{% endif %}
"""

Messages = list[dict[str, Any]]


def _message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


_USER, _MORE = _message("user", "What is 6 · 7?"), _message("user", "And <b>8 · 9</b>?")
_SYSTEM = _message("system", "  Be brief.\n")
_CALL = {"type": "function", "function": {"name": "product", "arguments": {
    "factors": [6, 7], "exact": True, "unit": "é<", "options": {"base": 10}}}}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {
        "name": "product", "description": "Multiplies <numbers> & more: é", "parameters": {
            "type": "object", "required": ["factors"],
            "properties": {"factors": {"type": "array", "items": {"type": "number"}}}}}},
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]  # fmt: skip
CHATS: dict[str, Messages] = {
    "user": [_USER],
    "system": [_SYSTEM, _USER],
    "turns": [_SYSTEM, _USER, _message("assistant", "42"), _MORE],
    "thinking": [
        _USER,
        _message("assistant", "<think>\nSix sevens.\n</think>\n\n42"),
        _MORE,
        _message("assistant", "It is</think>72\n"),
        _USER,
    ],
    "reasoning": [_USER, _message("assistant", "42", reasoning_content="\nSix sevens. "), _MORE],
    "ends in an answer": [_USER, _message("assistant", "<think>\nHm.\n</think>\n\n42")],
    "parts": [_message("user", [{"type": "text", "text": "What "}, {"type": "text", "text": "?"}])],
    "call": [
        _SYSTEM,
        _USER,
        _message("assistant", "<think>\nCall it.</think>I call.", tool_calls=[_CALL, _CALL]),
        _message("tool", "42"),
        _message("tool", "forty-two"),
    ],
    "call answered": [
        _USER,
        _message("assistant", None, tool_calls=[_CALL]),
        _message("tool", "42"),
        _message("assistant", "It is 42."),
        _MORE,
    ],
}
