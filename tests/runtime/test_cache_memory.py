"""The prefix cache's memory goes back to the system: resident bytes, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools.presets import PRESETS
from tools.presets.qwen import QwenPreset
from tools.synth import write_model

MIB = 1 << 20
BUDGET = 48 * MIB
# What Python, numpy and the kernels' threads take by and by; far less than what is told apart.
SLACK = 12 * MIB
START = """
import json, mmap, sys
import numpy as np
from engine import Engine, SamplingParams
from engine.graph import dim_name
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

engine = Engine.load(
    sys.argv[1], backend="cpu", n_threads=1, n_ctx=1024, n_checkpoints=0, cache_ram=48
)
(store,) = {id(s): s for s in engine.loop.executable.stores}.values()
room, capacity = engine.cache._cache.room, engine.capacity
"""
# All slots and blocks are written; every other slot and the first half of the blocks go back.
GIVE_BACK = """
def rows(dim):
    return [a for t, a in store.arrays.items() if dim_name(t) == dim]

def filled(array):
    return (np.arange(len(array)) % 100 + 1).astype(array.dtype)

for dim in ("n_slots", "n_blocks"):
    for a in rows(dim):
        a[:] = filled(a).reshape(-1, *[1] * (a.ndim - 1))
given = {d: list(range(0, len(rows(d)[0]), 2)) for d in ["n_slots"]}
given["n_blocks"] = list(range(len(rows("n_blocks")[0]) // 2))
before = resident()
for dim, indices in given.items():
    store.give_back(dim, indices)
fell = before - resident()
expected = sum(a[0].nbytes * len(given[d]) for d in given for a in rows(d))
whole = all(
    (a[i] == filled(a)[i]).all()
    for d in given for a in rows(d) for i in set(range(len(a))) - set(given[d])
)
print(json.dumps({"fell": fell, "expected": expected, "whole": bool(whole)}))
"""
# Many short prompts fill the budget with states, then long ones with keys and values.
PHASES = """
if sys.argv[2] == "kept":
    engine.cache._cache._give_back = lambda dim, indices: None
params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
rng = np.random.default_rng(0)
def run(n_tokens):
    for _ in engine.generate(rng.integers(5, 300, n_tokens).tolist(), params):
        pass
run(64)
engine.cache.clear()
start, phases = resident(), []
for n_tokens, n_prompts in ((30, 40), (1000, 8), (30, 40)):
    most = 0
    for _ in range(n_prompts):
        run(n_tokens)
        assert engine.cache.n_bytes <= engine.cache.budget
        most = max(most, resident() - start)
    phases.append(most)
own = capacity.n_slots * room.state_bytes + capacity.n_blocks * room.block_bytes
print(json.dumps({"phases": phases, "own": own, "sizes": [room.state_bytes, room.block_bytes]}))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose states and blocks are large beside its weights and its activations."""
    tiny = PRESETS["tiny"]
    assert isinstance(tiny, QwenPreset)
    preset = replace(
        tiny, k_dim=128, v_dim=128, n_v_heads=8, n_k_heads=8, n_heads=8, n_kv_heads=8, head_dim=128
    )
    return write_model(tmp_path_factory.mktemp("model") / "model.gguf", preset, "Q8_0")


def result(script: str, path: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-c", START + script, str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_what_is_given_back_is_resident_no_more(path: Path) -> None:
    found = result(GIVE_BACK, path)
    assert found["whole"]
    # Pages at the ends of a row stay.
    assert found["fell"] == pytest.approx(found["expected"], rel=0.1)
    assert found["expected"] > 2 * SLACK


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_the_cache_stays_within_its_budget_when_its_use_changes(path: Path) -> None:
    """Without giving back, slots of the first phase and blocks of the second are resident both."""
    found = result(PHASES, path, "given back")
    most = BUDGET + found["own"] + SLACK
    assert max(found["phases"]) <= most
    kept = result(PHASES, path, "kept")
    assert kept["phases"][-1] > most
