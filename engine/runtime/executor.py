"""A placed graph that runs: its inputs are written, its programs run in order, and tensors that
cross from one backend to another are copied. (The CPU's executor.cpp runs one program.)

`HostRunner` runs a step at once. `DeviceRunner` launches it and samples on the device, so that the
next step can be launched before this one's tokens are known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import (
    Array,
    DeviceSampler,
    Instruction,
    Split,
    StateStore,
    StepHandle,
    Timing,
    Watch,
    WeightSource,
)
from engine.graph import Kind, Live, Tensor
from engine.placement.place import Plan
from engine.runtime.batch import Batch, Chunk
from engine.runtime.finite import FiniteCheck, failure
from engine.runtime.step import Outcome, Outcomes, Row, Step
from engine.sampling.spec import SampleSpec

_POLL_S, _ALONE_S = 20e-6, 1e-3


class Executable:
    """A plan with its programs compiled, weights loaded and states allocated."""

    def __init__(
        self, plan: Plan, source: WeightSource, extra: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """extra: slots and blocks, by dim, beyond those of the plan."""
        self.plan = plan
        for backend in plan.backends:
            backend.allocate_states(plan.tensors_of(backend, Kind.STATE), extra)
            backend.declare_inputs(plan.tensors_of(backend, Kind.INPUT))
            backend.load_weights(plan.nodes_of(backend), source)
            # Last, as copies get a part of the memory that nothing else needs.
            backend.copy_weights(plan.splits_of(backend), plan.buffer_bytes(backend) or 0)
        self._programs = [(split, split.backend.compile(split)) for split in plan.splits]
        self._inputs = [(b, plan.tensors_of(b, Kind.INPUT)) for b in plan.backends]
        made = {t: s for s in plan.splits for node in s.nodes for t in node.outputs}
        self._sources = {t: made[t].backend for s in plan.splits for t in s.copies}
        self._kept = [(made[t.base].backend, t) for t in plan.graph.kept]
        assert all(t.view_of is None for t in plan.graph.outputs.values())
        self._outputs = {k: (made[t.base].backend, t) for k, t in plan.graph.outputs.items()}

    def run(
        self, inputs: Mapping[str, Array], live: Live, watch: Watch | None = None
    ) -> dict[str, Array]:
        """One step: `inputs` by name, at their live sizes. Returns the graph's outputs by name."""
        self._write_inputs(inputs)
        for split, program in self._programs:
            self._copy(split)
            program.run(live, watch)
        return self._read_outputs()

    def run_timed(self, inputs: Mapping[str, Array], live: Live) -> list[Timing]:
        """A step as `run` makes it, timed: every instruction, and what moves data between them."""
        timings = [_timing("", "write inputs", partial(self._write_inputs, inputs))]
        for split, program in self._programs:
            name = split.backend.name
            if split.copies:
                timings.append(_timing(name, "copy", partial(self._copy, split)))
            timed = zip(program.instructions, program.run_timed(live), strict=True)
            timings += [Timing(name, instruction, seconds) for instruction, seconds in timed]
        timings.append(_timing("", "read outputs", self._read_outputs))
        return timings

    def _write_inputs(self, inputs: Mapping[str, Array]) -> None:
        for backend, tensors in self._inputs:
            for t in tensors:
                backend.write(t, inputs[t.name])

    def _copy(self, split: Split) -> None:
        for t in split.copies:
            split.backend.write(t, self._sources[t].read(t))

    def _read_outputs(self) -> dict[str, Array]:
        return {name: backend.read(t) for name, (backend, t) in self._outputs.items()}

    def kept(self) -> list[Array]:
        """The live rows that the last step left in the tensors that the graph keeps."""
        return [backend.read(t) for backend, t in self._kept]

    def enter_thread(self) -> None:
        """Let this thread run the steps from now on, in place of another one."""
        for backend in self.plan.backends:
            backend.enter_thread()

    def after_fork(self) -> None:
        """In a forked process: leave the threads and devices to the parent."""
        for backend in self.plan.backends:
            backend.after_fork()

    def device_sampler(self) -> DeviceSampler | None:
        """A sampler on the device, if the whole graph is one split of a backend that has one."""
        if len(self._programs) != 1:
            return None
        ((split, program),), ((_, inputs),) = self._programs, self._inputs
        _, logits = self._outputs["logits"]
        return split.backend.device_sampler(program, inputs, logits)

    @property
    def states(self) -> list[tuple[StateStore, Tensor]]:
        """Every state of the plan, with the store that has it."""
        plan = self.plan
        return [(b.states, t) for b in plan.backends for t in plan.tensors_of(b, Kind.STATE)]

    @property
    def stores(self) -> list[StateStore]:
        return [backend.states for backend in self.plan.backends]


