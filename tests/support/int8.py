"""Products with quantized weights, whose activations are rounded to int8, and their limits."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.graph import Kind
from tests.support.opcase import OpCase, assert_close, check_case, expected, run_case

# exp and divisions of float32 vectors, sums in another order than numpy's.
FLOAT32_LIMIT = 1e-10
# One step of an int8 activation is 1/127 of its group's largest value; uniform rounding errors have
# a variance of step² / 12. For normal values the largest of 32 is about 2.1 standard deviations, at
# most 4: the error's share of the energy is (4 / 127)² / 12 at the worst.
INT8_LIMIT = (4 / 127) ** 2 / 12


# A few outputs may by chance be smaller than their terms; the energies of this many runs are not.
POOLED_RUNS = 16


def has_int8_activations(c: OpCase) -> bool:
    operands = c.case.make(np.random.default_rng(0)).values()
    quantized = any(o.kind is Kind.WEIGHT and o.dtype.block_elems > 1 for o in operands)
    return quantized and c.op.name in ("MUL_MAT", "MUL_MAT_ID")


def check_pooled(backend: Any, c: OpCase, strided: bool, seed: int) -> None:
    """Outputs of several runs, other weights in each, together within INT8_LIMIT."""
    seeds = range(seed, seed + POOLED_RUNS)
    got = [run_case(backend, c.op, c.case, s, strided)[0] for s in seeds]
    want = [expected(c.op, c.case, s)[0] for s in seeds]
    for i in range(len(want[0])):
        ours, right = (np.concatenate([outputs[i] for outputs in runs]) for runs in (got, want))
        assert_close(ours, right, INT8_LIMIT, f"{c}, strided={strided}, output {i}, seed {seed}")


def check_op(backend: Any, c: OpCase, strided: bool, seed: int) -> None:
    """Fail unless the kernels agree with the naive definition as well as their arithmetic can."""
    if has_int8_activations(c):
        check_pooled(backend, c, strided, seed)
    else:
        check_case(backend, c.op, c.case, seed, strided, max(c.limit, FLOAT32_LIMIT))
