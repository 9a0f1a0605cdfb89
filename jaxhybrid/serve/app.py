"""The endpoints: a request is read, checked, put into the queue of its model, and answered as its tokens come."""

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxhybrid.complete import answer_text, chat_tokens
from jaxhybrid.decoding import engine
from jaxhybrid.decoding.sampling import Sampling
from jaxhybrid.decoding.text import Answer
from jaxhybrid.errors import ConfigError, JaxHybridError
from jaxhybrid.serve.asked import Asked, ChatAsked, CompletionAsked, read
from jaxhybrid.serve.batcher import Batcher
from jaxhybrid.serve.errors import APIError
from jaxhybrid.serve.limits import Limits
from jaxhybrid.serve.metrics import Metrics
from jaxhybrid.serve.page import CONTENT_SECURITY_POLICY, PAGE
from jaxhybrid.serve.reply import Reply, event, usage
from jaxhybrid.serve.served import Model, Served, Ticket

OPEN = ("/", "/health")  # without the API key
DRAINED = 4  # times the largest body: so much of a larger one is still taken, for its client to read the refusal
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class App:
    def __init__(self, batcher: Batcher, limits: Limits, metrics: Metrics):
        self.batcher, self.limits, self.metrics = batcher, limits, metrics

    # --- what there is

    async def page(self, request: Request) -> Response:
        return Response(PAGE, media_type="text/html", headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})

    async def health(self, request: Request) -> Response:
        alive = self.batcher.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    async def counts(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text())

    async def models(self, request: Request) -> Response:
        listed = [self._described(served.model) for served in self.batcher.models.values()]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._described(self._served(request.path_params["name"]).model))

    def _described(self, model: Model) -> dict[str, Any]:
        own = {"chat": model.has_chat, "context": self.limits.context, "max_new_tokens": self.limits.max_new_tokens}
        return {"id": model.name, "object": "model", "created": 0, "owned_by": "jaxhybrid"} | own

    def _served(self, name: str) -> Served:
        if name not in self.batcher.models:
            message = f"model={name[:200]!r} is not served here; there is {', '.join(self.batcher.models)}."
            raise APIError(404, message, "model_not_found", "model")
        return self.batcher.models[name]

    # --- answers

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionAsked)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatAsked)

    async def _answer(self, request: Request, kind: type[Asked]) -> Response:
        asked = read(kind, await read_body(request, self.limits))
        served = self._served(asked.model)
        prompt = await asyncio.to_thread(prompt_tokens, asked, served.model)
        wanted = self._request(asked, prompt, served)
        reply = Reply(isinstance(asked, ChatAsked), asked.model, asked.has_usage)
        answer = Answer(partial(answer_text, served.model.vocabulary), asked.stops)
        ticket = self.batcher.submit(asked.model, wanted)
        release = partial(served.cancel, ticket)
        if asked.stream:
            return Released(events(ticket, answer, reply), release, media_type="text/event-stream")
        try:
            return await unless_gone(request.receive, whole(ticket, answer, reply))
        finally:
            release()

    def _request(self, asked: Asked, prompt: list[int], served: Served) -> engine.Request:
        room = self.limits.context - len(prompt)
        most = min(room, self.limits.max_new_tokens)
        wanted = asked.longest
        if room < 1 or (wanted or 1) > room:
            told = "" if wanted is None else f" and {wanted} of the answer"
            message = f"{len(prompt)} tokens of the prompt{told} are more than the {self.limits.context} there may be."
            raise APIError(400, message, "context_length_exceeded", "max_tokens" if room > 0 else None)
        if (wanted or 1) > most:
            message = f"max_tokens={wanted}: an answer may have {self.limits.max_new_tokens} tokens here."
            raise APIError(400, message, "invalid_value", "max_tokens")
        given = {"temperature": 1.0, "repetition_penalty": served.model.penalty, "seed": secrets.randbits(32)}
        try:
            request = engine.Request(prompt, wanted or most, Sampling(**given | asked.sampling), served.model.ends)
            engine.check_request(request, 0, served.engine.model.config)
        except JaxHybridError as error:
            name = str(error).partition("=")[0] if isinstance(error, ConfigError) else None
            raise APIError(400, str(error), "invalid_value", name) from error
        return request


def prompt_tokens(asked: Asked, model: Model) -> list[int]:
    """The prompt as the model shall read it; for a thread beside the event loop.

    Raises:
        APIError: there is no chat template, or it refuses the messages.
    """
    if isinstance(asked, CompletionAsked):
        return model.vocabulary.prompt(asked.text) if isinstance(asked.text, str) else asked.text
    assert isinstance(asked, ChatAsked)
    if not model.has_chat:
        message = f"The tokenizer of {model.name} has no chat template; use /v1/completions."
        raise APIError(400, message, "no_chat_template", "messages")
    messages = [{"role": message.role, "content": message.text} for message in asked.messages]
    try:
        return chat_tokens(model.vocabulary, messages)
    except TemplateError as error:
        message = f"The chat template of {model.name} refuses these messages: {error}"
        raise APIError(400, message, "invalid_value", "messages") from error


