"""The process that runs templates: how it ends, and what its parent may do meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import linecache
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import OrderedDict, UserList
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import numpy as np
import pytest

from engine.text import jinja_process
from engine.text.template import ChatError, ChatTemplate

ROOT = Path(__file__).parents[2]
ECHO = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
LONG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# What the scripts below begin with.
START = f"""
import os, sys, time, signal, threading
from engine.text import jinja_process
from engine.text.template import ChatError, ChatTemplate
ECHO, LONG, USER = {ECHO!r}, {LONG!r}, [{{"role": "user", "content": "a"}}]
def pid():
    return jinja_process._process.child.pid
"""


def pid() -> int:
    child = jinja_process._process.child
    assert child is not None
    return child.pid


def chat(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


def script(code: str, *argv: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of the engine's users, also with what a shell does before or with it."""
    command = [sys.executable, "-c", START + textwrap.dedent(code), *argv]
    if shell:
        command = ["sh", "-c", shell, *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def seconds_of_work(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_that_is_killed_between_renders_is_replaced() -> None:
    template = ChatTemplate(ECHO)
    assert template.render(chat("a")) == "<a>"
    before = pid()
    os.kill(before, signal.SIGKILL)
    os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
    assert template.render(chat("b")) == "<b>"
    assert pid() != before
    assert not Path(f"/proc/{before}").exists()


def test_one_that_is_killed_during_a_render() -> None:
    long, template = ChatTemplate(LONG), ChatTemplate(ECHO)
    before, start = pid(), seconds_of_work(pid())
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(long.render, chat("a"))
        wait_until(lambda: seconds_of_work(before) > start + 0.05)
        os.kill(before, signal.SIGKILL)
        with pytest.raises(
            ChatError, match=r"^chat template: the process .* ended with status -9$"
        ):
            ended.result()
    assert template.render(chat("b")) == "<b>"


def test_many_threads_get_their_own_texts() -> None:
    template = ChatTemplate(ECHO)

    def renders(thread: int) -> None:
        for i in range(50):
            text = f"{thread}.{i}" * (1 + i * 999 % 7)
            assert template.render(chat(text, i)) == f"<{text}><{i}>"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(renders, range(8)))


class InterruptAtLine:
    """A KeyboardInterrupt at the n-th line that runs in the module or in subprocess."""

    def __init__(self, n: int) -> None:
        self.n, self.n_seen = n, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if code.co_filename not in (jinja_process.__file__, subprocess.__file__):
            return None
        if code.co_name in ("__init__", "_execute_child", "_get_handles"):
            return None  # Many lines, and what they have started is left to itself.
        # No signal's handler runs where `with` ends and `try` begins: a lock would stay taken.
        source = linecache.getline(code.co_filename, frame.f_lineno).strip()
        if event == "line" and not source.startswith(("with ", "try:")):
            self.n_seen += 1
            if self.n_seen == self.n:
                raise KeyboardInterrupt
        return self


# A process whose start was interrupted ends by itself: Python warns that nobody waited for it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_line_leaves_no_lock_taken() -> None:
    """Also in subprocess, whose poll can leave a lock taken that its wait needs."""
    template = ChatTemplate(ECHO)
    with ThreadPoolExecutor(1) as pool:
        for n in itertools.count(1):
            killed = pid()  # So that the lines of an end and of a start run, too.
            os.kill(killed, signal.SIGKILL)
            os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
            interrupt = InterruptAtLine(n)
            with contextlib.suppress(KeyboardInterrupt):
                sys.settrace(interrupt)
                try:
                    template.render(chat("a"))
                finally:
                    sys.settrace(None)
            assert pool.submit(template.render, chat("b")).result(timeout=60) == "<b>", n
            if interrupt.n_seen < n:
                break
    assert n > 40


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupt_leaves_nothing_half_read() -> None:
    long, template = ChatTemplate(LONG), ChatTemplate(ECHO)
    before = pid()
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.2):
        long.render(chat("a"))
    assert not Path(f"/proc/{before}").exists()
    assert template.render(chat("b")) == "<b>"
    # At any place: in a large request, and in the answer.
    big, n_interrupts = chat("c" * 3_000_000), 0
    for i in range(30):
        try:
            with interrupted_after(0.001 * (i + 1)):
                template.render(big)
        except KeyboardInterrupt:
            n_interrupts += 1
        assert template.render(chat(i)) == f"<{i}>"
    assert n_interrupts