class Runner(Protocol):
    """Runs steps. `overlaps`: whether a step may be launched before the last one's outcomes."""

    overlaps: bool

    def launch(self, batch: Batch, step: Step, before: Step | None) -> Outcomes:
        """Start a step; `before`: the one in flight, whose tokens it continues with."""


class HostRunner:
    """Runs a step at once, on any backends; `check`: check every node's outputs."""

    overlaps = False

    def __init__(self, executable: Executable, check: bool) -> None:
        self._executable, self._check = executable, check

    def run(self, batch: Batch, chunks: Sequence[Chunk]) -> tuple[NDArray[np.float32], FiniteCheck]:
        """The logits [n_outputs, n_vocab] of a batch, and which chunks' values are not finite."""
        finite = FiniteCheck(batch, [chunk.seq for chunk in chunks])
        watch = finite.watch if self._check else None
        logits = self._executable.run(batch.inputs, batch.live, watch)["logits"]
        finite.check("the logits", logits, True)
        return np.asarray(logits, np.float32), finite

    def launch(self, batch: Batch, step: Step, before: Step | None) -> Outcomes:
        logits, finite = self.run(batch, [row.chunk for row in step.rows])
        failures, values = finite.failures, iter(logits)
        outcomes = []
        for i, row in enumerate(step.rows):
            own = next(values) if row.chunk.n_outputs else None
            outcomes.append(Outcome(logits=own, failure=failures.get(i, "")))
        return lambda: outcomes


class DeviceRunner:
    """Launches steps that sample on the device where it can; the host samples the other rows."""

    overlaps = True

    def __init__(self, device: DeviceSampler) -> None:
        self._device = device

    def launch(self, batch: Batch, step: Step, before: Step | None) -> Outcomes:
        at = {row.request: i for i, row in enumerate(before.sampled)} if before else {}
        specs = [row.spec() for row in step.sampled]
        feed = [at.get(row.request, -1) if row.n_ahead else -1 for row in step.sampled]
        handle = self._device.launch(batch.inputs, batch.live, specs, feed)
        if any(spec is not None and spec.is_masked for spec in specs):
            step.sample = partial(_sample, handle, step.sampled, specs)
        positions = batch.inputs["positions"][batch.inputs["output_rows"]].tolist()

        def outcomes() -> list[Outcome]:
            ids, logits = handle.wait()
            values = iter(logits)
            given = [
                Outcome(logits=next(values)) if spec is None else Outcome(token)
                for spec, token in zip(specs, ids, strict=True)
            ]
            seqs = [row.chunk.seq for row in step.sampled]
            checked = map(_checked, given, seqs, positions)
            return [next(checked) if row.chunk.n_outputs else Outcome() for row in step.rows]

        return outcomes


def _sample(handle: StepHandle, rows: Sequence[Row], specs: list[SampleSpec | None]) -> None:
    """Sample with the masks that are ready when the logits are. The host samples the other rows
    whose specs are masked; these specs become None.

    A row that is alone delays nobody: a little more time costs it less than that.
    """
    until = time.perf_counter() + (_ALONE_S if len(rows) == 1 else 0)
    masks: list[Array | None] = [None] * len(rows)
    for i, (row, spec) in enumerate(zip(rows, specs, strict=True)):
        if spec is None or not spec.is_masked:
            continue
        request = row.request
        assert request is not None
        while not request.is_ready and (not handle.has_logits() or time.perf_counter() < until):
            request.wait_until_ready(_POLL_S)
        masks[i] = request.sampler.mask()
        if masks[i] is None:
            specs[i], request.is_for_host = None, True
    handle.sample(masks)


def _checked(given: Outcome, seq: int, position: int) -> Outcome:
    """The outcome, or that its logits were not finite."""
    is_bad = given.token == -1 if given.logits is None else not np.isfinite(given.logits).all()
    return Outcome(failure=failure("the logits", seq, position)) if is_bad else given


def _timing(backend: str, what: str, action: Callable[[], object]) -> Timing:
    start = time.perf_counter()
    action()
    return Timing(backend, Instruction(what, ()), time.perf_counter() - start)
