"""What a training step computes: the trunk's loss, and later that of its layer for drafts."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.train_demo.model import DemoModel
from tools.train_demo.mtp import Mtp

# In the loss, of context, text and answers.
WEIGHT_OF = (0.05, 0.5, 1.0)
# Drafts must be right wherever somebody generates, in text as in answers. Nobody generates a
# question, but what is learnt of it helps with the others.
DRAFT_WEIGHT_OF = (0.2, 1.0, 1.0)
# Of drafts 1 to 3: one that comes later is of use only if those before it are accepted.
DEPTH_WEIGHTS = (1.0, 0.8, 0.6)
_ROWS_OF_LOGITS = 4  # rows whose logits are in memory at a time


class Stage(Protocol):
    """What is trained, and how."""

    trained: nn.Module

    def compile(self) -> None:
        """Have PyTorch compile what is slow otherwise."""

    def gradients(self, ids: Tensor, kinds: Tensor) -> Tensor:
        """The loss [] of a batch [B, T + 1], after its gradients were added to the parameters'."""


class TrunkStage:
    """Cross entropy with the tokens that follow."""

    def __init__(self, trunk: DemoModel, compute: torch.dtype) -> None:
        self._trunk, self._compute = trunk, compute
        self.trained: nn.Module = trunk
        self._weight_of = _on_device_of(trunk, WEIGHT_OF)
        self._loss: Any = _loss

    def compile(self) -> None:
        """Each layer alone, not all of them as one large graph; those of a kind share one."""
        compile_layers(self._trunk)
        self._loss = torch.compile(_loss, dynamic=False)

    def gradients(self, ids: Tensor, kinds: Tensor) -> Tensor:
        """See `Stage`."""
        ids, weights = ids.long(), self._weight_of[kinds[:, 1:].long()]
        hidden, embedding = self._trunk.model(ids[:, :-1]), self._trunk.model.embed_tokens.weight
        operands = hidden.to(self._compute), embedding.to(self._compute)
        loss: Tensor = self._loss(*operands, ids[:, 1:], weights)
        loss.backward()
        return loss.detach()


class MtpStage:
    """Divergence of the drafts' distributions from the trunk's, which stays as it is.

    From the whole distribution and not from the likeliest token alone: its divergence bounds how
    often a draft is refused at any temperature, and in text one token says less than all of them.
    """

    def __init__(self, trunk: DemoModel, mtp: Mtp, compute: torch.dtype) -> None:
        self._trunk, self._mtp, self._compute = trunk, mtp, compute
        self.trained: nn.Module = mtp
        self._weight_of = _on_device_of(trunk, DRAFT_WEIGHT_OF)
        self._loss: Any = draft_loss

    def compile(self) -> None:
        """The trunk's layers as for its own training; all three drafts as one graph."""
        compile_layers(self._trunk)
        self._mtp.compile(dynamic=False)
        self._loss = torch.compile(draft_loss, dynamic=False)

    def gradients(self, ids: Tensor, kinds: Tensor) -> Tensor:
        """See `Stage`. Logits of three drafts are large: a few rows' are in memory at a time."""
        ids, weights = ids[:, :-1].long(), self._weight_of[kinds[:, 1:].long()]
        with torch.no_grad():
            embedding = self._trunk.model.embed_tokens.weight.detach().to(self._compute)
            hidden, embedded = self._trunk.model(ids), self._trunk.model.embed_tokens(ids)
            targets = hidden.to(self._compute)
        drafts = self._mtp(embedded, hidden)  # [3, B, T, E]
        parts = [x.detach().requires_grad_() for x in drafts.split(_ROWS_OF_LOGITS, 1)]
        total = weights.sum()
        losses = []
        for part, target, weight in zip(
            parts, targets.split(_ROWS_OF_LOGITS), weights.split(_ROWS_OF_LOGITS), strict=True
        ):
            loss = self._loss(part.to(self._compute), target, embedding, weight / total)
            loss.backward()
            losses.append(loss.detach())
        drafts.backward(torch.cat([part.grad for part in parts], 1))
        return torch.stack(losses).sum()


def compile_layers(trunk: DemoModel) -> None:
    """Compile each layer of a trunk."""
    for layer in trunk.model.layers:
        layer.compile(dynamic=False)


def _on_device_of(trunk: DemoModel, values: tuple[float, ...]) -> Tensor:
    """Once: a copy to the device in every step would wait for the step before."""
    return torch.tensor(values, device=trunk.model.embed_tokens.weight.device)


def _loss(hidden: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean cross entropy [] of hidden [B, T, E], weighted."""
    logits = F.linear(hidden, embedding).float().flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def draft_loss(drafts: Tensor, target: Tensor, embedding: Tensor, weights: Tensor) -> Tensor:
    """The sum [] of divergences, weighted by weights [B, T] and depth.

    drafts: h' [3, B, T, E], all for the token that follows their row; target: the trunk's states
    [B, T, E]. The first rows of later drafts have no meaning and don't count.
    """
    wanted = F.linear(target, embedding).float().log_softmax(-1)
    total = torch.zeros_like(weights[0, 0])
    for k, (draft, depth_weight) in enumerate(zip(drafts, DEPTH_WEIGHTS, strict=True)):
        found = F.linear(draft, embedding).float().log_softmax(-1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1)
        share = depth_weight / sum(DEPTH_WEIGHTS)
        total = total + share * (divergence * weights)[:, k:].sum()
    return total
