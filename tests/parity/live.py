"""The transformers side of the parity cases: models, logits and greedy tokens. Imports torch.

Nothing is cached between steps: every greedy token is read off a forward pass over the whole
sequence, so that transformers' own decode path is no part of the reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.parity.common import (
    F32,
    MIN_DISTINCT,
    MIN_MARGIN,
    N_GREEDY,
    Case,
    Golden,
    Weights,
    case_id,
    eos_id,
    random_ids,
    random_weights,
)


@dataclass(frozen=True)
class Live:
    """A transformers model with the weights of one seed, and its greedy run."""

    weights: Weights
    model: Any
    golden: Golden


def build(case: Case, weights: Weights) -> Any:
    """The model with exactly `weights`: a name or shape too many, missing or different raises."""
    model = case.transformers_model().eval()
    state = {name: torch.from_numpy(values) for name, values in weights.items()}
    result = model.load_state_dict(state, strict=False)
    expected = ["lm_head.weight"] if case.tied else []
    if result.unexpected_keys or result.missing_keys != expected:
        raise ValueError(f"{case_id(case)}: {result}, expected missing: {expected}")
    if case.tied and model.lm_head.weight is not model.model.embed_tokens.weight:
        raise ValueError(f"{case_id(case)}: transformers did not tie lm_head to the embedding")
    if {p.dtype for p in model.parameters()} != {torch.float32}:
        raise ValueError(f"{case_id(case)}: expected float32 parameters only")
    return model


def logits(model: Any, ids: list[int]) -> F32:
    """Logits of every position, float32 [n_tokens, n_vocab]."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], float]:
    """N_GREEDY tokens and the smallest margin of the run: (best − second best) / RMS of a row."""
    ids, margin = list(prompt), np.inf
    for _ in range(N_GREEDY):
        row = logits(model, ids)[-1].astype(np.float64)
        second, best = np.sort(row)[-2:]
        margin = min(margin, (best - second) / np.sqrt(np.mean(row**2)))
        ids.append(int(row.argmax()))
    return ids[len(prompt) :], float(margin)


def is_fair(case: Case, tokens: list[int], margin: float) -> bool:
    """Whether another float32 implementation must find the same tokens.

    No near tie, and no end-of-generation token, which `ignore_eos` bans in some engines. Runs
    that repeat themselves are left out too.
    """
    distinct = len(set(tokens))
    return margin >= MIN_MARGIN and distinct >= MIN_DISTINCT and eos_id(case) not in tokens


def first_fair(case: Case, seeds: Iterable[int]) -> Live:
    """The model of the first seed whose greedy run is a fair test."""
    tried = []
    for seed in seeds:
        weights = random_weights(case, seed)
        model = build(case, weights)
        ids, prompt = random_ids(case, seed)
        tokens, margin = greedy(model, prompt)
        if is_fair(case, tokens, margin):
            golden = Golden(seed, ids, logits(model, ids), prompt, tokens, margin)
            return Live(weights, model, golden)
        tried.append(f"{seed} ({margin:.1e})")
    raise ValueError(f"{case_id(case)}: no fair greedy run with seeds (margins) {', '.join(tried)}")
