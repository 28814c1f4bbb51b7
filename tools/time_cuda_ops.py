"""Times GATED_DELTA_NET and ATTENTION on a GPU: microseconds a call, and the share of its peaks.

    python tools/time_cuda_ops.py [--bandwidth GB/S] [--flops TFLOPS] [delta] [attention]

A captured graph launches many layers with states of their own, so that states come from memory as
in a model. `scan` computes all rows by the scan, `chunk` in chunks. `--device emulated --quick`
runs the tool itself without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.device import Device
from engine.backends.cuda.limits import timed
from engine.backends.cuda.program import CudaProgram
from engine.formats.quants import F16, numpy_dtype
from engine.graph import Kind, Live, Op
from engine.ops import OPS
from engine.placement.place import place
from engine.runtime.executor import Executable
from tests.support.cases import (
    Case,
    Operand,
    activation,
    blocks,
    live_counts,
    paged_operands,
    recurrent_operands,
    single_node_graph,
    slots,
)
from tests.support.opcase import RawWeights
from tools.cuda_device import add_device_options, device_of

Operands = dict[str, Operand]
# Bytes that an L2 cache does not hold; calls, of which the median counts.
TOUCHED, CALLS = 256 << 20, 7
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Sizes:
    """What is timed: (rows, sequences) of the delta rule, its heads, (cached positions, rows,
    sequences) of attention, and the most layers of one graph."""

    delta: Sequence[tuple[int, int]]
    heads: Sequence[int]
    attention: Sequence[tuple[int, int, int]]
    max_layers: int


FULL = Sizes(
    delta=(
        (1, 1), (1, 8), (1, 64),
        *((n, 1) for n in (16, 64, 128, 256, 512, 2048, 8192)), (128, 8),
    ),
    heads=(16, 32),
    attention=(
        *((n, 1, s) for n in (0, 511, 8191, 32767) for s in (1, 8)),
        (511, 1, 64), (0, 2048, 1), (30720, 2048, 1), (0, 512, 4),
    ),
    max_layers=24,
)  # fmt: skip
QUICK = Sizes(delta=((1, 2), (9, 1)), heads=(1,), attention=((20, 1, 2), (0, 17, 1)), max_layers=1)


def normal(*shape: int, dtype: Any = np.float32) -> Any:
    """Normal values; large arrays repeat some."""
    n = int(np.prod(shape))
    return (
        np.resize(RNG.standard_normal(min(n, 1 << 20), np.float32), n).reshape(shape).astype(dtype)
    )


@dataclass
class Timed:
    """Seconds a call, the last layer's output, and the work of a call."""

    seconds: float
    out: Any
    flops: int
    bytes: int


