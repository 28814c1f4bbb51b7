"""What the parity cases of every architecture share; numpy only.

A case draws all its weights from one seed, in the layout of the transformers state dict. No
parameter keeps its default: a norm of ones or a bias of zeros would hide a conversion error.
RandomState's stream is frozen, so that a seed means the same weights with every numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tests.parity.routing import Routing
from tools.ggufwrite import f32_tensor, write_gguf

F32 = NDArray[np.float32]
Weights = dict[str, F32]
Shape = tuple[int, ...]
SampleSpec = Callable[[np.random.RandomState, Shape], NDArray[Any]]
Parameters = dict[str, tuple[Shape, SampleSpec]]

LENGTHS = (1, 3, 64, 65, 200)  # both sides of the chunk of 64, and a prompt below the conv kernel
N_IDS, N_PROMPT, N_GREEDY = 200, 5, 64
MAX_ERROR = 1e-5
# A greedy step is a fair test when the best logit leads by this much of the logits' RMS: far above
# what float32 rounding moves a logit by.
MIN_MARGIN = 1e-3
# A choice of experts is a fair test when the last one chosen leads the best one left out by this
# much (Routing.margin): some fifty times what float32 rounding moves a score by.
MIN_CHOICE_MARGIN = 1e-4
# A run that keeps repeating a few tokens tests little.
MIN_DISTINCT = 8
GOLDEN_DIR = Path(__file__).parents[1] / "golden"


class Case(Protocol):
    """A tiny random model: see kimi_linear.Case for an implementation."""

    @property
    def arch(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def tied(self) -> bool: ...
    @property
    def routing(self) -> Routing | None:
        """How the routers choose experts; None if the model has none."""

    def parameters(self) -> Parameters:
        """Name -> shape and distribution, for every entry of the transformers state dict."""

    def metadata(self) -> dict[str, Any]:
        """The architecture's GGUF metadata; general and tokenizer keys are added to it."""

    def gguf_tensors(self, weights: Weights) -> dict[str, F32]:
        """Weights in the GGUF layout, by GGUF name."""

    def transformers_model(self) -> Any:
        """The transformers model in float32 with eager attention, its weights not yet loaded."""


def case_id(case: Case) -> str:
    return f"{case.arch}-{case.name}"


# Distributions.


def matrix(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
    return 0.02 * rng.standard_normal(shape)


def strong(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
    """For matrices whose product meets a sigmoid, a softmax or a choice of experts.

    With `matrix` these would see hardly more than a constant.
    """
    return 0.2 * rng.standard_normal(shape)


def conv(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
    return 0.3 * rng.standard_normal(shape)


def norm_around_0(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
    return rng.uniform(-0.3, 0.3, shape)


def norm_of_both_signs(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
    """For the output norm (stored zero-centred) of tied models.

    With positive factors a tied random model repeats its last token for ever: the residual stream
    still is mostly that token's embedding, whose product with itself wins.
    """
    return rng.uniform(-2.0, 0.0, shape)


def norm_around_1(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
    return rng.uniform(0.7, 1.3, shape)


def a_log(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
    return rng.uniform(-4.0, 1.5, shape)


def dt_bias(rng: np.random.RandomState, shape: Shape) -> NDArray[Any]:
    return rng.uniform(-3.0, 2.0, shape)


def random_weights(case: Case, seed: int) -> Weights:
    """Every parameter of `case`, float32, in the transformers layout."""
    rng = np.random.RandomState(seed)
    return {
        name: draw(rng, shape).astype(np.float32)
        for name, (shape, draw) in case.parameters().items()
    }


def random_ids(case: Case, seed: int) -> tuple[list[int], list[int]]:
    """The ids whose logits are compared (N_IDS) and the prompt of the greedy run (N_PROMPT)."""
    rng = np.random.RandomState([seed, 1])
    ids = rng.randint(0, case.n_vocab, N_IDS + N_PROMPT).tolist()
    return ids[:N_IDS], ids[N_IDS:]


# The GGUF file.

GLOBAL_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}


def layer_weights(weights: Weights, i: int) -> Weights:
    """The weights of layer `i`, by their names within the layer."""
    prefix = f"model.layers.{i}."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def eos_id(case: Case) -> int:
    return case.n_vocab - 1


def write_case(path: Path, case: Case, weights: Weights) -> None:
    metadata = {
        "general.architecture": case.arch,
        "general.name": case_id(case),
        **{f"{case.arch}.{key}": value for key, value in case.metadata().items()},
        **_vocabulary(case.n_vocab),
    }
    tensors = [f32_tensor(name, values) for name, values in case.gguf_tensors(weights).items()]
    write_gguf(path, metadata, tensors)


def _vocabulary(n_vocab: int) -> dict[str, Any]:
    """A byte-level BPE of exactly `n_vocab` tokens: single bytes, one merge, one control token."""
    n_bytes = n_vocab - 2
    alphabet = _byte_alphabet()
    assert 94 <= n_bytes <= len(alphabet), "the merge needs the printable ASCII characters"
    types = np.ones(n_vocab, np.int32)
    types[-1] = 3
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": [*alphabet[:n_bytes], "he", "<|im_end|>"],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.eos_token_id": n_vocab - 1,
    }


def _byte_alphabet() -> list[str]:
    """GPT-2's 256 byte characters: the printable bytes first, then stand-ins for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


# Golden files.


@dataclass(frozen=True)
class Golden:
    """What transformers answered for a case whose weights are `random_weights(case, seed)`."""

    seed: int
    ids: list[int]
    logits: F32  # [N_IDS, n_vocab]
    prompt: list[int]
    greedy: list[int]
    margin: float  # the smallest of the greedy run
    choice_margin: float = np.inf  # the smallest of all routers, for `ids`, prompt and greedy run

    def save(self, path: Path) -> None:
        choice: dict[str, Any] = {"choice_margin": np.float32(self.choice_margin)}
        np.savez_compressed(
            path,
            seed=np.uint32(self.seed),
            ids=np.array(self.ids, np.int32),
            logits=self.logits,
            prompt=np.array(self.prompt, np.int32),
            greedy=np.array(self.greedy, np.int32),
            margin=np.float32(self.margin),
            **(choice if np.isfinite(self.choice_margin) else {}),
        )

    @staticmethod
    def load(case: Case) -> Golden:
        with np.load(golden_path(case)) as file:
            return Golden(
                int(file["seed"]),
                file["ids"].tolist(),
                file["logits"],
                file["prompt"].tolist(),
                file["greedy"].tolist(),
                float(file["margin"]),
                float(file["choice_margin"]) if "choice_margin" in file else np.inf,
            )


def golden_path(case: Case) -> Path:
    return GOLDEN_DIR / f"{case_id(case)}.npz"


def relative_error(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """‖got − expected‖₂ / ‖expected‖₂ over all positions; shapes must be the same."""
    assert got.shape == expected.shape, f"expected shape {expected.shape}, got {got.shape}"
    difference = got.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))
