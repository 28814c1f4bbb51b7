"""Dump what the engine computes, and compare two dumps bit for bit: a refactoring changes nothing.

    python tools/dump_outputs.py write before.npz            # --device gpu on a machine with one
    python tools/dump_outputs.py write after.npz
    python tools/dump_outputs.py compare before.npz after.npz
    python tools/dump_outputs.py write some.npz --quick      # one model, no commands

A dump holds the logits of tiny models of all architectures on every backend and instruction set
here and on the emulated CUDA device (prompts in chunks, ragged batches, decode steps, a return to a
checkpoint), sampled tokens, and the output of every command on the demo model. Times and other
measured numbers are left out of the commands' output.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # Run as a script: Python looks for modules in tools/ only.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine import Engine, SamplingParams
from engine.backends.cpu.backend import CpuBackend
from engine.backends.native import library as cpu_library
from engine.backends.reference import ReferenceBackend
from engine.runtime.batch import Chunk, Logits
from tests.support.cuda_devices import cuda_and_others, emulated, engine_on, gpu
from tools.synth import write_model

ROOT = Path(__file__).resolve().parents[1]
DEMO = "engine/data/demo.gguf"
MODELS = (
    ("tiny", "F32"), ("tiny", "Q8_0"), ("tiny", "Q4_K_M"), ("tiny-untied", "BF16"),
    ("tiny-moe", "Q8_0"), ("tiny-moe", "Q4_K_M"), ("tiny-next", "F32"), ("tiny-next", "Q4_0"),
    ("tiny-kimi", "F32"), ("tiny-kimi", "Q8_0"), ("tiny-ling", "F32"), ("tiny-ling", "Q8_0"),
)  # fmt: skip
OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 128, "n_parallel": 4}
# Large enough that a wrong state moves logits.
STD = 0.1
PARAMS = (
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(seed=1, max_tokens=12),
    SamplingParams(seed=2, max_tokens=12, repeat_penalty=1.3, dry_multiplier=0.8),
    SamplingParams(seed=3, max_tokens=12, mirostat=2, logit_bias={5: 2.0}),
)
PROMPT = r"Question: What is 27 plus 48?\nAnswer:"
TEXT = "Anna went to the kitchen. Anna took the ball. " * 30
# Arguments of cli.py -> standard input; {dir} is an empty folder with TEXT in text.txt.
COMMANDS: dict[str, str] = {
    f"--temp 0 -n 20 -p '{PROMPT}'": "",
    f"-s 1 -n 20 -p '{PROMPT}'": "",
    f"--backend reference --temp 0 -n 8 -p '{PROMPT}'": "",
    "--temp 0 -n 20 --prompts - -np 3": "What is 2 plus 3?\nHello\n" + PROMPT,
    "-cnv --temp 0 -n 30 -sys 'Be brief.'": "What is 23 times 45?\nSort these numbers: 42, 7\n",
    "graph": "",
    "graph -v": "",
    "graph --gdn decomposed": "",
    "graph --backend reference --strict-backend": "",
    "tokenize -p 'Hello, world! 12'": "",
    "perplexity -c 64 -f {dir}/text.txt": "",
    f"bench -m {DEMO} -p 32 -n 4 -r 2": "",
    f"bench -m {DEMO} -p 32 -n 4 -r 2 -o json": "",
    f"bench -m {DEMO} -p 32 -n 4 -r 2 -o csv": "",
    "sweep-bench -c 128 -ub 64": "",
    "sweep-bench -c 128 -ub 64 --output-format jsonl": "",
    "batched-bench -npp 16 -ntg 4 -npl 1,2": "",
    "batched-bench -npp 16 -ntg 4 -npl 1,2 -pps --output-format jsonl": "",
    "profile -n 2": "",
    "profile -p 64 -r 1 -o json": "",
    "-m {dir}/absent.gguf -p Hello": "",
    "--temp -1 -p Hello": "",
    "--no-such-option": "",
}
_MEASURED = re.compile(
    r"\d+ GFLOP/s|(?<![\w.])[-+±]?\d+(\.\d+(e[-+]?\d+)?%?|[T:-]\d\S*)|(?<![\w.])\d{5,}"
)
_EXACT = ("graph", "tokenize", "perplexity")


def walk(engine: Engine, ids: list[int]) -> Iterator[np.ndarray]:
    """Logits of a prompt in chunks, of ragged batches, and of decode steps."""
    memory = engine.memory
    one, two = memory.create(), memory.create()
    yield engine.step([Chunk(one, ids[:70], Logits.ALL)])
    yield engine.step([Chunk(one, ids[70:75]), Chunk(two, ids[:33], Logits.ALL)])
    checkpoint = memory.checkpoint(one)
    for i in range(75, 80):
        yield engine.step([Chunk(one, [ids[i]]), Chunk(two, [ids[i + 9]])])
    memory.restore(one, checkpoint)
    checkpoint.release()
    yield engine.step([Chunk(one, ids[80:83], Logits.ALL), Chunk(two, ids[:120])])
    for token in ids[83:86]:
        yield engine.step([Chunk(one, [token])])
    memory.free(one)
    memory.free(two)


def outputs(engine: Engine, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """Logits and sampled tokens of an engine, each with a name."""
    rng = np.random.default_rng(7)
    ids = rng.integers(0, 320, 130).tolist()
    for i, logits in enumerate(walk(engine, ids)):
        yield f"{name}/walk/{i}", logits
    yield f"{name}/logits", engine.logits(ids)
    prompts = [ids[: 5 + 30 * i] for i in range(len(PARAMS))]
    for i, completion in enumerate(engine.generate_batch(prompts, PARAMS)):
        yield f"{name}/tokens/{i}", np.array(completion.tokens)


def engines(device: str) -> Iterator[tuple[str, Any]]:
    """(name, function from a model's path to a context with an engine) of everything here."""

    def plain(**options: Any) -> Any:
        return lambda path: Engine.load(path, **OPTIONS, **options)

    yield "reference", plain(backend="reference")
    for isa in cpu_library.usable():
        yield f"cpu-{isa}", plain(backend="cpu", cpu_isa=isa)
    # The matrix units' tiles, in vectors of the best instruction set that has none.
    vectors = next(isa for isa in cpu_library.usable() if isa != "amx")
    yield (
        "cpu-tiles",
        lambda path: engine_on(
            path, [CpuBackend(2, vectors, matrix=True), ReferenceBackend()], **OPTIONS
        ),
    )
    if device == "none":
        return
    make = gpu if device == "gpu" else emulated

    def cuda(**options: Any) -> Any:
        def load(path: Path) -> AbstractContextManager[Engine]:
            return engine_on(path, cuda_and_others(make(0), **options), **OPTIONS)

        return load

    yield f"cuda-{device}", cuda()
    yield f"cuda-{device}-invariant", cuda(batch_invariant=True)


def command_output(arguments: str, stdin: str, folder: Path) -> str:
    """What a command prints, its status, and no measured number."""
    words = arguments.replace("{dir}", str(folder))
    run = subprocess.run(
        f"{sys.executable} cli.py {words}",
        shell=True, cwd=ROOT, input=stdin, text=True, capture_output=True, check=False,
    )  # fmt: skip
    is_exact = arguments.startswith(_EXACT) or run.returncode
    stderr = run.stderr if run.returncode else _MEASURED.sub("#", run.stderr)
    stdout = run.stdout if is_exact else _MEASURED.sub("#", run.stdout)
    text = f"status {run.returncode}\n{stdout}\n--- stderr\n{stderr}"
    text = text.replace(str(folder), "{dir}")
    if is_exact:
        return text
    # Columns are as wide as their numbers; a profile's rows are in the order of their times.
    lines = re.sub(r"[ -]*-[ -]*-|[^\S\n]+", " ", text).split("\n")
    return "\n".join(sorted(lines) if arguments.startswith("profile") else lines)


def dump(device: str, quick: bool = False) -> dict[str, np.ndarray]:
    """All outputs by name; if `quick`, those of one model."""
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for preset, dtype in MODELS[:1] if quick else MODELS:
            path = write_model(folder / f"{preset}-{dtype}.gguf", preset, dtype, std=STD)
            for name, load in engines(device):
                print(f"{preset} {dtype} {name}", file=sys.stderr)
                with load(path) as engine:
                    found |= dict(outputs(engine, f"{preset}-{dtype}/{name}"))
        (folder / "text.txt").write_text(TEXT)
        for arguments, stdin in () if quick or device == "gpu" else COMMANDS.items():
            print(arguments, file=sys.stderr)
            found[f"cli {arguments}"] = np.array(command_output(arguments, stdin, folder))
    return found


def compare(before: Path, after: Path) -> int:
    """Print what differs; 1 if anything does."""
    a, b = np.load(before), np.load(after)
    different = sorted(set(a.files) ^ set(b.files))
    for name in sorted(set(a.files) & set(b.files)):
        x, y = a[name], b[name]
        if x.dtype.kind == "U":
            if str(x) != str(y):
                different.append(f"{name}\n--- before\n{x}\n--- after\n{y}")
        elif x.shape != y.shape or x.dtype != y.dtype or x.tobytes() != y.tobytes():
            different.append(f"{name}: other bits")
    for text in different:
        print(text)
    print(f"{len(a.files)} outputs before, {len(b.files)} after, {len(different)} differ")
    return int(bool(different))


def main() -> int:
    """Write a dump, or compare two."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="run everything and write what came out")
    write.add_argument("file", type=Path)
    write.add_argument("--device", choices=("emulated", "gpu", "none"), default="emulated")
    write.add_argument("--quick", action="store_true", help="one model and no commands")
    both = commands.add_parser("compare", help="compare two dumps")
    both.add_argument("before", type=Path)
    both.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        return compare(args.before, args.after)
    arrays: dict[str, Any] = dump(args.device, args.quick)
    np.savez_compressed(args.file, **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
