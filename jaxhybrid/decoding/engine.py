"""Texts in slots: each slot is a row of the decoding state, filled with a prompt and freed while others go on.

The state (caches and memories) stays on the devices and is written in place. All that is small is kept here, on the
host, and goes along with every call: last tokens, lengths, how tokens are chosen, what ends a text. Few programs are
compiled, for all sizes come in steps: rows, tokens of a chunk, places in the caches, tokens between two looks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.decoding.sampling import Sampling, SamplingRows, choose, in_rows
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.model import decode
from jaxhybrid.model.config import FULL_ATTENTION, ModelConfig
from jaxhybrid.model.decode import Chunk, LayerStates, Unstacked
from jaxhybrid.model.head import Head
from jaxhybrid.model.layers import layer_views
from jaxhybrid.model.partition import head_spec, on_shards, row_devices, rows_sharding
from jaxhybrid.model.transformer import Model

CHUNK = 32, 2048  # fewest and most tokens of a row in a chunk of a prompt
CHUNK_TOKENS = 16384  # of all rows of a device together, at most, where that leaves 64 of a row
CAPACITY = 256  # fewest places in a cache
STEPS = 8, 32  # tokens between two looks of the host: for short answers, and for others
END_IDS = 8  # room for so many end tokens, or for twice, four times as many
NO_TOKEN = -1
GREEDY = Sampling()


@dataclass(frozen=True)
class Request:
    """A prompt, and how its answer is made."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    end_ids: tuple[int, ...] = ()  # tokens that end the answer; the one that did is its last


class Rows(NamedTuple):
    """What a step is told of each row: arrays [B], or [B,...]."""

    token: Any  # int32: the text's last token, which is not in the state yet
    length: Any  # int32: tokens in the state
    left: Any  # int32: tokens that may still come; 0 where the slot is idle
    ends: Any  # int32 [B,E]: end tokens, NO_TOKEN beside them
    sampling: SamplingRows
    seen: Any  # bool [B,S]: tokens that occurred; None where no row has a repetition penalty


