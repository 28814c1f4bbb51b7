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

from tests.parity import bailingmoe3
from tests.parity.common import (
    F32,
    MIN_CHOICE_MARGIN,
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
from tests.support.numpy_ling import NumpyLing


@dataclass(frozen=True)
class Live:
    """A transformers model with the weights of one seed, and its greedy run."""

    weights: Weights
    model: Any
    golden: Golden


def build(case: Case, weights: Weights) -> Any:
    """The model with exactly `weights`: a name or shape too many, missing or different raises.

    It is numpy_ling's where a case has what transformers does not: clamps.
    """
    if isinstance(case, bailingmoe3.Case) and case.clamps:
        return NumpyLing(case, weights)
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
    if isinstance(model, NumpyLing):
        return model.logits(ids).astype(np.float32)
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


def choice_margin(case: Case, model: Any, ids: list[int]) -> float:
    """The smallest margin of all routers for `ids`, see Routing.margin; infinite without routers.

    transformers takes another expert than another implementation where this is down at noise.
    """
    if isinstance(model, NumpyLing):
        return model.choice_margin(ids)
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    if bool(routers) != (case.routing is not None):
        raise ValueError(f"{case_id(case)}: {len(routers)} routers, routing = {case.routing}")
    margins = [np.inf]

    def note(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        bias = getattr(router, "e_score_correction_bias", torch.zeros(1))
        assert case.routing is not None
        margins.append(case.routing.margin(output[0].numpy(), bias.numpy()))

    handles = [router.register_forward_hook(note) for router in routers]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return min(margins)


def is_fair(case: Case, golden: Golden) -> bool:
    """Whether another float32 implementation must find the same tokens.

    No near tie of tokens or experts, and no end-of-generation token, which `ignore_eos` bans in
    some engines. Runs that repeat themselves are left out too.
    """
    tie = golden.margin < MIN_MARGIN or golden.choice_margin < MIN_CHOICE_MARGIN
    repetitive = len(set(golden.greedy)) < MIN_DISTINCT
    return not tie and not repetitive and eos_id(case) not in golden.greedy


def first_fair(case: Case, seeds: Iterable[int]) -> Live:
    """The model of the first seed that makes a fair test."""
    tried = []
    for seed in seeds:
        weights = random_weights(case, seed)
        model = build(case, weights)
        ids, prompt = random_ids(case, seed)
        choice = choice_margin(case, model, ids)
        tokens, margin = list[int](), np.inf
        if choice >= MIN_CHOICE_MARGIN:  # else a greedy run would take time for nothing
            tokens, margin = greedy(model, prompt)
            choice = min(choice, choice_margin(case, model, prompt + tokens))
        golden = Golden(seed, ids, logits(model, ids), prompt, tokens, margin, choice)
        if is_fair(case, golden):
            return Live(weights, model, golden)
        tried.append(f"{seed} ({margin:.1e}, {choice:.1e})")
    raise ValueError(
        f"{case_id(case)}: no fair seed; margins of tokens, experts: {', '.join(tried)}"
    )
