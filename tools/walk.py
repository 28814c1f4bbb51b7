"""Print the files between `engine.commands.main` and the kernels of one op, found by running it.

    python tools/walk.py                  # GATED_DELTA_NET on the CPU and on the emulated GPU
    python tools/walk.py --op ATTENTION

The demo model answers `-p Hello -n 1` under a profiler. Two moments count: a backend compiles the
program that has the op's nodes (calls that are given such a node, below `compile`), and a step runs
that program (below the program's `run`: the call into the CPU's library, launches of the device).
Every file of the engine with a function on the
stack at such a moment is printed in the order in which the stacks meet it, then the kernel sources
of the op's stem. `back` counts the calls from one file into a file that was met before, along the
deepest stack of each moment.
"""

from __future__ import annotations

import argparse
import io
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

if not __package__:  # Run as a script: Python looks for modules in tools/ only.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.backends.native import library
from engine.graph import Node
from tests.support.cuda_devices import cuda_and_others, emulated

ROOT = Path(__file__).resolve().parents[1]
ENGINE, BACKENDS = f"{ROOT}/engine/", f"{ROOT}/engine/backends/"
COMMAND = ("-p", "Hello", "-n", "1", "--temp", "0")


@dataclass
class Walk:
    """Files on the stack at the two moments, in order, and the deepest stack of each."""

    op: str
    # Whether a call below a program's `run` is one that leads to native code.
    is_native: Callable[[FrameType], bool]
    files: dict[str, None] = field(default_factory=dict)
    deepest: dict[str, list[str]] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    def profile(self, frame: FrameType, event: str, arg: object) -> None:
        """Look at one call; `sys.setprofile` takes this."""
        name = frame.f_code.co_filename
        if event != "call":
            return
        if _is_ours(name):
            self.called.add(name)
        if not name.startswith(BACKENDS) and not self.is_native(frame):
            return
        frames = list(_stack(frame))
        if (moment := self._moment(frames)) is None:
            return
        stack = [f.f_code.co_filename for f in frames if _is_ours(f.f_code.co_filename)]
        stack = [f for f, above in pairwise([*stack, ""]) if f != above][::-1]
        self.files |= dict.fromkeys(stack)
        if len(stack) > len(self.deepest.get(moment, ())):
            self.deepest[moment] = stack

    def _moment(self, frames: list[FrameType]) -> str | None:
        """`compile` or `run` if this call is part of one of the op's program; innermost first. A
        sampler launches a program where it doesn't run."""
        for frame in frames:
            first = frame.f_code.co_varnames[:1]
            owner = frame.f_locals.get(first[0]) if first else None
            match frame.f_code.co_name:
                case "compile" if frame.f_code.co_filename.startswith(BACKENDS):
                    return "compile" if self._is_given_node(frames[0]) else None
                case "run" | "launch" if self._has_op(getattr(owner, "instructions", ())):
                    return "run" if self.is_native(frames[0]) else None
        return None

    def _is_given_node(self, frame: FrameType) -> bool:
        n_args = frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount
        given = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[:n_args]]
        return any(isinstance(x, Node) and x.op.name == self.op for x in given)

    def _has_op(self, instructions: Iterable[Any]) -> bool:
        return any(n.op.name == self.op for i in instructions for n in getattr(i, "nodes", ()))

    @property
    def n_back(self) -> int:
        """Calls along the deepest stacks into a file that was met before."""
        stacks = self.deepest.values()
        return sum(f in stack[:i] for stack in stacks for i, f in enumerate(stack))


def _is_ours(name: str) -> bool:
    return name.startswith(ENGINE) or name == str(ROOT / "cli.py")


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _native_call(frame: FrameType) -> bool:
    return frame.f_code is _run_natively.__code__


def _run_natively(run: Callable[..., int], *given: Any) -> int:
    """In place of the library's function `run`, whose own call a profiler doesn't see."""
    return run(*given)


def _launches(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "launch" and Path(code.co_filename).parent.name == "cuda_emulator"


def walk(op: str, create: Callable[..., Any] | None) -> Walk:
    """Run the command under the profiler; `create` replaces the engine's own choice of backends."""
    found = Walk(op, _launches if create else _native_call)
    native = library.load()
    on_cpu = patch.object(native, "run", partial(_run_natively, native.run))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        backend = ("--backend", "cpu") if create is None else ()
        replaced: Any = patch("engine.backends.create", create) if create else on_cpu
        with replaced, patch("sys.argv", ["cli.py", *COMMAND, *backend]):
            sys.setprofile(found.profile)
            try:
                runpy.run_path(str(ROOT / "cli.py"), run_name="__main__")
            except SystemExit as done:
                status = done.code
            finally:
                sys.setprofile(None)
    assert status == 0, errors.getvalue()
    return found


def kernels(op: str, folder: str, ending: str) -> list[str]:
    """The kernel sources of an op's stem, and the native code that runs a program."""
    found = sorted((ROOT / "engine" / "ops" / folder).glob(f"{op.lower()}*{ending}"))
    found = sorted(found, key=lambda path: len(path.name))[:1]
    return [*map(str, (ROOT / "engine" / "backends" / folder).glob(f"*{ending}")), *map(str, found)]


def show(title: str, found: Walk, sources: list[str]) -> None:
    """Print the numbered files with their line counts."""
    files = [*found.files, *sources]
    lines = [len(Path(name).read_text().splitlines()) for name in files]
    print(f"{title}: {len(files)} files, {sum(lines)} lines, {found.n_back} times back")
    for i, (name, n) in enumerate(zip(files, lines, strict=True), 1):
        print(f"{i:4} {n:5} {Path(name).relative_to(ROOT)}")
    print(f"     ({len(found.called)} Python files of the engine had a function called)\n")


def main() -> None:
    """Print both walks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", default="GATED_DELTA_NET", help="name of an op (%(default)s)")
    op = parser.parse_args().op
    show("CPU", walk(op, None), kernels(op, "cpu", ".cpp"))
    devices = cuda_and_others(emulated())
    show("CUDA, emulated", walk(op, lambda *given: devices), kernels(op, "cuda", ".cu"))


if __name__ == "__main__":
    main()
