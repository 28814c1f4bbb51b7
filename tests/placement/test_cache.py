"""The size of the prefix cache: its budget, and the slots and blocks beyond a run's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from engine import Engine, SamplingParams
from engine.kvcache.entries import Room
from engine.placement.cache import CacheRoomError, cache_room
from engine.placement.place import Plan
from engine.planning import plan_only
from tools.presets import PRESETS, QwenPreset
from tools.synth import write_model

MIB = 1 << 20
# Of the preset tiny: a state and a KV block of all layers. The engine keeps states in float32, and
# keys and values of the CPU in float16.
STATE, BLOCK = 19200, 16384


@pytest.fixture
def plan(models: Callable[[str, str], Path]) -> Plan:
    return plan_only(models("tiny", "F32"), 64, backend="cpu")


@pytest.mark.parametrize(
    ("free", "budget"),
    [(0, 0), (256, 0), (256.1, 0), (260, 1), (656, 100), (1279, 255.75), (1280, 512), (4352, 1024),
     (100_000, 8192)],
)  # fmt: skip
def test_the_default_is_a_quarter_of_what_is_free(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: float,
    budget: float,
) -> None:  # fmt: skip
    """None if 256 MiB or less are; who asked for no cache is not warned that there is none."""
    monkeypatch.setattr("engine.placement.cache._free_bytes", lambda *given: int(free * MIB))
    n_bytes = int(budget * MIB)
    n_states, n_blocks = min(n_bytes // STATE, 1024), min(n_bytes // BLOCK, 16384)
    expected = Room(n_bytes, STATE, BLOCK, n_states, n_blocks) if budget else Room()
    assert cache_room(plan, None) == expected
    assert caplog.messages == []


def test_a_budget_that_was_asked_for(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.placement.cache._free_bytes", lambda *given: 100 * MIB)
    assert cache_room(plan, 100).budget == 100 * MIB
    assert cache_room(plan, 0) == Room()
    monkeypatch.setattr("engine.placement.cache._free_bytes", lambda *given: 356 * MIB)
    assert cache_room(plan, -1).budget == 100 * MIB
    monkeypatch.setattr("engine.placement.cache._free_bytes", lambda *given: 100 * MIB)
    with pytest.raises(CacheRoomError) as refused:
        cache_room(plan, 101)
    assert str(refused.value) == (
        "cache_ram (--cache-ram): expected at most 100 MiB (free after loading), got 101"
    )


def test_a_model_without_states_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    preset = replace(cast(QwenPreset, PRESETS["tiny"]), full_attention_interval=1)
    plan = plan_only(write_model(tmp_path / "m.gguf", preset), 64, backend="cpu")
    assert cache_room(plan, 8) == cache_room(plan, None) == Room()
    assert caplog.messages == [
        "cache_ram (--cache-ram): expected a model with states, got one without: prompts "
        "reuse nothing"
    ]


def test_a_budget_too_small_for_a_state_is_said(
    models: Callable[[str, str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = models("tiny", "F32")
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.placement.cache._MIB", 1 << 10)
        engine = Engine.load(path, backend="cpu", cache_ram=34, n_ctx=64)
    assert caplog.messages == [
        "cache_ram (--cache-ram): expected at least 34.8 MiB, for one state, got 34.0: prompts "
        "reuse nothing"
    ]
    with engine:
        for _ in range(2):
            done = engine.generate([1, 2], SamplingParams(max_tokens=1)).wait()
            assert str(done.reuse) == "reused 0 of 2 tokens (the cache is off: no cache_ram)"