def time_op(
    device: Device, op: Op, operands: Operands, attrs: dict[str, Any], max_layers: int
) -> Timed:
    """Time an op on operands, with copies of its states for each layer."""
    graph, tensors = single_node_graph(op, Case("timed", lambda _: operands, attrs), operands, 0)
    (node,), live = graph.nodes, live_counts(operands)
    cost = op.cost(node, live)
    states = [name for name, t in tensors.items() if t.kind is Kind.STATE]
    n_layers = max(1, min(max_layers, TOUCHED // cost.bytes))
    for i in range(1, n_layers):
        own = {n: graph.state(f"{n}.{i}", tensors[n].shape, tensors[n].dtype) for n in states}
        graph.outputs = {"out": graph.add(op, f"layer.{i}", tensors | own, **attrs)[0]}
    backend = CudaBackend(device)
    executable = Executable(place(graph, [backend], strict=True), RawWeights({}))
    for name, operand in operands.items():
        if operand.kind is Kind.ACTIVATION:
            backend.write(tensors[name], operand.values.astype(np.float32))
    for t in graph.states.values():
        of = next(name for name in states if t.name.startswith((f"test.{name}", f"{name}.")))
        values = operands[of].values.astype(numpy_dtype(t.dtype))
        device.upload(backend.states.address(t), values)
    inputs = {name: o.values for name, o in operands.items() if o.kind is Kind.INPUT}
    (out,) = executable.run(inputs, live).values()
    return Timed(_seconds(device, executable, live) / n_layers, out, cost.flops, cost.bytes)


def _seconds(device: Device, executable: Executable, live: Live) -> float:
    ((_, program),) = executable._programs
    assert isinstance(program, CudaProgram)
    replay = device.capture(lambda: program.launch(live))
    return median(timed(device, replay, CALLS))


def delta_operands(n_tokens: int, n_seqs: int, n_heads: int, kda: bool) -> Operands:
    """Heads of 128; unit keys, weak decays."""
    n, size = n_tokens * n_seqs, 128
    g = -0.1 * RNG.uniform(0.2, 2, (n, n_heads, size) if kda else (n, n_heads))
    return {
        "q": activation(normal(n, n_heads, size) * size**-0.5),
        "k": activation(normal(n, n_heads, size) * size**-0.5),
        "v": activation(normal(n, n_heads, size)),
        "g": activation(g),
        "beta": activation(RNG.uniform(0, 1, (n, n_heads))),
        "state": slots(normal(2 * n_seqs, n_heads, size, size)),
        **recurrent_operands([n_tokens] * n_seqs),
    }


def delta_rows(device: Device, sizes: Sizes) -> Iterator[tuple[str, Timed, str]]:
    """(what, its times, a remark) of the delta rule."""
    op = OPS["GATED_DELTA_NET"]
    for kda in (False, True):
        for n_heads in sizes.heads:
            for n, n_seqs in sizes.delta:
                operands, outs = delta_operands(n, n_seqs, n_heads, kda), []
                for algorithm in ("scan", "chunk") if n > 1 else ("scan",):
                    attrs = {"head_map": "tiled", "scale": 128**-0.5, "algorithm": algorithm}
                    timed = time_op(device, op, operands, attrs, sizes.max_layers)
                    outs.append(timed.out.astype(np.float64))
                    remark = f"{timed.seconds / n * 1e9:.0f} ns a token"
                    if algorithm == "chunk":
                        error = np.square(outs[1] - outs[0]).sum() / np.square(outs[0]).sum()
                        remark += f", NMSE against the scan {error:.1e}"
                    name = f"{'kda ' if kda else ''}{algorithm}, {n_heads} heads, {n_seqs} × {n}"
                    yield name, timed, remark


def attention_rows(device: Device, sizes: Sizes) -> Iterator[tuple[str, Timed, str]]:
    """(what, its times, a remark) of attention: 8 query heads on 2 key heads of 256."""
    for past, n, n_seqs in sizes.attention:
        paged, n_blocks = paged_operands(RNG, [past] * n_seqs, [n] * n_seqs, 64)
        operands = {
            "q": activation(normal(n * n_seqs, 8, 256)),
            "k_cache": blocks(normal(n_blocks, 2, 64, 256, dtype=np.float16), F16),
            "v_cache": blocks(normal(n_blocks, 2, 64, 256, dtype=np.float16), F16),
            **paged,
        }
        op, attrs = OPS["ATTENTION"], {"scale": 1 / 16}
        timed = time_op(device, op, operands, attrs, sizes.max_layers)
        yield f"attention, {n_seqs} × {n} rows after {past}", timed, ""


def numbers(text: str) -> list[int]:
    """A list of numbers with commas."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Print the table."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("what", nargs="*", default=["delta", "attention"])
    p.add_argument("--bandwidth", type=float, default=3350, help="GB/s of the memory")
    p.add_argument("--flops", type=float, default=989, help="TFLOPS of float16 products")
    p.add_argument("--heads", type=numbers, default=[])
    add_device_options(p)
    options = p.parse_args()
    device, sizes = device_of(options), QUICK if options.quick else FULL
    sizes = replace(sizes, heads=options.heads or sizes.heads)
    device.prepare()
    print(device.detail)
    print("| | µs | GB/s | of peak | TFLOPS | of peak | |\n|---|---|---|---|---|---|---|")
    rows = {"delta": delta_rows, "attention": attention_rows}
    for what in options.what:
        for name, t, remark in rows[what](device, sizes):
            gbs, tflops = t.bytes / t.seconds / 1e9, t.flops / t.seconds / 1e12
            shares = f"{gbs:.0f} | {gbs / options.bandwidth:.0%} | {tflops:.1f} | "
            shares += f"{tflops / options.flops:.1%} | {remark} |"
            print(f"| {name} | {t.seconds * 1e6:.2f} | {shares}", flush=True)


if __name__ == "__main__":
    main()
