"""Servers for clients: of the scripted engine, and `serve` with the demo model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.server.chat import Shared
from engine.text.template import ChatTemplate
from tests.commands.test_cli_process import ROOT
from tests.server.test_serve import serving
from tests.support.live import Live
from tests.support.scripted import Script, ScriptedEngine

# Where docs/server.md says that the server is.
ADDRESS = "http://127.0.0.1:8080/v1"
_TEMPLATE = Path(__file__).parents[1] / "support" / "templates" / "qwen35_style.jinja"

Serve = Callable[..., Live]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(script, n_parallel=…, n_ctx=…, **config): a server of the scripted engine, whose
    template has tools and thinking."""
    with contextlib.ExitStack() as stack:

        def run(script: Any = None, n_parallel: int = 4, n_ctx: int = 4096, **config: Any) -> Live:
            engine = ScriptedEngine(script or Script(), n_parallel, n_ctx)
            shared = Shared("scripted", template=ChatTemplate(_TEMPLATE.read_text()))
            server = Live(engine, shared, **config)
            stack.callback(server.close)
            return server

        yield run


@pytest.fixture(scope="session")
def demo() -> Iterator[str]:
    """The address of `serve` with the demo model."""
    with serving("--alias", "demo", "-np", 4, "--api-key", "key") as server:
        yield f"http://127.0.0.1:{server.port}/v1"


def replay(*texts: str) -> tuple[Callable[[str], Script], list[str]]:
    """A script of a conversation with tools, whose answers are `texts`, and the prompts that came.
    What has no tools, such as a question for a title, gets the last text."""
    prompts: list[str] = []

    def script(prompt: str) -> Script:
        if "<tools>" not in prompt:
            return Script(texts[-1])
        prompts.append(prompt)
        first, now = (p.count("<|im_start|>assistant\n") for p in (prompts[0], prompt))
        return Script(texts[now - first])

    return script, prompts


def recipes(language: str) -> list[str]:
    """The programs, or settings, of clients in docs/server.md."""
    text = (ROOT / "docs" / "server.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
