"""Joint gates: a share of softmax for every layer, all of them trained together against a price of softmax.

FlashMorph's rule (arXiv 2606.30562): weights frozen, gates from 1, what each gate adds to the loss is the same, the
layers with the largest gates are kept. Two things differ. Its loss compares the two branches' outputs layer by layer,
which for one input is the error of alignment over again; here the mixed stream goes through all layers and the loss is
the KL to the teacher. And the price is the all-linear student's KL, unless it is given: it then costs a layer an even
share of what all of them are worth.
"""

from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field

from jaxhybrid.model.head import Head
from jaxhybrid.selection.choice import Choice, Given, Method, ranked
from jaxhybrid.selection.gated import gated_kl
from jaxhybrid.selection.masked import MaskedStudent, finite
from jaxhybrid.selection.rounds import Round, by_layer, from_layers
from jaxhybrid.settings.select import MeasureConfig, MethodConfig
from jaxhybrid.settings.types import Count, Positive, about


class JointGatesConfig(MethodConfig):
    """A gate for each layer between softmax and linear, all trained together on the text of select.measure."""

    tokens: Count = about(1_048_576, "training tokens, padding included; whole batches of select.measure are taken")
    learning_rate: Positive = about(2e-2, "Adam's, at the beginning; it ends at a tenth, by half a cosine")
    price: Annotated[float, Field(ge=0)] | None = about(
        None, "added to the KL, times the mean gate, in nats; null: the KL of the all-linear student"
    )

    def trouble(self, measure: MeasureConfig) -> str | None:
        step = measure.batch_size * measure.sequence_length
        return None if self.tokens >= step else f"tokens {self.tokens:,} are less than one batch of measure, {step:,}"


def choose(given: Given, count: int) -> Choice:
    settings = given.own(JointGatesConfig)

    def compute() -> Round:
        student = given.student()
        price, forward = settings.price, student.tokens()  # the teacher's pass
        if price is None:
            price, forward = student.kl(()), 2 * forward
        course, trained = train_gates(student, settings, price)
        return {
            "action": "rank",
            "scores": by_layer(course[-1]),
            "finer": by_layer(course.mean(0)),
            "price": price,
            "tokens": student.tokens(),
            "forward_tokens": forward,
            "trained_tokens": trained,
        }

    found = given.log.round(compute)
    return ranked(from_layers(found["scores"]), count, from_layers(found["finer"]), rounds=[found])


def train_gates(student: MaskedStudent, settings: JointGatesConfig, price: float) -> tuple[np.ndarray, int]:
    """(the gates after every step [steps,L], tokens trained on). Gates at 1 come down together and part on the way."""
    steps = max(settings.tokens * student.batches // student.tokens(), 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, steps, alpha=0.1))

    def loss(gates: jax.Array, batches: list[Any], model: Any, head: Head) -> jax.Array:
        own = partial(gated_kl, dtype=student.dtype, chunk_tokens=student.chunk_tokens)
        kls = [share * own(gates, model, batch, head) for share, batch in zip(student.shares, batches)]
        return sum(kls) + price * jnp.mean(gates)

    @jax.jit
    def step(gates: jax.Array, state: Any, batches: list[Any], model: Any, head: Head) -> Any:
        value, gradient = jax.value_and_grad(loss)(gates, batches, model, head)
        updates, state = optimizer.update(gradient, state)
        return jnp.clip(gates + updates, 0.0, 1.0), state, value

    gates = jnp.ones(student.depth, jnp.float32)
    state, course, trained = optimizer.init(gates), [], 0
    for number in range(steps):
        batches = student.placed(number % student.batches)
        gates, state, value = step(gates, state, batches, student.student, student.head)
        finite(float(value), f"loss of the gates at step {number}", "Lower select.joint_gates.learning_rate.")
        course.append(np.asarray(gates))
        trained += sum(batch["tokens"].size for batch in batches)
    return np.array(course), trained


METHODS = {"joint_gates": Method(choose, "student", JointGatesConfig, answers=True)}
