"""llama.cpp's side of compare.py, through the C interface of llama-cpp-python.

Flash attention is on, the KV cache is f16, everything else is llama.cpp's default. The timed part
is `llama_decode` of known tokens until their logits are there; nothing is sampled, and Python only
fills a batch. It runs in the peer's environment, so it imports numpy and llama_cpp, and no module
of the engine.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp as lib
import numpy as np


class PeerError(Exception):
    """llama.cpp returned an error."""


class PeerRunner:
    """Answers a worker's requests."""

    errors = (PeerError,)

    def __init__(self) -> None:
        lib.llama_backend_init()
        self._past: tuple[int, ...] = ()
        self._state: Any = None

    def about(self) -> dict[str, Any]:
        """The version of llama-cpp-python, and what llama.cpp was built for."""
        return {
            "version": f"llama-cpp-python {lib.__version__}",
            "system_info": lib.llama_print_system_info().decode(errors="replace"),
        }

    def load(
        self, model: str, backend: str, n_ctx: int, n_ubatch: int, n_threads: int
    ) -> dict[str, Any]:
        """Load a model; `backend` is ignored, it is an option of the other engine."""
        start = time.perf_counter()
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(model.encode(), model_params)
        if not self._model:
            raise PeerError("llama.cpp could not load the model")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ubatch, n_ubatch
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = lib.GGML_TYPE_F16
        self._ctx = lib.llama_init_from_model(self._model, params)
        if not self._ctx:
            raise PeerError("llama.cpp could not make a context")
        self._memory = lib.llama_get_memory(self._ctx)
        self._n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch, self._n_ubatch = lib.llama_batch_init(n_ubatch, 0, 1), n_ubatch
        load_s = time.perf_counter() - start
        return {
            "backends": "cpu", "n_threads": n_threads, "type_k": "f16", "type_v": "f16",
            "load_s": load_s,
        }  # fmt: skip

    def prompt(self, tokens: Sequence[int]) -> dict[str, float]:
        """Seconds for a prompt, with the logits of its last token."""
        lib.llama_memory_clear(self._memory, True)
        start = time.perf_counter()
        self._feed(tokens, 0)
        return {"seconds": time.perf_counter() - start}

    def generate(self, past: Sequence[int], tokens: Sequence[int]) -> dict[str, float]:
        """Seconds to feed `tokens` one by one after `past`, with the logits of each."""
        self._go_to(tuple(past))
        start = time.perf_counter()
        for i, token in enumerate(tokens, len(past)):
            self._decode([token], i, last_only=True)
        return {"seconds": time.perf_counter() - start}

    def _go_to(self, past: tuple[int, ...]) -> None:
        """Make `past` the contents of the sequence: process it once, then copy its state back."""
        lib.llama_memory_clear(self._memory, True)
        if not past:
            return
        if past != self._past:
            self._feed(past, 0)
            size = lib.llama_state_seq_get_size(self._ctx, 0)
            self._past, self._state = past, (ctypes.c_uint8 * size)()
            lib.llama_state_seq_get_data(self._ctx, self._state, size, 0)
        elif not lib.llama_state_seq_set_data(self._ctx, self._state, len(self._state), 0):
            raise PeerError("llama.cpp could not take a state back")

    def logits(self, tokens: Sequence[int], one_by_one: bool, file: str) -> dict[str, Any]:
        """Write the logits [n_tokens, n_vocab] after each token to a file."""
        lib.llama_memory_clear(self._memory, True)
        out = np.empty((len(tokens), self._n_vocab), np.float32)
        size = 1 if one_by_one else self._n_ubatch

        def keep(n_past: int, row: int) -> None:
            values = lib.llama_get_logits_ith(self._ctx, row)
            out[n_past + row] = np.ctypeslib.as_array(values, (self._n_vocab,))

        self._feed(tokens, 0, size, keep)
        np.save(file, out)
        return {}

    def _feed(
        self,
        tokens: Sequence[int],
        n_past: int,
        size: int | None = None,
        keep: Callable[[int, int], None] | None = None,
    ) -> None:
        """Decode tokens in chunks; call keep(position of the chunk, row) for each of its rows."""
        size = size or self._n_ubatch
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]
            at_end = start + size >= len(tokens)
            self._decode(chunk, n_past + start, last_only=keep is None, wanted=at_end)
            for row in range(len(chunk) if keep else 0):
                keep(n_past + start, row)  # type: ignore[misc]

    def _decode(
        self, tokens: Sequence[int], n_past: int, last_only: bool, wanted: bool = True
    ) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, n_past + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = not last_only
        if last_only and wanted:
            batch.logits[len(tokens) - 1] = 1
        if status := lib.llama_decode(self._ctx, batch):
            raise PeerError(f"llama_decode answered {status}")
        lib.llama_synchronize(self._ctx)
