"""A fake llama_cpp for tests of compare.py: all its logits are 0.

For every decoded batch it calls `fake_hook.on_decode(tokens, n_past)`; a test writes the module
`fake_hook` and puts it on PYTHONPATH.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import fake_hook

__version__ = "0.0.fake"
LLAMA_FLASH_ATTN_TYPE_ENABLED = 1
GGML_TYPE_F16 = 1
N_VOCAB = 320

print("output of a library, which is no answer")


class _Batch(SimpleNamespace):
    """`logits` marks the rows whose logits were asked for."""


def llama_backend_init() -> None:
    pass


def llama_print_system_info() -> bytes:
    return b"CPU : AVX9 = 1 | AVX10 = 0 | "


def llama_model_default_params() -> Any:
    return SimpleNamespace()


def llama_context_default_params() -> Any:
    return SimpleNamespace()


def llama_model_load_from_file(path: bytes, params: Any) -> Any:
    assert params.n_gpu_layers == 0
    return fake_hook.load(path)


def llama_init_from_model(model: Any, params: Any) -> Any:
    assert (params.flash_attn_type, params.type_k, params.type_v) == (1, 1, 1)
    assert params.n_threads == params.n_threads_batch >= 1
    assert params.n_batch == params.n_ubatch <= 512
    return SimpleNamespace(n_ctx=params.n_ctx, n_batch=params.n_batch, past=[], batch=None)


def llama_get_memory(ctx: Any) -> Any:
    return ctx


def llama_model_get_vocab(model: Any) -> Any:
    return model


def llama_vocab_n_tokens(vocab: Any) -> int:
    return N_VOCAB


def llama_batch_init(n_tokens: int, embd: int, n_seq_max: int) -> Any:
    rows = range(n_tokens)
    return _Batch(
        n_tokens=0,
        token=[-1 for _ in rows],
        pos=[-1 for _ in rows],
        n_seq_id=[0 for _ in rows],
        seq_id=[[-1] for _ in rows],
        logits=[0 for _ in rows],
    )


def llama_memory_clear(memory: Any, data: bool) -> None:
    memory.past = []


def llama_decode(ctx: Any, batch: Any) -> int:
    n, n_past = batch.n_tokens, len(ctx.past)
    assert 1 <= n <= ctx.n_batch
    assert batch.pos[:n] == list(range(n_past, n_past + n))
    assert batch.seq_id[:n] == [[0]] * n
    assert batch.n_seq_id[:n] == [1] * n
    assert n_past + n <= ctx.n_ctx
    fake_hook.on_decode(batch.token[:n], n_past)
    ctx.past += batch.token[:n]
    ctx.batch = batch
    return 0


def llama_synchronize(ctx: Any) -> None:
    pass


def llama_get_logits_ith(ctx: Any, i: int) -> Any:
    assert ctx.batch.logits[i] == 1
    return (ctypes.c_float * N_VOCAB)()


def llama_state_seq_get_size(ctx: Any, seq_id: int) -> int:
    return 4 * len(ctx.past)


def llama_state_seq_get_data(ctx: Any, data: Any, size: int, seq_id: int) -> int:
    ctypes.memmove(data, (ctypes.c_int32 * len(ctx.past))(*ctx.past), size)
    return size


def llama_state_seq_set_data(ctx: Any, data: Any, size: int, seq_id: int) -> int:
    ctx.past = list((ctypes.c_int32 * (size // 4)).from_buffer_copy(data))
    return size
