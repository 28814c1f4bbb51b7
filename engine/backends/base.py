"""The contract of a backend.

Placement asks `supports` about every node. Runs of nodes on one backend are splits; the backend
compiles each into a `Program`, and the executor runs the programs in order. A backend sees nodes,
never architectures. Nothing outside engine/backends/ decides by a backend's name: `Traits` say
what options depend on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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

    def allocate(self, states: Sequence[Tensor], extra: Mapping[str, int]) -> None:
        """See Backend.allocate_states."""

    def zero(self, dim: str, index: int) -> None:
        """Assign zeros to a slot or block of every layer."""

    def copy(self, dim: str, source: int, target: int) -> None:
        """Copy a slot or block of every layer."""

    def read(self, tensor: Tensor, indices: Sequence[int], buffer: Array) -> Array:
        """Copies of slots or blocks of one state: [len(indices), ...], in a buffer of uint8."""

    def write(self, tensor: Tensor, indices: Sequence[int], values: Array) -> None:
        """Set slots or blocks of one state."""

    def give_back(self, dim: str, indices: Sequence[int]) -> None:
        """Return the memory of slots or blocks, in rising order, to the system if it takes it;
        their contents are arbitrary until written again."""


class WeightSource(Protocol):
    """Where weights come from: a GGUFFile, or whatever a test makes up."""

    def raw(self, name: str, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
        """Bytes `begin` to `end` (None: to the last) of a weight as stored, uint8: whole rows.
        Threads may call it at the same time."""

    def factors(self, name: str) -> NDArray[np.float32]:
        """The factors of its values: float32 [1], or [X] for a weight of X matrices."""


@dataclass(frozen=True)
class Traits:
    """What options depend on.

    n_ubatch: tokens of a step that suit the backend. cache_type: the type of cached keys and values
    where the user names none. own_memory: weights lie in memory of its own, which may have room for
    some layers only. overlaps_steps: it can sample on the device, so that a decode step is launched
    before the tokens of the step before are known; that takes a second state slot per sequence.
    activations: the bits among which a user may choose for BackendOptions.activations.
    """

    n_ubatch: int = 512
    cache_type: str = "f16"
    own_memory: bool = False
    overlaps_steps: bool = False
    activations: tuple[int, ...] = ()


@dataclass(frozen=True)
class Copies:
    """Copies of weights that a backend keeps so that products are faster: their bytes, how many
    weights have one, and of how many a copy pays."""

    n_bytes: int = 0
    n_weights: int = 0
    n_possible: int = 0


@dataclass(frozen=True)
class Limits:
    """Peaks of a machine: bytes moved per second, and operations per second of each arithmetic unit
    that its kernels use, by the unit's name. `unit_of`: the fastest unit of an op's kernels, by the
    op's name; all others use the first unit. `what` names the kernels that measured bytes.
    `cache_bytes`: what the largest cache holds; None if that is not known."""

    bytes_per_s: float
    ops_per_s: Mapping[str, float]
    what: str
    unit_of: Mapping[str, str] = field(default_factory=dict)
    cache_bytes: int | None = None

    def least_s(self, work: Mapping[str, int]) -> float:
        """The seconds that operations, by name of their op, take at the peaks of their units."""
        first = next(iter(self.ops_per_s))
        units = {op: self.unit_of.get(op, first) for op in work}
        return sum(n / self.ops_per_s[units[op]] for op, n in work.items())


@dataclass(frozen=True)
class BackendOptions:
    """n_threads: of the CPU (None: all cores). cpu_isa: its instruction set (None: the best).
    batch_invariant: a sequence's results must not depend on what else is in the batch. activations:
    bits of the integers that rows outside row tiles become, where a weight is quantized (None: the
    backend's own). gpu_memory: MiB that the process may take of a GPU's memory (None: all)."""

    n_threads: int | None = None
    cpu_isa: str | None = None
    batch_invariant: bool = False
    activations: int | None = None
    gpu_memory: int | None = None


class Backend(ABC):
    """Runs nodes, and holds the weights and states that they use. `detail`: the hardware and
    kernels in a few words. `states`: its part of sequence memory."""

    name: str
    detail: str
    traits = Traits()
    states: StateStore

    @abstractmethod
    def supports(self, node: Node) -> Support:
        """Whether it can run a node, and if not, why."""

    @abstractmethod
    def weight_bytes(self, nodes: Sequence[Node]) -> int:
        """Bytes that the weights of some nodes will take in memory."""

    def buffer_bytes(self, splits: Sequence[Split]) -> int | None:
        """Bytes that the programs of its splits will take beside weights and states, inputs
        included; None if that is not known before they are compiled."""
        return None

    def free_bytes(self) -> int | None:
        """Bytes left of its own memory; None if it uses the machine's."""
        return None

    def total_bytes(self) -> int | None:
        """Bytes of its own memory in all, or as many of them as it may take; None if it uses the
        machine's."""
        return None

    def copies(self, splits: Sequence[Split], n_left: int | None = None) -> Copies:
        """The copies of weights that it keeps, or that it would make if the programs of its splits
        left so many bytes."""
        return Copies()

    @abstractmethod
    def load_weights(self, nodes: Sequence[Node], source: WeightSource) -> None:
        """Load the weights that its nodes read, in the form in which their kernels read them."""

    def copy_weights(self, splits: Sequence[Split], n_buffers: int) -> None:  # noqa: B027
        """Copy loaded weights where that makes products faster, in a part of the memory that is
        left beside the `n_buffers` bytes of its splits' programs."""

    def allocate_states(self, states: Sequence[Tensor], extra: Mapping[str, int]) -> None:
        """Allocate the states of its nodes, with so many slots and blocks, by dim, beyond those of
        their shapes; contents are arbitrary until written."""
        self.states.allocate(states, extra)

    def declare_inputs(self, inputs: Sequence[Tensor]) -> None:  # noqa: B027
        """The INPUTs of all its nodes, before programs are compiled."""

    @abstractmethod
    def compile(self, split: Split) -> Program:
        """Compile a split into a program that runs without Python between nodes where it can."""

    def device_sampler(
        self, program: Any, inputs: Sequence[Tensor], logits: Tensor
    ) -> DeviceSampler | None:
        """A sampler behind one of its programs, which is the whole graph; None if it has none."""
        return None

    @abstractmethod
    def write(self, tensor: Tensor, values: Array) -> None:
        """Set the live rows of an INPUT, or of an ACTIVATION computed elsewhere."""

    @abstractmethod
    def read(self, tensor: Tensor) -> Array:
        """The live rows of a tensor that one of its programs computed."""

    @abstractmethod
    def measure_limits(self) -> Limits:
        """Measure the peaks of what it runs on; about half a second."""

    def enter_thread(self) -> None:  # noqa: B027
        """Make this thread the one that calls the backend, in place of another one."""

    def after_fork(self) -> None:  # noqa: B027
        """In a forked process: threads and devices are the parent's; let them be."""

    @abstractmethod
    def release(self) -> None:
        """Free weights and states; nothing can be run after it."""


@dataclass(frozen=True)
class Registration:
    """A backend that can be asked for by name. make: creates it, or raises an EngineError that says
    what is missing. missing: why `auto` passes it by, or "". describe: what it would run with, for
    --version. hardware: what it runs on, if that is here, or ""; whether or not it can be used."""

    name: str
    traits: Traits
    make: Callable[[BackendOptions], Backend]
    missing: Callable[[], str]
    describe: Callable[[], str]
    hardware: Callable[[], str] = lambda: ""


@dataclass
class Split:
    """Consecutive nodes on one backend; `copies` come from elsewhere, `keeps` are read later."""

    backend: Backend
    nodes: list[Node] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    keeps: list[Tensor] = field(default_factory=list)


class StepHandle(Protocol):
    """A step that was launched."""

    def has_logits(self) -> bool:
        """Say whether the device has computed the logits of this step."""

    def sample(self, masks: Sequence[NDArray[np.uint32] | None]) -> None:
        """Sample, behind the logits: once before `wait`, if a spec is masked. masks: for each
        output whose spec is, a bit for each token, from the lowest of each word on: whether it may
        come. None for one that is masked: the host samples it."""

    def wait(self) -> tuple[list[int], NDArray[np.float32]]:
        """Wait for this step only. Returns each output's token, -1 where a logit was not finite,
        and the logits [n, n_vocab] of the outputs without a spec, or without a mask."""


class DeviceSampler(Protocol):
    """Runs steps, of one row or several of each sequence, that sample on the device. Its steps are
    in order with all other work of its backend."""

    def launch(
        self,
        inputs: Mapping[str, NDArray[np.int32]],
        live: Live,
        specs: Sequence[SampleSpec | None],
        feed: Sequence[int],
    ) -> StepHandle:
        """Start a step and return without waiting for it. specs: how each output is sampled; None:
        by the host. feed: for each output, that of the previously launched step whose token its
        row continues with, or -1 for the token in `inputs`; rows that are fed come first, one for
        each of their sequences. Only the last two handles may be waited for."""
