"""GET_ROWS: table [N, E], ids [R] i32 -> its rows [R, E]; the embedding, rows that need logits."""

from engine.formats.quants import F32
from engine.graph import Attrs, Cost, Inputs, Live, Node, Op, Out, match_shapes
from engine.ops.base import Array, live_bytes, require_contiguous_rows


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


GET_ROWS = Op("GET_ROWS", ("table", "ids"), _infer, _reference, _cost)
