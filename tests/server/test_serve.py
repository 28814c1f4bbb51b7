"""`serve` as a process: the demo model over real sockets, signals, and what can't be served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from engine.commands.serving import open_listener
from tests.commands.test_cli_process import ENV, ROOT
from tests.commands.test_missing_packages import without
from tests.support.helpers import Cli

QUESTION = {"messages": [{"role": "user", "content": "What is 23 times 45?"}], "temperature": 0}
ANSWER = "23 * 40 = 920, 23 * 5 = 115, 920 + 115 = 1035"
ENDLESS = {"prompt": "a", "ignore_eos": True, "stream": True, "max_tokens": 1500}


class Process:
    """A server and its address."""

    def __init__(self, *argv: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "cli.py", "serve", "--port", "0", "-t", "1", *map(str, argv)],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENV,
        )  # fmt: skip
        assert self.process.stderr is not None
        self.line = self.process.stderr.readline()
        match = re.fullmatch(r"(\S+) at http://127\.0\.0\.1:(\d+)\n", self.line)
        assert match, self.line + self.process.stderr.read()
        self.name, self.port = match[1], int(match[2])

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> HTTPResponse:
        """A response whose body may come; to close it closes the connection."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        raw = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, raw, {"Connection": "close", **headers})
            return connection.getresponse()
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """(status, body)."""
        with self.open(method, path, body, **headers) as response:
            return response.status, response.read().decode()

    def wait_until_loaded(self) -> Process:
        end = time.monotonic() + 30
        while self.ask("GET", "/health")[0] != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        return self

    def end(self) -> tuple[int, str]:
        """(exit status, standard error after the first line)."""
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err


@contextlib.contextmanager
def serving(*argv: object) -> Iterator[Process]:
    server = Process(*argv)
    try:
        yield server.wait_until_loaded()
    finally:
        server.process.kill()
        server.process.communicate()


def test_answers_over_a_socket() -> None:
    with serving("--alias", "my-demo", "--temp", "0") as server:
        assert server.name == "my-demo"
        body = json.loads(server.ask("POST", "/v1/chat/completions", QUESTION)[1])
        assert body["choices"][0]["message"]["content"] == ANSWER
        n_prompt = body["usage"]["prompt_tokens"]
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        # The next turn processes what is new, if the template keeps what an answer began with.
        turn = [*QUESTION["messages"], body["choices"][0]["message"]]  # type: ignore[misc]
        turn.append({"role": "user", "content": "Sort these numbers: 42, 7, 95, 19"})
        _, sent = server.ask(
            "POST",
            "/v1/chat/completions",
            {"messages": turn, "stream": True, "chat_template_kwargs": {"preserve_thinking": True}},
        )
        lines = [line for line in sent.split("\n\n") if line][:-1]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        assert text == "7, 19, 42, 95"
        timings = chunks[-1]["timings"]
        assert timings["cache_n"] == n_prompt + body["usage"]["completion_tokens"]
        assert timings["reuse"].endswith("(the rest is new)")
        server.process.send_signal(signal.SIGTERM)
        status, err = server.end()
        assert (status, err.count("\n")) == (0, 1), err  # The summary of the model.


def test_choices_of_a_long_prompt_process_it_once() -> None:
    text = "Question: Anna went to the kitchen. " * 30
    with serving() as server:
        ask = {"prompt": text, "n": 3, "max_tokens": 2, "temperature": 0}
        body = json.loads(server.ask("POST", "/v1/completions", ask)[1])
        n = body["usage"]["prompt_tokens"]
        assert len({c["text"] for c in body["choices"]}) == 1
        assert n <= body["timings"]["prompt_n"] < n + 2 * 64
        assert body["timings"]["cache_n"] == 3 * n - body["timings"]["prompt_n"]


def test_a_client_that_vanishes_frees_its_place() -> None:
    with serving("-np", 1) as server:
        for _ in range(3):
            with server.open("POST", "/v1/completions", ENDLESS) as response:
                response.read(100)
        begun = time.monotonic()
        ask = {"prompt": "a", "max_tokens": 1}
        assert server.ask("POST", "/v1/completions", ask)[0] == 200
        assert time.monotonic() - begun < 5  # 1,500 tokens would take longer.
        metrics = server.ask("GET", "/metrics")[1]
        assert 'gdn_requests_total{outcome="cancelled"} 3.0' in metrics


