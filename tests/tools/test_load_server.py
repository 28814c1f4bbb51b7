"""load_server.py: small runs on the demo model, and clients whose server misbehaves."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.chats import QWEN35_STYLE
from tests.support.helpers import Result
from tools.load_agent import MARGIN, converse, table
from tools.load_client import Client, LoadError, ServerProcess, Streamed, request_bytes
from tools.load_server import main
from tools.load_vanish import State, Vanished, check

_TAIL = b'data: {"timings":{"predicted_n":7}}\n\ndata: [DONE]\n\n'
_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [re.split(r" *\| *", line)[1:-1] for line in lines]


def result(capsys: pytest.CaptureFixture[str], *argv: object) -> list[list[str]]:
    status, out, err = Result.of(main, ["-t", 1, *argv], capsys)
    assert (status, err) == (0, "")
    assert out.startswith("demo.gguf; ")
    return rows(out)


def test_clients_and_the_engine_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "--clients", 3, "-np", 2, "--seconds", 1, "--rounds", 2, "-n", 8)
    assert found[0][1] == "requests"
    assert [row[0] for row in found[1:]] == ["1", "2"]
    for _, n, median, longest, served, alone, ratio, *cores in found[1:]:
        assert int(n) >= 3
        assert 0 < float(median) <= float(longest)
        assert float(ratio) == pytest.approx(int(served) / int(alone), abs=0.02)
        # Beside busy neighbours a short round takes less than what is shown of a core.
        assert all(0 <= float(x) < 1.2 for x in cores)


def test_one_client(capsys: pytest.CaptureFixture[str]) -> None:
    head, *found, added = result(capsys, "--one", "-r", 2, "-n", 4)
    assert head == ["one client", "first token, ms", "between tokens, ms"]
    assert [row[0] for row in found] == ["Engine.generate", "Engine.chat", "the server"]
    for i in (1, 2):
        times = [float(row[i]) for row in found]
        assert min(times) > 0
        assert float(added[i]) == pytest.approx(times[2] - times[0], abs=0.011)


def test_nothing_stays_of_clients_that_vanish(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "--vanish", "--clients", 6, "--seconds", 3, "-n", 8)
    names = [row[0] for row in found]
    assert names[1:3] == ["requests running", "requests waiting"]
    assert [row[1:] for row in found if row[0].startswith("requests")] == [["0", "0"]] * 4
    # The first table is of a server without a prefix cache.
    free = [row for row in found[: len(found) // 2] if row[0] in ("slots free", "blocks free")]
    assert len(free) == 2
    assert all(before == after > "0" for _, before, after in free)


def state(**gauges: float) -> State:
    held = {"gdn_slots_free": 8, "gdn_blocks_free": 9, "gdn_cache_states": 0, **gauges}
    return State(held, 17, 100.0, 0.0)


@pytest.mark.parametrize(
    ("after", "has_cache", "said"),
    [
        (state(gdn_slots_free=7), True, "expected 8 slots free or kept, got 7"),
        (state(gdn_blocks_free=5), False, "gdn_blocks_free: expected 9, got 5"),
        (
            State(state().gauges, 20, 100.0, 0.0),
            True,
            "expected at most 19 file descriptors, got 20",
        ),
    ],
)
def test_what_is_still_held_is_an_error(after: State, has_cache: bool, said: str) -> None:
    check(state(), state(gdn_slots_free=7, gdn_cache_states=1), Vanished(), has_cache=True)
    with pytest.raises(LoadError, match=f"^{said}$"):
        check(state(), after, Vanished(), has_cache)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A file with one that has tools, and drops thoughts of earlier turns."""
    path = tmp_path / "template.jinja"
    path.write_text(QWEN35_STYLE)
    return path


def test_an_agent_processes_what_is_new(capsys: pytest.CaptureFixture[str], template: Path) -> None:
    options = ("--agent", "--turns", 3, "--chat-template", template)
    head, *found, sums = result(capsys, *options)
    assert head[:4] == ["turn", "prompt", "new or changed", "processed"]
    assert [row[0] for row in found] == sorted(row[0] for row in found)
    numbers = [[int(x) for x in row[1:4]] for row in found]
    assert [int(x) for x in sums[1:4]] == [sum(x) for x in zip(*numbers, strict=True)]
    for n_prompt, n_needed, n_processed in numbers[1:]:
        assert n_processed <= n_needed + MARGIN < n_prompt
    assert all(f"of {row[1]} tokens" in row[-1] for row in found)


def test_an_agent_without_a_cache_processes_all(template: Path) -> None:
    with ServerProcess("-t", 1, "-cram", 0, "--chat-template", template) as server:
        asked = converse(server, 2, 0, max_tokens=8)
    assert all(a.n_processed == a.n_prompt for a in asked)
    assert asked[-1].n_needed + MARGIN < asked[-1].n_prompt
    assert rows(table(asked))[-1][0] == "sum"


async def streamed(pieces: Sequence[bytes]) -> Streamed:
    """What a client makes of an answer that comes in pieces, before the connection ends."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        client = await Client.connected(server.sockets[0].getsockname()[1])
        got = await client.stream(request_bytes({}))
        client.close()
        await asyncio.sleep(0.02)
    return got


@pytest.mark.parametrize("cut", [1, 2, 5, 7, 20, len(_TAIL)])
def test_an_answer_ends_wherever_it_is_cut(cut: int) -> None:
    """h11 sends the last chunk of a body by itself, httptools with what comes before it."""
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(_TAIL), _TAIL)
    got = asyncio.run(streamed([_HEAD, body[:-cut], body[-cut:]]))
    assert (got.error, got.n_tokens) == ("", 7)
    assert 0 < got.first_s <= got.seconds


@pytest.mark.parametrize(
    "pieces", [(), (_HEAD, b'5\r\ndata: {"a"'), (b"HTTP/1.1 503 Busy\r\n\r\n", b"busy")]
)
def test_an_answer_that_is_not_whole_is_an_error(pieces: Sequence[bytes]) -> None:
    got = asyncio.run(streamed(pieces))
    assert got.error.startswith("the connection ended: ")
    assert repr(b"".join(pieces)) in got.error


def test_a_server_that_does_not_load() -> None:
    with pytest.raises(LoadError, match=r"^expected a server that loads, got: .*nowhere\.gguf"):
        ServerProcess("-m", "nowhere.gguf").__enter__()
