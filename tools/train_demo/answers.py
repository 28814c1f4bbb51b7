"""How often a file of the demo model is right when the engine runs it, on held-out questions.

    python tools/train_demo/answers.py -n 200 --backend cpu

An answer counts if it is exactly the right one and ends by itself, as in the trainer's evaluation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine import Engine, SamplingParams
from tools.train_demo.heldout import EVALUATED, completion, forms, held_out, prompt
from tools.train_demo.questions import Question

GREEDY = SamplingParams(temperature=0, max_tokens=400)
_ENDS = ("<|im_end|>", "<|endoftext|>")


def questions(task: str, n: int, form: str = "chat") -> list[tuple[str, str]]:
    """Prompts, and what has to follow; the token that ends it is not part of it."""
    return [asked(question, form) for question in held_out(task, n)]


def asked(question: Question, form: str = "chat") -> tuple[str, str]:
    """The prompt of a question, and what has to follow."""
    answer = completion(question, form)
    for end in _ENDS:
        answer = answer.removesuffix(end)
    return prompt(question, form), answer


def n_right(engine: Engine, asked: Sequence[tuple[str, str]]) -> int:
    """How many of the prompts get the right answer."""
    done = engine.generate_batch([text for text, _ in asked], GREEDY)
    pairs = zip(done, asked, strict=True)
    return sum(d.text == answer and d.finish_reason == "stop" for d, (_, answer) in pairs)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", help="GGUF file (default: the one of the engine)")
    parser.add_argument("-n", type=int, default=200, help="questions of each task")
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()
    with Engine.load(args.model, backend=args.backend, n_ctx=16384, n_parallel=8) as engine:
        for task in EVALUATED:
            for form in forms(task):
                rate = n_right(engine, questions(task, args.n, form)) / args.n
                print(f"{task:12} {form:6} {rate:.3f}", flush=True)


if __name__ == "__main__":
    main()
