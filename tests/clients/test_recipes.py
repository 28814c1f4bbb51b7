"""The programs of docs/server.md run as they stand there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.clients.conftest import ADDRESS, recipes
from tests.clients.test_openai import ANSWER
from tests.server.test_serve import serving

pytestmark = pytest.mark.clients


def test_recipes() -> None:
    programs = recipes("python")
    assert len(programs) == 2
    with serving("--temp", 0) as server:
        for program in programs:
            text = program.replace(ADDRESS, f"http://127.0.0.1:{server.port}/v1")
            said = subprocess.check_output([sys.executable, "-c", text], text=True, timeout=60)
            assert said == ANSWER
