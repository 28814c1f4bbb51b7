"""The demo's trainer against transformers: logits and gradients of its model, and its rounding.

Weights are drawn anew in every run; the same seed is printed by a failure.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

for package in ("torch", "transformers"):
    pytest.importorskip(package, reason=f"{package}: install the parity extra")

import torch  # noqa: E402

from engine import Engine  # noqa: E402
from tools.ggufwrite import write_gguf  # noqa: E402
from tools.makevocab import made_vocabulary, padded_vocabulary  # noqa: E402
from tools.train_demo.convert import gguf_tensors, metadata, tensor_specs  # noqa: E402
from tools.train_demo.delta import CHUNK, unit_lower_inverse  # noqa: E402
from tools.train_demo.model import DemoModel, Sizes, transformers_config  # noqa: E402
from tools.train_demo.optim import Optimizer, orthogonal  # noqa: E402
from tools.train_demo.weights import load_weights, save_weights  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
N_VOCAB = 352
SIZES = Sizes(n_vocab=N_VOCAB, n_embd=64, n_layers=4, n_ff=96, n_heads=4, n_linear_heads=2)
N_TOKENS = 3 * CHUNK


@pytest.fixture
def model() -> DemoModel:
    seed = torch.seed() % 2**32
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)
    model = DemoModel(SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def random_ids(n_rows: int) -> torch.Tensor:
    return torch.randint(0, N_VOCAB, (n_rows, N_TOKENS))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_model_is_transformers(model: DemoModel) -> None:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    other = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**transformers_config(SIZES))).eval()
    result = other.load_state_dict(model.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["lm_head.weight"], [])
    ids = random_ids(2)
    ours, theirs = model(ids), other(ids, use_cache=False).logits
    assert relative(ours, theirs) < 1e-5
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = gradients[name].grad
        assert expected is not None
        assert relative(parameter.grad, expected) < 1e-3, name


def test_engine_runs_the_trained_model(model: DemoModel, tmp_path: Path) -> None:
    """Through the files between them: logits of the weights as they are saved, in bfloat16."""
    save_weights(tmp_path, {name: p.numpy() for name, p in model.state_dict().items()})
    weights = load_weights(tmp_path)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    values = metadata(SIZES.to_json(), "BF16", "") | padded_vocabulary(made_vocabulary(), N_VOCAB)
    write_gguf(tmp_path / "m.gguf", values, tensor_specs(gguf_tensors(weights), "BF16"))
    ids = random_ids(1)
    with torch.no_grad():
        expected = model(ids)[0]
    with Engine.load(tmp_path / "m.gguf", backend="reference") as engine:
        got = engine.logits(ids[0].tolist())
    assert relative(torch.from_numpy(got), expected) < 1e-4


def test_weights_are_rounded_as_torch_rounds(tmp_path: Path) -> None:
    values = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    save_weights(tmp_path, {"x": values.numpy()})
    expected = values.bfloat16().float().numpy()
    assert np.array_equal(load_weights(tmp_path)["x"], expected)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_inverse_of_triangular_blocks(scale: float) -> None:
    """Ones everywhere below the diagonal are a run of one token: powers of it are huge."""
    for a in (torch.rand(3, 5, CHUNK, CHUNK), torch.ones(1, CHUNK, CHUNK)):
        a = (scale * a).tril(-1)
        product = unit_lower_inverse(a) @ (a + torch.eye(CHUNK))
        assert torch.allclose(product, torch.eye(CHUNK), atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 64, 16), (2, 16, 64), (1, 32, 32)])
def test_updates_are_nearly_orthogonal(shape: tuple[int, int, int]) -> None:
    """The steps keep singular vectors and map singular values, here computed one by one.

    A random square matrix may have a singular value so small that five steps leave it small, so
    these are chosen: from one to a hundredth of the largest.
    """
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -2, min(shape[1:]), dtype=torch.float64)
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    assert 0.3 < expected.min() <= expected.max() < 1.4
    updates = orthogonal((u @ torch.diag(7 * values) @ vh).float())
    assert relative(updates.double(), u @ torch.diag(expected) @ vh) < 1e-4


def test_a_few_steps_lower_the_loss(model: DemoModel) -> None:
    optimizer, ids = Optimizer(model), random_ids(2)
    losses = []
    for _ in range(6):
        logits = model(ids)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step(0.5)
    assert losses[-1] < losses[0] - 0.3
