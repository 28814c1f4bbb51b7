"""GET_ROWS: rows of a table by index; the token embedding, and the rows that need logits."""

from __future__ import annotations

from collections.abc import Iterable

from engine.formats.quants import BF16, F32, WEIGHT_TYPES, DType
from engine.graph import Attrs, Cost, Graph, Inputs, Live, Node, Op, Out, Tensor, match_shapes
from engine.ops.base import Array, live_bytes, require_contiguous_rows
from engine.ops.cases import Case, Operand, Rng, activation, case, integers, weight


def _infer(inputs: Inputs, attrs: Attrs) -> list[Out]:
    dims = match_shapes(inputs, table="N E", ids="R")
    require_contiguous_rows(inputs, "table")
    return [((dims.R, dims.E), F32)]


def _reference(table: Array, ids: Array) -> tuple[Array]:
    return (table[ids],)


def _cost(node: Node, live: Live) -> Cost:
    table, out = node.inputs["table"], node.outputs[0]
    n_rows = live.shape(out.shape)[0]
    read = n_rows * table.dtype.row_bytes(table.shape[-1])
    return Cost(0, read + live_bytes(node.inputs["ids"], live) + live_bytes(out, live))


def _cases() -> Iterable[Case]:
    def embed(rng: Rng, dtype: DType) -> dict[str, Operand]:
        table = weight(rng.normal(size=(11, 64)), dtype)
        return {"table": table, "ids": integers(rng.integers(0, 11, 5), "n_tokens")}

    def pick(rng: Rng) -> dict[str, Operand]:
        table = activation(rng.normal(size=(9, 8)))
        return {"table": table, "ids": integers([8, 0, 8], "n_outputs")}

    for dtype in (F32, BF16, WEIGHT_TYPES["Q8_0"]):
        yield case(embed, {}, dtype=dtype)
    yield case(pick, {})


GET_ROWS = Op("GET_ROWS", _infer, _reference, _cost, _cases)


def get_rows(graph: Graph, name: str, table: Tensor, ids: Tensor) -> Tensor:
    """table [N, E] (weight or activation), ids [R] i32 -> [R, E] f32."""
    return graph.add(GET_ROWS, name, {"table": table, "ids": ids})[0]
