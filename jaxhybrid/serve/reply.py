"""An answer in the form of OpenAI's objects: whole, or as the events of a stream."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from jaxhybrid.serve.served import Ticket


@dataclass(frozen=True)
class Reply:
    """`chat`: of /v1/chat/completions; else of /v1/completions, where pieces and wholes look alike."""

    chat: bool
    model: str
    has_usage: bool = False  # a stream ends with an event that has the usage
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        message = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._object("chat.completion", message, reason) | usage

    def events(self, text: str, reason: str | None = None) -> bytes:
        """The events for a piece of text; `reason` says why it is the last one."""
        pieces = [text] if text else []
        content = [{"delta": {"content": piece}} if self.chat else {"text": piece} for piece in pieces]
        found = [self._piece(one, None) for one in content]
        if reason is not None:
            found.append(self._piece({"delta": {}} if self.chat else {"text": ""}, reason))
        return b"".join(map(event, found))

    def begin(self) -> bytes:
        """The first event, before there is any text."""
        return event(self._piece({"delta": {"role": "assistant", "content": ""}}, None)) if self.chat else b""

    def end(self, usage: dict[str, Any]) -> bytes:
        last = self._object("chat.completion.chunk", None, None) | usage
        return (event(last) if self.has_usage else b"") + b"data: [DONE]\n\n"

    def _piece(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return self._object("chat.completion.chunk", content, reason) | ({"usage": None} if self.has_usage else {})

    def _object(self, kind: str, content: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **(content or {}), "logprobs": None, "finish_reason": reason}
        return {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + self.id,
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [] if content is None else [choice],
        }


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


def usage(ticket: Ticket, answer_tokens: int) -> dict[str, Any]:
    """Counts of tokens, as OpenAI has them, and beside them how long the engine worked on this text."""
    prompt_tokens, seconds = len(ticket.request.prompt), ticket.answer_seconds
    return {
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": answer_tokens,
            "total_tokens": prompt_tokens + answer_tokens,
        },
        "timings": {
            "prompt_seconds": round(ticket.prompt_seconds, 4),
            "answer_seconds": round(seconds, 4),
            "tokens_per_second": round(answer_tokens / seconds, 2) if seconds else None,
        },
    }
