"""Runs the cases of ops on any backend and says what must come out.

A case becomes a graph of one node at a capacity above its live counts, and is placed and run as an
engine's graph is. Memory that a kernel must not read is NaN: padding around rows, rows above the
live counts, slots and cache rows that nothing reads. The expected result is the naive definition in
float64, on what is stored: decoded weights and rounded states.
"""

from __future__ import annotations

import functools
import math
import secrets
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import gguf
import numpy as np
from numpy.lib.stride_tricks import as_strided

from engine.formats.quants import F32, I32, DType, numpy_dtype
from engine.graph import Graph, Kind, Op, Tensor
from engine.ops import OPS
from engine.ops.rope import RopeScaling
from engine.placement.place import place
from engine.runtime.executor import Executable
from tests.ops.cases import CASES
from tests.ops.cases.gated_delta_net import random_operands
from tests.support.cases import Case, Operand, integers, live_counts, single_node_graph
from tests.support.decoding import decode
from tests.support.naive import NAIVE, routing_scores
from tests.support.states import load, save
from tools.randblocks import TYPES, generator, random_blocks


@dataclass(frozen=True)
class OpCase:
    """One case of one op, and the NMSE that float32 arithmetic may have on it."""

    op: Op
    case: Case
    limit: float = 1e-11

    def __str__(self) -> str:
        return f"{self.op.name} {self.case.name}"


Array = np.ndarray[Any, Any]
Outputs = list[Array]
States = dict[str, Array]
Chunks = tuple[tuple[int, int], ...]
Made = TypeVar("Made")
# More than the runs that int8.py takes together.
_N_REMEMBERED = 32
# NaNs that no computation makes, so that one that was written anew is told from an old one.
_POISON_BITS = {"F32": 0x7FC0DEAD, "F16": 0x7EAD}
# Around routed ids, which can't be NaN: no expert has this number.
_NO_EXPERT = np.iinfo(np.int32).max
# Operands whose heads may be strided too: in a model, halves of one projection.
_INTERLEAVED = {
    ("ATTENTION", "gate"): 1,
    ("MUL_MAT_HEADS", "tail"): 1,
    ("MUL_MAT_HEADS", "x"): 0,
    ("QK_NORM_ROPE", "q"): 0,
    ("SWIGLU", "gate"): 0,
    ("SWIGLU", "up"): 1,
}
# A choice of experts is a fair test if its scores differ by more than float32 may turn around.
_MIN_ROUTING_MARGIN = 1e-5
# Rounding to float16 may go the other way than that of the naive result: half a step, 2^-11.
F16_LIMIT = 1e-7
# A chunk takes differences of cumulated decays, which float32 rounds where they are large.
MIXED_GATES_LIMIT = 1e-8


def fresh_seed(given: int | None = None) -> int:
    """Another seed on every run, unless one is given; failures print it."""
    return secrets.randbits(32) if given is None else given


