"""Endpoints of llama-server that generate nothing: tokens, templates, models, properties."""

from __future__ import annotations

from typing import Any

from engine.engine import Engine
from engine.server.chat import ChatPrompt, Shared
from engine.server.protocol import ChatRequest, DetokenizeRequest, TokenizeRequest, read
from engine.version import __version__


def tokenize(body: bytes, engine: Engine, shared: Shared, key: str) -> dict[str, Any]:
    request, tokenizer = read(body, TokenizeRequest), engine.tokenizer
    is_special = request.parse_special is not False
    ids = tokenizer.encode(request.content, bool(request.add_special), is_special)
    if not request.with_pieces:
        return {"tokens": ids}
    raw = [tokenizer.token_bytes(i, special=True) for i in ids]
    pieces = [{"id": i, "piece": _text_or_bytes(b)} for i, b in zip(ids, raw, strict=True)]
    return {"tokens": pieces}


def _text_or_bytes(raw: bytes) -> str | list[int]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def detokenize(body: bytes, engine: Engine, shared: Shared, key: str) -> dict[str, Any]:
    return {"content": engine.tokenizer.decode(read(body, DetokenizeRequest).tokens, special=True)}


def apply_template(body: bytes, engine: Engine, shared: Shared, key: str) -> dict[str, Any]:
    """The text that a chat's model reads, with its special tokens."""
    prompt = ChatPrompt(read(body, ChatRequest), shared, key)
    ids = engine.encode_chat(prompt.messages, **prompt.options(engine))
    return {"prompt": engine.tokenizer.decode(ids, special=True)}


def model(engine: Engine, shared: Shared) -> dict[str, Any]:
    """The model, under whatever name it was asked for."""
    meta = {"n_vocab": engine.model.n_vocab, "n_ctx_train": engine.model.n_ctx_train,
            "n_ctx": engine.n_ctx, "size": engine.file.path.stat().st_size}  # fmt: skip
    return {"id": shared.name, "object": "model", "created": shared.created,
            "owned_by": "gdn-engine", "meta": meta}  # fmt: skip


def props(engine: Engine, shared: Shared) -> dict[str, Any]:
    tokenizer = engine.tokenizer
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {
        "default_generation_settings": {"n_ctx": engine.n_ctx},
        "total_slots": engine.config.n_parallel,
        "model_alias": shared.name,
        "model_path": engine.file.path.name,
        "modalities": {"vision": False, "audio": False},
        "chat_template": shared.template_for(engine, None).source,
        **{name: "" if i is None else tokenizer.text(i) for name, i in ends.items()},
        "build_info": f"gdn-engine {__version__}",
    }
