"""The aligned student with any of its layers softmax, measured against its teacher by one program for every set."""

import math
from collections.abc import Collection, Sequence
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxhybrid.errors import DivergenceError
from jaxhybrid.evaluate.recall_prompts import RecallTask
from jaxhybrid.losses import CHUNK_TOKENS, linear_cross_entropy, next_token_targets, squared_error
from jaxhybrid.model.head import Head
from jaxhybrid.model.transformer import Model, hidden_states, outputs
from jaxhybrid.selection.cosine import block_cosines
from jaxhybrid.selection.questions import Answered, Prompts, answer
from jaxhybrid.stages.align import align_loss, linear_mixers
from jaxhybrid.stages.batch import Batch, count_tokens, token_mask
from jaxhybrid.stages.score import masked_kl
from jaxhybrid.train.loop import HostBatch
from jaxhybrid.train.placement import place_batch

# A share of the KL, and the batches it is measured on. A batch may hold `counted`, float32 [B,T]: 1 where tokens count.
Texts = Sequence[tuple[float, Sequence[HostBatch]]]


class MaskedStudent:
    """Which layers are softmax is a traced mask, so each function here is compiled once for each shape of batch.

    The teacher's hidden states are computed once per batch and stay on the devices, tokens x width in `dtype`.
    """

    def __init__(
        self,
        teacher: Model,
        student: Model,
        texts: Texts,
        mesh: Mesh,
        dtype: Any = jnp.bfloat16,
        chunk_tokens: int = CHUNK_TOKENS,
    ):
        """
        Args:
            teacher: in the compute dtype, placed on `mesh` as the student is.
            student: the all-linear student, with the teacher's attention of every layer beside its own mixers.
            texts: this process's rows; as many batches of each text.
        """
        self.teacher, self.mesh, self.dtype, self.chunk_tokens = teacher, mesh, dtype, chunk_tokens
        self._cast = jax.jit(lambda student: student.cast(dtype))
        self.student = self._cast(student)
        self.shares, self._host = zip(*texts)
        self.batches, self.depth = len(self._host[0]), student.config.num_layers
        assert {len(batches) for batches in self._host} == {self.batches}
        self._placed: dict[int, list[Batch]] = {}
        self._kls: dict[tuple[int, ...], list[list[float]]] = {}  # of a set: for each batch, a sum for each text
        self._counts: dict[int, list[float]] = {}
        self.head = jax.jit(lambda teacher: teacher.head.astype(dtype))(teacher)
        self._prepare = jax.jit(partial(_prepare, dtype=dtype))
        self._kl = jax.jit(partial(_kl, dtype=dtype, chunk_tokens=chunk_tokens))
        self._cross_entropy = jax.jit(partial(_cross_entropy, dtype=dtype))

    def kl(self, kept: Collection[int], batches: int | None = None) -> float:
        """KL(teacher, student with the layers `kept` softmax) in nats per token, over the first so many batches.

        Batches that were measured for this set before are not run again.
        """
        batches = self.batches if batches is None else batches
        name = tuple(sorted(kept))
        sums = self._kls.setdefault(name, [])
        for number in range(len(sums), batches):
            mask = self._mask(kept)
            parts = [self._kl(self.student, mask, batch, self.head) for batch in self.placed(number)]
            sums.append([float(part) for part in parts])
        totals = np.sum(sums[:batches], axis=0) / np.sum([self.counts(i) for i in range(batches)], axis=0)
        value = float(np.dot(self.shares, totals))
        return finite(value, f"KL of the student with layers {list(name)} softmax")

    def of(self, student: Model) -> "MaskedStudent":
        """The same text, teacher and programs with other parameters of the student."""
        other = copy(self)
        other.student, other._kls = self._cast(student), {}
        return other

    def tokens(self, batches: int | None = None) -> int:
        """Tokens of the first so many batches on all processes, padding included."""
        batches = self.batches if batches is None else batches
        return sum(batch["tokens"].size for number in range(batches) for batch in self.placed(number))

    def cross_entropy(self, kept: Collection[int]) -> float:
        """Of the student with the layers `kept` softmax, in nats per token that is predicted and counts."""
        mask, sums = self._mask(kept), np.zeros((len(self.shares), 2))
        for number in range(self.batches):
            batches = self.placed(number)
            sums += np.array([self._cross_entropy(self.student, mask, batch) for batch in batches], np.float64)
        value = float(np.dot(self.shares, sums[:, 0] / sums[:, 1]))
        return finite(value, f"cross entropy of the student with layers {sorted(kept)} softmax")

    def answer(self, prompts: Prompts | RecallTask, kept: Collection[int], rows: int) -> Answered:
        """How well the student with the layers `kept` softmax answers; `rows` prompts at once."""
        found = answer(self.student, prompts, self._mask(kept), rows=rows, dtype=self.dtype)
        finite(found.likelihood, f"log-likelihood of the answers of the student with layers {sorted(kept)} softmax")
        return found

    def activation_errors(self) -> list[float]:
        """Mean squared difference of each layer's attention output and its aligned mixer's, for the teacher's input."""
        measure = partial(align_loss, config=self.student.config, dtype=self.dtype, distance=squared_error)
        found = self._layer_means(measure, linear_mixers(self.student.params), self.teacher)
        return [finite(value, f"error of the mixer of layer {layer}") for layer, value in enumerate(found)]

    def block_cosines(self) -> list[float]:
        """Mean cosine of what goes into each of the teacher's blocks and what comes out."""
        found, remedy = self._layer_means(partial(block_cosines, dtype=self.dtype), self.teacher), "Try dtype=float32."
        return [finite(value, f"cosine of the teacher's block {layer}", remedy) for layer, value in enumerate(found)]

    def compiled(self) -> dict[str, int]:
        """How many executables each function has been compiled to."""
        used: dict[str, Any] = {"kl": self._kl, "teacher_forward": self._prepare}
        return {name: function._cache_size() for name, function in used.items()}

    def _layer_means(self, measure: Any, *models: Any) -> list[float]:
        """measure: of models and a batch, [L] means over its tokens."""
        compiled = jax.jit(measure)
        weights = [self.counts(number)[0] for number in range(self.batches)]
        means = [np.asarray(compiled(*models, self.placed(number)[0]), np.float64) for number in range(self.batches)]
        return np.average(means, axis=0, weights=weights).tolist()

    def _mask(self, kept: Collection[int]) -> np.ndarray:
        return np.isin(np.arange(self.depth), list(kept))

    def placed(self, number: int) -> list[Batch]:
        """Batch `number` of each text."""
        if number not in self._placed:
            placed = [place_batch(batches[number], self.mesh) for batches in self._host]
            self._placed[number] = [self._prepare(self.teacher, batch) for batch in placed]
        return self._placed[number]

    def counts(self, number: int) -> list[float]:
        """Tokens of each text that count in batch `number`."""
        if number not in self._counts:
            self._counts[number] = [max(float(batch["count"]), 1.0) for batch in self.placed(number)]
        return self._counts[number]


