"""Errors in the form in which OpenAI's API gives them."""

from typing import Any


class APIError(Exception):
    """What a client is told: an HTTP status, and a message that names the value and the way out."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def stopping() -> APIError:
    return APIError(503, "The server is being stopped; ask again when it is back.", "stopping", retry_after=30)
