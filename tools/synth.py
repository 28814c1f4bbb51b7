"""Write a GGUF with random weights at real shapes: what the benchmarks and many tests run on.

    python tools/synth.py 0.8b -o model.gguf --type Q4_K_M --fast

Tensors, types and metadata are those of a converted model; the weights have mean 0 and standard
deviation --std; decays, routers and norms are realistic, so that logits stay finite however long
the run, and tokens differ in their experts.
The bytes depend on preset, options and --seed only. Needs only numpy.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.ggufwrite import TensorSpec, f32_tensor, write_gguf, write_split
from tools.makevocab import VocabError, copied_vocabulary, made_vocabulary, padded_vocabulary
from tools.presets import PRESETS, Preset, metadata, tensors
from tools.randblocks import TYPES, BlockType, generator, random_panel, random_pieces, repeated

# `general.file_type`, by the name of a type or mix.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K": 11, "Q4_K": 14, "Q4_K_M": 15, "Q5_K": 16, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20,
    "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30,
    "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40,
    "Q2_0": 41,
}  # fmt: skip
# What llama.cpp takes where rows are no whole blocks (it has nothing for NVFP4).
_FALLBACK = dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "NVFP4"), "Q4_0") | {
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
# Of the mix Q4_K_M: tensors treated as attn_v is, and the exceptions for exactly 8 experts.
_LIKE_ATTN_V = ("attn_v", "attn_qkv", "attn_kv_b")
_WITH_8_EXPERTS = dict.fromkeys((*_LIKE_ATTN_V, "attn_k"), "Q8_0") | {"attn_output": "Q5_K"}
_STD_RANGE = (0.001, 10.0)
# Weights that turn a vector of rms 1 into one of this rms, whatever --std: routers, and the two
# factors of KDA's decay and output gate.
_GAINS = {
    "ffn_gate_inp": 1.0,
    "ffn_gate_inp_shexp": 1.0,
    "ssm_f_a": 1.0,
    "ssm_f_b": 0.5,
    "ssm_g_a": 1.0,
    "ssm_g_b": 1.0,
}


class SynthError(Exception):
    """A mistake in the options, told in one line."""


def write_model(  # noqa: PLR0913
    path: str | Path,
    preset: str | Preset,
    dtype: str = "F32",
    *,
    seed: int = 0,
    fast: bool = False,
    vocab: str | Path | None = None,
    vocab_size: int | None = None,
    layers: int | None = None,
    std: float = 0.02,
    split: int = 1,
    overrides: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray | None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a random model; returns the path to open (with `split`, that of the first file).

    `dtype`: a type or mix of FILE_TYPES; `vocab`: a GGUF whose vocabulary is copied;
    `overrides`: metadata keys to replace, None leaves the key out; `arrays`: tensor name ->
    values to store as F32 instead of the random ones, None leaves the tensor out, a new name is
    added; `progress` is called with bytes written and their total. Raises SynthError,
    VocabError and OSError.
    """
    p, dtype = sized(preset, layers), type_name(dtype)
    if not _STD_RANGE[0] <= std <= _STD_RANGE[1]:
        raise SynthError(f"std {std:g}: expected {_STD_RANGE[0]:g} to {_STD_RANGE[1]:g}")
    vocabulary = made_vocabulary() if vocab is None else copied_vocabulary(vocab)
    if vocab_size is None:
        n_tokens = len(vocabulary["tokenizer.ggml.tokens"])
        vocab_size = n_tokens if vocab is not None else p.n_vocab or n_tokens
    p = replace(p, n_vocab=vocab_size)
    values = _general(p, dtype) | metadata(p) | padded_vocabulary(vocabulary, p.n_vocab)
    values |= overrides or {}
    values = {key: value for key, value in values.items() if value is not None}
    specs = _watched(_specs(p, dtype, _Source(p, seed, std, fast), arrays or {}), progress)
    if not 1 <= split <= len(specs):
        raise SynthError(f"split {split}: expected 1 to {len(specs)} files")
    if split == 1:
        write_gguf(path, values, specs)
        return Path(path)
    return write_split(path, values, specs, split)[0]


