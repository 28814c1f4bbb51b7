"""The process that runs chat templates: untrusted programs, which the kernel bounds there.

All templates share one process. It starts with the first template, again after it has died, and
anew in a process that was forked; it ends with its parent. What comes from it is text, and bounded.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import importlib.util
import marshal
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_START = (
    "import sys; sys.path += sys.argv[3:]; import jinja_child; jinja_child.main(*sys.argv[1:3])"
)
# The headers: bytes that follow, seconds of work, bytes of memory; whether it is an error, bytes
# that follow.
_REQUEST, _REPLY = struct.Struct("=QdQ"), struct.Struct("=?Q")
# A short chat takes 0.1 ms; one of very short messages takes 0.3 seconds a MiB.
_SECONDS, _SECONDS_PER_MIB = 2.0, 2.0
# A text with one emoji takes four bytes a character, and a template makes some copies.
_MEMORY, _MEMORY_PER_BYTE = 256 << 20, 64
# A chat is rendered about once.
_TEXT, _TEXT_PER_BYTE = 2 << 20, 16


class JinjaError(Exception):
    """What a template raised, or how it ended its process."""


def run(source: str, given: Mapping[str, Any] | None = None) -> str:
    """What a template makes of variables; without them, the names that it reads, apart by spaces.

    given: dicts, lists, str, int, float, bool and None, no subclasses. Raises JinjaError.
    """
    request: Any = (source, given)
    try:
        # Version 2 has no references: it has the size of all texts, and all lists are copies.
        request = marshal.dumps(request, 2)
    except ValueError as error:
        raise JinjaError(str(error)) from None
    failed, text = _process.ask(request)
    if failed:
        raise JinjaError(text)
    return text


class _Process:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.child: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket

    def ask(self, request: bytes) -> tuple[bool, str]:
        seconds = _SECONDS + _SECONDS_PER_MIB * len(request) / 2**20
        memory = _MEMORY + _MEMORY_PER_BYTE * len(request)
        n_text = _TEXT + _TEXT_PER_BYTE * len(request)
        with self._lock:
            if self.child is None or _reaped(self.child, os.WNOHANG) is not None:
                self.end()
                self._start()
            try:
                header = _REQUEST.pack(len(request), seconds, memory)
                # No signal, which may end this process, if the other end is closed.
                self.socket.sendall(header, socket.MSG_NOSIGNAL)
                self.socket.sendall(request, socket.MSG_NOSIGNAL)
                failed, n_bytes = _REPLY.unpack(self._read(_REPLY.size))
                if n_bytes > n_text:
                    raise JinjaError(f"expected at most {n_text:,} bytes of text, and it made more")
                return failed, self._read(n_bytes).decode("utf-8", "surrogatepass")
            except (OSError, ValueError):  # It has closed its end, or sends what is no text.
                status = self.end()
            except BaseException:  # The rest of the exchange would be read as the next one.
                self.end()
                raise
        if status == -signal.SIGPROF:
            raise JinjaError(f"expected at most {seconds:.0f} seconds of work, and it took more")
        if status == errno.ENOMEM:
            raise JinjaError(
                f"expected at most {memory >> 20} MiB of memory (or what ulimit -v leaves), and it "
                "took more"
            )
        # Who ignores SIGCHLD is told 0.
        how = f"ended with status {status}" if status else "ended, as at its limits"
        raise JinjaError(f"the process that runs it {how}")

    def _start(self) -> None:
        folders = [Path(__file__).parent, *map(_folder, ("jinja2", "markupsafe"))]
        # Isolated and without site-packages: nothing in a folder can replace a standard module.
        start = [_START, _REQUEST.format, _REPLY.format, *map(str, folders)]
        command = [sys.executable or "", "-I", "-S", "-c", *start]
        try:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                theirs.settimeout(None)
                # In a session of its own: Ctrl-C is for the parent.
                child = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
                # Above 2: libraries write to standard error where it is closed.
                self.socket = socket.socket(fileno=fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 3))
                self.socket.settimeout(None)
                self.child = child
        except OSError as error:
            why = error.strerror or error
            raise JinjaError(f"the process that runs it can't be started: {why}") from None

    def _read(self, n_bytes: int) -> bytes:
        parts = []
        while n_bytes:
            parts.append(self.socket.recv(n_bytes, socket.MSG_WAITALL))
            if not parts[-1]:
                raise ConnectionResetError
            n_bytes -= len(parts[-1])
        return b"".join(parts)

    def end(self) -> int:
        """The exit status, as subprocess has it."""
        child, self.child = self.child, None
        if child is None:
            return 0
        child.kill()
        self.socket.close()
        return _reaped(child) or 0

    def leave_parent(self) -> None:
        """In a forked process: the child is the parent's, and a thread of it may have the lock."""
        self._lock = threading.Lock()
        if self.child is not None:
            self.socket.close()
            self.child.returncode = 0  # So that nobody here waits for it.
            self.child = None


def _reaped(child: subprocess.Popen[bytes], options: int = 0) -> int | None:
    """As Popen.wait and poll, whose lock an interrupt can leave taken: then wait never returns."""
    if child.returncode is None:
        try:
            process, status = os.waitpid(child.pid, options)
        except ChildProcessError:  # Who ignores SIGCHLD is told nothing.
            child.returncode = 0
        else:
            if process:
                child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode


def _folder(package: str) -> Path:
    """From which Python imports a package here."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.origin).absolute().parents[1]


_process = _Process()
os.register_at_fork(after_in_child=_process.leave_parent)
atexit.register(_process.end)
