"""llama.cpp's side of reuse.py, through `Llama` of llama-cpp-python.

`Llama.generate` goes on from what is in memory, if the prompt begins with all of it. A state of a
hybrid model can't be cut back, so otherwise `generate` processes the whole prompt. The end of every
answer is kept in a `LlamaRAMCache` of 2 GiB, its default. Of these states and what is in memory,
the longest that the prompt begins with is taken; `LlamaRAMCache` itself would take the state with
the most tokens in common, which may be no beginning. It runs in the peer's environment, so it
imports llama_cpp, and no module of the engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as lib
import numpy as np


class ReusePeer:
    """Answers a worker's requests."""

    errors = (ValueError, RuntimeError)

    def about(self) -> dict[str, Any]:
        """The version of llama-cpp-python, and what llama.cpp was built for."""
        return {
            "version": f"llama-cpp-python {lib.__version__}",
            "system_info": lib.llama_print_system_info().decode(errors="replace"),
        }

    def load(self, model: str, n_ctx: int, n_threads: int) -> dict[str, Any]:
        """Load a model."""
        self._llama = llama = lib.Llama(
            model, n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads,
            n_batch=512, n_gpu_layers=0, flash_attn=True, verbose=False,
        )  # fmt: skip
        # They are only for log probabilities, and would be copied with every state: 300 MiB.
        llama.scores = np.empty((512, 0), np.single)
        self._n_processed, evaluate = 0, llama.eval

        def counted(tokens: Sequence[int]) -> None:
            self._n_processed += len(tokens)
            evaluate(tokens)

        llama.eval = counted
        llama.eval([1] * 64)  # The first batch touches all weights for the first time.
        return {}

    def clear(self) -> dict[str, Any]:
        """Forget everything."""
        self._llama.reset()
        self._cache = lib.LlamaRAMCache()
        return {}

    def turn(self, prompt: list[int], answer: list[int]) -> dict[str, Any]:
        """Seconds from a prompt to its first token, and the tokens that were processed for it.
        Memory then gets `answer`, whatever was generated, and its end is kept."""
        start, self._n_processed = time.perf_counter(), 0
        self._load_longest(tuple(prompt))
        # It makes one token; greedy, so that the sampler takes no time.
        next(self._llama.generate(prompt, temp=0.0))
        seconds, n_processed = time.perf_counter() - start, self._n_processed
        self._llama.eval(answer)
        self._cache[prompt + answer] = self._llama.save_state()
        return {"seconds": seconds, "n_processed": n_processed}

    def _load_longest(self, prompt: tuple[int, ...]) -> None:
        states = self._cache.cache_state
        here = tuple(self._llama.input_ids[: self._llama.n_tokens])
        whole = [key for key in (here, *states) if prompt[: len(key)] == key]
        longest = max(whole, key=len, default=here)
        if longest in states and longest != here:
            self._llama.load_state(states[longest])
            states.move_to_end(longest)