def test_a_forked_process_has_one_of_its_own() -> None:
    code = """
    template, long = ChatTemplate(ECHO), ChatTemplate(LONG)
    before = pid()
    def ends():
        try:
            long.render(USER)
        except ChatError as error:
            assert "2 seconds" in str(error), error
    for other in (None, threading.Thread(target=ends)):
        if other:  # It has the lock, and waits for an answer.
            other.start()
            time.sleep(0.3)
        forked = os.fork()
        if not forked:
            assert template.render(USER) == "<a>"
            assert pid() != before
            jinja_process._process.end()
            os._exit(0)
        assert os.waitpid(forked, 0)[1] == 0
        if other:
            other.join()
        else:
            assert template.render(USER) == "<a>" and pid() == before
    """
    done = script(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_does_not_keep_the_process_of_its_parent() -> None:
    code = """
    template = ChatTemplate(ECHO)
    forked = os.fork()
    if not forked:
        time.sleep(30)
    print(pid(), forked, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", START + textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child, forked = map(int, parent.stdout.readline().split())
        parent.wait()
        try:
            wait_until(lambda: not is_running(child))
        finally:
            os.kill(forked, signal.SIGKILL)


def test_none_is_left_when_its_parent_ends() -> None:
    done = script("assert ChatTemplate(ECHO).render(USER) == '<a>'; print(pid())")
    assert not Path(f"/proc/{int(done.stdout)}").exists()
    killed = "ChatTemplate(ECHO); print(pid(), flush=True); os.kill(os.getpid(), 9)"
    done = script(killed)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not is_running(int(done.stdout)))


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    code = """
    text = ChatTemplate(ECHO).render(USER)
    try:
        os.write(2, b"what a library says")
    except OSError:
        pass
    open(sys.argv[1], "w").write(text + ChatTemplate(ECHO).render(USER))
    """
    done = script(code, str(tmp_path / "out"), shell=f'exec "$0" "$@" {closed}')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "<a><a>"


def test_signals_that_the_parent_ignores_or_blocks() -> None:
    code = """
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF, signal.SIGTERM])
    try:
        ChatTemplate(LONG).render(USER)
    except ChatError as error:
        print(error)
    template = ChatTemplate(ECHO)
    os.kill(pid(), signal.SIGKILL)
    while os.path.exists(f"/proc/{pid()}"):
        time.sleep(0.01)
    print(template.render(USER))
    """
    ended, text = script(code).stdout.splitlines()
    # Whoever ignores SIGCHLD is not told how a child ended.
    assert ended == "chat template: the process that runs it ended, as at its limits"
    assert text == "<a>"


@pytest.fixture
def fresh() -> Iterator[None]:
    """No process before the test, and none after it."""
    jinja_process._process.end()
    yield
    jinja_process._process.end()


@contextlib.contextmanager
def limited(what: int, n: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


@pytest.mark.usefixtures("fresh")
def test_files_that_run_out() -> None:
    # Whatever of it fails: the sockets, the copy of one, the process.
    n_open, said = len(os.listdir("/proc/self/fd")), []
    for n in range(n_open + 8):
        with limited(resource.RLIMIT_NOFILE, n):
            try:
                said.append(ChatTemplate(ECHO).render(chat("a")))
            except ChatError as error:
                said.append(str(error))
        jinja_process._process.end()
        assert len(os.listdir("/proc/self/fd")) <= n_open
    refusal = "the process that runs it can't be started: Too many open files"
    assert set(said) == {"<a>", f"chat template: {refusal}"}


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("n_mib", [1, 8])
def test_memory_that_runs_out(n_mib: int) -> None:
    with limited(resource.RLIMIT_AS, n_mib << 20), pytest.raises(ChatError) as raised:
        ChatTemplate(ECHO)
    assert str(raised.value).startswith("chat template: the process that runs it ")
    assert ChatTemplate(ECHO).render(chat("a")) == "<a>"


@pytest.mark.usefixtures("fresh")
def test_a_limit_of_memory_that_suffices() -> None:
    with limited(resource.RLIMIT_AS, 60 << 20):
        assert ChatTemplate(ECHO).render(chat("a")) == "<a>"
        with pytest.raises(ChatError, match="MiB of memory"):
            ChatTemplate("{{ ('a' * 10**8) | length }}").render([])


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("executable", ["", None, "/nothing/python"])
def test_no_python(monkeypatch: pytest.MonkeyPatch, executable: Any) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(ChatError, match=r"can't be started: (No such file|Permission)"):
        ChatTemplate(ECHO)


@pytest.mark.usefixtures("fresh")
def test_a_folder_does_not_replace_standard_modules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("json", "struct", "marshal", "markupsafe", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert ChatTemplate(ECHO).render(chat("a")) == "<a>"


@pytest.mark.usefixtures("fresh")
def test_a_default_timeout_of_sockets() -> None:
    socket.setdefaulttimeout(0.001)
    try:
        assert ChatTemplate(ECHO).render(chat("a" * 10**6)) == f"<{'a' * 10**6}>"
    finally:
        socket.setdefaulttimeout(None)


def test_what_comes_from_it_is_bounded() -> None:
    """Also what a template's process sends that is no longer ours."""
    reply = jinja_process._REPLY
    template = ChatTemplate(ECHO)
    for sent in (
        reply.pack(False, 1 << 40),
        reply.pack(True, 1 << 40),
        reply.pack(False, 1) + b"\xff",
    ):
        ours, theirs = socket.socketpair()
        # Its own socket stays open: where that is closed, it ends, and another one answers.
        with ours, theirs, jinja_process._process.socket:
            theirs.sendall(sent)
            jinja_process._process.socket = ours
            with pytest.raises(ChatError, match=r"bytes of text|ended with status"):
                template.render(chat("a"))
        assert template.render(chat("b")) == "<b>"


