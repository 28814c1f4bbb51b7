"""The engine's version, which packaging reads from here, and the commit that it is of."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

__version__ = "0.1.0"


def commit() -> str:
    """The short hash of the commit, with `-dirty` if tracked files differ from it; "" if unknown.

    A checkout has it from git, an installed package from its build (CMakeLists.txt).
    """
    package = Path(__file__).resolve().parent
    git_dir = package.parent / ".git"
    if not git_dir.exists():
        recorded = package / "native" / "commit"
        return recorded.read_text().strip() if recorded.exists() else ""
    # A monitor of files would be a process that stays. Named folders go before GIT_DIR.
    command = ["git", f"--git-dir={git_dir}", f"--work-tree={package.parent}",
               "--no-optional-locks", "-c", "core.fsmonitor=false",
               "describe", "--always", "--dirty", "--exclude=*"]  # fmt: skip
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, timeout=5, check=True,
        ).stdout.strip()  # fmt: skip
    return ""
