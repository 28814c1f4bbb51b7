"""Several devices of one process, as every engine on a GPU has its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.backends import missing
from engine.backends.cuda.cupy_device import CupyDevice
from engine.backends.cuda.device import Device, Gemm, Memory
from tests.backends.cpu.test_weights import to_bfloat16

_MISSING = missing("cuda")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]
Array = np.ndarray[Any, Any]


class Products:
    """A matrix product of random bfloat16 values on a device of its own."""

    M, N, K = 33, 40, 64

    def __init__(self, rng: np.random.Generator) -> None:
        self.device: Device = CupyDevice()
        a, b = (to_bfloat16(rng.normal(size=(n, self.K))) for n in (self.M, self.N))
        self.want = a @ b.T
        halves = [(x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for x in (a, b)]
        self._inputs = [self._upload(x) for x in halves]
        self._out = self.device.allocate(self.M * self.N * 4)

    def _upload(self, values: Array) -> Memory:
        memory = self.device.allocate(values.nbytes)
        self.device.upload(memory.address, values)
        return memory

    def launch(self) -> None:
        """The product."""
        a, b = (memory.address for memory in self._inputs)
        self.device.gemm(Gemm(self._out.address, a, b, self.M, self.N, self.K))

    def poison(self) -> None:
        """Make the output what no product is."""
        self.device.fill(self._out.address, self._out.nbytes, 0xFF)

    def output(self) -> Array:
        """The output, once all work is done."""
        values = np.empty((self.M, self.N), np.float32)
        self.device.download(self._out.address, values)
        return values


def test_each_has_products_on_its_own_stream(rng: np.random.Generator) -> None:
    """A product that went to another stream would run before the output is poisoned."""
    first, second = Products(rng), Products(rng)
    for products in (first, second):
        products.launch()
    captured = first.device.capture(first.launch)
    for products in (first, second):
        products.poison()
        products.device.synchronize()
    captured()
    second.launch()
    for products in (first, second):
        np.testing.assert_allclose(products.output(), products.want, rtol=1e-4, atol=1e-4)