def finite(value: float, what: str, remedy: str = "Align again at a lower align.learning_rate.") -> float:
    """The value. Raises DivergenceError if it is no number."""
    if not math.isfinite(value):
        raise DivergenceError(f"The {what} is {value}. {remedy}")
    return value


def _prepare(teacher: Model, batch: Batch, *, dtype: Any) -> Batch:
    """The batch with what every set needs of it."""
    counted = batch.get("counted", token_mask(batch["segment_ids"]))
    hidden = hidden_states(teacher, batch["tokens"], batch["segment_ids"], dtype=dtype)
    return {**batch, "counted": counted, "teacher_hidden": hidden, "count": jnp.sum(counted)}


def _kl(student: Model, softmax: jax.Array, batch: Batch, head: Head, **static: Any) -> jax.Array:
    return masked_kl(student, softmax, batch, batch["counted"], head, **static)


def trained_kl(
    student: Model, softmax: jax.Array, teacher: Model, batch: Batch, *, dtype: Any, chunk_tokens: int
) -> jax.Array:
    """KL(teacher || student with these layers softmax) in nats per token of a batch of text, to train on."""
    hidden = hidden_states(teacher, batch["tokens"], batch["segment_ids"], dtype=dtype)
    batch, counted = {**batch, "teacher_hidden": hidden}, token_mask(batch["segment_ids"])
    static: dict[str, Any] = {"dtype": dtype, "remat": "block", "chunk_tokens": chunk_tokens}
    return masked_kl(student, softmax, batch, counted, teacher.head, **static) / count_tokens(batch)


def _cross_entropy(student: Model, softmax: jax.Array, batch: Batch, *, dtype: Any) -> tuple[jax.Array, jax.Array]:
    targets, mask = next_token_targets(batch["tokens"], batch["segment_ids"])
    mask = mask * batch["counted"]
    own = outputs(student, batch["tokens"], batch["segment_ids"], softmax=softmax, dtype=dtype)
    return linear_cross_entropy(*own, targets, mask), jnp.sum(mask)
