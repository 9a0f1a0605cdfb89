"""How the changes that single layers make to the logits add up: a quadratic form of the KL over sets of layers.

With teacher probabilities p and logits z, changes a and b have the product <a, b> = the mean over tokens of
sum_v p (a - E_p a)(b - E_p b), the Fisher metric: KL is half the square of a small change. Seen from the aligned
all-linear student, D_l is what making layer l softmax changes and r what is missing to the teacher; from the teacher,
D_l is what making layer l linear changes and nothing is missing:

    KL(changed layers C) ~ 1/2 <r, r> - sum_C <r, D_l> + 1/2 sum_C sum_C <D_l, D_m>
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxhybrid.evaluate.answers import softmax_states
from jaxhybrid.model.head import SHARERS, Head, gathered, in_chunks, log_partition, own_columns
from jaxhybrid.model.partition import BATCH_AXES, batch_spec, head_spec, on_shards, total
from jaxhybrid.selection.masked import MaskedStudent, finite
from jaxhybrid.stages.batch import Batch


@dataclass(frozen=True)
class QuadraticKl:
    """The KL of sets of changed layers, to second order."""

    products: np.ndarray  # [L,L]: <D_l, D_m>
    missing: np.ndarray  # [L]: <r, D_l>
    start: float  # 1/2 <r, r>

    def __call__(self, changed: Any) -> float:
        layers = sorted(changed)
        pairs = self.products[np.ix_(layers, layers)].sum()
        return float(self.start - self.missing[layers].sum() + 0.5 * pairs)

    def best(self, count: int) -> frozenset[int]:
        """The set of `count` changed layers with the lowest KL by the form: greedy, then by exchanges of one layer
        until none is better. Ties go to the lower layers."""
        changed, depth = frozenset[int](), len(self.missing)
        for _ in range(count):
            changed = min((changed | {layer} for layer in range(depth) if layer not in changed), key=self)
        while (better := min(self.neighbours(changed), key=self, default=changed)) and self(better) < self(changed):
            changed = better
        return changed

    def neighbours(self, changed: frozenset[int]) -> list[frozenset[int]]:
        """All sets with one layer exchanged for another."""
        others = [layer for layer in range(len(self.missing)) if layer not in changed]
        return [changed - {out} | {layer} for out in sorted(changed) for layer in others]


def quadratic_kl(student: MaskedStudent, softmax_first: bool) -> QuadraticKl:
    """Measured on the student's texts: from the teacher if `softmax_first`, else from the all-linear student.

    The hidden states of L + 1 students are held for a batch at a time, tokens x width each.
    """
    depth, layers = student.depth, np.arange(student.depth)
    start = np.full(depth, softmax_first)
    masks = [start, *(np.where(layers == layer, ~start, start) for layer in layers)]
    states = jax.jit(partial(softmax_states, dtype=student.dtype))
    add_up = jax.jit(partial(_products, vocab_size=student.student.config.vocab_size, chunk=student.chunk_tokens))
    sums = np.zeros((len(student.shares), depth + 1, depth + 1))
    for number in range(student.batches):
        for text, batch in enumerate(student.placed(number)):
            tokens = batch["tokens"], batch["segment_ids"]
            hidden = [states(student.student, *tokens, mask) for mask in masks]
            sums[text] += np.asarray(add_up(hidden, batch, student.head), np.float64)
    counts = np.sum([student.counts(number) for number in range(student.batches)], axis=0)
    whole = np.einsum("t,tab->ab", np.array(student.shares) / counts, sums)
    finite(float(whole.sum()), "quadratic form of the student's KL")
    return QuadraticKl(whole[1:, 1:], whole[0, 1:], 0.5 * float(whole[0, 0]))


def _products(hidden: list[jax.Array], batch: Batch, head: Head, *, vocab_size: int, chunk: int) -> jax.Array:
    """[L+1,L+1]: <a, b> summed over tokens, of what is missing (first) and of the changes.

    hidden: final states of the student that changes start from, and of each changed one.
    """
    spec, students = batch_spec(batch["tokens"]), len(hidden)

    def local(hidden: list[jax.Array], teacher: jax.Array, counted: jax.Array, head: Head) -> jax.Array:
        columns = own_columns(head, vocab_size, teacher.dtype)
        logits_of = partial(columns.logits, vocab_size=vocab_size)

        def some(tokens: Any) -> jax.Array:
            *states, teacher, counted = map(gathered, tokens)
            target, first, *changed = map(logits_of, [teacher, *states])
            p = jnp.exp(target - log_partition(target)[:, None])
            changes = jnp.stack([target - first, *(logits - first for logits in changed)])
            # A column that is padding has the same logit everywhere.
            means = total(jnp.einsum("ns,ans->an", p, changes), *SHARERS)
            centred = (changes - means[..., None]) * jnp.sqrt(p * counted[:, None])
            return jnp.einsum("ans,bns->ab", centred, centred, precision="highest")

        flat = [x.reshape(-1, *x.shape[2:]) for x in (*hidden, teacher, counted)]
        chunks = in_chunks(tuple(flat), max(chunk // (students + 1), 1))
        return total(jnp.sum(jax.lax.map(some, chunks), 0), *BATCH_AXES, "tensor")

    arguments = hidden, batch["teacher_hidden"], batch["counted"], head
    return on_shards(local, arguments, (spec, spec, spec, head_spec(*head.shape)), P())