class Engine:
    """A model with slots for texts.

    engine = Engine(model, slots=4)
    engine.prefill({0: Request(prompt, max_new_tokens=100)})
    while engine.busy:
        for slot, tokens in engine.step().items():
            ...                                  # as they come; `engine.stop(slot)` ends a text early
        # engine.prefill({engine.idle[0]: ...})  # the other slots' texts stay as they are

    On a mesh the slots are split over the devices of `data`, `fsdp` and `context`, heads over `tensor`; it has to be
    active in every call.
    """

    def __init__(self, model: Model, slots: int, *, dtype: Any = jnp.float32, consume: bool = False):
        """
        Args:
            slots: texts at once, rounded up to a multiple of the devices; each number has programs of its own.
            dtype: of weights, caches and computation.
            consume: the model's stacks of layers are deleted, for weights are held layer by layer here.
        """
        if slots < 1:
            raise ConfigError(f"slots={slots}: an engine needs at least one.")
        mesh = jax.sharding.get_mesh()
        self.mesh = None if mesh.empty else mesh
        self.devices = 1 if self.mesh is None else row_devices(self.mesh)
        self.slots = -(-slots // self.devices) * self.devices
        self.dtype = jnp.dtype(dtype)
        self.model = decode.unstack(model, self.dtype, consume=consume)
        self.capacity = 0
        self.states: LayerStates = ()
        self.texts: dict[int, list[int]] = {}  # of busy slots: prompt and answer so far
        self.requests: dict[int, Request] = {}

    @property
    def busy(self) -> list[int]:
        """Slots whose text is not finished."""
        return sorted(self.texts)

    @property
    def idle(self) -> list[int]:
        return [slot for slot in range(self.slots) if slot not in self.texts]

    def stop(self, slot: int) -> None:
        """Ends the text in a slot, if there is one."""
        self.texts.pop(slot, None)
        self.requests.pop(slot, None)

    def clear(self) -> None:
        """Ends all texts and frees the state, whatever it is: a call that failed on the devices leaves none."""
        self.texts, self.requests, self.states, self.capacity = {}, {}, (), 0

    # --- prompts

    def prefill(self, requests: Mapping[int, Request]) -> None:
        """Reads prompts into idle slots, all but their last token, which the next step takes.

        Raises:
            DataError: a prompt is empty, or holds a token outside the vocabulary.
            ConfigError: a slot is busy or does not exist, or a request asks for no tokens.
        """
        for slot, request in requests.items():
            if slot not in self.idle:
                raise ConfigError(f"Slot {slot} is busy or does not exist; idle are {self.idle}.")
            check_request(request, slot, self.model.config)
        if not requests:
            return
        prompts = {slot: list(request.prompt) for slot, request in requests.items()}
        longest = max(map(len, prompts.values())) - 1
        places, rows = self._places(list(prompts))
        tokens = np.zeros((len(places), longest), np.int32)
        lengths = np.zeros(len(places), np.int32)
        for row, place in enumerate(places):
            if place is not None:
                lengths[row] = len(prompts[place]) - 1
                tokens[row, : lengths[row]] = prompts[place][:-1]
        sizes = chunk_sizes(longest, len(places) // self.devices)
        self.reserve(max(sum(sizes), longest + 1))
        for number, size in enumerate(sizes):
            first = sum(sizes[:number])
            part = tokens[:, first : first + size]
            part = np.pad(part, ((0, 0), (0, size - part.shape[1])))
            counts = np.clip(lengths - first, 0, size).astype(np.int32)
            self._read(part, Chunk(np.int32(first), counts, np.int32(longest + 1), rows))  # type: ignore[arg-type]
        self.texts |= prompts
        self.requests |= requests

    def _places(self, slots: list[int]) -> tuple[list[int | None], np.ndarray | None]:
        """The slot of each row of a chunk, and its number on its device; no numbers where a chunk is all slots."""
        own = self.slots // self.devices
        by_device = [[slot for slot in slots if slot // own == device] for device in range(self.devices)]
        width = power_of_two(max(map(len, by_device)))
        if width >= own and not self.texts:
            return [slot if slot in slots else None for slot in range(self.slots)], None
        filled = [[*found, *[None] * (width - len(found))] for found in by_device]
        places = [slot for device in filled for slot in device]
        return places, np.array([own if slot is None else slot % own for slot in places], np.int32)

    def _read(self, tokens: np.ndarray, chunk: Chunk) -> None:
        placed = self._placed(tokens)
        chunk = chunk._replace(counts=self._placed(chunk.counts), rows=self._placed(chunk.rows))
        x = _embedded(self.model, placed)
        states = list(self.states)
        self.states = ()  # given away layer by layer
        config = self.model.config
        for layer, (kind, view) in enumerate(zip(config.layer_types, layer_views(config))):
            x, states[layer] = _prefill_layer(
                config, kind, self.model.layers[layer], x, states[layer], chunk, view=view
            )
        self.states = tuple(states)

    def reserve(self, places: int) -> None:
        """Has the caches hold so many tokens a row; what they hold stays. Calls that need more do it by themselves."""
        if places <= self.capacity:
            return
        capacity = max(rounded(places), CAPACITY)
        if not self.capacity:
            self.states = _initial_states(self.model.config, self.slots, capacity, self.dtype)
        elif not self.texts:  # nothing to keep
            self.states = ()
            self.states = _initial_states(self.model.config, self.slots, capacity, self.dtype)
        else:
            for state in (s for s, kind in zip(self.states, self.model.config.layer_types) if kind == FULL_ATTENTION):
                for name in state:  # one after the other: the old one is gone before the next is made
                    state[name] = _grown(state[name], capacity)
        self.capacity = capacity

    def _placed(self, x: Any) -> Any:
        return x if self.mesh is None or x is None else jax.device_put(x, rows_sharding(self.mesh))

    # --- answers

    def step(self, steps: int | None = None) -> dict[int, list[int]]:
        """Up to `steps` more tokens of every busy slot, by slot; one that has ended is idle afterwards.

        Args:
            steps: of the loop on the devices; each number is a program. None: 32, or 8 if no text wants more.

        Raises:
            ConfigError: `steps` is less than 1; all texts stay as they are.
        """
        if steps is not None and steps < 1:
            raise ConfigError(f"steps={steps}: a call makes at least 1 token.")
        if not self.texts:
            return {}
        left = {slot: request.max_new_tokens - self._made(slot) for slot, request in self.requests.items()}
        if steps is None:
            steps = STEPS[max(left.values()) > STEPS[0]]
        self.reserve(max(len(text) + min(steps, left[slot]) for slot, text in self.texts.items()))
        settings = [self.requests[slot].sampling if slot in self.texts else GREEDY for slot in range(self.slots)]
        rows = jax.tree.map(self._placed, self._rows(left, settings))
        drawn = any(setting.temperature > 0 for setting in settings)
        produced, self.states = _steps(self.model, self.states, rows, steps=steps, drawn=drawn)
        found = {}
        for slot, tokens in zip(range(self.slots), np.asarray(produced).tolist()):
            if slot not in self.texts:
                continue
            found[slot] = [token for token in tokens if token != NO_TOKEN]
            self.texts[slot] += found[slot]
            if found[slot][-1] in self.requests[slot].end_ids or len(found[slot]) == left[slot]:
                self.stop(slot)
        return found

    def _made(self, slot: int) -> int:
        return len(self.texts[slot]) - len(self.requests[slot].prompt)

    def _rows(self, left: dict[int, int], settings: list[Sampling]) -> Rows:
        room = END_IDS
        while room < max(len(request.end_ids) for request in self.requests.values()):
            room *= 2
        token, length, still = (np.zeros(self.slots, np.int32) for _ in range(3))
        ends_of = np.full((self.slots, room), NO_TOKEN, np.int32)
        is_penalized = any(setting.repetition_penalty != 1 for setting in settings)
        seen = np.zeros((self.slots, self.model.config.vocab_size), bool) if is_penalized else None
        for slot, text in self.texts.items():
            ends = self.requests[slot].end_ids
            token[slot], length[slot], still[slot] = text[-1], len(text) - 1, left[slot]
            ends_of[slot, : len(ends)] = ends
            if seen is not None:
                seen[slot, text] = True
        return Rows(token, length, still, ends_of, in_rows(settings), seen)


def check_request(request: Request, number: int, config: ModelConfig) -> None:
    """Raises what `Engine.prefill` raises for a request; `number` is the prompt's in the message."""
    if request.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={request.max_new_tokens}: ask for at least 1.")
    if not len(request.prompt):
        raise DataError(f"Prompt {number} is empty; give it at least one token (the model's start or end token, say).")
    if worst := [token for token in request.prompt if not 0 <= token < config.vocab_size]:
        raise DataError(f"Prompt {number} has token {worst[0]}; the vocabulary has {config.vocab_size}.")


def power_of_two(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()


def rounded(least: int) -> int:
    """The next 2^k or 3 * 2^k: at most half as many more than are asked for."""
    whole = power_of_two(least)
    return whole * 3 // 4 if whole > 3 and whole * 3 // 4 >= least else whole


def chunk_sizes(tokens: int, rows: int) -> list[int]:
    """Tokens of each chunk of prompts of up to `tokens`: whole ones, then the power of two that holds the rest.

    There is one chunk at least: the first begins a row's state anew.
    """
    least, most = CHUNK
    size = min(most, max(64, power_of_two(CHUNK_TOKENS // rows + 1) // 2))
    whole, rest = divmod(tokens, size)
    return [size] * whole + [max(least, power_of_two(rest))] * (rest > 0 or not whole)


# --- the programs; each that takes states gives their memory to what it returns

_embedded = jax.jit(decode.embedded)
_prefill_layer = jax.jit(decode.prefill_layer, static_argnums=(0, 1), static_argnames="view", donate_argnames="state")
_initial_states = jax.jit(decode.initial_states, static_argnums=(0, 1, 2, 3))
_grown = jax.jit(decode.grown, static_argnames="capacity")


@partial(jax.jit, static_argnames=("steps", "drawn"), donate_argnames="states")
def _steps(
    model: Unstacked, states: LayerStates, rows: Rows, *, steps: int, drawn: bool
) -> tuple[jax.Array, LayerStates]:
    """[B,steps] next tokens, NO_TOKEN after a row's end: one loop on the devices."""
    config = model.config

    def local(ends: Any, head: Head, layers: Any, states: LayerStates, rows: Rows) -> Any:
        own = replace(model, ends=ends, layers=layers)
        columns = decode.columns_of(own, head)

        def advance(carry: tuple[Rows, LayerStates], _: None) -> tuple[tuple[Rows, LayerStates], jax.Array]:
            rows, states = carry
            active = rows.left > 0
            logits, states = decode.decode_own_token(own, columns, rows.token, states, rows.length)
            length = rows.length + active
            token = choose(logits, rows.sampling, length, rows.seen, drawn=drawn)
            token = jnp.where(active, token, rows.token)
            ended = jnp.any(token[:, None] == rows.ends, axis=1)
            seen = rows.seen
            if seen is not None:
                seen = seen.at[jnp.arange(len(token)), token].set(True)
            left = jnp.where(active & ~ended, rows.left - 1, 0)
            rows = rows._replace(token=token, length=length, left=left, seen=seen)
            return (rows, states), jnp.where(active, token, NO_TOKEN)

        (_, states), tokens = jax.lax.scan(advance, (rows, states), None, length=steps)
        return tokens.T, states

    (ends_at, layers_at), states_at, head = model.specs, decode.states_specs(config), model.model.head
    specs = ends_at, head_spec(*head.shape), layers_at, states_at, decode.ROWS
    return on_shards(local, (model.ends, head, model.layers, states, rows), specs, (decode.ROWS, states_at))
