"""Between the engine's thread and the event loop: wake-ups, queue, clients that vanish, the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.support.asgi import Running, running, settled
from tests.support.scripted import Script, ScriptedEngine

PATH = "/v1/completions"
ENDLESS = Script("a b c d e f ", token_s=0.002, is_endless=True)
STREAM = {"prompt": "x", "stream": True}


def run(
    body: Callable[[Running], Awaitable[None]], script: Any = ENDLESS, n_parallel: int = 2,
    **config: Any,
) -> None:  # fmt: skip
    """Run a test in an event loop, with a server of the scripted engine."""

    async def main() -> None:
        async with running(ScriptedEngine(script, n_parallel), **config) as on:
            await body(on)

    asyncio.run(main())


def loop_of(on: Running) -> Any:
    engine = on.engine
    assert isinstance(engine, ScriptedEngine)
    return engine.scripted


def test_a_step_wakes_the_event_loop_once_for_all_requests() -> None:
    async def body(on: Running) -> None:
        news, loop = on.server.bridge._news, on.server.bridge.loop
        calls, real = [0], loop.call_soon_threadsafe

        def counted(callback: Any, *args: Any) -> Any:
            calls[0] += callback == news._answer
            return real(callback, *args)

        asked = [on.post(PATH, STREAM | {"max_tokens": 1000}) for _ in range(8)]
        await asyncio.gather(*(e.until(3) for e in asked))
        loop.call_soon_threadsafe = counted  # type: ignore[assignment, method-assign]
        begun, n_sent = loop_of(on).n_steps, sum(len(e.sends) for e in asked)
        await asyncio.sleep(0.3)
        n_steps = loop_of(on).n_steps - begun
        n_sent = sum(len(e.sends) for e in asked) - n_sent
        assert n_sent > 4 * n_steps > 40
        assert calls[0] <= n_steps + 1
        for exchange in asked:
            exchange.vanish()
        await asyncio.gather(*(e.end() for e in asked))

    run(body, n_parallel=8)


def test_what_a_step_gives_is_one_send() -> None:
    async def body(on: Running) -> None:
        n = 4
        exchange = await on.post(PATH, STREAM | {"n": n, "max_tokens": 6}).end()
        assert exchange.status == 200
        # Of a choice an event has one token, or what several steps gave if they were seen late.
        assert len(exchange.events) <= 6 * n + n + 1
        texts = dict.fromkeys(range(n), "")
        for event in exchange.events[:-1]:
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["text"]
        assert set(texts.values()) == {"a b c d e f"}
        # The first send has the prompt's token of all choices, unless the steps were seen apart.
        assert len(exchange.sends) <= 6 + n

    run(body, n_parallel=4)


@pytest.mark.parametrize("state", ["runs", "waits", "prefills"])
def test_who_vanishes_is_cancelled_within_a_step(state: str) -> None:
    """Also while it waits for its turn, or for its prompt."""
    script = Script(ENDLESS.text, 60.0 if state == "prefills" else 0.0, 0.05, is_endless=True)

    async def body(on: Running) -> None:
        loop = loop_of(on)
        first = [on.post(PATH, STREAM) for _ in range(2)]
        await settled(lambda: len(loop.running) == 2)
        leaver = first[0]
        if state == "waits":
            leaver = on.post(PATH, STREAM)
            await settled(lambda: len(loop.waiting) == 1)
        n_held, begun = loop.n_held, loop.n_steps
        leaver.vanish()
        await settled(lambda: loop.n_held < n_held)
        # A step may run, and one that has begun before the note.
        assert loop.n_steps - begun <= 3
        await leaver.end()
        assert on.server.bridge.n_taken == n_held - 1
        for exchange in first:
            exchange.vanish()
        await settled(lambda: on.server.bridge.n_taken == 0)

    run(body, script)


def test_who_vanishes_without_streaming_is_cancelled_too() -> None:
    async def body(on: Running) -> None:
        exchange = on.post(PATH, {"prompt": "x"})
        await settled(lambda: len(loop_of(on).running) == 1)
        exchange.vanish()
        await exchange.end()
        await settled(lambda: not loop_of(on).n_held)
        assert exchange.sends == []

    run(body)


def test_more_than_may_wait_are_refused() -> None:
    async def body(on: Running) -> None:
        several = await on.post(PATH, STREAM | {"n": 4}).end()
        assert (several.status, several.json["error"]["param"]) == (400, "n")
        taken = [on.post(PATH, STREAM) for _ in range(3)]
        await settled(lambda: loop_of(on).n_held == 3)
        refused = await on.post(PATH, STREAM).end()
        assert refused.status == 503
        assert refused.headers["retry-after"].isdecimal()
        assert refused.json["error"]["code"] == "queue_full"
        assert refused.json["error"]["message"] == (
            "expected at most 1 waiting requests (--max-queue): try again later"
        )
        for exchange in taken:
            exchange.vanish()
        await asyncio.gather(*(e.end() for e in taken))
        again = await on.post(PATH, STREAM | {"max_tokens": 2}).end()
        assert again.status == 200

    run(body, max_queue=1)


def test_a_stream_with_nothing_to_send_says_so() -> None:
    async def body(on: Running) -> None:
        exchange = await on.post(PATH, STREAM).end()
        assert exchange.status == 200
        comments = [s for s in exchange.sends if s == b": keep-alive\n\n"]
        assert 2 <= len(comments) <= 6
        assert exchange.sends[: len(comments)] == comments
        assert exchange.events[-1] == b"[DONE]"

    run(body, Script("a", prompt_s=0.5), keep_alive_s=0.1)


def test_one_that_fails_is_its_own_error() -> None:
    def script(prompt: str) -> Script:
        # Slow enough that a stream has begun before it breaks.
        return Script("a b " * 10, 0.0, 0.03, error="it broke" if prompt == "bad" else "")

    async def body(on: Running) -> None:
        bad, good = on.post(PATH, {"prompt": "bad"}), on.post(PATH, {"prompt": "good"})
        await asyncio.gather(bad.end(), good.end())
        assert (bad.status, good.status) == (500, 200)
        assert bad.json["error"] == {
            "message": "it broke", "type": "server_error", "param": None, "code": None
        }  # fmt: skip
        streamed = await on.post(PATH, STREAM | {"prompt": "bad"}).end()
        assert streamed.status == 200
        assert [e["error"]["message"] for e in streamed.events if "error" in e] == ["it broke"]
        assert streamed.events[-1] != b"[DONE]"

    run(body, script)


def test_a_bug_of_ours_is_an_error_without_detail(caplog: pytest.LogCaptureFixture) -> None:
    async def body(on: Running) -> None:
        def broken(*args: Any, **options: Any) -> Any:
            raise ZeroDivisionError("/secret/path")

        on.engine.generate = broken  # type: ignore[method-assign]
        exchange = await on.post(PATH, STREAM).end()
        assert (exchange.status, exchange.json["error"]["message"]) == (500, "internal error")
        assert on.server.bridge.n_taken == 0

    run(body)
    assert "ZeroDivisionError" in caplog.text


def test_a_large_request_does_not_stall_the_streams() -> None:
    """Its text is tokenized by another thread."""

    async def body(on: Running) -> None:
        real = on.engine.generate

        def slow(prompt: Any, *args: Any, **options: Any) -> Any:
            if len(prompt) > 100:
                time.sleep(0.5)
            return real(prompt, *args, **options)

        on.engine.generate = slow  # type: ignore[method-assign]
        stream = on.post(PATH, STREAM)
        await stream.until(3)
        large = on.post(PATH, {"prompt": "a " * 200, "max_tokens": 1})
        n = len(stream.sends)
        await asyncio.sleep(0.4)
        assert len(stream.sends) > n + 50
        assert not large.task.done()
        await large.end()
        stream.vanish()
        await stream.end()

    run(body)


def test_the_end_of_the_server_ends_answers() -> None:
    async def body(on: Running) -> None:
        bridge = on.server.bridge
        stream, whole = on.post(PATH, STREAM), on.post(PATH, {"prompt": "x"})
        await stream.until(2)
        bridge.refuse()
        refused = await on.post(PATH, STREAM).end()
        assert (refused.status, refused.json["error"]["code"]) == (503, "shutting_down")
        n = len(stream.sends)
        await stream.until(n + 3)  # It goes on.
        bridge.cancel_all()
        await asyncio.gather(stream.end(), whole.end())
        assert stream.events[-1]["error"]["message"] == "the server ends: the answer was cut short"
        assert whole.status == 503
        assert bridge.n_taken == 0

    run(body)


def test_who_sends_a_body_has_a_place() -> None:
    """So that many large bodies can't fill the memory."""

    async def body(on: Running) -> None:
        slow = [on.post(PATH, STREAM, is_whole=False) for _ in range(3)]
        await settled(lambda: on.server.bridge.n_taken == 3)
        refused = await on.post(PATH, STREAM).end()
        assert refused.json["error"]["code"] == "queue_full"
        assert (await on.post("/tokenize", {"content": "a"}).end()).status == 503
        for exchange in slow:
            exchange.vanish()
        await asyncio.gather(*(e.end() for e in slow))
        assert on.server.bridge.n_taken == 0
        assert (await on.post("/tokenize", {"content": "a"}).end()).status == 200

    run(body, max_queue=1)


def test_a_body_that_does_not_come_gives_its_place_back() -> None:
    """A client may vanish without a word, and its connection stay open."""

    async def body(on: Running) -> None:
        slow = [on.post(path, STREAM, is_whole=False) for path in (PATH, "/tokenize")]
        for exchange in slow:
            await exchange.end()
            n = len(json.dumps(STREAM))
            said = f"expected more of the body within 0.1 s, got {n} bytes"
            assert (exchange.status, exchange.json["error"]["message"]) == (408, said)
        assert on.server.bridge.n_taken == 0
        # What comes in time is taken, however long the whole of it takes.
        parts = on.post(PATH, b"", is_whole=False)
        for i in range(0, n, 20):
            await asyncio.sleep(0.03)
            parts.send(json.dumps(STREAM).encode()[i : i + 20], is_last=i + 20 >= n)
        await parts.end()
        assert parts.events[-1] == b"[DONE]"

    run(body, body_idle_s=0.1)
