"""The contract of a backend: what it answers, takes and compiles, and what it runs.

Placement asks `supports`, a split of the graph becomes a `Program`, and the executor runs programs
in order. Backends see nodes, never architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engine.graph import Live, Node, Tensor
from engine.sampling.spec import SampleSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class Support:
    """Answer to "can you run this node?"; `reason` says why not."""

    ok: bool
    reason: str = ""


# Looks at a node's outputs (live rows, in the order of `node.outputs`) right after it ran.
Watch = Callable[[Node, Sequence[Array]], None]


@dataclass(frozen=True)
class Instruction:
    """What a program runs at a time: a kernel, and the nodes that it covers or has a part in."""

    kernel: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds that one instruction took in a step; `backend` is the name of the one that ran it."""

    backend: str
    instruction: Instruction
    seconds: float


class Program(Protocol):
    """A compiled split."""

    @property
    def instructions(self) -> Sequence[Instruction]:
        """What it runs, in order."""

    def run(self, live: Live, watch: Watch | None = None) -> None:
        """Run its nodes on the live rows of what was written to their inputs."""

    def run_timed(self, live: Live) -> Sequence[float]:
        """As `run`; returns the seconds of each instruction."""


class StateStore(Protocol):
    """One backend's part of the sequences' memory; `dim` is "n_slots" or "n_blocks"."""

    def zero(self, dim: str, index: int) -> None:
        """Assign zeros to a slot or block of every layer."""

    def copy(self, dim: str, source: int, target: int) -> None:
        """Copy a slot or block of every layer."""

    def save(self, dim: str, index: int) -> dict[str, Array]:
        """A slot's or block's contents by state tensor name."""

    def load(self, dim: str, index: int, contents: Mapping[str, Array]) -> None:
        """The reverse of `save`."""


class WeightSource(Protocol):
    """Where weights come from: a GGUFFile, or whatever a test makes up."""

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A weight's stored bytes, uint8."""

    def release(self, name: str, begin: int = 0, end: int | None = None) -> None:
        """These of its bytes (all: None) are not needed any more, or only seldom: their memory may
        be given back."""


class Backend(Protocol):
    """Something that can run nodes and holds the weights and states that they use."""

    name: str
    # What it runs with, in a few words.
    detail: str

    @property
    def states(self) -> StateStore:
        """Its part of the sequences' memory."""

    def supports(self, node: Node) -> Support:
        """Whether it can run a node, and if not, why."""

    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        """Bytes that the weights of some nodes will take in memory."""

    def free_bytes(self) -> int | None:
        """What is left of a memory of its own; None if it uses the machine's."""

    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
        """Load the weights of its nodes, before programs are compiled."""

    def allocate_states(self, states: Sequence[Tensor]) -> None:
        """Make room for the states of its nodes; contents are arbitrary until written."""

    def declare_inputs(self, inputs: Sequence[Tensor]) -> None:
        """The INPUTs of all its nodes, before programs are compiled."""

    def compile(self, split: Split) -> Program:
        """Turn a split into something that runs without Python between nodes where it can."""

    def write(self, tensor: Tensor, values: Array) -> None:
        """Set the live rows of an INPUT, or of an ACTIVATION computed elsewhere."""

    def read(self, tensor: Tensor) -> Array:
        """The live rows of a tensor that one of its programs computed."""

    def release(self) -> None:
        """Give back the memory of weights and states; nothing can be run after it."""


@dataclass
class Split:
    """Consecutive nodes on one backend; `copies` come from elsewhere, `keeps` are read later."""

    backend: Backend
    nodes: list[Node] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    keeps: list[Tensor] = field(default_factory=list)


class StepHandle(Protocol):
    """A step on its way."""

    def ids(self) -> list[int]:
        """Waits for this step only; each row's token, -1 where a logit was not finite."""


class DeviceSampler(Protocol):
    """Runs steps of one row for each sequence, in order with all else that its backend does."""

    def launch(
        self,
        inputs: Mapping[str, NDArray[np.int32]],
        live: Live,
        draws: Sequence[SampleSpec],
        feed: Sequence[int],
    ) -> StepHandle:
        """Start a step, and return without waiting for it.

        feed: for each row the row of the step launched before whose token it continues with, or -1
        for the one in `inputs`. At most the last two tickets may be asked for ids.
        """


@runtime_checkable
class SamplingBackend(Protocol):
    """What a backend is that has decoders."""

    def decoder(
        self, program: Any, inputs: Sequence[Tensor], logits: Tensor
    ) -> DeviceSampler | None:
        """A decoder of a program of its own which is the whole graph; None if it can't."""
