"""A worker process of compare.py and reuse.py: runs one engine, answers requests as JSON lines.

    PYTHON tools/compare_worker.py engine | peer | reuse

A line on standard input is a request `{"do": METHOD, …}`; a line on standard output is its answer,
`{"ok": {…}}` or `{"error": TEXT}`. The first answer may be `{"missing": TEXT}`: a module that this
Python lacks. Output of libraries goes to standard error. As `peer` and `reuse` it runs in the
peer's environment and imports no module of the engine. It is killed when its parent ends, also
while it is stopped.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer requests until there are no more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers)

    answer(ok={"pid": os.getpid()})
    # Python puts tools/, the folder of the script, first; modules are looked for beside it.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    try:
        runner = _runner(sys.argv[1])
    except ImportError as error:
        answer(missing=f"{type(error).__name__}: {error}")
        return
    answer(ok=runner.about())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(ok=getattr(runner, request.pop("do"))(**request))
        except runner.errors as error:
            answer(error=str(error))


def _runner(kind: str) -> Any:
    if kind == "peer":
        from tools.compare_peer import PeerRunner

        return PeerRunner()
    if kind == "reuse":
        from tools.reuse_peer import ReusePeer

        return ReusePeer()
    from tools.compare_engine import EngineRunner

    return EngineRunner()


if __name__ == "__main__":
    main()
