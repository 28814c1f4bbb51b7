"""GATED_DELTA_NET alone on the CPU: scan against chunk over prompt lengths and numbers of heads.

    python tools/time_delta_net.py [-t THREADS] [--heads 16,32] [--lengths 1,16,64,…] [--kda]

Microseconds a call, medians of calls that take turns, on one sequence with a state; heads of 128.
Decays are one per head, or with `--kda` one per head and key row.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library
from engine.graph import Kind, Live
from engine.ops import OPS
from engine.placement.place import place
from engine.runtime.executor import Executable
from engine.threads import n_cores
from tests.ops.cases.gated_delta_net import random_operands
from tests.support.cases import Case, single_node_graph
from tests.support.opcase import RawWeights

OP, SIZE, SECONDS = OPS["GATED_DELTA_NET"], 128, 0.25


class Call:
    """The op on one sequence of `n` rows, by one algorithm."""

    def __init__(self, n: int, n_heads: int, kda: bool, algorithm: str, n_threads: int) -> None:
        self._backend = CpuBackend(n_threads, matrix=True)
        rng = np.random.default_rng(n)
        heads, sizes = (n_heads, n_heads), (SIZE, SIZE)
        operands = random_operands(rng, [n], heads, sizes, -0.1, kda)
        attrs = {"head_map": "tiled", "scale": SIZE**-0.5, "algorithm": algorithm}
        case = Case("timed", lambda _: operands, attrs)
        graph, tensors = single_node_graph(OP, case, operands)
        self._executable = Executable(place(graph, [self._backend], strict=True), RawWeights({}))
        for name, operand in operands.items():
            if operand.kind is Kind.ACTIVATION:
                self._backend.write(tensors[name], operand.values)
            if operand.kind is Kind.STATE:
                self._backend.states.arrays[tensors[name]][:] = operand.values
        self._inputs = {m: o.values for m, o in operands.items() if o.kind is Kind.INPUT}
        self._live = Live(n, 1, 0, chunks=((0, n),))

    def seconds(self) -> float:
        """How long the kernel takes."""
        timings = self._executable.run_timed(self._inputs, self._live)
        return sum(t.seconds for t in timings if t.backend)


def compare(n: int, n_heads: int, kda: bool, n_threads: int) -> tuple[float, float]:
    """Median seconds by scan and by chunk."""
    calls = [Call(n, n_heads, kda, algorithm, n_threads) for algorithm in ("scan", "auto")]
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            taken.append(call.seconds())
    return median(times[0][1:]), median(times[1][1:])


def numbers(text: str) -> list[int]:
    """What a list of numbers with commas says."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("-t", "--threads", type=int, default=n_cores())
    p.add_argument("--heads", type=numbers, default=[16, 32])
    lengths = [1, 16, 32, 64, 128, 256, 512, 1024, 2048]
    p.add_argument("--lengths", type=numbers, default=lengths)
    p.add_argument("--kda", action="store_true", help="one decay per head and key row")
    options = p.parse_args()
    decays = "decays by key row" if options.kda else "a decay per head"
    isa = cpu_library.load().isa
    print(f"{isa} kernels, {options.threads} threads, heads of {SIZE}, {decays}")
    print("| T | heads | scan µs | chunk µs | scan / chunk |\n|---|---|---|---|---|")
    for n_heads in options.heads:
        for n in options.lengths:
            scan, chunk = compare(n, n_heads, options.kda, options.threads)
            row = f"| {n} | {n_heads} | {scan * 1e6:.0f} | {chunk * 1e6:.0f} | {scan / chunk:.2f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
