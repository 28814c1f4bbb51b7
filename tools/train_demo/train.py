"""Train the demo model on one GPU: its trunk, then its layer for drafts, for given times.

    python3 tools/train_demo/train.py --corpus build/demo-corpus --out build/demo-run

A run may take several processes: with --stop-after one leaves state.pt, and --resume goes on from
it. Leaves weights-*.npz (bfloat16), log.jsonl (loss and tokens per second) and run.json (sizes, how
it ran, evaluation of the rounded weights). state.pt is saved every minute, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

START = time.monotonic()
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# START comes first: importing torch is part of the time that is measured.
try:
    import torch
except ModuleNotFoundError as error:
    sys.exit(f"train.py: expected {error.name} (pip install torch)")

from tools.train_demo.feed import BLOCK, Batches, Feed  # noqa: E402
from tools.train_demo.model import DemoModel, Sizes  # noqa: E402
from tools.train_demo.mtp import PREFIX, Mtp  # noqa: E402
from tools.train_demo.optim import Optimizer  # noqa: E402
from tools.train_demo.scores import Scores, table  # noqa: E402
from tools.train_demo.stages import MtpStage, TrunkStage  # noqa: E402
from tools.train_demo.weights import save_weights  # noqa: E402

WARMUP_STEPS, DECAY_FROM = 100, 0.35  # a number, and a share of the time
SAVE_EVERY = 60.0
# Seconds before --stop-after that are left for the last save, and for questions; and how many a
# stage needs to compile, so that it isn't begun with less.
SAVE_TAKES, QUESTIONS_TAKE, COMPILING_TAKES = 8.0, 25.0, 90.0
LOG_STEPS = 10
PHASES = ("trunk", "mtp", "evaluate", "done")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="what corpus.py made")
    add("--out", type=Path, required=True)
    add("--minutes", type=float, default=7.0, help="of training the trunk, in all processes")
    add("--mtp-minutes", type=float, default=2.0, help="of training the layer for drafts")
    add("--stop-after", type=float, default=math.inf, help="seconds of this process; saves first")
    add("--resume", action="store_true", help="go on from state.pt in --out")
    add("--evaluate-at-stop", action="store_true", help="ask questions before --stop-after")
    add("--rows", type=int, default=24, help=f"of a batch; a multiple of {BLOCK}")
    add("--length", type=int, default=4096, help="tokens of a row; whole chunks of 64")
    add("--rate", type=float, default=1.0, help="factor of the learning rates")
    add("--questions", type=int, default=200, help="held-out questions of each task at the end")
    add("--stop-questions", type=int, default=40, help="the same for --evaluate-at-stop")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    add("--seed", type=int, default=0)
    add("--layers", type=int, default=8)
    add("--width", type=int, default=256)
    add("--no-compile", action="store_true")
    add("--smoke", action="store_true", help="all stages, with half a minute of training")
    args = parser.parse_args(argv)
    if args.smoke:
        args.minutes, args.mtp_minutes, args.questions = 1 / 3, 1 / 6, min(args.questions, 40)
    if args.rows % BLOCK or args.rows < BLOCK:
        parser.error(f"--rows: expected a multiple of {BLOCK}, got {args.rows}")
    if args.resume and not (args.out / "state.pt").exists():
        parser.error(f"--resume: expected {args.out / 'state.pt'}, found no such file")
    return args


def seconds_of_process() -> float:
    """Since the start of this process."""
    return time.monotonic() - START


@dataclass
class Progress:
    """How far a stage's training is: steps, tokens, seconds of it, factor of the rates."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rate: float = 1.0


