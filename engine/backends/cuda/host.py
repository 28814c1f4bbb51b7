"""The part of a CudaBackend that its programs and samplers use, and their launches' arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from numpy.typing import NDArray

from engine.backends.cuda.device import Device
from engine.backends.cuda.kernels import KERNELS
from engine.backends.cuda.launches import Launch
from engine.backends.cuda.states import DeviceStates
from engine.backends.cuda.weights import CudaWeights
from engine.backends.native.program import write_operand
from engine.graph import Live, Tensor


class Host(Protocol):
    """`sample_specs`: the INPUT that `sampling.specs_input` describes."""

    device: Device
    weights: CudaWeights
    states: DeviceStates
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


def prepare(host: Host, step: Launch, args: Any, addresses: Iterable[int]) -> int:
    """Fill in the record `args` of ARGS for a launch; returns its function.

    addresses: of the operands' bases, but of packed weights.
    """
    for view, ref, address in zip(args["v"], step.operands, addresses, strict=False):
        write_operand(view, ref, step.nodes, address, host.weights)
    args["attr"][: len(step.attrs)] = step.attrs
    args["live"] = host.live_address
    _, shared = step.block
    return host.device.function(KERNELS[step.kernel].source, step.kernel, shared)