def sized(preset: str | Preset, layers: int | None = None) -> Preset:
    """The preset of that name, with another number of layers if one is given."""
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise SynthError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if layers is None:
        return preset
    if layers < 1:
        raise SynthError(f"layers {layers}: expected at least 1")
    return replace(preset, n_layers=layers)


def type_name(name: str) -> str:
    """The type or mix, as FILE_TYPES spells it."""
    if name.upper() not in FILE_TYPES:
        raise SynthError(f"unknown type {name!r}; known are {', '.join(FILE_TYPES)}")
    return name.upper()


def tensor_type(p: Preset, name: str, shape: tuple[int, ...], dtype: str) -> BlockType:
    """The type that a tensor has in a file of type or mix `dtype`."""
    if _is_always_f32(name, shape):
        return TYPES["F32"]
    block = TYPES[_q4_k_m(p, name) if dtype == "Q4_K_M" else dtype]
    if shape[-1] % block.elems and block.elems > 32:
        block = TYPES[_FALLBACK.get(block.name, "IQ4_NL")]
    return TYPES["F16"] if shape[-1] % block.elems else block


def _is_always_f32(name: str, shape: tuple[int, ...]) -> bool:
    return (
        len(shape) == 1
        or not name.endswith(".weight")
        or name.endswith("_norm.weight")
        or "conv1d" in name
        or "ffn_gate_inp" in name
    )


def _q4_k_m(p: Preset, name: str) -> str:
    """llama.cpp's choice (src/llama-quant.cpp)."""
    if name == ("token_embd.weight" if p.tied else "output.weight"):
        return "Q6_K"
    layer, role = _layer_and_role(name)
    if p.n_experts == 8 and role in _WITH_8_EXPERTS:
        return _WITH_8_EXPERTS[role]
    more_bits = False
    if role in _LIKE_ATTN_V:
        layers = _attn_v_layers(p)
        more_bits = _use_more_bits(layers.index(layer), len(layers))
    elif role.startswith("ffn_down"):
        more_bits = _use_more_bits(layer, p.n_layers)
    return "Q6_K" if more_bits else "Q4_K"


def _layer_and_role(name: str) -> tuple[int, str]:
    """(3, "attn_v") for blk.3.attn_v.weight; -1 is the layer of tensors outside the layers."""
    parts = name.split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "blk" else (-1, parts[0])


@cache
def _attn_v_layers(p: Preset) -> tuple[int, ...]:
    """The layers that have a tensor like attn_v; the mix counts these only."""
    found = (_layer_and_role(name) for name in tensors(p))
    return tuple(layer for layer, role in found if role in _LIKE_ATTN_V)


def _use_more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _general(p: Preset, dtype: str) -> dict[str, Any]:
    return {
        "general.architecture": p.arch,
        "general.type": "model",
        "general.name": f"synthetic {p.arch} {p.name} {dtype}",
        "general.file_type": FILE_TYPES[dtype],
        "general.quantization_version": 2,
    }