async def pieces(ticket: Ticket, answer: Answer) -> AsyncIterator[tuple[str, str | None]]:
    """The answer's text as it comes; with the last piece why it is the last one: `stop` or `length`."""
    async for tokens in ticket.tokens():
        text = answer.add(tokens)
        if answer.is_stopped:
            ticket.outcome = "answered"
            yield text, "stop"
            return
        if text:
            yield text, None
    yield answer.rest(), "stop" if answer.tokens[-1] in ticket.request.end_ids else "length"


async def whole(ticket: Ticket, answer: Answer, reply: Reply) -> Response:
    async for _, reason in pieces(ticket, answer):
        if reason is not None:
            return JSONResponse(reply.whole(answer.text, reason, usage(ticket, len(answer.tokens))))
    raise AssertionError("an answer without an end")


async def events(ticket: Ticket, answer: Answer, reply: Reply) -> AsyncIterator[bytes]:
    yield reply.begin()
    try:
        async for text, reason in pieces(ticket, answer):
            yield reply.events(text, reason)
    except APIError as error:  # the status is sent already
        yield event(error.body)
    else:
        yield reply.end(usage(ticket, len(answer.tokens)))


class Released(StreamingResponse):
    """A stream whose text leaves the engine when it ends, whatever ends it."""

    def __init__(self, content: AsyncIterator[bytes], release: Any, **settings: Any):
        super().__init__(content, headers={"Cache-Control": "no-store"}, **settings)
        self.release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


async def unless_gone(receive: Receive, work: Awaitable[Response]) -> Response:
    """What `work` gives; it is cancelled when the client goes away."""

    async def gone() -> Response:
        while (await receive())["type"] != "http.disconnect":
            pass
        return Response()  # nobody reads it

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return (tasks[0] if tasks[0] in done else tasks[1]).result()
    finally:
        for task in tasks:
            task.cancel()


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        APIError: it is no JSON by its header, too large, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another origin may send unasked is of other types
        raise APIError(415, f"Content-Type {kind!r}: send application/json.", "unsupported_media_type")
    most, drained = limits.body_bytes, DRAINED * limits.body_bytes
    body, size = bytearray(), 0
    announced = int(request.headers.get("content-length", 0))  # h11 has seen to it that this is a number
    try:
        async with asyncio.timeout(limits.body_seconds):
            if announced <= drained:
                async for part in request.stream():
                    size += len(part)
                    if size <= most:
                        body += part
                    if size > drained:
                        break
    except TimeoutError as error:
        message = f"The body did not come within {limits.body_seconds:g} s."
        raise APIError(408, message, "timeout") from error
    if max(size, announced) > most:
        message = f"The body has more than {most} bytes; prompts go up to {limits.context} tokens here."
        raise APIError(413, message, "request_too_large")
    return bytes(body)


# --- around the endpoints


class Guard:
    """Refuses requests without the API key, and with names of other hosts where only this machine shall ask."""

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: tuple[str, ...] | None):
        self.app, self.hosts = app, hosts
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._refusal(scope)):
            await refused(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> APIError | None:
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.hosts is not None and name.lower() not in self.hosts:  # a page may give its own name this address
            return APIError(403, f"Host {host[:200]!r}: this server is for {', '.join(self.hosts)}.", "wrong_host")
        given = headers.get(b"authorization", b"")
        if self.expected and scope["path"] not in OPEN and not hmac.compare_digest(given, self.expected):
            return APIError(401, "Wrong or no API key: send Authorization: Bearer KEY.", "invalid_api_key")
        return None


def refused(error: APIError) -> Response:
    """Where the body may not have been read the connection cannot be used again."""
    close = {"Connection": "close"} if error.status in (401, 403, 408, 413, 415) else {}
    return JSONResponse(error.body, error.status, error.headers | close)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return refused(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or another method."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    message = f"{request.method} {request.url.path[:200]}: {status.phrase.lower()}."
    found = APIError(status, message, status.name.lower())
    return JSONResponse(found.body, status, {**(error.headers or {}), "Connection": "close"})


async def _gone(request: Request, error: Exception) -> Response:
    return Response()  # nobody reads it


async def _fault(request: Request, error: Exception) -> Response:
    return JSONResponse(APIError(500, "The server failed; its log says why.", "server_failed").body, 500)


def make_app(app: App, api_key: str | None, hosts: tuple[str, ...] | None) -> Starlette:
    """
    Args:
        api_key: asked of every request but those for the page and /health.
        hosts: names in the Host header that are answered; None: all.
    """
    return Starlette(
        routes=[
            Route("/", app.page),
            Route("/health", app.health),
            Route("/metrics", app.counts),
            Route("/v1/models", app.models),
            Route("/v1/models/{name:path}", app.model),
            Route("/v1/completions", app.completions, methods=["POST"]),
            Route("/v1/chat/completions", app.chat, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, api_key=api_key, hosts=hosts)],
        exception_handlers={
            APIError: _api_error, HTTPException: _http_error, ClientDisconnect: _gone, Exception: _fault,
        },
    )  # fmt: skip
