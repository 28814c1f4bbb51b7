"""The table of released models: sizes of published files, the engine's estimate, and the pages.

Released weights can't be opened here, so published numbers are the reference. What README.md and
docs/models.md quote is compared with the engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineError
from engine.backends.cuda.device import Device
from engine.formats.gguf import GGUFFile
from engine.models import load_model
from engine.placement.estimate import estimate
from tests.support.cuda_devices import ON_DEVICES, cuda_and_others, engine_on
from tests.support.presets import WITH_LATENTS
from tools.model_table import CONTEXT, MODELS, full_table, need_of, needs, short_table, tensor_bytes
from tools.presets import PRESETS
from tools.synth import write_model

ROOT = Path(__file__).resolve().parents[2]
# Bytes of files in Q8_0 as llama.cpp's own model catalog lists them (ggml-org/Llama-macOS).
Q8_0_FILES = {
    "0.8b": 811_843_840, "2b": 2_012_012_800, "4b": 4_482_403_488, "9b": 9_527_502_048,
    "27b": 28_595_763_104, "35b-a3b": 36_903_139_968, "122b-a10b": 129_871_935_040,
    "397b-a17b": 421_507_365_376,
}  # fmt: skip
# Of llama-quantize without changes: Qwen's own file, and ymcki's of Kimi-Linear to four digits.
Q4_K_M_FILES = {"next-80b": 48_410_988_384, "kimi-48b": 29_700_000_000}
# A vocabulary of 248,320 tokens with its merges, and the tensor tables of up to ten split files.
MAX_METADATA = 12_000_000
# MiB of f16 KV cache for 1024 positions, from the same catalog.
KV_PER_1024 = {
    "0.8b": 12, "2b": 12, "4b": 32, "9b": 32, "27b": 64, "35b-a3b": 20, "122b-a10b": 24,
    "397b-a17b": 30,
}  # fmt: skip
Models = Callable[[str, str], Path]


@pytest.mark.parametrize("name", Q8_0_FILES)
def test_tensors_and_vocabulary_make_up_a_published_file(name: str) -> None:
    left = Q8_0_FILES[name] - sum(tensor_bytes(PRESETS[name], "Q8_0"))
    assert 0 < left < MAX_METADATA


@pytest.mark.parametrize("name", Q4_K_M_FILES)
def test_the_mix_has_the_size_of_a_published_file(name: str) -> None:
    size = sum(tensor_bytes(PRESETS[name], "Q4_K_M"))
    assert size == pytest.approx(Q4_K_M_FILES[name], rel=0.002)


@pytest.mark.parametrize("name", KV_PER_1024)
def test_the_cache_has_the_published_size(name: str) -> None:
    for need in needs(name, "Q8_0"):
        assert need.kv == KV_PER_1024[name] * 2**20 * CONTEXT // 1024


@pytest.mark.parametrize("preset", ["tiny-moe", *WITH_LATENTS])
def test_it_is_what_an_engine_estimates_on_the_cpu(models: Models, preset: str) -> None:
    path = models(preset, "Q8_0")
    need = need_of(load_model(GGUFFile(path)), "cpu")
    with Engine.load(path, backend="cpu", n_ctx=CONTEXT) as engine:
        whole = estimate(engine.plan)
        assert (need.weights, need.total) == (whole.weights, whole.total)
        assert need.state * engine.capacity.n_slots == whole.states


@ON_DEVICES
def test_it_is_what_an_engine_estimates_on_a_gpu(
    models: Models, make_device: Callable[[int], Device]
) -> None:
    path = models("tiny-moe", "Q8_0")
    device = make_device(0)
    need = need_of(load_model(GGUFFile(path)), "cuda", device)
    with engine_on(path, cuda_and_others(device), n_ctx=CONTEXT) as engine:
        whole = estimate(engine.plan)
        assert (need.weights, need.total) == (whole.weights, whole.total)
        assert need.state * engine.capacity.n_slots == whole.states


def test_the_models_have_a_preset() -> None:
    """Every preset of real dimensions has a row."""
    assert list(MODELS) == [name for name in PRESETS if not name.startswith("tiny")]


@pytest.mark.parametrize(
    ("page", "table"), [("README.md", short_table), ("docs/models.md", full_table)]
)
def test_the_pages_have_the_table(page: str, table: Callable[[], Iterable[str]]) -> None:
    expected = "\n".join(table())
    assert f"\n\n{expected}\n\n" in (ROOT / page).read_text(), f"tools/model_table.py, {page}"


REFUSED: dict[str, dict[str, Any]] = {
    "unknown architecture": {"overrides": {"general.architecture": "qwen4exp"}},
    "block_count is missing": {"overrides": {"qwen35.block_count": None}},
    "rope.dimension_sections: expected 4 integers": {
        "overrides": {"qwen35.rope.dimension_sections": None}
    },
    "expected ssm_f_a and ssm_g_a": {
        "preset": "tiny-ling",
        "arrays": {"blk.0.ssm_f.weight": np.ones((128, 64))},
    },
    "rope.dimension_sections: expected none": {
        "preset": "tiny-ling",
        "overrides": {"bailingmoe3.rope.dimension_sections": np.zeros(4, np.int32)},
    },
    "rope.scaling.type: expected none, linear or yarn": {
        "overrides": {"qwen35.rope.scaling.type": "longrope"}
    },
    "open the first one": {"overrides": {"split.count": np.uint16(2), "split.no": np.uint16(1)}},
    "not a GGUF file": {},
}


def test_the_page_quotes_the_engine(tmp_path: Path) -> None:
    """Every message in the page's table of refused files is the engine's."""
    section = (ROOT / "docs" / "models.md").read_text().split("## Files that are refused")[1]
    quoted = re.findall(r"^\| .+ \| `([^`]+)` \| .+ \|$", section, re.M)
    assert quoted == list(REFUSED)
    for message, changes in REFUSED.items():
        path = tmp_path / "model-00002-of-00002.gguf"
        write_model(path, **{"preset": "tiny"} | changes)
        if not changes:
            path.write_bytes(b"PK\3\4" + bytes(100))
        pattern = ".*".join(map(re.escape, message.split("…")))
        with pytest.raises(EngineError, match=pattern):
            Engine.load(path)


def test_the_python_of_the_readme_answers(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec("\n".join(code), names)
    want = " 75\n 75 stop\n 11 stop\n23 * 40 = 920, 23 * 5 = 115, 920 + 115 = 1035\n"
    assert capsys.readouterr().out == want
