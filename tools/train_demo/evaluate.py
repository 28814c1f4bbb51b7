"""What a model can do: held-out questions answered exactly, and perplexity of held-out text.

An answer counts if every token of it, the one that ends it included, is the likeliest after the
right ones before it: then greedy generation gives exactly this answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tools.train_demo.delta import CHUNK
from tools.train_demo.heldout import completion, held_out, prompt
from tools.train_demo.model import DemoModel
from tools.train_demo.tokenizer import END_OF_TEXT, Encoder

N_CTX = 512
_MAX_TOKENS = 40_000  # of a batch


def answered(
    model: DemoModel, tokenizer: Any, pairs: Sequence[tuple[str, str]], device: str
) -> list[bool]:
    """For each prompt and completion, whether the model goes on exactly so."""
    encode = Encoder(tokenizer)
    tokens = [(encode(p), encode(c)) for p, c in pairs]
    longest = max(len(p) + len(c) for p, c in tokens)
    width = -(-longest // CHUNK) * CHUNK
    n_rows = max(1, _MAX_TOKENS // width)
    right = []
    for start in range(0, len(tokens), n_rows):
        part = tokens[start : start + n_rows]
        ids = torch.full((len(part), width), END_OF_TEXT)
        for row, (p, c) in zip(ids, part, strict=True):
            row[: len(p) + len(c)] = torch.tensor(p + c)
        best = _logits(model, ids.to(device)).argmax(-1).cpu()
        for row, (p, c) in zip(best, part, strict=True):
            right.append(row[len(p) - 1 : len(p) + len(c) - 1].tolist() == c)
    return right


@torch.no_grad()
def _logits(model: DemoModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids)
    return logits


def accuracy(model: DemoModel, tokenizer: Any, task: str, form: str, n: int, device: str) -> float:
    """The share of `n` held-out questions that are answered exactly."""
    questions = held_out(task, n)
    pairs = [(prompt(q, form), completion(q, form)) for q in questions]
    return sum(answered(model, tokenizer, pairs, device)) / n


def perplexity(model: DemoModel, ids: Sequence[int], device: str) -> tuple[float, int]:
    """As llama.cpp: whole chunks of 512, of each the last 255 tokens scored; and their number."""
    n = len(ids) // N_CTX
    chunks = torch.tensor(ids[: n * N_CTX]).view(n, N_CTX)
    total = 0.0
    first = N_CTX // 2
    for chunk in chunks.split(16):
        logits = _logits(model, chunk.to(device))[:, first:-1].double().log_softmax(-1)
        targets = chunk[:, first + 1 :, None].to(device)
        total -= float(logits.gather(-1, targets).sum())
    n_scored = n * (N_CTX - first - 1)
    return float(torch.tensor(total / n_scored).exp()), n_scored
