"""The engine: a model with its memory, and text from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import backends
from engine.backends.base import BackendOptions, Timing
from engine.config import ConfigError, EngineConfig, capacity_of, context_size
from engine.errors import EngineError
from engine.formats.gguf import GGUFFile
from engine.graph import Live
from engine.kvcache.sequences import Checkpoint, SequenceMemory
from engine.models import BuildOptions, Model, load_model
from engine.placement import estimate
from engine.placement.place import Plan
from engine.placement.rules import Offload, place_where_it_fits
from engine.runtime.batch import Chunk, Logits
from engine.runtime.conversation import Conversation
from engine.runtime.executor import Executable
from engine.runtime.loop import StepLoop
from engine.runtime.request import ChatCompletion, Completion, FinishReason, Request
from engine.runtime.scheduler import Scheduler
from engine.sampling.chain import Sampler, sequence_breakers
from engine.sampling.params import SamplingError, SamplingParams
from engine.text.template import ChatTemplate, Message, find_template
from engine.text.tokenizer import Tokenizer

# The model that runs where none is named; tools/train_demo made it.
DEMO_MODEL = Path(__file__).parent / "data" / "demo.gguf"


Prompt = str | Sequence[int]  # A text, or token ids.


class PromptError(EngineError):
    """A prompt that can't be run."""


