"""`--session FILE`: what a run goes on from, and what it leaves for the next one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.commands.options import InputError, Parser, given_fields
from engine.engine import Engine
from engine.kvcache.store import StoreError
from engine.runtime.completion import Completion
from engine.runtime.sessions import Session
from engine.sampling.params import SamplingParams

Messages = list[dict[str, Any]]


def add_options(p: Parser) -> None:
    p.add_argument("--session", metavar="FILE",
        help="go on from this file if it is there, and write the state to it at the end of the run "
        "or of each turn of a chat; without a prompt, generate more")  # fmt: skip


class SessionFile:
    """The file of --session; without one, nothing is read or written."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._path = None if args.session is None else Path(args.session)

    @property
    def is_there(self) -> bool:
        return self._path is not None and self._path.exists()

    def restore(self, engine: Engine) -> Session | None:
        """Restore the session of the file, if there is one. Raises StoreError."""
        if self._path is None or not self.is_there:
            return None
        session = engine.restore(self._path)
        print(f"{self._path}: {len(session.tokens)} tokens, none processed again", file=sys.stderr)
        return session

    def messages(self, engine: Engine, system: Messages) -> Messages:
        """Those of a chat that goes on, or the system message of a new one."""
        session = self.restore(engine)
        if session is None:
            return system
        found = session.data.get("messages") if isinstance(session.data, dict) else None
        if not isinstance(found, list):
            raise InputError(f"{self._path}: expected the session of a chat, got that of a text")
        if system and system != found[:1]:
            raise InputError(f"{self._path}: expected a session with this system message")
        return found

    def save(self, engine: Engine, completion: Completion, messages: Sequence[Any] = ()) -> None:
        """Write it, or say why not: the run goes on."""
        if self._path is not None:
            try:
                engine.save(completion, self._path, {"messages": messages} if messages else None)
            except StoreError as error:
                print(f"error: {error}", file=sys.stderr)


def start(
    engine: Engine, session: Session | None, prompt: str, params: SamplingParams,
    args: argparse.Namespace,
) -> Completion:  # fmt: skip
    """The completion of a prompt, behind a session's tokens; without a prompt, more of its own."""
    if session is None:
        return engine.generate(prompt, params)
    if prompt:
        segments = engine.tokenizer.segments(prompt, continues=True)
        return engine.generate([*session.tokens, *(i for _, ids in segments for i in ids)], params)
    given = {name: getattr(params, name) for name in given_fields(args, SamplingParams)}
    return engine.resume(session, replace(session.params, **given) if given else None)
