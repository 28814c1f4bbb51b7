"""Compare the CPU's activations of 8 and of 15 bits: distance from float32, and speed in turns.

    python tools/activations.py MODEL.gguf … [--cpu-isa NAME] [--tokens 64] [-np 1,2,4]

The distance is that of the logits from the float32 reference backend's, for one prompt and token by
token. Decode steps of so many sequences are timed in turns, 8 and 15 bits in each round; the
ratio is the median over rounds of the speed with 15 bits to that with 8.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import Engine
from engine.backends.native import library as cpu_library
from engine.commands.options import Parser, integers
from engine.config import ACTIVATIONS
from engine.errors import EngineError
from engine.runtime.batch import Chunk
from engine.threads import n_cores
from tools.compare_table import distance
from tools.endings import ends_in_one_line


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    p = Parser(prog="activations.py", allow_abbrev=False, description=str(__doc__).split("\n")[0])
    add = p.add_argument
    add("models", nargs="+", metavar="MODEL.gguf", type=Path)
    add("--cpu-isa", choices=tuple(cpu_library.ISAS), metavar="NAME",
        help="instruction set (the best)")  # fmt: skip
    p.number("-t --threads", "threads (all cores)", default=n_cores())
    p.number("--tokens", "tokens whose logits are compared (64; 0: none)", low=0, default=64)
    add("-np", "--parallel", type=integers(1), default=[1, 2, 4], metavar="N,…",
        help="sequences of a decode step (1,2,4)")  # fmt: skip
    p.number("-n --n-gen", "steps of a round (32)", default=32)
    p.number("-r --repetitions", "rounds (7; 0: no speed)", low=0, default=7)
    p.number("--seed", "seed of the random tokens (0)", low=0, default=0)
    return p.parse_args(argv)


def token_by_token(engine: Engine, ids: list[int]) -> NDArray[np.float32]:
    """Logits [n_tokens, n_vocab] of a sequence whose tokens come in steps of one."""
    seq = engine.memory.create()
    try:
        return np.concatenate([engine.step([Chunk(seq, [token])]) for token in ids])
    finally:
        engine.memory.free(seq)


def accuracy(path: Path, engines: dict[int, Engine], ids: list[int]) -> None:
    """Print each engine's distances."""
    with Engine.load(path, backend="reference", n_ctx=len(ids), cache_ram=0) as engine:
        expected = engine.logits(ids)
    for bits, engine in engines.items():
        cells = []
        for logits in (engine.logits(ids), token_by_token(engine, ids)):
            far = distance(logits, expected)
            cells.append(f"{far['nmse']:.1e} | {far['kl']:.1e}")
        print(f"| {path.name} | {bits} | {' | '.join(cells)} |", flush=True)


def step_seconds(engine: Engine, n_seqs: int, n_steps: int) -> float:
    """The median of the seconds of decode steps, on fresh sequences, after two of them."""
    seqs = [engine.memory.create() for _ in range(n_seqs)]
    chunks, seconds = [Chunk(seq, [1 + i]) for i, seq in enumerate(seqs)], []
    for _ in range(n_steps + 2):
        start = time.perf_counter()
        engine.step(chunks)
        seconds.append(time.perf_counter() - start)
    for seq in seqs:
        engine.memory.free(seq)
    return statistics.median(seconds[2:])


def speed(path: Path, engines: dict[int, Engine], args: argparse.Namespace) -> None:
    """Print the speeds of both in turns."""
    for n_seqs in args.parallel:
        rounds = [
            {bits: step_seconds(engine, n_seqs, args.n_gen) for bits, engine in engines.items()}
            for _ in range(args.repetitions)
        ]
        coarse, fine = (n_seqs / statistics.median(r[bits] for r in rounds) for bits in ACTIVATIONS)
        ratio = statistics.median(r[ACTIVATIONS[0]] / r[ACTIVATIONS[1]] for r in rounds)
        isa = args.cpu_isa or next(iter(cpu_library.usable()))
        print(f"| {path.name} | {isa} | {n_seqs} | {coarse:.1f} | {fine:.1f} | {ratio:.3f} |")
        sys.stdout.flush()


def compare(path: Path, args: argparse.Namespace, what: str) -> None:
    n_seqs = max(args.parallel)
    options: dict[str, Any] = {
        "backend": "cpu", "cpu_isa": args.cpu_isa, "n_threads": args.threads, "cache_ram": 0,
        "n_parallel": n_seqs, "n_ctx": max(args.tokens, (args.n_gen + 3) * n_seqs),
    }  # fmt: skip
    engines = {bits: Engine.load(path, activations=bits, **options) for bits in ACTIVATIONS}
    if what == "accuracy":
        rng = np.random.default_rng(args.seed)
        n_vocab = engines[ACTIVATIONS[0]].model.n_vocab
        accuracy(path, engines, rng.integers(0, n_vocab, args.tokens).tolist())
    else:
        speed(path, engines, args)
    for engine in engines.values():
        engine.close()


@ends_in_one_line(EngineError)
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.tokens:
        print("| file | bits | prompt: NMSE | KL | token by token: NMSE | KL |")
        print("|---|---|---|---|---|---|")
        for path in args.models:
            compare(path, args, "accuracy")
    if args.repetitions:
        print("\n| file | instruction set | sequences | 8 bits, t/s | 15 bits, t/s | ratio |")
        print("|---|---|---|---|---|---|")
        for path in args.models:
            compare(path, args, "speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
