"""What is refused, in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from jax_chunkattn.engine.admission import InvalidRequest
from jax_chunkattn.engine.outputs import EngineClosed
from jax_chunkattn.tree.allocator import PoolExhausted

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""The `type` of an error, by its status."""

MOST_CHARACTERS = 500  # of a message: some tell what was sent


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
      status: of HTTP.
      message: what was wrong, what was expected and what to do.
      param: the field that was wrong, if one was.
      code: a word for programs, if there is one.
      headers: sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MOST_CHARACTERS else f"{message[:497]}..."
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As JSON values: `{"error": {"message", "type", "param", "code"}}`."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        return Response(json_bytes(self.body), self.status, self.headers, "application/json")


_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def json_bytes(value: Any) -> bytes:
    """One line of JSON in UTF-8; half surrogate pairs become question marks."""
    return _ENCODE(value).encode(errors="replace")


def as_api_error(error: BaseException) -> ApiError:
    """What an engine raised, or ended a request by, as an answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        too_long = "positions" in str(error)
        return ApiError(400, str(error), code="context_length_exceeded" if too_long else None)
    if isinstance(error, PoolExhausted):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, EngineClosed):
        return ApiError(503, "the engine is closed: nothing is served any longer")
    if isinstance(error, FloatingPointError):
        return ApiError(500, str(error), code="not_finite")
    return ApiError(500, "the request failed by an error of the server, which its log tells")
