"""Time the saving and restoring of a session, beside the disk's own speed.

    python tools/time_sessions.py --preset 0.8b -n 32768 [--backend cpu] [--directory DIR]

The model is made up, and so are the contents of memory: what is written and read are bytes. The
disk's speed is that of the same number of bytes, written in one file and brought to the disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import Engine, SamplingParams
from engine.graph import dim_name
from engine.kvcache.policy import Kind
from engine.kvcache.prefix import packed
from engine.runtime.files import read_all
from tools.synth import write_model

_MIB = 1 << 20


def keep_random(engine: Engine, ids: list[int], rng: np.random.Generator) -> None:
    """Have the cache keep random contents for some tokens."""
    loop = engine.loop
    cache, memory = loop.scheduler.cache, loop.memory

    def keep() -> None:
        seq = memory.reserve()
        own = memory.adopt(seq, len(ids))
        indices = {"n_slots": [own.state.slot], "n_blocks": own.table.blocks}
        for store, tensor in loop.executable.states:
            at = indices[dim_name(tensor)]
            rows = read_all(store, tensor, at)
            rows[...] = rng.standard_normal(rows.shape[1:], np.float32)
            store.write(tensor, at, rows)
        assert cache.keep(packed(ids), seq, Kind.ANSWER) is not None
        memory.free(seq)

    loop.owner.call(keep)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def write_plainly(path: Path, n_bytes: int) -> None:
    piece = os.urandom(16 * _MIB)
    with path.open("wb") as file:
        for begin in range(0, n_bytes, len(piece)):
            file.write(piece[: n_bytes - begin])
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="0.8b", help="of tools/synth.py")
    add("-n", type=int, default=32768, metavar="N", help="tokens")
    add("--backend", default="cpu")
    add("--directory", help="where the session is written (the system's for temporary files)")
    add("-r", type=int, default=5, metavar="N", help="rounds")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        model, file = Path(folder) / "model.gguf", Path(folder) / "session"
        write_model(model, args.preset, "Q4_0", fast=True)
        saves, restores, plain, n_bytes = [], [], [], 0
        options = {"backend": args.backend, "n_ctx": args.n + 64, "cache_ram": -1}
        with Engine.load(model, **options) as engine:
            ids = rng.integers(0, engine.model.n_vocab, args.n).tolist()
            keep_random(engine, ids[:-1], rng)
            one = SamplingParams(max_tokens=1, temperature=0)
            completion = engine.generate(ids, one).wait()
            assert completion.timings.n_prompt == 1
            for _ in range(args.r):
                saves.append(seconds(lambda: engine.save(completion, file)))
                n_bytes = file.stat().st_size
                plain.append(seconds(partial(write_plainly, Path(folder) / "plain", n_bytes)))
                engine.cache.clear()
                restores.append(seconds(lambda: engine.restore(file)))
                again = engine.generate(ids + completion.tokens, one).wait()
                assert again.reuse.n_reused >= args.n
        print(f"{args.preset}, {args.n} tokens, {args.backend}: {n_bytes / _MIB:.1f} MiB")
        for what, each in (("save", saves), ("restore", restores), ("the disk", plain)):
            s = statistics.median(each)
            print(f"{what:>9}: {s:6.2f} s, {n_bytes / s / 1e9:5.2f} GB/s")


if __name__ == "__main__":
    main()
