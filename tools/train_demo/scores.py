"""Scores of trained weights, as they were rounded: answers, perplexity, accepted drafts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.train_demo.drafts import acceptance
from tools.train_demo.evaluate import accuracy, perplexity
from tools.train_demo.heldout import EVALUATED, FORMS, forms
from tools.train_demo.model import DemoModel, Sizes
from tools.train_demo.mtp import PREFIX, Mtp
from tools.train_demo.tokenizer import load_tokenizer
from tools.train_demo.weights import load_weights


def load_models(
    out: Path, sizes: Sizes, device: str, dtype: torch.dtype = torch.float32
) -> tuple[DemoModel, Mtp | None]:
    """The trunk and the layer for drafts that a run's files have; None: it has no such layer."""
    weights = {name: torch.from_numpy(v) for name, v in load_weights(out).items()}
    own = {n.removeprefix(PREFIX): w for n, w in weights.items() if n.startswith(PREFIX)}
    trunk = DemoModel(sizes, dtype)
    trunk.load_state_dict({n: w for n, w in weights.items() if not n.startswith(PREFIX)})
    mtp = Mtp(sizes, dtype) if own else None
    if mtp is not None:
        mtp.load_state_dict(own)
        mtp.to(device, dtype)
    return trunk.to(device, dtype), mtp


class Scores:
    """What was scored so far, in `facts` under perplexity, accuracy and acceptance.

    Each call of `add` computes one of them that is not there yet, so it can be broken off.
    """

    def __init__(self, out: Path, corpus: Path, sizes: Sizes, device: str, n: int) -> None:
        torch.set_float32_matmul_precision("highest")
        self._trunk, self._mtp = load_models(out, sizes, device)
        self._tokenizer = load_tokenizer(corpus / "tokenizer.json")
        self._text = (corpus / "heldout.txt").read_text()
        self._device, self._n = device, n

    def fill(self, facts: dict[str, Any], may_go_on: Callable[[], bool]) -> bool:
        """Add what is missing while `may_go_on()`; returns whether nothing is."""
        found: dict[str, dict[str, float]] = facts.setdefault("accuracy", {})
        facts["questions"] = self._n
        for task in EVALUATED:
            for form in forms(task):
                if form in found.get(task, {}):
                    continue
                if not may_go_on():
                    return False
                score = accuracy(self._trunk, self._tokenizer, task, form, self._n, self._device)
                found.setdefault(task, {})[form] = score
        if "perplexity" not in facts:
            if not may_go_on():
                return False
            ids = self._tokenizer.encode(self._text).ids
            value, n_scored = perplexity(self._trunk, ids, self._device)
            facts["perplexity"] = {"value": value, "n_ctx": 512, "n_scored": n_scored}
        if "acceptance" not in facts and self._mtp is not None:
            if not may_go_on():
                return False
            models = self._trunk, self._mtp
            facts["acceptance"] = acceptance(models, self._tokenizer, self._text, self._device)
        return True


def table(facts: dict[str, Any]) -> str:
    """The scores as lines for people."""
    lines = [f"{'task':16}" + "".join(f"{form:>8}" for form in FORMS)]
    for task, found in facts.get("accuracy", {}).items():
        lines.append(
            f"{task:16}" + "".join(f"{found[f]:8.3f}" if f in found else f"{'':8}" for f in FORMS)
        )
    if "perplexity" in facts:
        lines.append(f"{'perplexity':16}{facts['perplexity']['value']:8.2f}")
    if "acceptance" in facts:
        lines.append(f"{'drafts of':16}{'1':>8}{'2':>8}{'3':>8}{'mean':>8}{'a step':>8}{'rows':>8}")
    for group, found in facts.get("acceptance", {}).items():
        rates = "".join(f"{x:8.3f}" for x in (*found["by_position"], found["mean"], found["step"]))
        lines.append(f"{group:16}{rates}{found['n']:8}")
    return "\n".join(lines)
