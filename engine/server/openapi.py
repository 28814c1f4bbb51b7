"""The description of the server at /openapi.json, made from the types of requests."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.server import protocol
from engine.version import __version__

_BODIES = {
    "/v1/chat/completions": protocol.ChatRequest,
    "/v1/completions": protocol.CompletionRequest,
    "/apply-template": protocol.ChatRequest,
    "/tokenize": protocol.TokenizeRequest,
    "/detokenize": protocol.DetokenizeRequest,
}
_GETS = ("/v1/models", "/props", "/health", "/metrics", "/openapi.json")
_REF = "#/components/schemas/{name}"


def description() -> dict[str, Any]:
    """OpenAPI 3.1."""
    kinds = sorted(set(_BODIES.values()), key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    of = dict(zip(kinds, schemas, strict=True))
    error = {"$ref": _REF.format(name="Error")}
    text = {"type": "string"}
    fields = {"message": text, "type": text, "param": {}, "code": {}}
    told = {"type": "object", "required": ["message", "type"], "properties": fields}
    components["Error"] = {"type": "object", "properties": {"error": told}, "required": ["error"]}
    responses = {
        "200": {"description": "the answer"},
        **{
            status: {"description": "an error", "content": {"application/json": {"schema": error}}}
            for status in ("4XX", "5XX")
        },
    }
    paths: dict[str, Any] = {path: {"get": {"responses": responses}} for path in _GETS}
    name = {"name": "name", "in": "path", "required": True, "schema": text}
    paths["/v1/models/{name}"] = {"get": {"responses": responses, "parameters": [name]}}
    for path, kind in _BODIES.items():
        body = {"required": True, "content": {"application/json": {"schema": of[kind]}}}
        paths[path] = {"post": {"requestBody": body, "responses": responses}}
    info = {"title": "gdn-engine", "version": __version__}
    return {
        "openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": components}
    }  # fmt: skip
