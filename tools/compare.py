"""Compare this engine with llama.cpp in one run: speed and accuracy, side by side.

    python tools/compare.py MODEL.gguf --peer-python PATH

PATH is a Python, or a virtual environment, that has llama-cpp-python. Each engine runs in its own
process; the two take turns, and the idle one is stopped. Both get the same file, number of threads
and tokens. Accuracy is the distance of an engine's logits from those of the float32 reference.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import backends
from engine.backends.cpu.backend import CpuBackend
from engine.bench.facts import cpu_name
from engine.commands.options import InputError, Parser, integers, write_text
from engine.errors import EngineError
from engine.formats.gguf import GGUFFile
from engine.models import load_model
from engine.threads import n_cores
from tools.compare_process import Worker, WorkerFailure, WorkerMissing, alternate
from tools.compare_table import accuracy_table, distance, finite, ratio, speed_table, summary
from tools.endings import ends_in_one_line

SIDES = ("engine", "peer")
WAYS = {"one prefill": False, "token by token": True}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line."""
    p = Parser(prog="compare.py", allow_abbrev=False, description=str(__doc__).split("\n")[0])
    add = p.add_argument
    add("models", nargs="+", metavar="MODEL.gguf", type=Path)
    add("--peer-python", required=True, metavar="PATH", type=Path,
        help="a Python, or a virtual environment, with llama-cpp-python")  # fmt: skip
    add("-p", "--n-prompt", type=integers(1), default=[512], metavar="N,…",
        help="prompt lengths (512)")  # fmt: skip
    p.number("-n --n-gen", "tokens generated (64)", default=64)
    add("-d", "--n-depth", type=integers(0), default=[0], metavar="N,…",
        help="tokens of context before the generated ones (0)")  # fmt: skip
    p.number("-r --repetitions", "rounds (5)", default=5)
    p.number("-t --threads", "threads of each engine (all cores)", default=n_cores())
    p.number("-ub --ubatch-size", "most tokens of a step (512)", default=512)
    add("--backend", choices=backends.names(), default="auto", help="of this engine (auto)")
    p.number("--accuracy-tokens", "compare the logits after N tokens with the reference's (64; "
        "0: none)", low=0, default=64)  # fmt: skip
    p.number("--seed", "seed of the random tokens (0)", low=0, default=0)
    p.number("--timeout", "seconds that an engine has for an answer (1800)", default=1800)
    add("--json", metavar="FILE", help="write all measurements to a file")
    return p.parse_args(argv)


def python_of(path: Path) -> Path:
    """The Python at a path, or the one of the virtual environment there. Raises InputError."""
    python = path / "bin" / "python" if path.is_dir() else path
    if not python.is_file():
        came = "a directory without bin/python" if path.is_dir() else "no such file"
        raise InputError(f"{path}: expected a Python with llama_cpp, got {came}")
    return python.absolute()