class Run:
    """A training run: models, optimizer, log; `state` is all that the next process needs."""

    stage: Any
    optimizer: Any

    def __init__(self, args: argparse.Namespace, batches: Any, clock: Callable[[], float]) -> None:
        self.args, self._batches, self._clock = args, batches, clock
        self.models: dict[str, Any] = {}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.compute = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.end = args.stop_after - SAVE_TAKES
        if args.evaluate_at_stop:
            self.end -= QUESTIONS_TAKE
        torch.set_float32_matmul_precision("high")
        self.log = (args.out / "log.jsonl").open("a" if args.resume else "w")
        n_ff = 1024 * args.width // 256
        self.sizes = replace(Sizes(), n_layers=args.layers, n_embd=args.width, n_ff=n_ff)
        self.state = torch.load(args.out / "state.pt") if args.resume else self._new_state()
        self.progress = {name: Progress(**p) for name, p in self.state["progress"].items()}
        self.facts: dict[str, Any] = self.state["facts"]
        if self.facts["sizes"] != json.loads(json.dumps(self.sizes.to_json())):
            raise SystemExit(f"--resume: expected the sizes of state.pt, {self.facts['sizes']}")
        torch.set_rng_state(self.state["rng"])

    def _new_state(self) -> dict[str, Any]:
        corpus = json.loads((self.args.corpus / "corpus.json").read_text())
        facts = {"corpus": corpus, "sizes": json.loads(json.dumps(self.sizes.to_json()))}
        progress = {name: asdict(Progress(rate=self.args.rate)) for name in PHASES[:2]}
        return {
            "phase": PHASES[0], "progress": progress, "facts": {**facts, "processes": []},
            "trunk": None, "mtp": None, "optimizer": None, "rng": torch.get_rng_state(),
        }  # fmt: skip

    def say(self, **entry: Any) -> None:
        """Log an entry, to the file and the terminal."""
        line = json.dumps(
            {"seconds": round(self._clock(), 2), "phase": self.state["phase"]} | entry
        )
        self.log.write(line + "\n")
        self.log.flush()
        print(line, flush=True)

    # Training.

    def train(self) -> None:
        """The stages that are left, as far as there is time."""
        for phase, minutes in zip(PHASES, (self.args.minutes, self.args.mtp_minutes), strict=False):
            if self.state["phase"] != phase:
                continue
            if self.end - self._clock() < COMPILING_TAKES * (self.device == "cuda"):
                return
            progress, finished = self.progress[phase], True
            if progress.seconds < 60 * minutes:
                n_rows = self._prepare(phase)
                finished = self._steps(progress, 60 * minutes, n_rows)
            self.save(PHASES[PHASES.index(phase) + 1] if finished else phase)
            if not finished:
                return

    def _prepare(self, phase: str) -> int:
        """Make models and optimizer, compiled if that works; returns the rows that a batch has."""
        n_all: int = self.args.rows
        attempts = [(c, n) for c in (True, False) for n in (n_all, n_all // 2, n_all // 4)]
        for compiled, n_rows in attempts[3 * self.args.no_compile :]:
            try:
                self._build(phase, compiled)
                value = self._try(n_rows)
            except Exception as error:  # whatever a compiler raises; the next attempt has less
                self.say(event="attempt failed", compiled=compiled, error=repr(error)[:2000])
            else:
                n = sum(p.numel() for p in self.stage.trained.parameters())
                self.facts.setdefault("parameters", {})[phase] = n
                self.facts |= {"compiled": compiled, "rows": n_rows}
                self.say(event="ready", compiled=compiled, rows=n_rows, loss=value, n=n)
                self._load(phase)
                return n_rows
            self.models, self.stage, self.optimizer = {}, None, None
            torch._dynamo.reset()
            if self.device == "cuda":
                torch.cuda.empty_cache()
        raise SystemExit("no attempt worked; the log says why")

    def _build(self, phase: str, compiled: bool) -> None:
        """The models that a stage needs, drawn from the seed if `state` lacks them."""
        torch.manual_seed(self.args.seed)
        trunk = DemoModel(self.sizes, self.compute).to(self.device)
        self.models = {"trunk": trunk}
        if phase == "mtp":
            self.models["mtp"] = Mtp(self.sizes, self.compute).to(self.device)
            self.stage = MtpStage(trunk, self.models["mtp"], self.compute)
        else:
            self.stage = TrunkStage(trunk, self.compute)
        if compiled:
            self.stage.compile()
        for name, model in self.models.items():
            if self.state[name] is None:
                self.state[name] = _copy(model.state_dict())
        self._load(phase)

    def _load(self, phase: str) -> None:
        """Weights, and a new optimizer, as `state` has them."""
        for name, model in self.models.items():
            model.load_state_dict(self.state[name])
        self.optimizer = Optimizer(self.stage.trained, self.progress[phase].rate)
        if self.state["optimizer"] is not None:
            self.optimizer.load_state_dict(self.state["optimizer"])

    def _try(self, n_rows: int) -> float:
        """Two steps with random tokens, at a rate of zero; returns the loss."""
        shape = n_rows, self.args.length + 1
        ids = torch.arange(math.prod(shape), device=self.device) * 7919 % self.sizes.n_vocab
        ids = ids.view(shape).int()
        for _ in range(2):
            loss = self.stage.gradients(ids, (ids % 3).byte())
            self.optimizer.step(0.0)
        return float(loss)

    def _steps(self, progress: Progress, seconds: float, n_rows: int) -> bool:
        """Steps until the stage was trained for so long, or the process has to stop; returns
        whether it was the former."""
        began = saved = last = self._clock()
        before, n_last = progress.seconds, progress.tokens
        pending: Later | None = None
        while progress.seconds < seconds:
            if self._clock() >= self.end:
                return False
            done = progress.seconds / seconds
            share = min(1.0, (progress.step + 1) / WARMUP_STEPS, (1 - done) / (1 - DECAY_FROM))
            loss = self.stage.gradients(*(x[:n_rows] for x in self._batches.next()))
            self.optimizer.step(share)
            progress.step += 1
            progress.tokens += n_rows * self.args.length
            now = self._clock()
            progress.seconds = before + now - began
            if progress.step % LOG_STEPS:
                continue
            speed = round((progress.tokens - n_last) / max(1e-9, now - last))
            last, n_last = now, progress.tokens
            if pending is not None:
                pending.tell(self.say, share=round(share, 4), speed=speed)
            pending = Later(progress.step, loss)
            if now - saved > SAVE_EVERY:
                self._save_or_go_back(progress, loss)
                saved = last = self._clock()
        return True

    def _save_or_go_back(self, progress: Progress, loss: torch.Tensor) -> None:
        """Save; if the loss is not finite, take the weights of the last save and half the rate."""
        if math.isfinite(loss.item()):
            self.save(self.state["phase"])
            return
        progress.rate /= 2
        self.say(event="not finite: back to the last save, half the rate", rate=progress.rate)
        phase = self.state["phase"]
        self.stage.trained.load_state_dict(self.state[phase])
        self.optimizer = Optimizer(self.stage.trained, progress.rate)

    # What is left.

    def save(self, phase: str) -> None:
        """Write state.pt, with which the next process goes on in `phase`."""
        is_new = phase != self.state["phase"]
        self.state |= {name: _copy(model.state_dict()) for name, model in self.models.items()}
        self.state |= {
            "phase": phase, "rng": torch.get_rng_state(), "facts": self.facts,
            "optimizer": None if is_new else _copy(self.optimizer.state_dict()),
            "progress": {name: asdict(p) for name, p in self.progress.items()},
        }  # fmt: skip
        self.write_state()

    def write_state(self) -> None:
        """Write state.pt as `state` is; an older one is replaced as a whole."""
        draft = self.args.out / "state.draft"
        torch.save(self.state, draft)
        draft.replace(self.args.out / "state.pt")

    def write(self) -> None:
        """Write weights and facts as they are in `state`."""
        if self.state["trunk"] is not None:
            weights = {name: p.numpy() for name, p in self.state["trunk"].items()}
            for name, p in (self.state["mtp"] or {}).items():
                weights[PREFIX + name] = p.numpy()
            save_weights(self.args.out, weights)
        trunk, mtp = (asdict(self.progress[name]) for name in PHASES[:2])
        first = self.facts["processes"][0]
        self.facts |= {key: first[key] for key in ("command", "device", "torch", "python")}
        self.facts |= {"steps": trunk["step"], "tokens": trunk["tokens"]}
        self.facts |= {"seconds": round(trunk["seconds"], 1)}
        self.facts["mtp"] = mtp | {"seconds": round(mtp["seconds"], 1)}
        (self.args.out / "run.json").write_text(json.dumps(self.facts, indent=1))

    def begin_process(self) -> None:
        """Note in the facts what runs this part of the run."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else platform.machine()
        entry = {"command": " ".join(["train.py", *sys.argv[1:]]), "device": name}
        entry |= {"torch": str(torch.__version__), "python": platform.python_version()}
        self.facts["processes"].append(entry)

    def end_process(self) -> None:
        """Note how long it took, and what its feed made."""
        facts = self._batches.facts() if self._batches else {}
        self.facts["processes"][-1] |= {"seconds": round(self._clock(), 1), **facts}

    def evaluate(self) -> None:
        """Score what was saved: all of it at the end, a part before a stop if that is wanted."""
        args, until = self.args, self.args.stop_after - SAVE_TAKES
        is_last = self.state["phase"] == "evaluate"
        if self.state["trunk"] is None or not (is_last or args.evaluate_at_stop):
            return
        n, facts = (args.questions, self.facts) if is_last else (args.stop_questions, {})
        scores = Scores(args.out, args.corpus, self.sizes, self.device, n)
        if scores.fill(facts, lambda: self._clock() < until) and is_last:
            self.state |= {"phase": "done"}
        self.say(
            event="scores", **{k: facts.get(k) for k in ("perplexity", "accuracy", "acceptance")}
        )
        print(table(facts), flush=True)


class Later:
    """A loss that is told when it is known, so that nobody waits for the GPU."""

    def __init__(self, step: int, loss: torch.Tensor) -> None:
        self._step, self._value = step, loss.to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if loss.is_cuda else None
        if self._event is not None:
            self._event.record()

    def tell(self, say: Callable[..., None], **entry: Any) -> None:
        """Say it."""
        if self._event is not None:
            self._event.synchronize()
        say(step=self._step, loss=round(self._value.item(), 4), **entry)


def _copy(tree: Any) -> Any:
    """Tensors in dictionaries and lists, copied to the host."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def main() -> None:
    """Train, save, evaluate."""
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    phase, n_before = PHASES[0], 0
    if args.resume:
        state = torch.load(args.out / "state.pt")
        phase, n_before = state["phase"], len(state["facts"]["processes"])
    batches = None
    if phase in PHASES[:2]:
        # Other rows than those of the processes before, and before anything of CUDA: it forks.
        feed = Feed(args.corpus, args.length + 1, f"{args.seed} {n_before}", args.workers)
        batches = Batches(feed, args.rows, "cuda" if torch.cuda.is_available() else "cpu")
    run = Run(args, batches, seconds_of_process)
    run.begin_process()
    try:
        run.train()
    finally:
        if batches is not None:
            batches.close()
    run.write()
    run.evaluate()
    run.end_process()
    run.write()
    run.write_state()
    run.say(event="stopped", next=run.state["phase"])


if __name__ == "__main__":
    main()
