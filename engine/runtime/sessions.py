"""Sessions: a completion as a file, so that it goes on in another engine as if it had not ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from engine import checks
from engine.errors import EngineError
from engine.kvcache.entries import Entry
from engine.kvcache.prefix import ID_BYTES, Node, packed
from engine.kvcache.store import StoreError, write
from engine.runtime.completion import Completion
from engine.runtime.files import StateFiles, count
from engine.runtime.loop import StepLoop
from engine.runtime.request import FinishReason, Request
from engine.runtime.scheduler import Scheduler
from engine.sampling.grammar import Grammar
from engine.sampling.params import SamplingParams


@dataclass(frozen=True)
class Session:
    """What a file has of a completion. tokens: of its prompt, `n_prompt`, and what it generated;
    `n_kept` of them are in its state. params: its sampling, `sampler`: what its samplers kept.
    data: what was given to `save`."""

    tokens: list[int]
    n_prompt: int
    n_kept: int
    params: SamplingParams
    sampler: Mapping[str, Any]
    data: Any = None


def save(files: StateFiles, loop: StepLoop, completion: Completion, path: Any, data: Any) -> int:
    """Write a completion's session, between two steps if it runs; returns the file's bytes. Raises
    StoreError."""
    checks.instance(StoreError, "completion", completion, Completion)
    place, request = _place(path), completion.request
    if completion.loop is not loop:
        raise StoreError("expected a completion of this engine, got another one's")
    try:
        json.dumps(data)
    except (TypeError, ValueError, RecursionError):
        checks.refuse(StoreError, "data", "what JSON has", data)
    held, said = files.call(
        lambda: (files.hold(*_kept(files, loop.scheduler, request)), _completion(request))
    )
    info, parts = files.contents(held)
    return write(place, info | {"completion": said, "data": data}, parts)


def restore(files: StateFiles, path: Any) -> Session:
    """Read a session into the prefix cache. Raises StoreError."""
    reader, said = files.opened(_place(path))
    try:
        its = said.info["completion"]
        bias = dict(its["params"].pop("logit_bias", ()))
        grammar = its["params"].pop("grammar", None)
        grammar = None if grammar is None else Grammar(*grammar)
        params = SamplingParams(**its["params"], logit_bias=bias, grammar=grammar)
        n_prompt, sampler, data = count(its["n_prompt"]), dict(its["sampler"]), said.info["data"]
        if n_prompt > reader.shapes["tokens"][1][0]:
            raise ValueError
    except (LookupError, TypeError, ValueError, AttributeError, EngineError):
        raise StoreError(f"{path}: expected a session, got states of none") from None
    tokens = files.read(reader, said)
    return Session(tokens.tolist(), n_prompt, said.n_kept, params, sampler, data)


def _place(path: Any) -> Path:
    return Path(checks.path(StoreError, "path", path))


def _kept(files: StateFiles, scheduler: Scheduler, request: Request) -> tuple[Node[Entry], bytes]:
    """The entry that has all of a completion that any state has, and the completion's ids."""
    if request.n_past:
        raise StoreError("expected a completion with all its tokens, got one of a checkpoint")
    if request.finish_reason is FinishReason.ERROR:
        raise StoreError(f"expected a completion without an error, got: {request.detail}")
    if not request.packed:
        why = request.reuse.reason
        raise StoreError(f"expected a completion that leaves a state, got one that does not: {why}")
    if request.finish_reason is None and request.source is not None and request.is_admitted:
        scheduler.leave(request, request.source)
    ids = packed(request.ids + request.tokens)
    node, n_ids = files.cache.match(ids).node, len(ids) // ID_BYTES
    n_kept = 0 if node is None else node.end
    # The last token that came is in no state yet.
    if node is None or n_kept < n_ids - bool(request.tokens):
        is_early = request.n_read < len(request.ids)
        why = "its prompt is not processed yet" if is_early else "raise cache_ram (--cache-ram)"
        raise StoreError(
            f"expected the state of {n_ids} tokens in the prefix cache, got one of {n_kept}: {why}"
        )
    return node, ids


def _completion(request: Request) -> dict[str, Any]:
    """What goes on of a completion."""
    params, plain = request.params, SamplingParams()
    said = {f.name: getattr(params, f.name) for f in fields(params)}
    del said["logits_processors"]  # Functions.
    said = {k: v for k, v in said.items() if v != getattr(plain, k)}
    if params.logit_bias:
        said["logit_bias"] = list(params.logit_bias.items())
    if params.grammar is not None:
        said["grammar"] = astuple(params.grammar)
    if params.max_tokens >= 0 and request.finish_reason is None:
        said["max_tokens"] = params.max_tokens - len(request.tokens)
    return {"n_prompt": len(request.ids), "params": said, "sampler": request.sampler.state}
