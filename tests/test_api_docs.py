"""docs/api.md: every program runs, and prints what is shown below it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "api.md").read_text()
_PROGRAM = re.compile(r"^## ([^\n]+)\n((?:(?!^## ).)*?)```python\n(.*?)```\n\n```text\n(.*?)```$",
    re.DOTALL | re.MULTILINE)  # fmt: skip
PROGRAMS = {title: (code, output) for title, _, code, output in _PROGRAM.findall(TEXT)}


@pytest.mark.parametrize("title", PROGRAMS)
def test_program(title: str, tmp_path: Path) -> None:
    code, output = PROGRAMS[title]
    program = tmp_path / "program.py"
    program.write_text(code)
    # Elsewhere than in the checkout, whatever `engine` the tests use.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-W", "error", str(program)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (output, "", 0)


def test_no_program_is_left_out() -> None:
    assert len(PROGRAMS) == TEXT.count("```python") >= 10
