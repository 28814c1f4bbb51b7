"""How a MoE layer of a parity case chooses its experts, and how clear the choice is; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Routing:
    """The choice of the `n_used` best of `n_experts`, by softmax or biased sigmoid of the logits.

    With groups, only experts of the `n_groups_used` best groups are chosen; a group is as good as
    the sum of its two best experts.
    """

    n_experts: int
    n_used: int
    sigmoid: bool = False
    n_groups: int = 1
    n_groups_used: int = 1

    def margin(self, logits: NDArray[Any], bias: NDArray[Any] | float = 0.0) -> float:
        """The smallest lead of the last one chosen over the best one left out, of all tokens.

        logits: [n_tokens, n_experts]. Leads are differences of biased probabilities with sigmoid
        and of logits with softmax, which doesn't change their order.
        """
        scores = logits.astype(np.float64)
        if self.sigmoid:
            scores = 1 / (1 + np.exp(-scores)) + bias
        grouped = scores.reshape(len(scores), self.n_groups, -1)
        group_scores = np.sort(grouped)[..., -2:].sum(axis=-1)
        worst_used = np.sort(group_scores)[:, -self.n_groups_used, None]
        grouped = np.where((group_scores >= worst_used)[..., None], grouped, -np.inf)
        allowed = grouped.reshape(scores.shape)
        return min(_lead(group_scores, self.n_groups_used), _lead(allowed, self.n_used))


def _lead(scores: NDArray[Any], n_used: int) -> float:
    ordered = np.sort(scores)[:, ::-1]
    if n_used == ordered.shape[1]:
        return np.inf
    return float((ordered[:, n_used - 1] - ordered[:, n_used]).min())
