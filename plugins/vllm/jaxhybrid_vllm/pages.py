"""An export's linear mixers over pages: states of many sequences in a few large tensors. torch and transformers only.

Axes: B sequences, L new tokens of each, P pages; those of states are the mixer's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from .exported.configuration_jaxhybrid import JaxHybridConfig
from .exported.decoder_layer_jaxhybrid import LINEAR_MIXERS
from .exported.linear_attention_jaxhybrid import JaxHybridLinearAttention

LINEAR = "linear_attention"
# Windows of softmax attention count in whole numbers what they hold; pages are of float32.
MIXERS = {name: mixer for name, mixer in LINEAR_MIXERS.items() if issubclass(mixer, JaxHybridLinearAttention)}


@dataclass
class Pages:
    """Where sequences that go on together have a layer's states.

    Attributes:
        inputs: the convolution's last inputs, [P,...] float32.
        states: of the recurrence, [P,N,K,K] float32.
        slots: the page of each sequence, [B] int64.
        started: whether they have a past. A page is never cleared: a sequence without one does not read it.
    """

    inputs: torch.Tensor
    states: torch.Tensor
    slots: torch.Tensor
    started: bool

    def read(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (self.inputs[self.slots], self.states[self.slots]) if self.started else (None, None)

    def write(self, last_inputs: torch.Tensor, state: torch.Tensor) -> None:
        self.inputs[self.slots] = last_inputs
        self.states[self.slots] = state


@dataclass(frozen=True)
class Group:
    """Sequences of a step with as many new tokens, that all have a past or all have none.

    Attributes:
        tokens: where their tokens are in the step, [B,L] int64.
        slots: as in `Pages`.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    started: bool


def grouped(starts: Sequence[int], lengths: Sequence[int], slots: torch.Tensor) -> list[Group]:
    """The sequences of a step.

    starts: where each one's new tokens begin in the step, and after the last where they end, [B+1].
    lengths: tokens of each with the new ones, [B].
    slots: [B]
    """
    alike: dict[tuple[int, bool], list[int]] = {}
    for number, length in enumerate(lengths):
        new = starts[number + 1] - starts[number]
        if new:  # else a row that fills up the batch
            alike.setdefault((new, length > new), []).append(number)
    groups = []
    for (new, started), numbers in alike.items():
        first = torch.tensor([starts[number] for number in numbers], device=slots.device)
        tokens = first[:, None] + torch.arange(new, device=slots.device)
        groups.append(Group(tokens, slots[torch.tensor(numbers, device=slots.device)].long(), started))
    return groups


@cache
def paged(mixer: type[JaxHybridLinearAttention]) -> type[JaxHybridLinearAttention]:
    """The mixer with `Pages` for its cache."""

    class Paged(mixer):  # type: ignore[misc, valid-type]
        def read(self, cache: Pages | None) -> Any:
            return (None, None) if cache is None else cache.read()

        def write(self, cache: Pages | None, last_inputs: torch.Tensor, state: torch.Tensor) -> None:
            if cache is not None:
                cache.write(last_inputs, state)

    return Paged


def make_mixer(config: JaxHybridConfig, layer: int) -> JaxHybridLinearAttention:
    """A linear layer of the config, over pages.

    Raises:
        ValueError: the config names a mixer that this package does not have.
    """
    if config.linear_mixer not in MIXERS:
        raise ValueError(f"linear_mixer {config.linear_mixer!r} is not one of {', '.join(MIXERS)}.")
    mixer = paged(MIXERS[config.linear_mixer])(config, layer)
    for name, parameter in mixer.named_parameters():
        if name.split(".")[0] in mixer.float32:
            parameter.data = parameter.data.float()
    return mixer


def state_shapes(config: JaxHybridConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a sequence's last inputs and state in a linear layer: what the layer writes for a token."""

    class Shapes(Pages):
        def __init__(self) -> None:
            self.started = False

        def write(self, last_inputs: torch.Tensor, state: torch.Tensor) -> None:
            self.seen = tuple(last_inputs.shape[1:]), tuple(state.shape[1:])

    shapes = Shapes()
    with torch.device("cpu"), FakeTensorMode():  # shapes alone: nothing is allocated
        mixer = make_mixer(config, config.layer_types.index(LINEAR))
        turn = torch.empty(1, 1, 1, config.head_dim)
        token = torch.empty(1, 1, config.hidden_size, dtype=mixer.o_proj.weight.dtype)
        mixer(token, (turn, turn), shapes, None, None)
    return shapes.seen
