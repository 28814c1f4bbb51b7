"""Print what released models take, as Markdown: file size and memory by quantization.

    python tools/model_table.py           # the table of docs/models.md
    python tools/model_table.py --short   # the table of README.md

Memory is the engine's own estimate (engine/placement/estimate.py) for a file that has a model's
header and no weights. Dimensions are those of tools/presets. Tests compare the pages with it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

if not __package__:  # run as a script, so Python looks for modules in tools/ only
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import backends
from engine.backends.cpu.backend import CpuBackend
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.device import Device
from engine.config import EngineConfig, capacity_of
from engine.formats.gguf import GGUFFile
from engine.models import BuildOptions, Model, load_model
from engine.placement.estimate import estimate
from engine.placement.place import place
from tests.support.cuda_emulator.device import EmulatedDevice
from tools.ggufwrite import ALIGNMENT, TensorSpec, write_gguf
from tools.makevocab import made_vocabulary, padded_vocabulary
from tools.presets import PRESETS, Preset, metadata, tensors
from tools.synth import tensor_type

# Released models, by the preset that has their dimensions.
MODELS = {
    "0.8b": "Qwen3.5 0.8B",
    "2b": "Qwen3.5 2B",
    "4b": "Qwen3.5 4B",
    "9b": "Qwen3.5 9B",
    "27b": "Qwen3.5, 3.6, 3.8 27B",
    "35b-a3b": "Qwen3.5, 3.6 35B-A3B",
    "122b-a10b": "Qwen3.5 122B-A10B",
    "397b-a17b": "Qwen3.5 397B-A17B",
    "next-80b": "Qwen3-Next 80B-A3B",
    "kimi-48b": "Kimi-Linear 48B-A3B",
    "ling-tiny": "Ling-3.0-tiny",
    "ling-flash": "Ling-3.0-flash",
}
TYPES = ("Q4_K_M", "Q8_0", "BF16")
CONTEXT = 32768
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Need:
    """Bytes that an engine takes with a context of CONTEXT and otherwise default options.

    weights: as the backend keeps them; state: of one sequence; kv: of CONTEXT positions; total:
    all that the engine allocates, with its state slots and activations.
    """

    weights: int
    state: int
    kv: int
    total: int


def write_header(path: Path, p: Preset, dtype: str) -> Path:
    """A GGUF of a preset's shapes in a type or mix; each tensor is a hole of a sparse file."""
    values = {"general.architecture": p.arch} | metadata(p)
    values |= padded_vocabulary(made_vocabulary(), p.n_vocab)
    write_gguf(path, values, [_hole(p, dtype, *tensor) for tensor in tensors(p).items()])
    return path


def _hole(p: Preset, dtype: str, name: str, shape: tuple[int, ...]) -> TensorSpec:
    block = tensor_type(p, name, shape, dtype)
    n_bytes = math.prod(shape) // block.elems * block.nbytes
    return TensorSpec(name, shape, block.ggml_id, n_bytes, lambda: [n_bytes])


def tensor_bytes(p: Preset, dtype: str) -> Iterator[int]:
    """Bytes of each tensor in a file of type or mix `dtype`, with the padding behind it."""
    for tensor in tensors(p).items():
        yield -(-_hole(p, dtype, *tensor).nbytes // ALIGNMENT) * ALIGNMENT


def need_of(model: Model, backend: str, device: Device | None = None) -> Need:
    """What a model needs on a backend, `cpu` or `cuda`; a GPU need not be there. device: on which
    CUDA programs run; None: one with the multiprocessors of an H200.

    Both backends keep weights in the same panels. They differ in the tokens of a step, in the
    number of state slots, and in the buffers of programs.
    """
    traits = backends.traits(backend)
    config = EngineConfig().resolved(traits)
    capacity = capacity_of(config, CONTEXT, traits)
    graph = model.build(BuildOptions(capacity, *config.cache_types(), config.gdn))
    on = CpuBackend(1) if backend == "cpu" else CudaBackend(device or _h200())
    need = estimate(place(graph, [on], strict=True))
    kv = need.kv_cache * CONTEXT // (capacity.n_blocks * capacity.block_size)
    return Need(need.weights, need.states // capacity.n_slots, kv, need.total)


def _h200() -> Device:
    """A device that is asked about sizes alone."""
    device = EmulatedDevice()
    device.n_multiprocessors = 132
    return device


@cache
def needs(name: str, dtype: str) -> tuple[Need, Need]:
    """What a preset in a type or mix needs on the CPU and on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_header(Path(folder) / "model.gguf", PRESETS[name], dtype)
        model = load_model(GGUFFile(path))
    return need_of(model, "cpu"), need_of(model, "cuda")


def full_table() -> Iterator[str]:
    """A row for each model and type."""
    yield from _head(
        "model", "type", "file, GiB", "weights, GiB", "state of a sequence, MiB",
        "KV of 32k, MiB", "all on a CPU, GiB", "all on a GPU, GiB",
    )  # fmt: skip
    for name, title in MODELS.items():
        for dtype in TYPES:
            cpu, cuda = needs(name, dtype)
            file = sum(tensor_bytes(PRESETS[name], dtype))
            yield _row(
                title, dtype, _gib(file), _gib(cpu.weights), _mib(cpu.state), _mib(cpu.kv),
                _gib(cpu.total), _gib(cuda.total),
            )  # fmt: skip


def short_table() -> Iterator[str]:
    """A row for each model: files and memory on the CPU in the first two types."""
    columns = [f"{t}: {what}, GiB" for t in TYPES[:2] for what in ("file", "memory")]
    yield from _head("model", *columns, "of it KV, GiB")
    for name, title in MODELS.items():
        cells = []
        for dtype in TYPES[:2]:
            cpu, _ = needs(name, dtype)
            cells += [_gib(sum(tensor_bytes(PRESETS[name], dtype))), _gib(cpu.total)]
        yield _row(title, *cells, _gib(cpu.kv))


def _head(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield "|" + "---|" * len(names)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.{2 if n_bytes < 10 * GIB else 1}f}"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / MIB:.0f}"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="model_table.py", description="Print what released models take, as Markdown."
    )
    parser.add_argument(
        "--short", action="store_true", help="one row for each model, as in README.md"
    )
    rows: Iterable[str] = short_table() if parser.parse_args(argv).short else full_table()
    for row in rows:
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
