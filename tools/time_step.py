"""Times the instructions of one decode step, by kernel: microseconds, and bytes per second.

    python tools/time_step.py -m FILE [--backend cuda] [-np 1,8,64] [-d TOKENS]

A step has one row for each of `-np` sequences, behind `-d` tokens of context each. Instructions
(launches on a GPU) are timed one by one, the median of several steps; that costs a little and takes
away what overlaps. The last line has the whole step as it runs, until the host has its logits. A
node's bytes count for its last instruction: its weights (of experts as many as the rows can
choose), activations and states.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import Engine
from engine.backends.base import Timing
from engine.errors import EngineError
from engine.graph import Live
from engine.runtime.batch import Chunk
from tools.endings import ends_in_one_line

STEPS, FAST_STEPS = 7, 50


def decode_chunks(engine: Engine, n: int, n_past: int) -> list[Chunk]:
    """A token for each of n new sequences, behind a context of random tokens."""
    rng, vocab = np.random.default_rng(0), engine.model.n_vocab
    sequences = [engine.memory.create() for _ in range(n)]
    for seq in sequences:
        engine.step([Chunk(seq, rng.integers(0, vocab, n_past).tolist())])
    return [Chunk(seq, [int(rng.integers(vocab))]) for seq in sequences]


def report(steps: Sequence[Sequence[Timing]], live: Live) -> None:
    """A line for each kernel, the slowest first."""
    times, counts = defaultdict[str, float](float), defaultdict[str, int](int)
    bytes_of = defaultdict[str, int](int)
    last = {
        node: i
        for i, timing in enumerate(steps[0])
        for node in timing.instruction.nodes
        if timing.seconds
    }
    for i, timing in enumerate(steps[0]):
        seconds = float(np.median([step[i].seconds for step in steps]))
        if not (seconds and timing.instruction.nodes):
            continue
        times[timing.instruction.kernel] += seconds
        counts[timing.instruction.kernel] += 1
        bytes_of[timing.instruction.kernel] += sum(
            node.op.cost(node, live).bytes for node in timing.instruction.nodes if last[node] == i
        )
    total = sum(times.values())
    for label, seconds in sorted(times.items(), key=lambda item: -item[1]):
        print(
            f"{label:24} {counts[label]:5} {seconds * 1e6:10.1f} us {seconds / total:6.1%} "
            f"{bytes_of[label] / 1e6:10.1f} MB {bytes_of[label] / seconds / 1e9:8.0f} GB/s"
        )
    print(f"{'all':24} {sum(counts.values()):5} {total * 1e6:10.1f} us")


@ends_in_one_line(EngineError)
def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Times the instructions of a decode step.")
    parser.add_argument("-m", required=True, help="the model's file")
    parser.add_argument("-np", default="1,8", help="sequences, separated by commas (1,8)")
    parser.add_argument("-d", type=int, default=64, help="tokens of context of each (64)")
    parser.add_argument("--backend", default="cuda", help="backend that runs the step (cuda)")
    args = parser.parse_args(argv)
    counts = [int(n) for n in args.np.split(",")]
    n_ctx = max(counts) * (args.d + STEPS + FAST_STEPS + 128)
    options = {"backend": args.backend, "n_parallel": max(counts), "cache_ram": 0}
    with Engine.load(args.m, n_ctx=n_ctx, **options) as engine:
        for n in counts:
            chunks = decode_chunks(engine, n, args.d)
            timed = [engine.run_timed(chunks) for _ in range(STEPS)]
            print(f"{n} sequences")
            report([timings for timings, _ in timed], timed[0][1])
            for _ in range(3):
                engine.step(chunks)
            begin = perf_counter()
            for _ in range(FAST_STEPS):
                engine.step(chunks)
            print(
                f"captured, with the host  {(perf_counter() - begin) / FAST_STEPS * 1e6:16.1f} us"
            )
            for chunk in chunks:
                engine.memory.free(chunk.seq)
    return 0


if __name__ == "__main__":
    sys.exit(main())
