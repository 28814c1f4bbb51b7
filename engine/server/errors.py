"""Errors as OpenAI's protocol has them, and which error of the engine is whose fault."""

from __future__ import annotations

import re
from typing import Any

from engine.errors import EngineError, NotEnoughMemoryError
from engine.kvcache.pool import MemoryFullError
from engine.runtime.completion import GenerationError
from engine.runtime.owner import OwnerError
from engine.runtime.requests import PromptTooLongError

_PARAM = re.compile(r"([a-z_]+(?:[.\[][\w.\[\]]*)?): ")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
# Of the engine's errors, those that the client has no part in.
_OURS = (GenerationError, OwnerError, MemoryFullError, NotEnoughMemoryError)


class ApiError(EngineError):
    """An answer with an error: HTTP `status`, a `code` for programs, and after how many seconds to
    try again. `param` is the field that is wrong: the text of a 400 begins with it."""

    def __init__(
        self, message: str, status: int = 400, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after
        found = _PARAM.match(message) if status == 400 else None
        self.param = found[1] if found else None

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        told = {"message": str(self), "type": _TYPES.get(self.status, kind)}
        return {"error": {**told, "param": self.param, "code": self.code}}


def as_api_error(error: EngineError) -> ApiError:
    """The answer for any error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, _OURS):
        return ApiError(str(error), 500)
    is_long = isinstance(error, PromptTooLongError)
    return ApiError(str(error), 400, "context_length_exceeded" if is_long else None)
