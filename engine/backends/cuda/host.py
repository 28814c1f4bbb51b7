"""The part of a CudaBackend that its programs and samplers use."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from engine.backends.cuda.device import Device
from engine.backends.cuda.weights import CudaWeights
from engine.graph import Live, Tensor


class Host(Protocol):
    """`sample_specs`: the INPUT that `sampling.specs_input` describes."""

    device: Device
    weights: CudaWeights
    batch_invariant: bool
    sample_specs: Tensor

    @property
    def live_address(self) -> int:
        """The address of the live counts."""

    def fixed(self, tensor: Tensor) -> int:
        """The address of an input, a state, or an activation that outlives programs."""

    def write(self, tensor: Tensor, values: NDArray[Any]) -> None:
        """Set the live rows of an input."""

    def begin(self, live: Live) -> None:
        """Bring inputs and live counts to the device."""
