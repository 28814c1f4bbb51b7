"""A placed graph that runs: its inputs are written, its programs run in order, and tensors that
cross from one backend to another are copied. (The CPU's executor.cpp runs one program.)"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from engine.backends.base import (
    Array,
    DeviceSampler,
    Instruction,
    Split,
    StateStore,
    Timing,
    Watch,
    WeightSource,
)
from engine.graph import Kind, Live
from engine.placement.place import Plan


class Executable:
    """A plan with its programs compiled, weights loaded and states allocated."""

    def __init__(self, plan: Plan, source: WeightSource) -> None:
        self.plan = plan
        for backend in plan.backends:
            backend.allocate_states(plan.tensors_of(backend, Kind.STATE))
            backend.declare_inputs(plan.tensors_of(backend, Kind.INPUT))
            # Last: a backend may keep copies of weights in part of the memory that is left.
            backend.load_weights(plan.nodes_of(backend), source)
        self._programs = [(split, split.backend.compile(split)) for split in plan.splits]
        self._inputs = [(b, plan.tensors_of(b, Kind.INPUT)) for b in plan.backends]
        made = {t: s for s in plan.splits for node in s.nodes for t in node.outputs}
        self._sources = {t: made[t].backend for s in plan.splits for t in s.copies}
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

    def device_sampler(self) -> DeviceSampler | None:
        """A sampler on the device, if the whole graph is one split of a backend that has one."""
        if len(self._programs) != 1:
            return None
        ((split, program),), ((_, inputs),) = self._programs, self._inputs
        _, logits = self._outputs["logits"]
        return split.backend.device_sampler(program, inputs, logits)

    @property
    def stores(self) -> list[StateStore]:
        return [backend.states for backend in self.plan.backends]


def _timing(backend: str, what: str, action: Callable[[], object]) -> Timing:
    start = time.perf_counter()
    action()
    return Timing(backend, Instruction(what, ()), time.perf_counter() - start)
