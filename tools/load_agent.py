"""A scripted user who asks for calls of tools, and what the server processes of each prompt.

The functions and wishes are of the kind that the demo model knows. What has to be processed is
found apart from the engine's cache, by the texts of the prompts: all that is new, and what comes
after the first character that the template writes otherwise than before.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from tools.load_client import CHAT, ServerProcess

_MOST_CALLS = 4  # of one turn
# Tokens that are not kept before what changes: those that open the message of the assistant.
MARGIN = 4
_FIELDS = {"number": ("integer", (17, 230, 4, 91, 1204)), "name": ("string", ("blue", "north"))}
_PAIRS = (("find", "parcel"), ("open", "gate"), ("paint", "fence"), ("order", "lamp"))
_ASKED = {"weight": (12, 340, 7), "size": ("small", "large"), "count": (3, 56, 808)}


def _tool(verb: str, noun: str) -> dict[str, Any]:
    properties = {name: {"type": kind} for name, (kind, _) in _FIELDS.items()}
    parameters = {"type": "object", "properties": properties, "required": ["number"]}
    about = f"Use this to {verb} {'an' if noun[0] in 'aeiou' else 'a'} {noun}."
    function = {"name": f"{verb}_{noun}", "description": about, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [_tool(*pair) for pair in _PAIRS]


@dataclass
class Asked:
    """One request: of which turn; tokens of its prompt, tokens that had to be processed and that
    were; calls of its answer; what the server says of the reuse."""

    turn: int
    n_prompt: int
    n_needed: int
    n_processed: int
    n_calls: int
    said: str


class Conversation:
    """A conversation over HTTP, whose history the client keeps as the server gave it."""

    def __init__(self, server: ServerProcess, seed: int, **fields: Any) -> None:
        self._server, self._random, self._fields = server, random.Random(seed), fields
        self._messages: list[dict[str, Any]] = [
            {"role": "system", "content": "You help with parcels and gates."}
        ]
        self._before, self._n_known = "", 0
        self.asked = list[Asked]()

    def turn(self, number: int) -> None:
        """A wish, the calls that it takes, their results, and the answer."""
        draw = self._random
        verb, noun = draw.choice(_PAIRS)
        values = " and ".join(f"{name} {draw.choice(of)}" for name, (_, of) in _FIELDS.items())
        wanted = draw.choice(list(_ASKED))
        text = f"Please {verb} the {noun} with {values}. What is the {wanted}?"
        self._messages.append({"role": "user", "content": text})
        for _ in range(_MOST_CALLS):
            message = self._answer(number)
            self._messages.append(message)
            for call in message.get("tool_calls") or ():
                result = json.dumps({wanted: draw.choice(_ASKED[wanted])})
                self._messages.append(
                    {"role": "tool", "tool_call_id": call["id"], "content": result}
                )
            if not message.get("tool_calls"):
                return

    def _answer(self, turn: int) -> dict[str, Any]:
        body = {"messages": self._messages, "tools": TOOLS, "temperature": 0, **self._fields}
        prompt = self._server.post("/apply-template", body)["prompt"]
        n_known = self._n_known_of(prompt)
        got = self._server.post(CHAT, body)
        timings, usage = got["timings"], got["usage"]
        n_prompt, n_generated = usage["prompt_tokens"], usage["completion_tokens"]
        message: dict[str, Any] = got["choices"][0]["message"]
        calls = message.get("tool_calls") or ()
        self.asked.append(
            Asked(turn, n_prompt, n_prompt - n_known, timings["prompt_n"], len(calls),
                  timings["reuse"])
        )  # fmt: skip
        self._before, self._n_known = prompt, n_prompt + n_generated
        return message

    def _n_known_of(self, prompt: str) -> int:
        """How many of its tokens the server has seen: the prompt before and its answer, or what of
        that prompt is still the same."""
        if self._before and prompt.startswith(self._before):
            return self._n_known
        pairs = enumerate(zip(prompt, self._before, strict=False))
        n = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(self._before)))
        ids = self._server.post("/tokenize", {"content": prompt[:n], "parse_special": True})
        return len(ids["tokens"])


def converse(server: ServerProcess, n_turns: int, seed: int, **fields: Any) -> list[Asked]:
    """All requests of a conversation of so many turns."""
    talk = Conversation(server, seed, **fields)
    for i in range(n_turns):
        talk.turn(i + 1)
    return talk.asked


def table(asked: list[Asked]) -> str:
    lines = ["| turn | prompt | new or changed | processed | calls | what the server says |"]
    lines.append("|---" * 6 + "|")
    numbers = [(a.n_prompt, a.n_needed, a.n_processed, a.n_calls) for a in asked]
    for a, row in zip(asked, numbers, strict=True):
        lines.append(f"| {' | '.join(map(str, (a.turn, *row, a.said)))} |")
    sums = map(sum, zip(*numbers, strict=True))
    return "\n".join([*lines, f"| sum | {' | '.join(map(str, sums))} | |"])
