"""Softmax attention to the last tokens of a document, and to its first few: sliding windows with attention sinks.

A query sees the `window` tokens up to itself, and the first `sinks` of its document (arXiv 2309.17453), at the
positions that they have in it. It is the teacher's attention otherwise, and begins with all of its weights.
"""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.attention import Attention, written
from jaxhybrid.model.blueprint import Params
from jaxhybrid.model.config import MixerConfig, ModelConfig, option
from jaxhybrid.model.layers import TokenContext, segment_positions, segment_starts
from jaxhybrid.model.partition import own_heads
from jaxhybrid.model.softmax import Window, causal_attention, decode_attention

PLACES = 64  # a cache's places are a multiple of this, as kernels of decoding want them


@dataclass(frozen=True)
class WindowAttentionConfig(MixerConfig):
    """What a layer sees; all else is the teacher's."""

    kind = "window_attention"

    window: int = option(1024, "tokens that a layer with a sliding window sees, its own among them")
    sinks: int = option(0, "first tokens of a document that it sees besides, attention sinks")

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"mixer.window={self.window}: a token sees itself at least; use 1 or more.")
        if self.sinks < 0:
            raise ConfigError(f"mixer.sinks={self.sinks}: use 0 for no sinks, or how many tokens there are.")

    def resolve(self, teacher: ModelConfig) -> Self:
        context, own = teacher.max_position_embeddings, teacher.window
        if self.window + self.sinks >= context:
            raise ConfigError(
                f"mixer.window={self.window} with mixer.sinks={self.sinks} holds the whole context of the teacher, "
                f"{context} tokens: the layer would be softmax attention. Use a shorter window."
            )
        if own is not None and (self.window > own.size or self.sinks):
            warnings.warn(
                f"mixer.window={self.window}, mixer.sinks={self.sinks}: the teacher's layers {list(own.layers)} see "
                f"{own.size} tokens and no others; one that is converted sees more than it did.",
                stacklevel=3,
            )
        return self


class WindowAttention(Attention):
    """Keys and values of `sinks` tokens, then a ring of `window`; which place is whose follows from the count."""

    Config: ClassVar[type[MixerConfig]] = WindowAttentionConfig
    title: ClassVar[str] = "softmax attention in a sliding window, arXiv 2309.17453"
    joins = False  # `token` knows no ring
    state_heads: ClassVar[dict[str, int | None]] = {"k": 1, "v": 1, "count": None}

    def __init__(self, config: ModelConfig, rngs: Any):
        super().__init__(config, rngs)
        self.rope, self.scales_by_length = True, False  # `softmax.` settings are of the layers that are kept
        self.size, self.sinks = _sizes(config)
        self.places = self.size + self.sinks

    @staticmethod
    def initial_state(config: ModelConfig, batch: int, capacity: int, dtype: Any) -> Params:
        """Of one layer, of this device's heads: caches [B,G,places,K], and how many tokens of the document were read.

        It does not depend on `capacity`.
        """
        places = sum(_sizes(config))
        shape = (batch, own_heads(config.num_kv_heads), places + -places % PLACES, config.head_dim)
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "count": jnp.zeros((batch,), jnp.int32)}

    @staticmethod
    def from_attention(attention: Params, config: ModelConfig) -> Params:
        """All of it: see `LinearMixer.from_attention`."""
        return attention

    @staticmethod
    def by_depth(depths: jax.Array, config: ModelConfig) -> Params:
        """Nothing depends on where a layer is."""
        return {}

    @classmethod
    def describe(cls, config: ModelConfig) -> list[str]:
        """A layer in a few words each, for the model card."""
        size, sinks = _sizes(config)
        return [f"a window of {size} tokens", *[f"{sinks} attention sinks"] * (sinks > 0)]

    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, state: Params | None = None
    ) -> tuple[jax.Array, Params | None]:
        """As `Attention`. A state knows by itself how far its document is, and `context` need not say it."""
        q, k, v = self.projected(x_BTD, context)
        if state is None:
            return self.o_proj(self.over_row(q, k, v, context)), None
        if context.segment_ids is None:
            out, state = self.one_token(q, {"k": k, "v": v}, state)
        else:
            out, state = self.chunk(q, {"k": k, "v": v}, context, state)
        return self.o_proj(out), state

    def sees(self, context: TokenContext) -> Window:
        return Window(self.size, True, self.sinks)

    def place(self, number: jax.Array) -> jax.Array:
        """Where in the caches a document's token of this number is held."""
        return jnp.where(number < self.sinks, number, self.sinks + (number - self.sinks) % self.size)

    def one_token(self, q: jax.Array, new: Params, state: Params) -> tuple[jax.Array, Params]:
        """Of every row: all that the caches hold is seen, so only where they are filled matters."""
        count = state["count"]
        caches = written({name: state[name] for name in new}, new, self.place(count))
        last = jnp.minimum(count, self.places - 1)
        out = decode_attention(q[:, 0], caches["k"], caches["v"], last, cap=self.cap)[:, None]
        return out, caches | {"count": count + 1}

    def chunk(self, q: jax.Array, new: Params, context: TokenContext, state: Params) -> tuple[jax.Array, Params]:
        """Of [B,T,heads,K], with documents by their ids: the state's goes on in the row's first run.

        The keys at hand are those of the state in their order, then the chunk's: a row in which the sinks are the
        document's first tokens, and what the state has dropped in between is beyond every window.
        """
        ids, count = context.segment_ids, state["count"]
        assert ids is not None
        T = ids.shape[1]
        held = jnp.arange(self.places, dtype=jnp.int32)
        order = held - jnp.maximum(self.places - count, 0)[:, None]  # below 0: nothing is held yet
        number = jnp.where(order < self.sinks, order, count[:, None] - self.places + held)
        before = self.place(number)
        key_ids = jnp.concatenate([jnp.where(order >= 0, ids[:, :1], -1), ids], axis=1)
        keys = {
            name: jnp.concatenate([jnp.moveaxis(_taken(state[name], before), 2, 1), x], axis=1)
            for name, x in new.items()
        }
        out = causal_attention(
            q, keys["k"], keys["v"], None,
            key_segment_ids=key_ids, first_query=jnp.int32(self.places), window=self.sees(context), cap=self.cap,
        )  # fmt: skip

        starts = segment_starts(ids)
        numbers = segment_positions(ids) + jnp.where(starts == 0, count[:, None], 0)
        last = jnp.max(jnp.where(ids != 0, jnp.arange(T, dtype=jnp.int32), -1), axis=1, keepdims=True)
        start, reached = (jnp.take_along_axis(x, jnp.maximum(last, 0), axis=1) for x in (starts, numbers))
        # Of each place the newest token of the last document that belongs there, by its place in the chunk.
        place = jnp.arange(state["k"].shape[2], dtype=jnp.int32)
        newest = jnp.where(place < self.sinks, place, reached - (reached - place) % self.size)
        source = newest - reached + last
        is_new = (last >= 0) & (place <= reached) & (source >= start)
        caches = {
            name: jnp.where(is_new[:, None, :, None], _taken(jnp.moveaxis(x, 1, 2), source), state[name])
            for name, x in new.items()
        }
        return out, caches | {"count": jnp.where(last[:, 0] < 0, count, reached[:, 0] + 1)}


def _sizes(config: ModelConfig) -> tuple[int, int]:
    """Tokens of the window, and sinks."""
    assert isinstance(config.mixer, WindowAttentionConfig)
    return config.mixer.window, config.mixer.sinks


def _taken(x_BGMK: jax.Array, places_BN: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BGMK, places_BN[:, None, :, None], axis=2, mode="clip")