class Engine:
    """A loaded model. Make one with `Engine.load`; use it as a context manager, or `close` it.

    `config` has the sizes that suit the backend; `n_ctx`: positions of memory; `capacity`: of one
    step; `conversation`: what memory holds for the next `chat`; `load_s`: seconds of loading.
    """

    def __init__(self, file: GGUFFile, config: EngineConfig) -> None:
        self.file, self.load_s = file, 0.0
        self.tokenizer = Tokenizer.from_gguf(file)
        self.model = load_model(file)
        self.n_ctx = context_size(config.n_ctx, self.model.n_ctx_train)
        self.config, self.plan = _planned(self.model, config, self.n_ctx)
        self.capacity = cap = self.plan.graph.capacity
        self._free_before = {b.name: b.free_bytes() or 0 for b in self.plan.backends}
        estimate.check(self.plan)
        executable = Executable(self.plan, self.model.weights)
        self.memory = SequenceMemory(cap.n_blocks, cap.n_slots, cap.block_size, self._copy_block)
        self.conversation = Conversation(self.tokenizer)
        scheduler = Scheduler(self.memory, cap, self.conversation.release)
        self.loop = StepLoop(executable, scheduler, cap, config.check)
        self._template: ChatTemplate | None = None
        # It looks at the whole vocabulary, so it is called once for each list of texts.
        self._sequence_breakers = cache(partial(sequence_breakers, self.tokenizer))

    @classmethod
    def load(cls, path: str | Path | None = None, **options: Any) -> Engine:
        """Load a GGUF file; with no path, the small model that comes with the engine.

        Options are those of EngineConfig: backend (auto, or the name of one), n_ctx (positions of
        memory; None: 4096 or what the model was trained on, whichever is less; 0: the latter),
        n_batch and n_ubatch (most tokens of a step; 0: what suits the backend), n_parallel (most
        sequences), n_checkpoints, n_threads, cpu_isa (amx, avx512, avx2, portable; None: the best),
        type_k and type_v (f32, f16), gdn (auto, scan, chunk, decomposed), strict_backend (fail
        rather than place a node elsewhere), batch_invariant (see BackendOptions), n_gpu_layers,
        n_cpu_moe and override_tensor (see Offload). Raises EngineError.
        """
        start = time.perf_counter()
        if unknown := options.keys() - EngineConfig.__dataclass_fields__.keys():
            raise ConfigError(f"unknown option {min(unknown)}")
        engine = cls(GGUFFile(DEMO_MODEL if path is None else path), EngineConfig(**options))
        engine.load_s = time.perf_counter() - start
        return engine

    def close(self) -> None:
        """Free weights and states; nothing can be run after it."""
        programs = self.loop.close()
        # A backend waits for its launches before their programs are freed.
        for backend in self.plan.backends:
            backend.release()
        del programs

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def device_bytes(self) -> int:
        """Bytes of devices' own memory taken since loading began."""
        used = (b for b in self.plan.backends if b.traits.own_memory)
        return sum(max(0, self._free_before[b.name] - (b.free_bytes() or 0)) for b in used)

    def _copy_block(self, source: int, target: int) -> None:
        for store in self.loop.executable.stores:
            store.copy("n_blocks", source, target)

    def run(self, chunks: Sequence[Chunk]) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Run one batch.

        Returns the logits [n_outputs, n_vocab] of the rows that asked for them, and for each chunk
        (by index) with non-finite values the reason; its sequence is zeroed and empty. Raises
        BatchError or MemoryFullError, with nothing changed, if the chunks don't fit.
        """
        return self.loop.run(chunks)

    def run_timed(self, chunks: Sequence[Chunk]) -> tuple[list[Timing], Live]:
        """Run one batch for its timings: every instruction, what lies between, and the rest."""
        return self.loop.run_timed(chunks)

    def step(self, chunks: Sequence[Chunk]) -> NDArray[np.float32]:
        """As `run`, but non-finite values raise NonFiniteError."""
        return self.loop.step(chunks)

    def prefill(
        self, seq: int, tokens: Sequence[int], logits: Logits = Logits.LAST
    ) -> NDArray[np.float32]:
        """Append tokens to a sequence, chunk by chunk; returns the logits asked for."""
        return self.loop.prefill(seq, tokens, logits)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n_tokens, n_vocab] after each of `ids`, on a fresh sequence."""
        self._check_prompt(ids)
        seq = self.memory.create()
        try:
            return self.prefill(seq, ids, Logits.ALL)
        finally:
            self.memory.free(seq)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt as llama.cpp makes them: special tokens added and parsed."""
        return self.tokenizer.encode(prompt, add_special=True, parse_special=True)

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, after: Checkpoint | None = None
    ) -> Completion:
        """Stream a completion: an iterator of tokens with `.text` and `.token`.

        It runs together with whatever else was started and not finished. A str is encoded with
        special tokens added and parsed. With `after`, a checkpoint of `memory`, the prompt goes on
        from there: nothing before it is processed again (nor seen by penalties).
        Raises PromptError for a prompt that is empty, too long or has unknown ids, SamplingError
        for parameters that don't go together with the model.
        """
        return Completion(self, self._submit(prompt, params, after))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning: bool | None = None,
        template: ChatTemplate | None = None,
    ) -> ChatCompletion:
        """Stream the answer to a conversation, as `generate` streams a completion.

        messages: each a dict with `role` (system, user, assistant, tool) and `content`; tools: JSON
        schemas; reasoning: whether to think, for templates that take it (`enable_thinking`);
        template: None for the model's own. The state after the last answer is kept: where the
        messages go on from it, with the answer's `text` as the assistant's content, nothing of the
        history is processed again (see runtime/conversation.py). Control tokens that a message
        spells are text. Raises ChatError, and as `generate` does.
        """
        if template is None:
            self._template = template = self._template or find_template(self.file)
        prompt = self.conversation.prompt(template, messages, tools=tools, reasoning=reasoning)
        try:
            request = self._submit(prompt.ids, params, prompt.after, prompt.before)
        finally:
            if prompt.after:
                prompt.after.release()
        request.rollback_at = prompt.rollback_at
        request.on_finish = lambda r, end: self.conversation.store(prompt, end, r.text, r.tokens)
        return ChatCompletion(self, request, prompt)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_done: Callable[[int, Completion], None] = lambda i, completion: None,
    ) -> list[Completion]:
        """Complete many prompts, `n_parallel` at a time; params: one for all, or one for each.

        Returns the finished completions in order; one whose prompt can't be run ends with the
        reason `error`. `on_done(index, completion)` is called when one ends.
        """
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        done = [self._submit_or_fail(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        pending = dict(enumerate(done))
        try:
            while pending:
                for i, completion in list(pending.items()):
                    if completion.finish_reason:
                        del pending[i]
                        on_done(i, completion)
                if pending:
                    self.advance()
        finally:
            for completion in pending.values():
                completion.close()
        return done

    def _submit_or_fail(self, prompt: Prompt, params: SamplingParams | None) -> Completion:
        try:
            return Completion(self, self._submit(prompt, params))
        except EngineError as error:
            ids = [] if isinstance(prompt, str) else prompt
            request = self._request(ids, SamplingParams(), 0, ())
            request.finish(FinishReason.ERROR, str(error))
            return Completion(self, request)

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        after: Checkpoint | None = None,
        before: Sequence[int] = (),
    ) -> Request:
        ids = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        n_past = after.n_tokens if after else 0
        self._check_prompt(ids, n_past)
        request = self._request(ids, params or SamplingParams(), n_past, before)
        if request.params.max_tokens == 0:
            request.finish(FinishReason.LENGTH, "0 tokens were asked for")
        else:
            self.loop.add(request, after)
        return request

    def _request(
        self, ids: Sequence[int], params: SamplingParams, n_past: int, before: Sequence[int]
    ) -> Request:
        params = params.resolved(self.file.metadata)
        for token in params.logit_bias:
            if not 0 <= token < self.model.n_vocab:
                raise SamplingError(f"logit_bias: {self._unknown_id(token)}")
        ends = self.tokenizer.eog_ids
        texts = params.dry_sequence_breakers
        breakers = self._sequence_breakers(texts) if params.dry_multiplier else {}
        sampler = Sampler(params, ends if params.ignore_eos else (), breakers)
        # Without a limit of its own, a completion gets its share of the context, as in llama.cpp.
        end = n_past + len(ids)
        share = max(self.n_ctx // self.config.n_parallel, end)
        limit = end + params.max_tokens if params.max_tokens >= 0 else share
        sampler.accept(*before)
        decoder = self.tokenizer.stream(at_start=False)
        return Request(ids, params, sampler, decoder, ends, min(limit, self.n_ctx), n_past)

    def advance(self) -> bool:
        """Run one step of everything that was started; False if there was nothing to do."""
        return self.loop.advance()

    def cancel(self, request: Request) -> None:
        """End a request now and free its memory."""
        self.loop.cancel(request)

    def _check_prompt(self, ids: Sequence[int], n_past: int = 0) -> None:
        if not len(ids):
            raise PromptError("the prompt is empty: expected at least one token")
        if n_past + len(ids) > self.n_ctx:
            before = f" after position {n_past}" if n_past else ""
            raise PromptError(
                f"the prompt has {len(ids)} tokens{before}, the context {self.n_ctx}: "
                "shorten it or raise n_ctx (-c)"
            )
        for token in ids:
            if not 0 <= token < self.model.n_vocab:
                raise PromptError(self._unknown_id(token))

    def _unknown_id(self, token: int) -> str:
        return f"token id {token}: expected 0 to {self.model.n_vocab - 1}"


def resolved_config(**options: Any) -> EngineConfig:
    """The config of an engine with these options, with the sizes that suit its backend."""
    config = EngineConfig(**options)
    return config.resolved(backends.traits(config.backend))


def plan_only(path: str | Path, n_tokens: int, gdn: str = "fused", **options: Any) -> Plan:
    """The placed graph of a file for batches of `n_tokens`, from its header; options: as `load`."""
    options |= {"gdn": "auto" if gdn == "fused" else gdn}
    config = EngineConfig(**options, n_ubatch=n_tokens, n_batch=n_tokens)
    model = load_model(GGUFFile(path))
    return _planned(model, config, context_size(None, model.n_ctx_train))[1]


def _planned(model: Model, config: EngineConfig, n_ctx: int) -> tuple[EngineConfig, Plan]:
    """The config with what suits the backend, and the placed graph."""
    options = BackendOptions(config.n_threads, config.cpu_isa, config.batch_invariant)
    available = backends.create(config.backend, options)
    traits = available[0].traits
    config = config.resolved(traits)
    capacity = capacity_of(config, n_ctx, traits)
    graph = model.build(BuildOptions(capacity, *config.cache_types(), config.gdn))
    rules = Offload(config.n_gpu_layers, config.n_cpu_moe, config.override_tensor)
    return config, place_where_it_fits(graph, available, rules, config.strict_backend)
