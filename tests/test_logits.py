"""Logits are exact in every place that makes them: a head in bfloat16 must not round them to 8 bits."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxhybrid.evaluate.answers import _read, softmax_states
from jaxhybrid.evaluate.quality import _sums
from jaxhybrid.model.decode import decode_token, initial_states, unstack
from jaxhybrid.model.transformer import forward, outputs
from jaxhybrid.stages.distill import distill_step
from jaxhybrid.stages.finetune import finetune_step
from jaxhybrid.train.optimizer import make_optimizer, start
from tests.tiny import training

PLACES = jnp.zeros((8, 1, 3), jnp.int32)
BF16 = {"dtype": jnp.bfloat16}


def products(jaxpr):
    """Every matrix product in a program and in the programs inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from products(getattr(value, "jaxpr", value))


def makers_of_logits(model, batch):
    """name -> (function, arguments)"""
    config, tokens = model.config, batch["tokens"]
    optimizer = make_optimizer(training(steps=1), model.params)
    static = {"config": config, "optimizer": optimizer, **BF16}
    answers = {"tokens": tokens, "segment_ids": tokens, "at": PLACES, "answers": PLACES}
    return {
        "forward": (partial(forward, **BF16), {"model": model, "tokens_BT": tokens}),
        "decode": (
            decode_token,
            {
                "model": unstack(model, jnp.bfloat16),
                "tokens_B": tokens[:, 0],
                "states": initial_states(config, 8, 32, jnp.bfloat16),
                "lengths_B": jnp.zeros(8, jnp.int32),
            },
        ),
        "answers": (partial(_read, softmax=None, states=softmax_states, **BF16), {"model": model, "batch": answers}),
        "quality": (
            lambda model, batch: _sums(
                *[outputs(model, batch["tokens"], **BF16)] * 2, batch | {"bucket": tokens}, buckets=1, **BF16
            ),
            None,
        ),
        "distill": (lambda model, batch: distill_step(start(model.params, optimizer), model, batch, **static), None),
        "finetune": (lambda model, batch: finetune_step(start(model.params, optimizer), batch, **static), None),
    }


@pytest.mark.parametrize("name", ["forward", "decode", "answers", "quality", "distill", "finetune"])
def test_logits_are_float32(name, teacher, batch):
    function, arguments = makers_of_logits(teacher, batch)[name]
    program = jax.make_jaxpr(lambda given: function(**given))(arguments or {"model": teacher, "batch": batch})
    of_words = [out for out in products(program.jaxpr) if teacher.config.vocab_size in out.shape]
    assert of_words
    assert {out.dtype for out in of_words} == {jnp.dtype(jnp.float32)}