class _Source:
    """Makes the tensors' bytes; each tensor's depend on its name and the constructor's values."""

    def __init__(self, p: Preset, seed: int, std: float, fast: bool) -> None:
        self.f32_values = _bounded_values if p.bounded_decay else _f32_values
        self.seed, self.std, self.fast = seed, std, fast
        self.panels: dict[str, np.ndarray] = {}

    def pieces(self, name: str, shape: tuple[int, ...], block: BlockType) -> Iterable[np.ndarray]:
        rng = generator(self.seed, zlib.crc32(name.encode()))
        gain = _GAINS.get(_layer_and_role(name)[1])
        std = self.std if gain is None else gain / math.sqrt(shape[-1])
        if _is_always_f32(name, shape):
            return [self.f32_values(name, shape, std, rng).astype("<f4")]
        if gain is not None or not self.fast:
            return random_pieces(block, math.prod(shape), std, rng)
        if block.name not in self.panels:
            panel_rng = generator(self.seed, block.ggml_id)
            self.panels[block.name] = random_panel(block, self.std, panel_rng)
        panel = self.panels[block.name]
        start = int(rng.integers(len(panel) // block.nbytes)) * block.nbytes
        return repeated(panel, start, math.prod(shape) // block.elems * block.nbytes)


def _f32_values(
    name: str, shape: tuple[int, ...], std: float, rng: np.random.Generator
) -> np.ndarray:
    """With these ssm_a and ssm_dt, what a state holds fades within 1 to 1000 tokens; exp_probs_b
    decides between experts that are nearly equal."""
    if name.endswith("_norm.weight"):
        return 1 + 0.1 * rng.standard_normal(shape)
    if name.endswith("ssm_a"):
        return -np.exp(rng.uniform(np.log(0.5), np.log(8), shape))
    if name.endswith("ssm_dt.bias"):
        softplus = np.exp(rng.uniform(np.log(0.002), np.log(0.1), shape))
        return np.log(np.expm1(softplus))
    if name.endswith("exp_probs_b.bias"):
        return 0.02 * rng.standard_normal(shape)
    return rng.standard_normal(shape) * (0.3 if "conv1d" in name else std)


def _bounded_values(
    name: str, shape: tuple[int, ...], std: float, rng: np.random.Generator
) -> np.ndarray:
    """As `_f32_values`, for decays with a lower bound."""
    if name.endswith("ssm_a"):
        return np.exp(rng.uniform(np.log(0.5), np.log(2), shape))
    if name.endswith("ssm_dt.bias"):
        return rng.uniform(-4, -1, shape)
    return _f32_values(name, shape, std, rng)


def _specs(
    p: Preset, dtype: str, source: _Source, arrays: Mapping[str, np.ndarray | None]
) -> list[TensorSpec]:
    def spec(name: str, shape: tuple[int, ...]) -> TensorSpec:
        block = tensor_type(p, name, shape, dtype)
        nbytes = math.prod(shape) // block.elems * block.nbytes
        return TensorSpec(
            name, shape, block.ggml_id, nbytes, lambda: source.pieces(name, shape, block)
        )

    random = [spec(name, shape) for name, shape in tensors(p).items() if name not in arrays]
    given = [f32_tensor(name, a) for name, a in arrays.items() if a is not None]
    return random + given


def _watched(specs: list[TensorSpec], progress: Callable[[int, int], None]) -> list[TensorSpec]:
    done, total = 0, sum(spec.nbytes for spec in specs)

    def watch(spec: TensorSpec) -> Iterator[np.ndarray | bytes | memoryview]:
        nonlocal done
        for piece in spec.data():
            yield piece
            done += memoryview(piece).nbytes
            progress(done, total)

    return [replace(spec, data=partial(watch, spec)) for spec in specs]


def _show_progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{done / 2**30:.2f} of {total / 2**30:.2f} GiB", end=end, file=sys.stderr)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _type_argument(text: str) -> str:
    try:
        return type_name(text)
    except SynthError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="synth.py", description="Write a GGUF model with random weights at real shapes."
    )
    add = parser.add_argument
    add("preset", metavar="PRESET", choices=PRESETS, help=", ".join(PRESETS))
    add("-o", "--output", metavar="OUT.gguf", required=True, type=Path)
    add("--type", metavar="TYPE", default="Q4_K_M", type=_type_argument,
        help="F32, F16, BF16, a quantized type, or the mix Q4_K_M (default)")  # fmt: skip
    add("--fast", action="store_true", help="repeat one random panel per type: disk speed")
    add("--vocab", metavar="FILE", type=Path, help="copy the vocabulary of this GGUF")
    add("--vocab-size", metavar="N", type=_count, help="pad the vocabulary with unused tokens")
    add("--layers", metavar="N", type=_count, help="number of layers instead of the preset's")
    add("--seed", metavar="N", type=_count, default=0)
    add("--std", type=float, default=0.02, help="standard deviation of the weights (0.02)")
    add("--split", metavar="N", type=_count, default=1, help="write N split files")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _arguments(argv)
    options = {k: v for k, v in vars(args).items() if k not in ("preset", "output", "type")}
    if sys.stderr.isatty():
        options["progress"] = _show_progress
    try:
        path = write_model(args.output, args.preset, args.type, **options)
    except (SynthError, VocabError) as error:
        print(f"synth.py: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"synth.py: {error.filename or args.output}: {error.strerror}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
