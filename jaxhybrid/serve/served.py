"""A model that is served: its engine, the requests that wait for a slot, and those in the slots."""

import asyncio
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from typing import Any

import jax

from jaxhybrid.complete import PENALTY, open_model, own_penalty
from jaxhybrid.decoding.engine import STEPS, Engine, Request, chunk_sizes
from jaxhybrid.decoding.sampling import Sampling
from jaxhybrid.errors import ConfigError
from jaxhybrid.serve.errors import APIError, stopping
from jaxhybrid.serve.limits import Limits
from jaxhybrid.serve.metrics import Metrics

STEP = STEPS[0]  # tokens of every text between two looks at what has changed
ROUND = 2048  # tokens of prompts after which the texts under way get their next step


class Ticket:
    """A request on its way, held by who waits for the answer. The engine's thread puts in, the event loop takes out."""

    def __init__(self, request: Request, seconds: float):
        self.request = request
        self.deadline = time.monotonic() + seconds
        self.is_cancelled = False
        self.outcome = "cancelled"  # what it is counted as when nobody waits for it any more
        self.prompt_seconds = self.answer_seconds = 0.0  # that the engine worked on it, compilation included
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[int] | APIError | None] = asyncio.Queue()

    async def tokens(self) -> AsyncIterator[list[int]]:
        """The answer's tokens as they come.

        Raises:
            APIError: the server ends the text before its end.
        """
        while (item := await self._queue.get()) is not None:
            if isinstance(item, APIError):
                raise item
            yield item

    def put(self, item: list[int] | APIError | None) -> None:
        """More tokens, the reason why no more come, or None after the last ones."""
        if not self.is_cancelled:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


@dataclass(frozen=True)
class Model:
    """What is asked of a model besides the engine's work."""

    name: str
    vocabulary: Any
    ends: tuple[int, ...]
    penalty: float  # repetition penalty of requests that say nothing of it

    @property
    def has_chat(self) -> bool:
        return bool(self.vocabulary.tokenizer.chat_template)


class Served:
    """`submit` and `cancel` are for the event loop, all else is for the engine's thread."""

    def __init__(self, model: Model, engine: Engine, limits: Limits, metrics: Metrics, changed: Condition):
        self.model, self.engine, self.limits, self.changed = model, engine, limits, changed
        self.metrics = metrics.of(model.name, self)
        self.waiting: deque[Ticket] = deque()
        self.running: dict[int, Ticket] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # --- from the event loop

    def submit(self, request: Request) -> Ticket:
        """Puts a request into the queue.

        Raises:
            APIError: the queue is full.
        """
        with self.changed:
            if len(self.waiting) >= self.limits.queue:
                self.metrics.ended("refused")
                message = f"{self.limits.queue} requests wait for {self.model.name} already; ask again in a moment."
                raise APIError(429, message, "queue_full", retry_after=2)
            ticket = Ticket(request, self.limits.request_seconds)
            self.waiting.append(ticket)
            self.changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its place is free, in the queue at once. One that has ended stays as it is."""
        with self.changed:
            ticket.is_cancelled = True
            if ticket in self.waiting:
                self.waiting.remove(ticket)
                self.metrics.ended(ticket.outcome)
            self.changed.notify()

    # --- in the engine's thread

    def round(self, is_cut: bool = False) -> None:
        """Texts that are over leave, prompts take idle slots, and each text gets its next tokens."""
        with self.changed:
            over = {ticket: self._over(ticket, is_cut) for ticket in (*self.waiting, *self.running.values())}
            self.waiting = deque(ticket for ticket in self.waiting if over[ticket] is None)
        for slot in [slot for slot, ticket in self.running.items() if over[ticket] is not None]:
            self.engine.stop(slot)
            del self.running[slot]
        for ticket, found in over.items():
            if found is not None:
                outcome, error = found
                self.metrics.ended(outcome)
                ticket.put(error)
        try:
            self._admit()
            self._step()
        except Exception:  # the state may be gone: nothing that is in it can go on
            traceback.print_exc()
            self.engine.clear()
            for ticket in self.running.values():
                self.metrics.ended("failed")
                ticket.put(APIError(500, "The engine failed; the server's log says why.", "engine_failed"))
            self.running.clear()

    def _over(self, ticket: Ticket, is_cut: bool) -> tuple[str, APIError | None] | None:
        """Why a text ends before its end: for the metrics, and for its client."""
        if ticket.is_cancelled:
            return ticket.outcome, None
        if is_cut:
            return "cut", stopping()
        if time.monotonic() > ticket.deadline:
            seconds = self.limits.request_seconds
            return "timeout", APIError(504, f"No whole answer within the {seconds:g} s of a request.", "timeout")
        return None

    def _admit(self) -> None:
        read = 0
        while self.engine.idle and read < ROUND:
            with self.changed:
                if not self.waiting:
                    return
                ticket = self.waiting.popleft()
            slot = self.engine.idle[0]
            self.running[slot] = ticket
            begin = time.monotonic()
            self.engine.prefill({slot: ticket.request})
            jax.block_until_ready(self.engine.states)
            ticket.prompt_seconds = time.monotonic() - begin
            read += len(ticket.request.prompt)
            self.metrics.prompt_tokens.inc(len(ticket.request.prompt))

    def _step(self) -> None:
        begin = time.monotonic()
        for slot, tokens in self.engine.step(STEP).items():
            ticket = self.running[slot]
            ticket.answer_seconds += time.monotonic() - begin
            self.metrics.made(len(tokens))
            ticket.put(tokens)
            if slot not in self.engine.busy:
                del self.running[slot]
                self.metrics.ended("answered")
                ticket.put(None)


def open_served(
    folder: str, name: str, limits: Limits, metrics: Metrics, changed: Condition, mesh: Any, dtype: str
) -> Served:
    """Loads a model, sees that the memory for the longest texts in all slots is there, and compiles the first programs.

    Raises:
        ConfigError: the memory is not there; says what to lower.
    """
    model, vocabulary, ends = open_model(folder, mesh=mesh, dtype=dtype, applied=[PENALTY])
    engine = Engine(model, limits.slots, dtype=dtype, consume=True)
    try:
        engine.reserve(max(sum(chunk_sizes(limits.context - 1, 1)), limits.context))
        jax.block_until_ready(engine.states)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"The state of {engine.slots} texts of {limits.context} tokens of {folder} does not fit into memory; "
            "lower --slots or --context, or use --dtype bfloat16."
        ) from error
    engine.clear()
    known = Model(name, vocabulary, tuple(ends), own_penalty(Path(model.folder)))
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature, repetition_penalty=known.penalty)
        engine.prefill({0: Request([vocabulary.end_id], 1, sampling)})
        engine.step(STEP)
    return Served(known, engine, limits, metrics, changed)
