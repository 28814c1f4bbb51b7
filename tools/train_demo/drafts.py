"""How many drafts the trunk would accept: of answers to held-out questions, and of held-out text.

The trunk's greedy continuation is generated first. A draft counts as accepted if it and those
before it are tokens of that continuation, so all can be computed as if they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_demo.delta import CHUNK
from tools.train_demo.heldout import EVALUATED, completion, held_out, prompt
from tools.train_demo.model import DemoModel
from tools.train_demo.mtp import DEPTH, Mtp
from tools.train_demo.tokenizer import END_OF_TEXT, IM_END, Encoder

N_QUESTIONS, N_TEXTS = 20, 40
N_PROMPT, N_MORE = 128, 64  # tokens of a text before the continuation, and of a continuation
_MAX_TOKENS = 40_000  # of a batch
Pair = tuple[list[int], list[int]]  # a prompt, and tokens that may follow


def acceptance(
    models: tuple[DemoModel, Mtp], tokenizer: Any, text: str, device: str
) -> dict[str, dict[str, Any]]:
    """For each task, for all of them and for text: the rates that `_rates` describes."""
    found: dict[str, dict[str, Any]] = {}
    all_tasks: list[list[int]] = []
    encode = Encoder(tokenizer)
    for task in EVALUATED:
        asked = held_out(task, N_QUESTIONS)
        tokens = [(encode(prompt(q, "chat")), encode(completion(q, "chat"))) for q in asked]
        counts = n_accepted(models, tokens, device)
        all_tasks += counts
        found[task] = _rates(counts)
    ids = tokenizer.encode(text).ids
    step = (len(ids) - N_PROMPT) // N_TEXTS
    places: list[Pair] = [(ids[i * step : i * step + N_PROMPT], []) for i in range(N_TEXTS)]
    return found | {"tasks": _rates(all_tasks), "text": _rates(n_accepted(models, places, device))}


@torch.no_grad()
def n_accepted(
    models: tuple[DemoModel, Mtp], pairs: Sequence[Pair], device: str
) -> list[list[int]]:
    """For each pair and each token of its continuation but the last, how many drafts of those
    after it are accepted, of as many as there are tokens (at most DEPTH)."""
    trunk, mtp = models
    width = max(len(p) for p, _ in pairs) + N_MORE
    n_rows = max(1, _MAX_TOKENS // width)
    counts: list[list[int]] = []
    for start in range(0, len(pairs), n_rows):
        ids, ends = continued(trunk, pairs[start : start + n_rows], device)
        h, embedding = trunk.model(ids), trunk.model.embed_tokens.weight
        states = mtp(trunk.model.embed_tokens(ids), h)  # [DEPTH, B, T, E]
        drafts = torch.stack([F.linear(x, embedding).argmax(-1) for x in states])
        right = (drafts[:, :, :-1] == ids[:, 1:]).cpu()
        for row, (first, end) in enumerate(ends):
            counts.append([_leading(right[:, row], i, end) for i in range(first, end - 1)])
    return counts


def _leading(right: Tensor, i: int, end: int) -> int:
    """How many drafts made at row i are right, up to the first that is not."""
    n = 0
    while n < DEPTH and i + n < end - 1 and bool(right[n, i + n]):
        n += 1
    return n


def continued(
    trunk: DemoModel, pairs: Sequence[Pair], device: str
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Ids [B, T] of prompts with their greedy continuations, and where these begin and end.

    Each pass takes the likeliest token at every place; what depends on right tokens alone is
    right, so at least one more token is after each pass, and all are when a pass changes nothing.
    """
    longest = max(len(p) for p, _ in pairs) + N_MORE
    ids = torch.full((len(pairs), -(-longest // CHUNK) * CHUNK), END_OF_TEXT)
    where = torch.zeros_like(ids, dtype=torch.bool)
    for row, mask, (p, c) in zip(ids, where, pairs, strict=True):
        known = [*p, *c[:N_MORE]]
        row[: len(known)] = torch.tensor(known)
        mask[len(p) : len(p) + N_MORE] = True
    ids, where = ids.to(device), where.to(device)
    for _ in range(N_MORE + 1):
        best = trunk(ids).argmax(-1).roll(1, 1)
        new = torch.where(where, best, ids)
        if torch.equal(new, ids):
            break
        ids = new
    ends = []
    for row, (p, _) in zip(ids.tolist(), pairs, strict=True):
        last = range(len(p), len(p) + N_MORE)
        stop = next((i for i in last if row[i] in (END_OF_TEXT, IM_END)), last[-1])
        ends.append((len(p), stop + 1))
    return ids, ends


def _rates(counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """by_position: how often draft 1 to 3 is accepted if those before it are; mean: of the three,
    how many, over all rows; step: the same over the rows at which drafts begin if what is accepted
    is skipped; n: rows. Drafts after the end of a continuation count as refused in the means."""
    flat = [n for row in counts for n in row]
    steps = []
    for row in counts:
        i = 0
        while i < len(row):
            steps.append(row[i])
            i += row[i] + 1
    tried = [0] * DEPTH
    for row in counts:
        for i, n in enumerate(row):
            for k in range(min(n + 1, DEPTH, len(row) - i)):
                tried[k] += 1
    accepted = [sum(n > k for n in flat) for k in range(DEPTH)]
    return {
        "by_position": [
            round(a / t, 4) if t else 0.0 for a, t in zip(accepted, tried, strict=True)
        ],
        "mean": round(sum(flat) / max(1, len(flat)), 4),
        "step": round(sum(steps) / max(1, len(steps)), 4),
        "n": len(flat),
    }
