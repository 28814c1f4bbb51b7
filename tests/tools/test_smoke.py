"""Every script in tools/ says what it does, and the small ones run.

synth.py and compare.py have tests of their own; time_cuda_*.py need a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.train_demo.heldout import EVALUATED, forms

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "tools").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text() and path.name != "compare_worker.py"
)
# Scripts that can't start without torch.
TORCH = ("tools/make_golden.py", "tools/train_demo/train.py", "tools/train_demo/golden.py")


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, argv)]
    env = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(
        command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=300, check=False
    )


def test_scripts_are_found() -> None:
    assert {"tools/synth.py", "tools/dump_outputs.py", *TORCH} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script: str) -> None:
    """Where torch is missing, its scripts say so in one line."""
    result = run(script, "--help")
    if script in TORCH and importlib.util.find_spec("torch") is None:
        assert (result.returncode, result.stdout) == (1, "")
        assert re.fullmatch(r"\w+\.py: expected torch \(pip install .*\)\n", result.stderr)
    else:
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(f"usage: {Path(script).name} ")


def test_two_dumps_are_the_same_and_a_changed_one_differs(tmp_path: Path) -> None:
    import numpy as np

    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for file in files:
        written = run("tools/dump_outputs.py", "write", file, "--quick", "--device", "none")
        assert written.returncode == 0
    result = run("tools/dump_outputs.py", "compare", *files)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"(\d+) outputs before, \1 after, 0 differ\n", result.stdout)
    with np.load(files[0]) as dump:
        arrays = {name: dump[name] for name in dump.files}
    name = next(name for name, values in arrays.items() if values.dtype == np.float32)
    arrays[name] = np.nextafter(arrays[name], np.float32(9e9))
    np.savez(files[1], **arrays)
    result = run("tools/dump_outputs.py", "compare", *files)
    assert result.returncode == 1
    assert result.stdout.startswith(f"{name}: other bits\n")
    assert result.stdout.endswith(", 1 differ\n")


@pytest.mark.parametrize("kda", [(), ("--kda",)])
def test_the_delta_rule_is_timed(kda: tuple[str, ...]) -> None:
    options = ("-t", 1, "--heads", 1, "--lengths", "1,64", *kda)
    result = run("tools/time_delta_net.py", *options)
    assert (result.returncode, result.stderr) == (0, "")
    rows = re.findall(r"^\| (\d+) \| 1 \| \d+ \| \d+ \| \d+\.\d\d \|$", result.stdout, re.M)
    assert rows == ["1", "64"]


def test_threads_are_timed_beside_neighbours() -> None:
    options = ("-t", "1,1", "--neighbours", "0,1", "-p", 4, "-n", 4, "-r", 1)
    result = run("tools/time_threads.py", *options)
    assert (result.returncode, result.stderr) == (0, "")
    number = r"\d+\.\d+"
    row = rf"^\| (\d) \| 1 \| {number} \| {number} \| {number} \| {number} \| 1 \|$"
    assert re.findall(row, result.stdout, re.M) == ["0", "0", "1", "1"]


def test_a_step_is_timed_by_kernel(tiny: Path) -> None:
    result = run("tools/time_step.py", "-m", tiny, "--backend", "cpu", "-np", "1,3", "-d", 5)
    assert (result.returncode, result.stderr) == (0, "")
    row = r"^(\w+) +(\d+) +\d+\.\d us +(\d+\.\d)% +\d+\.\d MB +\d+ GB/s$"
    rows = re.findall(row, result.stdout, re.M)
    assert sum(name == "GATED_DELTA_NET" for name, *_ in rows) == 2
    assert sum(float(share) for *_, share in rows) == pytest.approx(200, abs=2)


def test_activations_are_compared(tiny: Path) -> None:
    options = ("--tokens", 15, "-np", "1,3", "-n", 2, "-r", 1)
    result = run("tools/activations.py", tiny, *options)
    assert (result.returncode, result.stderr) == (0, "")
    number = r"\d\.\de[+-]\d\d"
    rows = re.findall(rf"^\| {tiny.name} \| (\d+) \|((?: {number} \|){{4}})$", result.stdout, re.M)
    errors = {bits: list(map(float, cells.split("|")[:4])) for bits, cells in rows}
    # 15 tokens are no row tile, so that a prompt of them has the rows of token by token.
    assert all(cells[:2] == cells[2:] for cells in errors.values())
    assert errors["15"][0] < 1e-2 * errors["8"][0]
    speeds = re.findall(r"^\| .* \| (\d) \| [\d.]+ \| [\d.]+ \| \d\.\d{3} \|$", result.stdout, re.M)
    assert speeds == ["1", "3"]


@pytest.mark.parametrize(
    ("options", "n_rows"),
    [
        (("masks", "--words", 40, "--extend", 5000), 5),
        (("speed", "-np", 2, "-n", 8, "--rounds", 1, "--backend", "cpu"), 1),
        (("answers", "-n", 2), 6),
    ],
)
def test_constrained_output_is_measured(options: tuple[object, ...], n_rows: int) -> None:
    pytest.importorskip("llguidance")
    result = run("tools/constraints.py", *options)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(re.findall(r"^\| .* [0-9.]+ \|$", result.stdout, re.M)) == n_rows


def test_the_demo_model_answers() -> None:
    """Two questions of each task in its forms; tests/models/test_demo_model.py asks more."""
    result = run("tools/train_demo/answers.py", "-n", 2, "--backend", "cpu")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) == sum(len(forms(task)) for task in EVALUATED)
    assert all(re.fullmatch(r"\w+ +\w+ +[01]\.\d00", line) for line in lines)
