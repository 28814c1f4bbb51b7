"""Times matrix products on a GPU: microseconds and bandwidth of few rows, TFLOP/s of many.

    python tools/time_cuda_products.py [few] [many] [experts] [--types Q8_0,Q4_K,…] [--set NAME=N …]

The backend lowers nodes of one weight each, which one captured graph launches: more weights than
the L2 cache holds. `--set` changes a constant of common.py, gemv.py, mul_mat.py, mul_mat_id.py or
staged.py in engine/backends/cuda/lower, such as GEMV_WARPS=4. `--device emulated --quick` runs the
tool itself without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.backends.base import Split
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.copies import SHARE
from engine.backends.cuda.device import Device
from engine.backends.cuda.limits import timed
from engine.backends.cuda.lower import common, gemv, staged
from engine.backends.cuda.lower import mul_mat as products
from engine.backends.cuda.lower import mul_mat_id as of_experts
from engine.formats.quants import F32, I32, WEIGHT_TYPES, DType
from engine.graph import Capacity, Dim, Graph, Kind, Live, Tensor
from engine.ops.mul_mat import mul_mat
from engine.ops.mul_mat_id import mul_mat_id
from tools.cuda_device import add_device_options, device_of
from tools.randblocks import TYPES, generator, random_blocks


@dataclass(frozen=True)
class Sizes:
    """What is timed: shapes are (in, out); experts are (experts, used, in, out).

    copies: the most weights of one graph of few rows.
    """

    few: Sequence[tuple[int, int]]
    many: Sequence[tuple[int, int]]
    experts: tuple[int, int, int, int]
    few_rows: Sequence[int]
    many_rows: Sequence[int]
    expert_rows: Sequence[int]
    copies: int


# Nodes of Qwen3.5-0.8B, 4B and 9B: narrow, square, wide and deep; experts of 35B-A3B.
FULL = Sizes(
    few=(
        (1024, 1024), (1024, 7168), (3584, 1024), (2560, 2560), (2560, 18432), (9216, 2560),
        (4096, 4096), (4096, 24576), (12288, 4096),
    ),
    many=((1024, 7168), (2560, 18432), (4096, 12288), (12288, 4096)),
    experts=(256, 8, 2048, 512),
    few_rows=(1, 2, 4, 8, 16, 32, 64),
    many_rows=(128, 512, 2048),
    expert_rows=(1, 2, 4, 8, 16, 32, 64, 128, 512, 2048),
    copies=100,
)  # fmt: skip
QUICK = Sizes(
    few=((512, 48),), many=((256, 48),), experts=(4, 2, 256, 256),
    few_rows=(1, 2, 20), many_rows=(20,), expert_rows=(1, 8, 70), copies=1,
)  # fmt: skip
# Bytes that the L2 cache doesn't hold.
PAST_CACHE, REPEATS = 200 << 20, 7


class RandomWeights:
    """The same random rows again and again: times don't depend on the bytes."""

    def __init__(self, dtype: DType, n_elems: int) -> None:
        n_blocks = min(n_elems, 1 << 22) // dtype.block_elems
        some = random_blocks(TYPES[dtype.name], n_blocks, 0.02, generator(1))
        n_bytes = n_elems // dtype.block_elems * dtype.block_bytes
        self._raw = np.resize(some, n_bytes)

    def raw(
        self, name: str, begin: int = 0, end: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A weight's bytes."""
        return self._raw[begin:end]

    def factors(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """There are none."""
        return np.ones(1, np.float32)


class Products:
    """`n_copies` nodes on one activation of up to `capacity` rows."""

    def __init__(  # noqa: PLR0913
        self, device: Device, dtype: DType, shape: tuple[int, ...], capacity: int, n_copies: int,
        copied: bool = False, used: int = 0, summed: bool = False,
    ) -> None:  # fmt: skip
        self._device, graph = device, Graph(Capacity(capacity))
        self._backend = CudaBackend(device, copy_share=SHARE if copied else 0.0)
        tokens, n_in = Dim(capacity, "n_tokens"), shape[-1]
        x_shape = (tokens, used, n_in) if summed else (tokens, n_in)
        x = Tensor("x", x_shape, F32, Kind.ACTIVATION)
        ids = Tensor("ids", (tokens, used), I32, Kind.ACTIVATION)
        shares = Tensor("shares", (tokens, used), F32, Kind.ACTIVATION)
        for i in range(n_copies):
            w = graph.weight(f"w{i}", shape, dtype)
            if used:
                mul_mat_id(graph, f"n{i}", x, ids, w, weights=shares if summed else None)
            else:
                mul_mat(graph, f"n{i}", x, w)
        self._backend.load_weights(graph.nodes, RandomWeights(dtype, int(np.prod(shape))))
        split = Split(self._backend, graph.nodes)
        self._backend.copy_weights([split], 0)
        self._program = self._backend.compile(split)
        rng = np.random.default_rng(0)
        self._backend.write(x, rng.normal(size=tuple(map(int, x_shape))))
        if used:
            order = np.argsort(rng.random((capacity, shape[0])), axis=1)[:, :used]
            self._backend.write(ids, order.astype(np.int32))
            self._backend.write(shares, np.full((capacity, used), 1 / used))
        self._n = n_copies
        self.nbytes = self._backend.weights.packed_bytes(w)

    def seconds(self, n_rows: int) -> float:
        """Of one node: the least of several replays."""
        live = Live(n_rows, n_rows, n_rows)
        self._backend.begin(live)
        self._program.launch(live)
        replay = self._device.capture(lambda: self._program.launch(live))
        return min(timed(self._device, replay, REPEATS)) / self._n


def few(device: Device, types: Sequence[DType], sizes: Sizes) -> None:
    """1 to 64 rows: µs and the share of bytes per second."""
    print("type    in    out      " + "".join(f"{n:>5} rows, GB/s" for n in sizes.few_rows))
    for dtype in types:
        for n_in, n_out in sizes.few:
            n_bytes = n_out * dtype.row_bytes(n_in)
            n_copies = min(sizes.copies, -(-PAST_CACHE // n_bytes))
            timed = Products(device, dtype, (n_out, n_in), max(sizes.few_rows), n_copies)
            cells = []
            for n in sizes.few_rows:
                s = timed.seconds(n)
                cells.append(f"{s * 1e6:8.2f} {timed.nbytes / s / 1e9:6.0f}")
            print(f"{dtype.name:6}{n_in:6}{n_out:7}   " + "".join(cells), flush=True)


def many(device: Device, types: Sequence[DType], sizes: Sizes) -> None:
    """128 to 2048 rows: TFLOP/s by cuBLAS from a copy, by expanding each time, by gemm.cu."""
    ways = [
        ("cuBLAS, copy", True, 0), ("cuBLAS, expanded", False, 0), ("gemm.cu", False, 1 << 30)
    ]  # fmt: skip
    for dtype in types:
        for n_in, n_out in sizes.many:
            line = f"{dtype.name:6}{n_in:6}{n_out:7}   "
            for name, copied, expanded_rows in ways:
                with changed(EXPANDED_ROWS=expanded_rows):
                    timed = Products(device, dtype, (n_out, n_in), max(sizes.many_rows), 4, copied)
                for n in sizes.many_rows:
                    rate = 2 * n * n_in * n_out / timed.seconds(n) / 1e12
                    line += f" {name} {n}: {rate:4.0f}"
            print(line, flush=True)


def experts(device: Device, types: Sequence[DType], sizes: Sizes) -> None:
    """Gate or up, and down with its sum: µs, and GB/s of the experts that one token uses."""
    n_experts, used, width, d_ff = sizes.experts
    capacity = max(sizes.expert_rows)
    for dtype in types:
        for summed, shape in ((False, (n_experts, d_ff, width)), (True, (n_experts, width, d_ff))):
            timed = Products(device, dtype, shape, capacity, 4, used=used, summed=summed)
            line = f"{dtype.name:6}{'down' if summed else 'gate':6}"
            for n in sizes.expert_rows:
                s, touched = timed.seconds(n), min(1.0, n * used / n_experts)
                line += f"  {n}: {s * 1e6:.1f} µs"
                if n == 1:
                    line += f" ({timed.nbytes * touched / s / 1e9:.0f} GB/s)"
            print(line, flush=True)


class changed:
    """Changes constants of the backend's files on products, for a while."""

    def __init__(self, **values: int) -> None:
        files = (common, gemv, products, of_experts, staged)
        if unknown := [name for name in values if not any(name in vars(f) for f in files)]:
            places = ", ".join(f.__name__ for f in files)
            raise SystemExit(f"--set: expected a constant of {places}, got {unknown[0]}")
        self._changes = [
            (f, name, n) for name, n in values.items() for f in files if name in vars(f)
        ]

    def __enter__(self) -> None:
        self._before = [(f, name, getattr(f, name)) for f, name, _ in self._changes]
        _assign(self._changes)

    def __exit__(self, *_: object) -> None:
        _assign(self._before)


def _assign(changes: Sequence[tuple[ModuleType, str, int]]) -> None:
    for module, name, value in changes:
        setattr(module, name, value)


PARTS: dict[str, Callable[[Device, Sequence[DType], Sizes], None]] = {
    "few": few,
    "many": many,
    "experts": experts,
}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Times matrix products on a GPU.")
    parser.add_argument("parts", nargs="*", default=[], help="few, many, experts; default: all")
    parser.add_argument("--types", default="Q8_0,Q4_0,Q4_K,Q6_K,BF16")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=N")
    add_device_options(parser)
    args = parser.parse_args()
    values = {name: int(number) for name, number in (item.split("=") for item in args.set)}
    device, sizes = device_of(args), QUICK if args.quick else FULL
    print(device.detail)
    with changed(**values):
        for part in args.parts or PARTS:
            PARTS[part](device, [WEIGHT_TYPES[name] for name in args.types.split(",")], sizes)


if __name__ == "__main__":
    main()
