"""Counts of what a server does, as Prometheus reads them: plain text."""

import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

if TYPE_CHECKING:
    from jaxhybrid.serve.served import Served

WINDOW = 10.0  # seconds over which tokens a second are counted


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="jaxhybrid", registry=self.registry)
        gauge = partial(Gauge, namespace="jaxhybrid", registry=self.registry)
        self.requests = counter("requests", "Requests by how they ended", ("model", "outcome"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read", ("model",))
        self.answer_tokens = counter("answer_tokens", "Tokens that were made", ("model",))
        self.waiting = gauge("waiting", "Requests in the queue", ("model",))
        self.running = gauge("running", "Texts under way", ("model",))
        self.speed = gauge("tokens_per_second", f"Tokens made in the last {WINDOW:g} s, a second", ("model",))

    def of(self, name: str, served: "Served") -> "ModelMetrics":
        return ModelMetrics(self, name, served)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class ModelMetrics:
    """The counts of one model."""

    def __init__(self, metrics: Metrics, name: str, served: "Served"):
        self.prompt_tokens = metrics.prompt_tokens.labels(name)
        self._requests, self._name = metrics.requests, name
        self._answer_tokens = metrics.answer_tokens.labels(name)
        self._recent: deque[tuple[float, int]] = deque()
        metrics.waiting.labels(name).set_function(lambda: len(served.waiting))
        metrics.running.labels(name).set_function(lambda: len(served.running))
        metrics.speed.labels(name).set_function(self._speed)

    def ended(self, outcome: str) -> None:
        self._requests.labels(self._name, outcome).inc()

    def made(self, tokens: int) -> None:
        self._answer_tokens.inc(tokens)
        now = time.monotonic()
        self._recent.append((now, tokens))
        while self._recent[0][0] < now - WINDOW:
            self._recent.popleft()

    def _speed(self) -> float:
        begin = time.monotonic() - WINDOW
        return sum(tokens for when, tokens in list(self._recent) if when >= begin) / WINDOW
