"""Train the demo model: one run on one GPU, whose length is a time and not a number of steps.

    python3 tools/train_demo/train.py --corpus build/demo-corpus --minutes 7 --out build/demo-run

Leaves weights-*.npz (bfloat16), log.jsonl (loss and tokens per second) and run.json (sizes, how it
ran, evaluation of the rounded weights). Weights are saved every minute, and before evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

START = time.monotonic()
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# START comes first: importing torch is part of the time that is measured.
try:
    import torch
    import torch.nn.functional as F
except ModuleNotFoundError as error:
    sys.exit(f"train.py: expected {error.name} (pip install torch)")

from tools.train_demo.evaluate import accuracy, perplexity  # noqa: E402
from tools.train_demo.feed import BLOCK, Feed  # noqa: E402
from tools.train_demo.heldout import EVALUATED, FORMS  # noqa: E402
from tools.train_demo.model import DemoModel, Sizes  # noqa: E402
from tools.train_demo.optim import Optimizer  # noqa: E402
from tools.train_demo.tokenizer import load_tokenizer  # noqa: E402
from tools.train_demo.weights import load_weights, save_weights  # noqa: E402

WEIGHT_OF = (0.05, 0.3, 1.0)  # in the loss, of context, text and answers
WARMUP_STEPS, DECAY_FROM = 100, 0.35  # a number, and a share of the time
SAVE_SECONDS = 60


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="what corpus.py made")
    add("--out", type=Path, required=True)
    add("--minutes", type=float, default=7.0, help="from the start to the end of training")
    add("--limit", type=float, default=8.0, help="minutes after which evaluation breaks off")
    add("--rows", type=int, default=40, help="of a batch")
    add("--length", type=int, default=2048, help="tokens of a row; whole chunks of 64")
    add("--rate", type=float, default=1.0, help="factor of the learning rates")
    add("--questions", type=int, default=200, help="held-out questions of each task")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    add("--seed", type=int, default=0)
    add("--layers", type=int, default=8)
    add("--width", type=int, default=256)
    add("--no-compile", action="store_true")
    add("--smoke", action="store_true", help="all stages in about half a minute of training")
    return parser.parse_args()


class Run:
    """A training run: model, optimizer, log."""

    model: Any
    optimizer: Any

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.out.mkdir(parents=True, exist_ok=True)
        self.feed = Feed(args.corpus, args.length + 1, args.seed, args.workers)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.compute = torch.bfloat16 if self.device == "cuda" else torch.float32
        torch.set_float32_matmul_precision("high")
        self.log = (args.out / "log.jsonl").open("w")
        self.facts: dict[str, Any] = {
            "command": " ".join(["train.py", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "corpus": json.loads((args.corpus / "corpus.json").read_text()),
        }
        n_ff = 1024 * args.width // 256
        self.sizes = replace(Sizes(), n_layers=args.layers, n_embd=args.width, n_ff=n_ff)
        self.facts["sizes"] = self.sizes.to_json()
        self.n_rows, self.rate, self.step, self.n_tokens = args.rows, args.rate, 0, 0

    def say(self, **entry: Any) -> None:
        """Log an entry, to the file and the terminal."""
        line = json.dumps({"seconds": round(time.monotonic() - START, 2)} | entry)
        self.log.write(line + "\n")
        self.log.flush()
        print(line, flush=True)

    def prepare(self) -> None:
        """The model, after steps that show that it runs: compiled, or as it is; with fewer rows."""
        attempts = [(True, self.n_rows), (True, self.n_rows // 2)] * (not self.args.no_compile)
        attempts += [(False, self.n_rows), (False, self.n_rows // 2), (False, self.n_rows // 4)]
        for compiled, n_rows in attempts:
            self.n_rows = max(BLOCK, n_rows // BLOCK * BLOCK)
            try:
                self._build(compiled)
                for _ in range(2):
                    loss = self._gradients()
                self.optimizer.step(0.0)
                loss_now = loss.item()
            except (
                Exception
            ) as error:  # whatever a compiler raises; the next attempt has less of it
                self.say(event="attempt failed", compiled=compiled, error=repr(error)[:2000])
                self.model = self.optimizer = None
                torch._dynamo.reset()
                if self.device == "cuda":
                    torch.cuda.empty_cache()
                continue
            n = sum(p.numel() for p in self.model.parameters())
            self.facts |= {"compiled": compiled, "rows": self.n_rows, "parameters": n}
            self.say(event="ready", compiled=compiled, rows=self.n_rows, loss=loss_now, n=n)
            return
        raise SystemExit("no attempt worked; the log says why")

    def _build(self, compiled: bool) -> None:
        torch.manual_seed(self.args.seed)
        self.model = DemoModel(self.sizes, self.compute).to(self.device)
        self.optimizer = Optimizer(self.model, self.rate)
        self.loss_of = _loss
        self.weight_of = torch.tensor(WEIGHT_OF, device=self.device)
        if compiled:
            # Each kind of layer once, instead of all of them as one large graph.
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self.loss_of = torch.compile(_loss, dynamic=False)

    def _gradients(self) -> torch.Tensor:
        ids, kinds = (torch.from_numpy(x) for x in self.feed.batch(self.n_rows))
        if self.device == "cuda":
            ids, kinds = (x.pin_memory().to("cuda", non_blocking=True) for x in (ids, kinds))
        ids, weights = ids.long(), self.weight_of[kinds[:, 1:].long()]
        hidden, embedding = self.model.model(ids[:, :-1]), self.model.model.embed_tokens.weight
        loss: torch.Tensor = self.loss_of(
            hidden.to(self.compute), embedding.to(self.compute), ids[:, 1:], weights
        )
        loss.backward()
        return loss.detach()

    def train(self, end: float) -> None:
        """Steps until `end`, in seconds from the start."""
        began = last = saved = time.monotonic() - START
        good = self._snapshot()
        n_last = 0
        while (now := time.monotonic() - START) < end:
            done = (now - began) / (end - began)
            share = min(1.0, (self.step + 1) / WARMUP_STEPS, (1 - done) / (1 - DECAY_FROM))
            loss = self._gradients()
            self.optimizer.step(share)
            self.step += 1
            self.n_tokens += self.n_rows * self.args.length
            if self.step % 10 and self.step > 10:
                continue
            value, now = loss.item(), time.monotonic() - START
            speed = round((self.n_tokens - n_last) / (now - last))
            last, n_last = now, self.n_tokens
            self.say(step=self.step, loss=round(value, 4), share=round(share, 4), speed=speed)
            if not math.isfinite(value):
                self.rate /= 2
                self.say(event="not finite: back to the last save, half the rate", rate=self.rate)
                self.model.load_state_dict(good)
                self.optimizer = Optimizer(self.model, self.rate)
            elif now - saved > SAVE_SECONDS:
                good, saved = self._snapshot(), now
                self.save()
        self.facts |= {
            "steps": self.step,
            "tokens": self.n_tokens,
            "seconds": round(now - began, 1),
        }
        self.facts |= {"rows_fresh": self.feed.n_fresh, "rows_again": self.feed.n_again}

    def _snapshot(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.state_dict().items()}

    def save(self) -> None:
        """Write weights and facts as they are."""
        weights = {name: p.float().cpu().numpy() for name, p in self._snapshot().items()}
        save_weights(self.args.out, weights)
        (self.args.out / "run.json").write_text(json.dumps(self.facts, indent=1))

    def evaluate(self) -> None:
        """Score the weights as they were saved, in float32; run.json has every score at once."""
        torch.set_float32_matmul_precision("highest")
        tokenizer = load_tokenizer(self.args.corpus / "tokenizer.json")
        model = DemoModel(self.sizes)
        weights = load_weights(self.args.out)
        model.load_state_dict({name: torch.from_numpy(v) for name, v in weights.items()})
        model.to(self.device)
        ids = tokenizer.encode((self.args.corpus / "heldout.txt").read_text()).ids
        value, n_scored = perplexity(model, ids, self.device)
        self.facts["perplexity"] = {"value": value, "n_ctx": 512, "n_scored": n_scored}
        self.facts["questions"] = self.args.questions
        scores: dict[str, dict[str, float]] = {}
        self.facts["accuracy"] = scores
        for task in EVALUATED:
            for form in FORMS:
                if time.monotonic() - START > 60 * self.args.limit:
                    self.say(event="out of time", task=task)
                    break
                n = self.args.questions
                score = accuracy(model, tokenizer, task, form, n, self.device)
                scores.setdefault(task, {})[form] = score
            (self.args.out / "run.json").write_text(json.dumps(self.facts, indent=1))
        self.say(perplexity=value, accuracy=scores)


def _loss(
    hidden: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Mean cross entropy [] of hidden [B, T, E], weighted."""
    logits = F.linear(hidden, embedding).float().flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def main() -> None:
    """Train, save, evaluate."""
    args = options()
    if args.smoke:
        args.questions = min(args.questions, 40)
    run = Run(args)
    try:
        run.prepare()
        end = 60 * args.minutes
        if args.smoke:
            end = time.monotonic() - START + 20
        run.train(end)
        run.save()
    finally:
        run.feed.close()
    run.evaluate()


if __name__ == "__main__":
    main()
