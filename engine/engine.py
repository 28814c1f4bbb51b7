"""The engine: a model with its memory, and text from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import itemgetter
from os import PathLike
from pathlib import Path
from typing import Any, Never, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine import checks
from engine.backends.base import Timing
from engine.config import ConfigError, EngineConfig, context_size
from engine.errors import EngineError
from engine.formats.fingerprint import fingerprint
from engine.formats.gguf import GGUFFile
from engine.graph import Live
from engine.kvcache.cache import PrefixCache
from engine.kvcache.entries import Text
from engine.kvcache.sequences import Checkpoint, SequenceMemory
from engine.kvcache.tier import HostTier, Mover
from engine.models import load_model
from engine.placement import estimate
from engine.placement.cache import cache_room
from engine.planning import planned
from engine.runtime import sessions
from engine.runtime.batch import Chunk, Logits
from engine.runtime.chats import Chats
from engine.runtime.completion import Completion
from engine.runtime.disk import DiskCache
from engine.runtime.executor import Executable
from engine.runtime.files import StateFiles
from engine.runtime.loop import StepLoop
from engine.runtime.memory import SharedCache, SharedMemory
from engine.runtime.owner import Owner, Signal
from engine.runtime.request import FinishReason, Request
from engine.runtime.requests import Prompt, PromptError, Requests
from engine.runtime.scheduler import Scheduler
from engine.runtime.sessions import Session
from engine.sampling.params import SamplingError, SamplingParams
from engine.text.template import ChatTemplate, Message
from engine.text.tokenizer import Tokenizer

C = TypeVar("C", bound=Completion)
# The model that runs where none is named; tools/train_demo made it.
DEMO_MODEL = Path(__file__).parent / "data" / "demo.gguf"


class Engine:
    """A loaded model. Make one with `Engine.load`; use it as a context manager, or `close` it.

    Any thread may call it. `config` has the sizes that suit the backend; `n_ctx`: positions of
    memory; `capacity`: of one step; `memory`: what sequences hold; `cache`: what is kept of prompts
    and answers for those that begin like them; `load_s`: seconds of loading.
    """

    def __init__(self, file: GGUFFile, config: EngineConfig) -> None:
        self.file, self.load_s = file, 0.0
        self.model = load_model(file)
        self.tokenizer = Tokenizer.from_gguf(file)
        self.n_ctx = context_size(config.n_ctx, self.model.n_ctx_train, config.n_parallel)
        self.config, self.plan = planned(self.model, config, self.n_ctx)
        self.capacity = cap = self.plan.graph.capacity
        self._free_before = {b.name: b.free_bytes() or 0 for b in self.plan.backends}
        estimate.check(self.plan)
        room = cache_room(self.plan, config.cache_ram)
        extra = {"n_slots": room.n_states, "n_blocks": room.n_blocks}
        executable = Executable(self.plan, self.model.weights, extra)
        n_blocks, n_slots = cap.n_blocks + room.n_blocks, cap.n_slots + room.n_states
        memory = SequenceMemory(n_blocks, n_slots, cap.block_size, self._copy_block)
        movers = [s for s in executable.stores if isinstance(s, Mover)]
        tier = HostTier(movers[0], memory, room.budget) if room.has_tier else None
        prefixes, owner = PrefixCache(memory, room, self._give_back, tier), Owner()
        self.memory, self.cache = SharedMemory(memory, owner), SharedCache(prefixes, owner)
        scheduler = Scheduler(memory, cap, prefixes)
        self.loop = StepLoop(executable, scheduler, cap, config.check, owner)
        self._chats = Chats(file, self.tokenizer, self._find_text)
        self._requests = Requests(
            file, self.tokenizer, self.model.n_vocab, self.n_ctx, config.n_parallel, self._find_text
        )
        self._files = StateFiles(self.loop, self.memory, cache(partial(fingerprint, file)))
        self._disk: DiskCache | None = None
        if config.cache_dir is not None:
            self._disk = DiskCache(Path(config.cache_dir), config.cache_disk, self._files)
            prefixes.on_leave, scheduler.disk = self._disk.keep, self._disk

    @classmethod
    def load(  # noqa: PLR0913  (the options of an engine)
        cls, path: str | PathLike[str] | None = None, *, backend: str = "auto",
        n_ctx: int | None = None, n_batch: int = 0, n_ubatch: int = 0, n_parallel: int = 1,
        n_checkpoints: int = 4, cache_ram: int | None = None, cache_prompt: bool = True,
        cache_dir: str | PathLike[str] | None = None, cache_disk: int | None = None,
        n_snapshots: int = 0, n_threads: int | None = None,
        cpu_isa: str | None = None, activations: int | None = None,
        type_k: str | None = None, type_v: str | None = None,
        gdn: str = "auto", strict_backend: bool = False, batch_invariant: bool = False,
        n_gpu_layers: int | None = None, n_cpu_moe: int = 0, override_tensor: Sequence[str] = (),
        gpu_memory: int | None = None, keep_experts: bool = False, check: bool = False,
        **unknown: Never,
    ) -> Engine:  # fmt: skip
        """Load a GGUF file; with no path, the small model that comes with the engine.

        backend: auto, or the name of one. n_ctx: positions of memory (None: 4096 or what the model
        was trained on, whichever is less; 0: the latter). n_batch, n_ubatch: most tokens of a step
        (0: what suits the backend). n_parallel: most sequences at a time. n_checkpoints: states
        that users keep. cache_ram: MiB for what prompts and answers leave to later ones (None: a
        quarter of what is free after loading, 512 MiB to 8 GiB; 0: nothing; -1: all of it).
        cache_dir: where long prefixes go that leave it, at most cache_disk MiB (None: a quarter of
        what is free there, at most 16 GiB). cache_prompt: whether requests use all that, unless
        they say. n_snapshots: most states kept per token of a step. n_threads: of the CPU (None:
        all cores). cpu_isa: amx, avx512, avx2, portable (None: the best). activations: 8 or 15, see
        BackendOptions. type_k, type_v: f32, f16 (None: what suits the backend). gdn: auto, scan,
        chunk, decomposed. strict_backend: fail rather than place a node elsewhere. batch_invariant:
        see BackendOptions. n_gpu_layers (None: all), n_cpu_moe, override_tensor: see Offload.
        gpu_memory: MiB that the process may take of the GPU's memory, as if it had no more (None:
        all); half of what is left in it goes to copies of weights. keep_experts: have `loop.kept`
        give the experts that a step chose. check: name the first node with values that are not
        finite; slow. Raises EngineError.
        """
        given = {k: v for k, v in locals().items() if k in EngineConfig.__dataclass_fields__}
        start = time.perf_counter()
        if unknown:
            name = next(iter(unknown))
            near = checks.did_you_mean(name, EngineConfig.__dataclass_fields__)
            raise ConfigError(f"unknown option {name}{near}")
        engine = cls(GGUFFile(DEMO_MODEL if path is None else path), EngineConfig(**given))
        engine.load_s = time.perf_counter() - start
        return engine

    def __repr__(self) -> str:
        on = ", ".join(f"{b.name}: {b.detail}" for b in self.plan.backends)
        return f"<Engine {self.file.path.name} ({on}), n_ctx {self.n_ctx}>"

    def start(self) -> None:
        """Run the steps in a thread of its own from now on, until `close`.

        Without it, whoever waits for a token runs them. `async for` over a completion calls it.
        """
        self.loop.start()

    def close(self) -> None:
        """Wait for the step that runs, end all completions, and free weights and states; nothing
        can be run after it."""
        if self.loop.owner.refusal:  # In a forked process all is the parent's.
            return
        disk, self._disk = self._disk, None
        try:
            if disk is not None:
                disk.close()
        finally:  # Also if its user does not wait for it.
            programs = self.loop.close()
            # A backend waits for its launches before their programs are freed.
            for backend in self.plan.backends:
                backend.release()
            del programs

    def __enter__(self) -> Engine:
        self.loop.check_usable()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def device_bytes(self) -> int:
        """Bytes of devices' own memory taken since loading began."""
        used = (b for b in self.plan.backends if b.traits.own_memory)
        return sum(max(0, self._free_before[b.name] - (b.free_bytes() or 0)) for b in used)

    def _find_text(self, key: str) -> tuple[int, Text | None]:
        found = self.cache.match_text(key)
        disk = self._disk
        return found if disk is None else max(found, disk.match_text(key), key=itemgetter(0))

    def _give_back(self, dim: str, indices: list[int]) -> None:
        for store in self.loop.executable.stores:
            store.give_back(dim, indices)

    def _unused(self, cache_prompt: bool | None, after: Checkpoint | None = None) -> str:
        """Why a request doesn't use the cache; empty if it does."""
        if cache_prompt is not None:
            checks.flag(PromptError, "cache_prompt", cache_prompt)
        if after is not None:
            return "it continues a checkpoint"
        is_used = self.config.cache_prompt if cache_prompt is None else cache_prompt
        if not is_used:
            return "cache_prompt is off"
        return "" if self.cache.budget else "the cache is off: no cache_ram"

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
        ids = self._requests.check(ids)
        seq = self.memory.create()
        try:
            return self.prefill(seq, ids, Logits.ALL)
        finally:
            self.memory.drop(seq)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt as llama.cpp makes them: special tokens added and parsed."""
        return self._requests.encode(prompt)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        after: Checkpoint | None = None,
        *,
        cache_prompt: bool | None = None,
    ) -> Completion:
        """Stream a completion: an iterator of tokens with `.text` and `.token`, also asynchronous.

        It runs together with whatever else was started and not finished. A str is encoded with
        special tokens added and parsed. With `after`, a checkpoint of `memory`, the prompt goes on
        from there: nothing before it is processed again (nor seen by penalties and processors).
        What a prompt begins with is not processed again, either, if an earlier one left it to the
        cache: see the completion's `reuse`. With cache_prompt False nothing is reused or left.
        Raises PromptError for a prompt that is empty, too long or has unknown ids, SamplingError
        for parameters that don't go together with the model, CheckpointError for a checkpoint that
        is not this engine's.
        """
        if after is not None:
            self.memory.check(after)
        unused, n_past = self._unused(cache_prompt, after), after.n_tokens if after else 0
        request = self._requests.make(prompt, params, unused, n_past)
        request.after = after
        return self._submitted(Completion(self.loop, request), request)

    def chat(  # noqa: PLR0913  (the options of a chat)
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning: bool | None = None,
        template: ChatTemplate | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_last: bool = False,
        cache_prompt: bool | None = None,
    ) -> Completion:
        """Stream the answer to a conversation, as `generate` streams a completion.

        messages: each a dict with `role` (system, user, assistant, tool) and `content`; tools: JSON
        schemas; reasoning: whether to think, for templates that take it (`enable_thinking`);
        template: None for the model's own; template_kwargs: more variables of it, of JSON's types;
        those that it does not read have no effect. continue_last: the last message is an
        assistant's, and the answer goes on with its content, or with its reasoning_content if there
        is no content. An assistant's content may be Sampled: what the model wrote, calls included,
        which stays as it is. States are kept in the cache: where messages go on from an answer,
        with its `text` as the assistant's content, nothing of the history is processed again (see
        runtime/chats.py); cache_prompt: as of `generate`. Control tokens that a message spells are
        text. Raises ChatError, and as `generate` does.
        """
        options: dict[str, Any] = {"tools": tools, "reasoning": reasoning}
        options |= {"template_kwargs": template_kwargs, "continue_last": continue_last}
        template = self._chats.checked(template, **options)
        unused = self._unused(cache_prompt)
        source = self._chats.prompt(template, messages, bool(unused), **options)
        request = self._requests.make(source, params, unused)
        return self._submitted(Completion(self.loop, request), request)

    def save(self, completion: Completion, path: str | PathLike[str], data: Any = None) -> int:
        """Write what the cache has of a completion to a file, for `restore`; returns its bytes.

        The completion may run, or have ended: then its state must still be in the cache. `data`:
        what JSON has. What was there is whole until the new file is. Raises StoreError.
        """
        return sessions.save(self._files, self.loop, completion, path, data)

    def restore(self, path: str | PathLike[str]) -> Session:
        """Read a file that `save` wrote into the cache, so that prompts that begin like it process
        only the rest; `resume` goes on with its completion. No token is processed. Raises
        StoreError for a file that is not whole, and for one of another model or cache type."""
        return sessions.restore(self._files, path)

    def resume(self, session: Session, params: SamplingParams | None = None) -> Completion:
        """Stream what comes after a session's tokens, as if its completion had never ended.

        params: None for those of the completion: max_tokens is what was left of it, if it had not
        ended, and else as many again. With others, random numbers go on, unless they have another
        seed. Functions (logits_processors) are not in files: give params with them.
        """
        request = self._requests.resume(session, params, self._unused(None))
        return self._submitted(Completion(self.loop, request), request)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning: bool | None = None,
        template: ChatTemplate | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_last: bool = False,
    ) -> list[int]:
        """Ids of the prompt that `chat` answers, for `generate` and `generate_batch`."""
        options: dict[str, Any] = {"tools": tools, "reasoning": reasoning}
        options |= {"template_kwargs": template_kwargs, "continue_last": continue_last}
        template = self._chats.checked(template, **options)
        return self._chats.encode(template, messages, **options)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_done: Callable[[int, Completion], None] = lambda i, completion: None,
        *,
        cache_prompt: bool | None = None,
    ) -> list[Completion]:
        """Complete many prompts, `n_parallel` at a time; params: one for all, or one for each.

        Returns the finished completions in order; one whose prompt can't be run ends with the
        reason `error`. `on_done(index, completion)` is called when one ends. cache_prompt: as of
        `generate`.
        """
        unused = self._unused(cache_prompt)
        prompts = checks.sequence(PromptError, "prompts", prompts, "prompts")
        if not callable(on_done):
            checks.refuse(PromptError, "on_done", "a function", on_done)
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise SamplingError(f"params: expected {len(prompts)}, one a prompt, got {len(each)}")
        for own in each:
            if own is not None:
                checks.instance(SamplingError, "params", own, SamplingParams)
        signal, done = Signal(), list[Completion]()
        try:
            for prompt, own in zip(prompts, each, strict=True):
                request = self._request_or_error(prompt, own, unused, signal)
                done.append(self._submitted(Completion(self.loop, request), request))
            left = {completion.request: i for i, completion in enumerate(done)}
            while left:
                self.loop.wait(signal, lambda: bool(signal.ended))
                if (i := left.pop(signal.ended.popleft(), None)) is not None:
                    on_done(i, done[i])
        finally:
            for completion in done:
                completion.close()
        return done

    def _request_or_error(
        self, prompt: Prompt, params: SamplingParams | None, unused: str, signal: Signal
    ) -> Request:
        """A request whose news go to `signal`; one that has ended if its prompt can't be run."""
        try:
            request = self._requests.make(prompt, params, unused)
        except EngineError as error:
            request = self._requests.empty()
            request.finish(FinishReason.ERROR, str(error), error)
        request.signal = signal
        return request

    def _submitted(self, completion: C, request: Request) -> C:
        """The completion of a request, which is queued."""
        self.loop.check_usable()
        if request.params.max_tokens == 0:
            request.finish(FinishReason.LENGTH, "0 tokens were asked for")
        if request.finish_reason:
            request.after = None
            request.signal.ended.append(request)
        else:
            self.loop.add(request)
        return completion

    def advance(self) -> bool:
        """Run one step of everything that was started; False if there was nothing to do."""
        return self.loop.advance()
