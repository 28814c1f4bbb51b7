"""Loading takes a time that grows with the number of layers, not with its square."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine import Engine
from tools.synth import write_model

FEW, FACTOR = 50, 8
# Where every pair of layers cost something, 8 times as many layers took 23 times as long.
MAX_RATIO = 2 * FACTOR


def load_seconds(path: Path) -> float:
    """The process's own time to load a model on the CPU, the least of three."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        engine = Engine.load(path, backend="cpu")
        seconds.append(time.process_time() - start)
        engine.close()
    return min(seconds)


@pytest.mark.timing
def test_time_to_load_is_linear_in_layers(tmp_path: Path) -> None:
    few, many = (
        write_model(tmp_path / f"{n}.gguf", "tiny", "Q8_0", layers=n, fast=True)
        for n in (FEW, FEW * FACTOR)
    )
    assert load_seconds(many) < MAX_RATIO * load_seconds(few)
