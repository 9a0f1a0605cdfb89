"""Independent chains of operations, written one step at a time so that one hides the latency of another.

A chain is a generator that yields between steps. The compiler keeps roughly to the order in which operations were
written: steps of different heads must alternate there.
"""

from collections.abc import Generator
from typing import Any

type Chain[T] = Generator[None, None, T]


def take_turns[T](chains: list[Chain[T]]) -> list[T]:
    """Runs all chains to their ends, one step of each at a time, and returns their results in order."""
    together = abreast(chains)
    while True:
        try:
            next(together)
        except StopIteration as end:
            return end.value


def abreast[T](chains: list[Chain[T]]) -> Chain[list[T]]:
    """All chains as one, each of whose steps is one step of every chain; gives their results in order."""
    results: dict[int, Any] = {}
    while len(results) < len(chains):
        for index, chain in enumerate(chains):
            if index in results:
                continue
            try:
                next(chain)
            except StopIteration as end:
                results[index] = end.value
        yield
    return [results[index] for index in range(len(chains))]
