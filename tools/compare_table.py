"""compare.py's figures and tables: medians, ratios, and distances between logits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def summary(n_tokens: int, seconds: Sequence[float], failure: str) -> dict[str, Any]:
    """Tokens per second of one engine in one test."""
    rates = [n_tokens / s for s in seconds]
    result: dict[str, Any] = {"seconds": list(seconds), "tokens_per_s": rates}
    if rates:
        result |= {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
    return result | ({"failure": failure} if failure else {})


def ratio(engine: Sequence[float], peer: Sequence[float]) -> float | None:
    """The median over rounds of the ratio of speeds; above 1 the engine is faster."""
    ratios = [p / e for e, p in zip(engine, peer, strict=False)]
    return statistics.median(ratios) if ratios else None


def distance(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
    """The distance of logits [n_tokens, n_vocab] from the reference's.

    nmse: ‖logits − reference‖² / ‖reference‖². kl: the mean over positions of
    KL(softmax(reference) ‖ softmax(logits)), in nats.
    """
    error = norm = divergence = 0.0
    for row, expected in zip(logits, reference, strict=True):
        x, y = row.astype(np.float64), expected.astype(np.float64)
        error += float(np.sum((x - y) ** 2))
        norm += float(np.sum(y**2))
        log_p, log_q = _log_softmax(y), _log_softmax(x)
        divergence += float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return {"nmse": error / norm if norm else math.nan, "kl": divergence / len(reference)}


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = x - x.max()
    result: NDArray[np.float64] = shifted - np.log(np.sum(np.exp(shifted)))
    return result


def finite(value: Any) -> Any:
    """A document without the numbers that JSON lacks: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def speed_table(models: Sequence[dict[str, Any]]) -> str:
    """A row for each model and test."""
    rows = [("model", "test", "engine t/s", "llama.cpp t/s", "ratio")]
    for model in models:
        for test in model["tests"]:
            shown = f"{test['ratio']:.2f}" if test["ratio"] is not None else "–"
            rows.append(
                (model["name"], test["test"], _rate(test["engine"]), _rate(test["peer"]), shown)
            )
    return _aligned(rows)


def _rate(result: dict[str, Any]) -> str:
    if "failure" in result:
        return str(result["failure"])
    digits = 1 if result["median"] < 1000 else 0
    low, high = f"{result['min']:.{digits}f}", f"{result['max']:.{digits}f}"
    return f"{result['median']:.{digits}f} ({low}–{high})"


def accuracy_table(models: Sequence[dict[str, Any]]) -> str:
    """A row for each model and way of processing the tokens."""
    rows = [("model", "logits", "engine NMSE, KL", "llama.cpp NMSE, KL")]
    for model in models:
        for way in model["accuracy"]:
            cells = (_distance(model["accuracy"][way][side]) for side in ("engine", "peer"))
            rows.append((model["name"], way, *cells))
    return _aligned(rows)


def _distance(result: dict[str, Any]) -> str:
    if "failure" in result:
        return str(result["failure"])
    return f"{result['nmse']:.1e}, {result['kl']:.1e}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their cells; a message longer than 32 characters shifts only its row."""
    widest = [max(len(row[i]) for row in rows if len(row[i]) <= 32) for i in range(len(rows[0]))]
    lines = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widest, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
