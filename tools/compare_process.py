"""compare.py's workers as their parent sees them: processes that run only during a request.

An idle worker is stopped (SIGSTOP), so that threads which spin while they wait take no core from
the worker whose turn it is. A worker that crashes, refuses a request or doesn't answer in time
keeps the reason in `failure`, and every later request raises it. `close` kills a worker, stopped
or not.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_SCRIPT = Path(__file__).with_name("compare_worker.py")
_LONGEST_LINE = 160
_PYTHON_STARTS_S = 60.0


class WorkerFailure(Exception):
    """Why a worker did not answer, in one line."""


class WorkerMissing(Exception):
    """What a worker needs and its Python lacks, in one line."""


class Worker:
    """A worker process of a kind (engine, peer) in a Python; its standard error goes to `log`."""

    def __init__(
        self,
        kind: str,
        python: str | Path,
        log: Path,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.kind, self.log, self.timeout_s, self.failure = kind, log, timeout_s, ""
        self._received = b""
        with log.open("wb") as stderr:
            try:
                # In a session of its own, so that only the parent gets Ctrl-C.
                self.process = subprocess.Popen(
                    [python, str(_SCRIPT), kind],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env={**os.environ, **(env or {})},
                    start_new_session=True,
                )
            except OSError as error:
                raise WorkerMissing(error.strerror or str(error)) from None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> dict[str, Any]:
        """Wait until it has imported its engine; returns what `about` of its runner says.

        Raises WorkerMissing if its Python is not a Python or lacks a module, WorkerFailure if it
        crashes.
        """
        timeout_s, self.timeout_s = self.timeout_s, min(self.timeout_s, _PYTHON_STARTS_S)
        try:
            self._receive()
        except WorkerFailure as failure:
            raise WorkerMissing(f"a program that is none ({failure})") from None
        self.timeout_s = timeout_s
        about = self._receive()
        self._stop()
        return about

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Continue it, wait for its answer to a request, and stop it. Raises WorkerFailure."""
        if self.failure:
            raise WorkerFailure(self.failure)
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdin
        # If it has ended, `_receive` says so.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do} | request).encode() + b"\n")
            self.process.stdin.flush()
        answer = self._receive()
        self._stop()
        return answer

    def _receive(self) -> dict[str, Any]:
        try:
            answer = json.loads(self._read_line())
            if "missing" in answer:
                raise WorkerMissing(answer["missing"])
            if "error" in answer:
                raise WorkerFailure(self._with_last_line(f"failed: {answer['error']}"))
            ok: dict[str, Any] = answer["ok"]
            return ok
        except (ValueError, TypeError, KeyError):
            failure = "failed: its answer is none"
        except WorkerFailure as error:
            failure = str(error)
        self.failure = failure
        self.close()
        raise WorkerFailure(failure)

    def _read_line(self) -> bytes:
        assert self.process.stdout
        out, deadline = self.process.stdout.fileno(), time.monotonic() + self.timeout_s
        while b"\n" not in self._received:
            ready, _, _ = select.select([out], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise WorkerFailure(f"failed: no answer within {self.timeout_s:g} s")
            data = os.read(out, 1 << 16)
            if not data:
                raise self._crash()
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _stop(self) -> None:
        """Stop it, and wait until it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        if self.process.returncode is None:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _crash(self) -> WorkerFailure:
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return WorkerFailure("crashed: it closed its output")
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return WorkerFailure(self._with_last_line(f"crashed: {how}"))

    def _with_last_line(self, text: str) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        shown = "".join(c if c.isprintable() else "?" for c in last)[:_LONGEST_LINE]
        return f"{text}, {shown}" if shown else text

    def close(self) -> None:
        """Kill it and wait for its end."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                # A request that it has not read is dropped.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def alternate(
    workers: Sequence[Worker], request: Mapping[str, Any], rounds: int
) -> list[list[float]]:
    """Seconds that each worker took for a request in each round; workers take turns, A B A B.

    A round before the first warms up. A worker that fails has fewer seconds than rounds.
    """
    seconds: list[list[float]] = [[] for _ in workers]
    for i in range(rounds + 1):
        for worker, taken in zip(workers, seconds, strict=True):
            try:
                answer = worker.ask(**request)
            except WorkerFailure:
                continue
            if i:
                taken.append(answer["seconds"])
    return seconds