def nmse(got: Array, want: Array) -> float:
    """Squared error over squared size; infinite where shapes differ or something isn't finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    error, size = np.sum(np.square(got - want)), np.sum(np.square(want))
    if error == 0:
        return 0.0
    return float(error / size) if size else float("inf")


def assert_close(got: Array, want: Array, limit: float, what: str) -> None:
    """Fail, naming `what`, unless the NMSE is at most `limit`."""
    error = nmse(got, want)
    assert error <= limit, f"{what}: NMSE {error:.3g}, expected at most {limit:g}"


def _remembered(make: Callable[[Op, Case, int], Made]) -> Callable[[Op, Case, int], Made]:
    """With its latest results: most is made for one backend after another. None may be changed."""
    # The cases are kept too, so that no other one gets the id of one of them.
    results: dict[tuple[str, int, int], tuple[Case, Made]] = {}

    @functools.wraps(make)
    def remembering(op: Op, case: Case, seed: int) -> Made:
        key = (op.name, id(case), seed)
        if key not in results:
            results[key] = case, make(op, case, seed)
            if len(results) > _N_REMEMBERED:
                del results[next(iter(results))]
        return results[key][1]

    return remembering


@_remembered
def make_operands(op: Op, case: Case, seed: int) -> dict[str, Operand]:
    """A case's operands as they are stored: activations float32, states rounded and poisoned.

    Weights keep their values; `encode` gives their bytes.
    """
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode())])
    operands = case.make(rng)
    while op.name == "ROUTER" and _routing_margin(case, operands) < _MIN_ROUTING_MARGIN:
        operands = case.make(rng)
    if "state_src" in operands:
        _assign_slots(rng, operands)
    for name, operand in operands.items():
        if operand.kind is Kind.ACTIVATION:
            stored = operand.values.astype(numpy_dtype(operand.dtype))
            operands[name] = replace(operand, values=stored)
        elif operand.kind is Kind.STATE:
            stored = operand.values.astype(numpy_dtype(operand.dtype))
            _poison(stored, operand.dtype, ~_read(op, name, stored, operands))
            operands[name] = replace(operand, values=stored)
    for operand in operands.values():
        operand.values.flags.writeable = False
    return operands


def _routing_margin(case: Case, operands: dict[str, Operand]) -> float:
    """How far the scores are apart between which the router decides, relative to the best one."""
    bias = operands["bias"].values if "bias" in operands else None
    n_used, groups = case.attrs["n_used"], case.attrs["groups"]
    margins = []
    for row in operands["logits"].values:
        _, scores, goodness = routing_scores(row, bias, case.attrs["gating"], groups)
        for values, n in ((scores, n_used), (goodness, groups[1])):
            best = np.sort(values)[::-1][: n + 1]
            margins += (np.abs(np.diff(best)) / abs(best[0])).tolist()
    return min(margins, default=math.inf)


def _assign_slots(rng: np.random.Generator, operands: dict[str, Operand]) -> None:
    """Shuffle the slots, and let about half of the sequences write where they read."""
    order = rng.permutation(len(operands["state"].values))
    slots = {name: operands[name].values for name in ("state_src", "state_dst", "snapshot_dst")}
    in_place = (slots["state_src"] >= 0) & (rng.random(len(slots["state_src"])) < 0.5)
    slots["state_dst"] = np.where(in_place, slots["state_src"], slots["state_dst"])
    for name, values in slots.items():
        shuffled = np.where(values < 0, values, order[values]).astype(np.int32)
        operands[name] = replace(operands[name], values=shuffled)


def _read(op: Op, name: str, state: Array, operands: dict[str, Operand]) -> Array:
    """Which entries of a state an op may look at, or leaves to later steps: not to be poisoned."""
    read = np.zeros(state.shape, bool)
    if name == "state":
        sources = operands["state_src"].values
        read[sources[sources >= 0]] = True
    elif name in op.writes:
        read[:] = True
    else:
        seq_starts, tables = operands["seq_starts"].values, operands["block_tables"].values
        for table, stop in zip(tables, seq_starts[1:], strict=True):
            for p in range(operands["positions"].values[stop - 1] + 1):
                read[table[p // state.shape[2]], :, p % state.shape[2]] = True
    return read


def _poison(stored: Array, dtype: DType, where: Array) -> None:
    stored.view(f"u{stored.itemsize}")[where] = _POISON_BITS[dtype.name]


def encode(operand: Operand) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A weight's bytes; random ones for types that the gguf package can't encode."""
    values = np.ascontiguousarray(operand.values, np.float32)
    try:
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[operand.dtype.name])
    except (KeyError, NotImplementedError):
        block, seed = TYPES[operand.dtype.name], zlib.crc32(values.tobytes())
        n_blocks = values.size // block.elems
        raw = random_blocks(block, n_blocks, float(values.std()), generator(seed))
    return np.ascontiguousarray(raw).reshape(-1).view(np.uint8)


