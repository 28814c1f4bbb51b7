"""Agents' command lines on the scripted engine: a whole loop with their own tools.

An agent sends its system prompt and its tools; the model calls two of them; the agent runs them in
a folder and sends the results.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import ADDRESS, Serve, recipes, replay
from tests.commands.test_cli_process import ROOT

pytestmark = pytest.mark.clients
BIN = ROOT / "build" / "clients" / "node_modules" / ".bin"
TASK = "Read notes.txt and write its number to out.txt."
WRITTEN = 'The number is\n"4711" & <b>.'


@dataclass(frozen=True)
class Agent:
    """command: before the task; read, write: its tools, and path: what they call a file's path;
    settings: their place in the home folder."""

    command: tuple[str, ...]
    read: str
    write: str
    path: str
    settings: str


AGENTS = {
    "qwen": Agent(
        ("qwen", "--auth-type", "openai", "--yolo", "-p"),
        "read_file", "write_file", "file_path", ".qwen/settings.json",
    ),
    "opencode": Agent(
        ("opencode", "run", "-m", "gdn/any"),
        "read", "write", "filePath", ".config/opencode/opencode.json",
    ),
}  # fmt: skip


def settings_of(name: str, address: str) -> Any:
    """What docs/server.md says, but that agents tell nobody anything."""
    if name == "qwen":
        off = {"privacy": {"usageStatisticsEnabled": False}}
        return {**off, "general": {"enableAutoUpdate": False}}
    (told,) = recipes("json")
    return {**json.loads(told.replace(ADDRESS, address)), "autoupdate": False, "share": "disabled"}


def call(name: str, **parameters: object) -> str:
    told = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in parameters.items())
    return f"<tool_call>\n<function={name}>\n{told}</function>\n</tool_call>"


def run(name: str, address: str, folder: Path, home: Path) -> str:
    """What the agent prints. It sees nothing of this machine's settings and accounts."""
    agent = AGENTS[name]
    (home / agent.settings).parent.mkdir(parents=True)
    (home / agent.settings).write_text(json.dumps(settings_of(name, address)))
    env = {
        "PATH": os.environ["PATH"], "HOME": str(home), "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": address, "OPENAI_MODEL": "any",
    }  # fmt: skip
    done = subprocess.run(
        [BIN / agent.command[0], *agent.command[1:], TASK], cwd=folder, env=env, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def roles(body: Any) -> Sequence[str]:
    return [message["role"] for message in body["messages"]]


@pytest.mark.parametrize("name", AGENTS)
def test_a_whole_loop(serve: Serve, tmp_path: Path, name: str) -> None:
    if not (BIN / name).exists():
        pytest.skip(f"{name}: run make test-clients")
    agent, folder, home = AGENTS[name], tmp_path / "work", tmp_path / "home"
    folder.mkdir()
    (folder / "notes.txt").write_text("It is 4711.\n")
    answers = (
        "I look.\n</think>\n\nI read it.\n\n"
        + call(agent.read, **{agent.path: folder / "notes.txt"}),
        "Now.\n</think>\n\n"
        + call(agent.write, content=WRITTEN, **{agent.path: folder / "out.txt"}),
        "So.\n</think>\n\nI wrote what you asked for.",
    )
    script, prompts = replay(*answers)
    server = serve(script, n_ctx=200_000, keys=("none",))
    said = run(name, server.address, folder, home)

    assert (folder / "out.txt").read_text() == WRITTEN
    assert "I wrote what you asked for." in said
    # Beside the loop an agent may ask for a title.
    assert {noted.status for noted in server.noted} == {200}
    turns = [noted.body for noted in server.noted if "tools" in noted.body]
    assert len(turns) == 3
    for turn in turns:
        assert {"model", "messages", "stream", "stream_options", "tools", "max_tokens"} <= set(turn)
        assert {agent.read, agent.write} <= {tool["function"]["name"] for tool in turn["tools"]}
        assert roles(turn)[0] == "system"
    assert roles(turns[2])[-4:] == ["assistant", "tool", "assistant", "tool"]
    assert "4711" in json.dumps(turns[1]["messages"][-1])
    # Each turn's prompt goes on with what the model wrote, so nothing of it is processed again.
    first, second, third = prompts
    assert second.startswith(first + answers[0])
    assert third.startswith(second + answers[1])