class Role(StrEnum):
    USER = "user"


class Old(str, Enum):  # noqa: UP042  (its str() is its name)
    USER = "user"


class Number(IntEnum):
    SEVEN = 7


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Role.USER, "user"),
        (Old.USER, "user"),
        (Number.SEVEN, "7"),
        (np.str_("a"), "a"),
        (np.int64(7), "7"),
        (np.float32(1.5), "1.5"),
        (np.bool_(True), "True"),
        (10**30, str(10**30)),
        (float("inf"), "inf"),
        ("\ud800 é \U0001f600 \0", "\ud800 é \U0001f600 \0"),
        ((1, (2, "a")), "[1, [2, 'a']]"),
        (UserList([1, Role.USER]), "[1, 'user']"),
        (OrderedDict(a=1), "{'a': 1}"),
        (MappingProxyType({Role.USER: None, 1: True}), "{'user': None, 1: True}"),
    ],
)
def test_values_that_a_template_gets(value: Any, text: str) -> None:
    assert ChatTemplate(ECHO).render(chat(value)) == f"<{text}>"


@pytest.mark.parametrize(
    "value",
    [datetime(2026, 1, 2), b"a", {1}, object(), {(1, 2): 3}, 1j, np.datetime64("2026", "D")],
)
def test_values_that_no_template_gets(value: Any) -> None:
    with pytest.raises(ChatError) as raised:
        ChatTemplate(ECHO).render(chat(value))
    expected = (
        "messages, tools or template_kwargs: expected texts, numbers, lists and mappings, got "
    )
    assert str(raised.value).startswith(expected)
    assert "\n" not in str(raised.value)


def test_equal_lists_are_lists_of_their_own() -> None:
    """What a template appends to one is in no other, though they were one list."""
    parts = ["a"]
    source = "{% set _ = messages[0].content.append('b') %}" + ECHO
    assert ChatTemplate(source).render(chat(parts, parts)) == "<['a', 'b']><['a']>"
    many = chat(*["a" * 10_000] * 1_000)
    assert len(ChatTemplate(ECHO).render(many)) == 10_002_000
    assert threading.active_count() < 100