def test_running_answers_finish_after_the_first_signal() -> None:
    with serving() as server:
        with server.open("POST", "/v1/completions", ENDLESS | {"max_tokens": 900}) as response:
            response.read(10)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.4)
            with pytest.raises(ConnectionError):
                server.ask("GET", "/health")
            rest = response.read().decode()
        assert rest.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in rest
        assert server.end()[0] == 0


@pytest.mark.parametrize("how", ["signal", "time"])
def test_they_are_cut_short_by_a_second_signal_or_after_a_time(how: str) -> None:
    with serving("-c", 100_000, "--drain-timeout", 60 if how == "signal" else 1) as server:
        with server.open("POST", "/v1/completions", ENDLESS | {"max_tokens": 90_000}) as response:
            response.read(10)
            server.process.send_signal(signal.SIGINT)
            if how == "signal":
                time.sleep(0.3)
                server.process.send_signal(signal.SIGTERM)
            rest = response.read().decode()
        assert rest.endswith("\n\n")
        last = json.loads(rest.strip().split("data: ")[-1])
        assert last["error"]["message"] == "the server ends: the answer was cut short"
        assert server.end()[0] == 0


def test_requests_are_logged_where_that_is_asked_for() -> None:
    with serving("-v") as server:
        for _ in range(2):
            server.ask("GET", "/props")
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[1].count('"GET /props HTTP/1.1" 200') == 2


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    with serving("--api-key-file", file, "--api-key", "three,four") as server:
        assert server.ask("GET", "/props")[0] == 401
        for key in ("one", "two", "three", "four"):
            assert server.ask("GET", "/props", Authorization=f"Bearer {key}")[0] == 200


def test_a_model_that_can_t_be_loaded_ends_the_server(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:-1000])
    done = subprocess.run(
        [sys.executable, "cli.py", "serve", "--port", "0", "-m", tmp_path / "cut.gguf"],
        capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=60, check=False,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert lines[-1].startswith("error: ")
    assert len(lines) <= 2


def test_parameters_that_leave_no_token_are_the_request_s_fault() -> None:
    with serving() as server:
        props = json.loads(server.ask("GET", "/v1/models")[1])["data"][0]["meta"]
        bans = {str(i): False for i in range(props["n_vocab"])}
        for fields, said in (
            ({"temperature": 1e-310}, "parameters too extreme for the logits: "),
            ({"logit_bias": bans}, "logits: expected a finite number as the highest"),
            ({"logit_bias": bans, "temperature": 0}, "logits: expected a finite number"),
        ):
            body = {"prompt": "a", "max_tokens": 2, **fields}
            status, told = server.ask("POST", "/v1/completions", body)
            assert status == 400, told
            assert json.loads(told)["error"]["message"].startswith(said)
            told = server.ask("POST", "/v1/completions", {**body, "stream": True})[1]
            assert '"type":"invalid_request_error"' in told


def test_small_packets_do_not_wait_for_each_other() -> None:
    async def main() -> None:
        delays = asyncio.Queue[int]()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            made = writer.get_extra_info("socket")
            delays.put_nowait(made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        opened = open_listener("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=opened):
            _, writer = await asyncio.open_connection(*opened.getsockname())
            assert await delays.get()
            writer.close()

    asyncio.run(main())


def test_what_can_t_be_served(cli: Cli, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = cli("serve", "--port", port).refused()
        assert line == f"--host 127.0.0.1 --port {port}: Address already in use"
    assert cli("serve", "--host", "no.such.host.invalid").refused().startswith("--host no.such")
    assert cli("serve", "--port", 65_536).status == 2
    (tmp_path / "keys").write_text("\n")
    line = cli("serve", "--port", 0, "--api-key-file", tmp_path / "keys").refused()
    assert line == f"{tmp_path / 'keys'}: expected keys, one a line, got none"
    assert cli("serve", "--port", 0, "--api-key", "é").refused().startswith("--api-key: expected")
    assert cli("serve", "--port", 0, "-m", tmp_path / "x.gguf").refused()


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "msgspec", "prometheus_client"])
def test_a_missing_package_of_the_extra(package: str) -> None:
    status, out, err = without(package, "serve", "--port", 0)
    assert (status, out) == (1, "")
    assert err == f"error: the server needs {package}: pip install 'gdn-engine[server]'\n"
