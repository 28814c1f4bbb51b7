"""The command line where a package is missing: one line that names it, and status 1."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.backends.cuda.driver import find_gpu
from tests.commands.test_cli_process import ENV, ROOT
from tests.support.helpers import without_summary
from tests.text.test_tokenizer import spm_metadata
from tools.ggufwrite import write_gguf

# Runs cli.py, or a module, as if a package were not installed.
WITHOUT = """
import importlib.abc, runpy, sys
missing, start, *argv = sys.argv[1:]

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv = [start, *argv]
if start.endswith(".py"):
    runpy.run_path(start, run_name="__main__")
else:
    runpy.run_module(start, run_name="__main__", alter_sys=True)
"""


def without(package: str, *argv: object, start: str = "cli.py") -> tuple[int, str, str]:
    """(status, standard output, standard error) of a command line."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, start, *map(str, argv)], capture_output=True,
        text=True, cwd=ROOT, env=ENV, stdin=subprocess.DEVNULL, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, without_summary(done.stderr)


def refusal(package: str) -> str:
    return (
        f"error: expected the package {package}, which {sys.executable} does not have: "
        f"pip install {package}\n"
    )


@pytest.mark.parametrize(
    ("package", "argv"),
    [
        ("numpy", "-p a"),
        ("numpy", "--help"),
        ("jinja2", "-st -p a"),
        ("markupsafe", "-st -p a"),
        ("tqdm", "bench -m MODEL"),
        ("tokenizers", "-m MODEL -p a"),
        ("sentencepiece", "tokenize -m VOCABULARY -p a"),
        ("gguf", "-m ROUNDED -p a -n 1"),
    ],
)
def test_a_missing_package(
    models: Callable[[str, str], Path], tmp_path: Path, package: str, argv: str
) -> None:
    vocabulary = tmp_path / "vocabulary.gguf"
    write_gguf(vocabulary, spm_metadata(eos_token_id=2), [])
    # Types without kernels of their own are decoded by the package gguf.
    made = {"MODEL": models("tiny", "Q8_0"), "ROUNDED": models("tiny-untied", "IQ1_M")}
    files = made | {"VOCABULARY": vocabulary}
    words = [files.get(word, word) for word in argv.split()]
    status, out, err = without(package, *words)
    lines = [line for line in err.splitlines(True) if not line.startswith("WARNING: IQ1_M is kept")]
    assert (status, out, lines) == (1, "", [refusal(package)])


def test_a_missing_package_of_the_module(tiny: Path) -> None:
    assert without("numpy", "-m", tiny, "-p", "a", start="engine") == (1, "", refusal("numpy"))


@pytest.mark.parametrize(
    ("package", "argv", "words"),
    [
        ("matplotlib", "sweep-bench --plot p.png", "error: plots need matplotlib (pip install "),
        ("cupy", "-p a --backend cuda", "error: backend cuda: expected "),
    ],
)
def test_a_missing_package_of_an_extra(package: str, argv: str, words: str) -> None:
    status, out, err = without(package, *argv.split())
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(words)
    # Without a GPU, CuPy would not help.
    assert ("pip install" in err) == (package != "cupy" or not find_gpu()[1])


def test_a_missing_module_of_the_engine_is_a_bug(tiny: Path) -> None:
    """Its traceback is shown."""
    code = (
        "import sys; sys.modules['engine.placement.place'] = None; "
        "from engine.commands.main import main; sys.exit(main(['graph']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