@_remembered
def _encoded(op: Op, case: Case, seed: int) -> dict[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """The bytes of a case's weights."""
    operands = make_operands(op, case, seed).items()
    return {name: encode(o) for name, o in operands if o.kind is Kind.WEIGHT}


class RawWeights:
    """Stored weights by name, where an engine has a file."""

    def __init__(
        self,
        weights: dict[str, np.ndarray[Any, np.dtype[np.uint8]]],
        factors: np.ndarray[Any, np.dtype[np.float32]] | None = None,
    ) -> None:
        self._weights = weights
        self._factors = np.ones(1, np.float32) if factors is None else factors

    def raw(
        self, name: str, begin: int = 0, end: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A weight's bytes."""
        return self._weights[name][begin:end]

    def factors(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The same of all weights."""
        return self._factors


def run_case(
    backend: Any, op: Op, case: Case, seed: int, strided: bool = False, chunks: Chunks = ()
) -> tuple[Outputs, States, States]:
    """(outputs, states before, states after), states by operand name as they are stored.

    With `strided`, activations are as strided as the op allows. `chunks`: see Live.
    """
    operands = make_operands(op, case, seed)
    graph, tensors = single_node_graph(op, case, operands, strided=strided)
    if strided:
        graph, tensors = _interleaved(graph, tensors)
    weights = {tensors[name].name: raw for name, raw in _encoded(op, case, seed).items()}
    executable = Executable(place(graph, [backend]), RawWeights(weights))
    states = {name: t for name, t in tensors.items() if t.kind is Kind.STATE}
    _load_states(backend, states, operands)
    for name, operand in operands.items():
        if operand.kind is Kind.ACTIVATION:
            _write_activation(backend, tensors[name], operand.values)
    before = _saved_states(backend, states)
    inputs = {n: o.values for n, o in operands.items() if o.kind is Kind.INPUT}
    live = live_counts(operands)
    outputs = executable.run(inputs, replace(live, chunks=chunks) if chunks else live)
    return list(outputs.values()), before, _saved_states(backend, states)


def _interleaved(graph: Graph, tensors: dict[str, Tensor]) -> tuple[Graph, dict[str, Tensor]]:
    """The graph with heads that alternate with others where its op takes that."""
    (node,), tensors = graph.nodes, dict(tensors)
    for name, tensor in tensors.items():
        half = _INTERLEAVED.get((node.op.name, name))
        if half is not None and len(tensor.shape) == 3:
            n_tokens, n_heads, size = tensor.shape
            base = Tensor(tensor.name, (n_tokens, 2 * n_heads * size), F32, Kind.ACTIVATION)
            tensors[name] = base.unflatten(1, n_heads, 2, size).select(2, half)
    copy = replace(graph, nodes=[], outputs={})
    outputs = copy.add(node.op, node.name, tensors, **node.attrs)
    copy.outputs = {f"out{i}": t for i, t in enumerate(outputs)}
    return copy, tensors


def _write_activation(backend: Any, tensor: Tensor, values: Array) -> None:
    """Fill an activation through the tensor that owns its memory; everything around it is NaN, or
    the number of no expert."""
    poison = _NO_EXPERT if tensor.dtype is I32 else np.nan
    base = np.full(tensor.base.shape, poison, numpy_dtype(tensor.dtype))
    backend.write(tensor.base, base)
    strides = [s * base.itemsize for s in tensor.strides]
    view = as_strided(base.reshape(-1)[tensor.offset :], tensor.shape, strides)
    view[: len(values)] = values
    backend.write(tensor.base, base[: len(values)])


def _load_states(backend: Any, states: dict[str, Tensor], operands: dict[str, Operand]) -> None:
    if not states:
        return
    dim = operands[next(iter(states))].dim
    for i in range(len(operands[next(iter(states))].values)):
        contents = {t.name: operands[name].values[i] for name, t in states.items()}
        load(backend.states, dim, i, contents)


def _saved_states(backend: Any, states: dict[str, Tensor]) -> States:
    saved = {}
    for name, t in states.items():
        dim = t.shape[0].name  # type: ignore[attr-defined]
        rows = [save(backend.states, dim, i)[t.name] for i in range(t.shape[0])]
        saved[name] = np.stack(rows)
    return saved


@_remembered
def expected(op: Op, case: Case, seed: int) -> tuple[Outputs, States]:
    """(outputs, states after) in float64, not rounded to the type that states are stored in."""
    operands, weights = make_operands(op, case, seed), _encoded(op, case, seed)
    arrays = {name: _stored_values(o, weights.get(name)) for name, o in operands.items()}
    outputs, after = NAIVE[op.name](**arrays, **case.attrs)
    return outputs, {n: arrays[n] for n, o in operands.items() if o.kind is Kind.STATE} | after


def _stored_values(operand: Operand, raw: Array | None) -> Array:
    if operand.dtype is I32:
        return operand.values
    if raw is not None:
        rows = raw.reshape(*operand.values.shape[:-1], -1)
        return decode(operand.dtype.name, rows).astype(np.float64)
    return operand.values.astype(np.float64)


def check_case(
    backend: Any,
    op: Op,
    case: Case,
    seed: int,
    strided: bool = False,
    limit: float = OpCase.limit,
    chunks: Chunks = (),
) -> None:
    """Fail unless a backend agrees with the naive definition, and leaves alone what it must.

    What the naive definition doesn't write must keep its bits.
    """
    where = f"{op.name} [{case.name}] on {backend.name}, strided={strided}, seed {seed}"
    outputs, before, after = run_case(backend, op, case, seed, strided, chunks)
    want_outputs, want_after = expected(op, case, seed)
    assert len(outputs) == len(want_outputs), where
    for i, (got, want) in enumerate(zip(outputs, want_outputs, strict=True)):
        assert_close(got, want, limit, f"{where}: output {i}")
    for name, operand in make_operands(op, case, seed).items():
        if operand.kind is Kind.STATE:
            loaded = operand.values
            assert _bits(before[name]) == _bits(loaded), f"{where}: {name} before the run"
            state_limit = max(limit, F16_LIMIT) if operand.dtype.name == "F16" else limit
            message = f"{where}: state {name}"
            _check_state(after[name], loaded, want_after[name], state_limit, message)


def _check_state(got: Array, before: Array, want: Array, limit: float, where: str) -> None:
    # In float64 what is written differs from what was there; rounded, it may be the same.
    old = before.astype(np.float64)
    kept = (old == want) | (np.isnan(old) & np.isnan(want))
    assert _bits(got[kept]) == _bits(before[kept]), f"{where}: changed where nothing is written"
    assert_close(got[~kept], want[~kept].astype(got.dtype), limit, where)


def _bits(values: Array) -> bytes:
    return np.ascontiguousarray(values).tobytes()


def every_case() -> list[OpCase]:
    """All cases of all ops, and some that no op lists."""
    listed = [OpCase(op, case) for op in OPS.values() for case in CASES[op.name]()]
    far = []
    # 1 / 3 is no float32.
    yarn = RopeScaling(1, 1 / 3, 1, 3, 1.1)
    for kind, s in (("", RopeScaling()), (" linear", RopeScaling(1 / 3, 1 / 3)), (" yarn", yarn)):
        attrs = {"eps": 1e-6, "n_rot": 16, "rope_base": 1e7, "rope_scaling": s}
        case = Case(f"positions up to 262143{kind}", _far_positions, attrs)
        far.append(OpCase(OPS["QK_NORM_ROPE"], case))
    mixed = []
    for algorithm, limit in (("scan", OpCase.limit), ("chunk", MIXED_GATES_LIMIT)):
        for kda in (False, True):
            attrs = {"head_map": "grouped", "scale": 0.2, "algorithm": algorithm}
            case = Case(f"mixed gates {algorithm} kda={kda}", partial(_mixed_gates, kda=kda), attrs)
            mixed.append(OpCase(OPS["GATED_DELTA_NET"], case, limit))
    return [*listed, *far, *mixed]


def largest_case(op: Op) -> Case:
    """The case with the most operands, and among those the most elements: sizes that differ."""

    def size(case: Case) -> tuple[int, int]:
        operands = case.make(np.random.default_rng(0)).values()
        return len(operands), sum(o.values.size for o in operands)

    return max(CASES[op.name](), key=size)


def _far_positions(rng: np.random.Generator) -> dict[str, Operand]:
    """The last rows of long contexts, where angles in float32 have lost their digits."""
    case = next(iter(CASES["QK_NORM_ROPE"]()))
    operands, n_blocks = case.make(rng), 4
    positions = np.array([131071, 131072, 262143])
    table = np.full((1, 262144 // 16), -1)
    table[0, positions // 16] = rng.permutation(n_blocks)[: len(positions)]
    for name in ("q", "k", "v"):
        rows = rng.normal(size=(len(positions), *operands[name].values.shape[1:]))
        operands[name] = replace(operands[name], values=rows)
    for name in ("k_cache", "v_cache"):
        cache = rng.normal(size=(n_blocks, *operands[name].values.shape[1:]))
        operands[name] = replace(operands[name], values=cache)
    return operands | {
        "positions": integers(positions, "n_tokens"),
        "seq_starts": integers([0, len(positions)], "n_seqs + 1"),
        "block_tables": integers(table, "n_seqs"),
    }


def _mixed_gates(rng: np.random.Generator, kda: bool) -> dict[str, Operand]:
    """Strong decays among weak ones, where differences of cumulated decays lose digits."""
    operands = random_operands(rng, [1, 17, 200], (2, 4), (32, 16), -1.0, kda, n_snapshots=1)
    g = operands["g"]
    strengths = rng.choice([0.0, 0.001, 0.1, 1.0, 20.0, 100.0], g.values.shape)
    return operands | {"g": replace(g, values=g.values * strengths)}
