"""Speed by the number of threads, alone and beside processes that keep cores busy.

    python tools/time_threads.py -m model.gguf -t 1,2,8,16 --neighbours 0,1

Engines of all numbers of threads take turns, so that they see the same machine; each is as fast as
the median of its rounds. `threads` says how many took part in the last step. A number of threads
above that of the cores is taken as the cores' (with a warning).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import numpy as np

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import Engine
from engine.backends.cpu.backend import CpuBackend
from engine.bench.facts import cpu_name
from engine.bench.measure import Case, measure
from engine.commands.options import Parser, integers
from engine.engine import DEMO_MODEL
from engine.errors import EngineError


@contextmanager
def busy(n: int) -> Iterator[None]:
    """While it lasts, `n` processes compute without a pause."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def threads_of(engine: Engine) -> int:
    """The threads that took part in the last step on the CPU."""
    (backend,) = engine.plan.backends
    assert isinstance(backend, CpuBackend)
    return backend.library.team_threads(backend.team)


def speeds(
    engines: Sequence[Engine], cases: Sequence[Case], rounds: int, rng: np.random.Generator
) -> list[tuple[list[float], int]]:
    """Of each engine the median tokens per second of each case, and the threads of its last step.
    Before, each runs the cases untimed."""
    taken: list[list[list[float]]] = [[[] for _ in cases] for _ in engines]
    last = [0] * len(engines)
    for i in range(rounds + 1):
        for at, engine in enumerate(engines):
            for m, case, of_case in zip(measure(engine, cases, rng), cases, taken[at], strict=True):
                if i > 0:
                    n, seconds = case.n_prompt + case.n_gen, m.prompt_s[0] + m.gen_s[0]
                    of_case.append(n / seconds)
            last[at] = threads_of(engine)
    return [([median(x) for x in of], n) for of, n in zip(taken, last, strict=True)]


def table(path: str, o: argparse.Namespace) -> None:
    """Print a row for each number of neighbours and threads."""
    cases = [Case(n_prompt=o.prompt), Case(n_gen=o.tokens)]
    n_ctx, rng = max(o.prompt, o.tokens + 8), np.random.default_rng(o.seed)
    print(f"{path}, {cpu_name()}")
    print(f"| busy | -t | pp{o.prompt} | to the first | tg{o.tokens} | to the first | threads |")
    print("|---|---|---|---|---|---|---|")
    with ExitStack() as stack:
        options = {"backend": "cpu", "n_ctx": n_ctx, "cpu_isa": o.cpu_isa}
        load = [Engine.load(path, n_threads=n, **options) for n in o.threads]
        engines = [stack.enter_context(engine) for engine in load]
        for n_busy in o.neighbours:
            with busy(n_busy):
                rows = speeds(engines, cases, o.rounds, rng)
            for n, ((pp, tg), threads) in zip(o.threads, rows, strict=True):
                first_pp, first_tg = rows[0][0]
                cells = f"{pp:.1f} | {pp / first_pp:.2f} | {tg:.1f} | {tg / first_tg:.2f}"
                print(f"| {n_busy} | {n} | {cells} | {threads} |", flush=True)


def main() -> int:
    """Print the table."""
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("-m", "--model", default=str(DEMO_MODEL), help="a GGUF file (the demo model)")
    p.add_argument("-t", "--threads", type=integers(1), default=[1, 2], help="numbers (1,2)")
    p.add_argument("--neighbours", type=integers(0), default=[0, 1], help="busy processes (0,1)")
    p.add_argument("-p", "--prompt", type=int, default=128, help="tokens of the prompt (128)")
    p.add_argument("-n", "--tokens", type=int, default=64, help="tokens to generate (64)")
    p.add_argument("-r", "--rounds", type=int, default=5, help="rounds that count (5)")
    p.add_argument("--cpu-isa", help="instruction set of the kernels (the best)")
    p.add_argument("-s", "--seed", type=int, default=0, help="of the tokens (0)")
    options = p.parse_args()
    try:
        table(options.model, options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