class Comparison:
    """One model, measured with both engines."""

    def __init__(self, path: Path, args: argparse.Namespace, folder: Path) -> None:
        self.path, self.args, self.folder = path, args, folder
        self.rng = np.random.default_rng(args.seed)
        self.n_vocab = load_model(GGUFFile(path)).n_vocab

    def run(self) -> dict[str, Any]:
        """All measurements of the model, as they go into the document."""
        with ExitStack() as stack:
            workers = [stack.enter_context(self._worker(side)) for side in SIDES]
            about = {side: self._start(w) for side, w in zip(SIDES, workers, strict=True)}
            result: dict[str, Any] = {"name": self.path.stem, "path": str(self.path), **about}
            for worker, side in zip(workers, SIDES, strict=True):
                about[side] |= self._load(worker, self.args.backend)
            result["tests"] = [self._test(workers, *test) for test in self._tests()]
            tokens = self._tokens(self.args.accuracy_tokens)
            files = self._logits(workers, tokens)
            failures = result["failures"] = [w.failure for w in workers if w.failure]
        result["accuracy"] = self._accuracy(files, tokens, failures) if tokens else {}
        return result

    def _worker(self, kind: str) -> Worker:
        python = python_of(self.args.peer_python) if kind == "peer" else Path(sys.executable)
        env = {"OPENBLAS_NUM_THREADS": str(self.args.threads), "GGML_NO_BACKTRACE": "1"}
        log = self.folder / f"{kind}.log"
        try:
            return Worker(kind, python, log, self.args.timeout, env)
        except WorkerMissing as missing:
            raise self._wrong_python(kind, missing) from None

    def _wrong_python(self, kind: str, missing: WorkerMissing) -> InputError:
        path = self.args.peer_python if kind == "peer" else sys.executable
        what = "llama_cpp" if kind == "peer" else "this engine's dependencies"
        return InputError(f"{path}: expected a Python with {what}, got {missing}")

    def _start(self, worker: Worker) -> dict[str, Any]:
        try:
            return worker.start()
        except WorkerMissing as missing:
            raise self._wrong_python(worker.kind, missing) from None
        except WorkerFailure as failure:
            return {"failure": str(failure)}

    def _load(self, worker: Worker, backend: str) -> dict[str, Any]:
        a = self.args
        # One position more than generation fills: the scheduler reserves it.
        n_ctx = max(*a.n_prompt, max(a.n_depth) + a.n_gen + 1, a.accuracy_tokens)
        try:
            return worker.ask(
                "load", model=str(self.path), backend=backend, n_ctx=n_ctx,
                n_ubatch=a.ubatch_size, n_threads=a.threads,
            )  # fmt: skip
        except WorkerFailure as failure:
            return {"failure": str(failure)}

    def _tokens(self, n: int) -> list[int]:
        tokens: list[int] = self.rng.integers(0, self.n_vocab, n).tolist()
        return tokens

    def _tests(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Name, number of tokens, and request of each test."""
        tests: list[tuple[str, int, dict[str, Any]]] = []
        for n in self.args.n_prompt:
            tests.append((f"pp{n}", n, {"do": "prompt", "tokens": self._tokens(n)}))
        n = self.args.n_gen
        for depth in self.args.n_depth:
            name = f"tg{n}" + (f" @ d{depth}" if depth else "")
            request = {"do": "generate", "past": self._tokens(depth), "tokens": self._tokens(n)}
            tests.append((name, n, request))
        return tests

    def _test(
        self, workers: list[Worker], name: str, n_tokens: int, request: dict[str, Any]
    ) -> dict[str, Any]:
        _progress(f"{self.path.stem} {name}")
        engine, peer = seconds = alternate(workers, request, self.args.repetitions)
        sides = {
            side: summary(n_tokens, taken, worker.failure)
            for side, taken, worker in zip(SIDES, seconds, workers, strict=True)
        }
        depth = len(request.get("past", ()))
        test = {"test": name, "n_tokens": n_tokens, "n_depth": depth}
        return test | sides | {"ratio": ratio(engine, peer)}

    def _logits(self, workers: list[Worker], tokens: list[int]) -> dict[str, dict[str, Any]]:
        """For each way and side, the file with its logits, or {"failure": why there is none}."""
        files: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
        for way, one_by_one in WAYS.items() if tokens else ():
            for side, worker in zip(SIDES, workers, strict=True):
                _progress(f"{self.path.stem} logits, {way}")
                file = self.folder / f"{side}-{one_by_one:d}.npy"
                request = {"tokens": tokens, "one_by_one": one_by_one, "file": str(file)}
                try:
                    worker.ask("logits", **request)
                    files[way][side] = file
                except WorkerFailure as failure:
                    files[way][side] = {"failure": str(failure)}
        return files

    def _accuracy(
        self, files: dict[str, dict[str, Any]], tokens: list[int], failures: list[str]
    ) -> dict[str, dict[str, Any]]:
        """Distances from the reference, which runs after the other processes have ended."""
        _progress(f"{self.path.stem} reference logits")
        file = self.folder / "reference.npy"
        with self._worker("engine") as worker:
            try:
                worker.start()
                self._load(worker, "reference")
                worker.ask("logits", tokens=tokens, one_by_one=False, file=str(file))
                reference = np.load(file, mmap_mode="r")
            except WorkerFailure as failure:
                failures.append(f"no reference: {failure}")

        def distance_of(logits: Any) -> dict[str, Any]:
            if isinstance(logits, dict):
                return logits
            if worker.failure:
                return {"failure": failures[-1]}
            return distance(np.load(logits, mmap_mode="r"), reference)

        return {
            way: {side: distance_of(of) for side, of in sides.items()}
            for way, sides in files.items()
        }


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text} ", end="", file=sys.stderr, flush=True)


def machine(n_threads: int) -> dict[str, Any]:
    """The CPU, its bandwidth, and the load average before the comparison."""
    load = os.getloadavg()[0]
    limits = CpuBackend(n_threads).measure_limits()
    return {
        "cpu": cpu_name() or "unknown CPU",
        "n_threads": n_threads,
        "read_bytes_per_s": limits.bytes_per_s,
        "load_average": load,
    }


def report(document: dict[str, Any]) -> str:
    """The document as text."""
    m, models = document["machine"], document["models"]
    engine, peer = (_about(models[0][side], side) for side in SIDES)
    parts = [
        f"{m['cpu']}, threads: {m['n_threads']}, {m['read_bytes_per_s'] / 1e9:.1f} GB/s read; "
        f"load average before: {m['load_average']:.1f}\n"
        f"{engine}; {peer}\n"
        f"{document['options']['repetitions']} rounds, A B A B after a warm-up: median "
        "(least–most); ratio: engine to llama.cpp, the median of the rounds'",
        speed_table(models),
    ]
    n = document["options"]["accuracy_tokens"]
    if n:
        title = f"distance from the float32 reference, {n} tokens:"
        if models[0]["engine"].get("backends") == "reference":
            title += " 0 for the engine's prefill, for it ran on the reference itself"
        parts.append(title + "\n" + accuracy_table(models))
    return "\n\n".join(parts)


def _about(side: dict[str, Any], name: str) -> str:
    version = side.get("version", "")
    title = f"engine {version}" if name == "engine" else version or "llama.cpp"
    if "backends" not in side:
        return title.strip()
    facts = [side["backends"], f"{side['type_k']}/{side['type_v']} cache"]
    if name == "peer":
        # A build without the best instruction sets of this machine would be no fair peer.
        sets = re.findall(r"\b((?:AVX|AMX|NEON|SVE|SME)\w*) = 1", side["system_info"])
        facts += ["flash attention", *sets]
    return f"{title} ({', '.join(facts)})"


def compare(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The document of all models, and whether nothing failed. Raises EngineError."""
    python_of(args.peer_python)
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        comparisons = [Comparison(path, args, Path(folder)) for path in args.models]
        options = {k: v for k, v in vars(args).items() if k not in ("models", "peer_python")}
        document: dict[str, Any] = {"machine": machine(args.threads), "options": options}
        document["models"] = [comparison.run() for comparison in comparisons]
    _progress("")
    return document, not any(model["failures"] for model in document["models"])


def check_writable(path: str) -> None:
    """Raise InputError if a file can't be written; called before anything is measured."""
    try:
        Path(path).open("a").close()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


@ends_in_one_line(EngineError)
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = arguments(argv)
    if args.json:
        check_writable(args.json)
    document, all_well = compare(args)
    print(report(document))
    if args.json:
        write_text(args.json, json.dumps(finite(document), indent=1) + "\n")
    return 0 if all_well else 1


if __name__ == "__main__":
    # As an exception, so that the folder with the logits is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
