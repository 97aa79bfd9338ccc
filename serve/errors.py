"""Errors that reach a client, in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that cannot be answered: its status, what was wrong, and what to change."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _printable(message)
        self.code = code
        self.param = param and _printable(param)
        self.retry_after_seconds = retry_after_seconds
        self._allow = allow

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that clients of OpenAI's API expect."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self._allow is not None:
            return {"Allow": self._allow}
        if self.retry_after_seconds is not None:
            return {"Retry-After": str(self.retry_after_seconds)}
        return {}


_KINDS = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}


def _printable(text: str) -> str:
    """Messages quote what clients sent, lone surrogates too; replies are UTF-8."""
    return text.encode("utf-8", "replace").decode()


def loggable(text: str) -> str:
    """What comes from strangers, for the log: no control characters, and no novels."""
    return "".join(character if character.isprintable() else "?" for character in text[:200])


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client must change the request."""
    return ApiError(400, message, param=param, code=code)
