"""tools/reuse_trace.py: the prefix cache's policy stays near an oracle that knows the trace."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from engine.kvcache.entries import Room
from engine.kvcache.prefix import packed
from tools import reuse_trace
from tools.reuse_oracle import Known, Oracle, common_lengths
from tools.reuse_trace import BLOCK_BYTES, STATE_BYTES, Player, compare, make_trace, play, room

N_REQUESTS = 300


def test_tokens_processed_beside_the_oracle() -> None:
    """A sixteenth of what so short a trace leaves is 2 GiB: less than its open conversations need.
    Which of them goes on is chance that the oracle alone knows, so 1.15 is not reached there."""
    whole, quarter, sixteenth = compare(make_trace(N_REQUESTS), (1, 4, 16))
    assert whole.ratio <= 1.15
    assert quarter.ratio <= 1.15
    assert sixteenth.ratio <= 1.5
    for result in (whole, quarter, sixteenth):
        assert result.ratio >= 1
        assert 0 < result.peak_bytes <= result.budget


def test_nothing_leaks() -> None:
    player = play(make_trace(60), room(40 * STATE_BYTES))
    assert player.cache.counts.n_evicted > 0
    player.cache.clear()
    assert player.cache.n_bytes == 0
    for pool in (player.memory.blocks, player.memory.slots):
        assert pool.n_free == pool.size


def test_the_report_agrees_with_the_steps() -> None:
    trace = make_trace(80)
    player = play(trace, room(40 * STATE_BYTES))
    counts = player.cache.counts
    assert counts.n_tokens == sum(turn.n_prompt for turn in trace)
    assert player.n_processed == counts.n_tokens - counts.n_reused


def test_without_a_budget_everything_is_processed() -> None:
    trace = make_trace(20)
    assert play(trace, Room()).n_processed == sum(turn.n_prompt for turn in trace)


def test_a_trace_follows_from_its_seed() -> None:
    assert make_trace(30, 1) == make_trace(30, 1)
    assert make_trace(30, 1) != make_trace(30, 2)


def test_the_oracle_keeps_what_is_used_next() -> None:
    """By hand: of two sequences and room for one, it keeps the one that comes back."""
    a, b = packed(range(100)), packed(range(1000, 1100))
    requests = [Known(a, a), Known(b, b), Known(b, b)]
    common = common_lengths(requests)
    assert common.tolist() == [[0, 0, 0], [0, 0, 100], [0, 0, 0]]
    assert Oracle(budget=150, state_bytes=50, kv_bytes=1.0).run(requests, common) == 200
    assert Oracle(budget=149, state_bytes=50, kv_bytes=1.0).run(requests, common) == 300


def test_common_lengths_against_one_by_one() -> None:
    rng = np.random.default_rng()
    lists = [rng.integers(0, 2, int(rng.integers(1, 9))).tolist() for _ in range(20)]
    common = common_lengths([Known(packed(ids[:-1]), packed(ids)) for ids in lists])
    for i, ids in enumerate(lists):
        for j in range(i + 1, len(lists)):
            prompt = lists[j][:-1]
            same = [n for n in range(len(prompt) + 1) if ids[:n] == prompt[:n]]
            assert common[i, j] == max(same)


def test_the_command() -> None:
    command = [sys.executable, reuse_trace.__file__, "-n", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("20 requests, ")
    assert [line.split()[0] for line in lines[2:]] == ["1/1", "1/4", "1/16"]


def test_no_requests() -> None:
    done = subprocess.run(
        [sys.executable, reuse_trace.__file__, "-n", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "-n: expected at least 1, got 0" in done.stderr


def test_a_retry_processes_nothing() -> None:
    (turn,) = make_trace(1)
    player = Player(Room(1 << 40, STATE_BYTES, BLOCK_BYTES, 64, 4096))
    player.run(turn)
    player.run(turn)
    assert player.n_processed == turn.n_prompt
