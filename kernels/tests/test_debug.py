"""What is refused: decays that grow, in debug mode; states in float16, always."""

import jax
import jax.numpy as jnp
import pytest
from jaxhybrid_kernels import (
    debug_checks,
    decode,
    dplr_attention,
    dplr_attention_step,
    linear_attention,
    linear_attention_step,
    short_convolution,
    short_convolution_step,
)

X = jnp.full((2, 6, 1, 4), 0.5)
STATE = jnp.zeros((2, 1, 4, 4))


def sequences(log_decay, segment_ids=None, state=STATE):
    """Every entry point that takes a decay per channel, as calls without arguments."""
    options = {"segment_ids": segment_ids, "initial_state": state, "implementation": "recurrent"}
    yield lambda: linear_attention(X, X, X, log_decay, **options)
    yield lambda: dplr_attention(X, X, X, log_decay, -X, X, **options)


def steps(log_decay, state=STATE):
    x = X[:, 0]
    yield lambda: linear_attention_step(x, x, x, log_decay, None, state)
    yield lambda: dplr_attention_step(x, x, x, log_decay, -x, x, state)


@pytest.mark.parametrize("value", [0.25, float("nan"), float("-inf")])
def test_wrong_decays_are_refused(value):
    log_decay = -X.at[1, 4, 0, 2].set(-value)
    with debug_checks():
        for call in sequences(log_decay):
            with pytest.raises(ValueError, match=rf"log_decay has the value {value} at \[1, 4, 0, 2\]"):
                call()
        for call in steps(log_decay[:, 4]):
            with pytest.raises(ValueError, match=rf"log_decay has the value {value} at \[1, 0, 2\]"):
                call()
    next(sequences(log_decay))()


def test_right_decays_and_padding_pass():
    segment_ids = jnp.asarray([[1, 1, 1, 1, 0, 1]] * 2)
    with debug_checks():
        for call in (*sequences(-X.at[:, 4].set(jnp.nan), segment_ids), *sequences(0 * X), *steps(-X[:, 0])):
            call()
        linear_attention(X, X, X)


def test_worst_value_is_named():
    with debug_checks(), pytest.raises(ValueError, match=r"value 3\.0"):
        linear_attention(X, X, X, jnp.asarray([0.5, 3.0, 1.0, -9.0, 0.0, 2.0])[None, :, None] * jnp.ones((2, 1, 1)))


def test_traced_code_is_checked_when_it_runs():
    with debug_checks():
        gradient = jax.jit(jax.grad(lambda log_decay: jnp.sum(linear_attention(X, X, X, log_decay)[0])))
        jax.block_until_ready(gradient(-X))
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"log_decay has the value 0\.5"):
            jax.block_until_ready(gradient(X))


def test_states_in_float16_are_refused():
    state = STATE.astype(jnp.float16)
    for call in sequences(-X, state=state):
        with pytest.raises(ValueError, match="initial_state has dtype float16"):
            call()
    for call in steps(-X[:, 0], state):
        with pytest.raises(ValueError, match="state has dtype float16"):
            call()
    x, weight, state = jnp.ones((2, 6, 4)), jnp.ones((3, 4)), jnp.zeros((2, 2, 4), jnp.float16)
    for name, call in (
        ("initial_state", lambda: short_convolution(x, weight, initial_state=state)),
        ("state", lambda: short_convolution_step(x[:, 0], weight, state)),
        ("state", lambda: decode.short_convolution_step(x[:, 0], weight, state)),
        ("initial_state", lambda: decode.short_convolution_steps(x, weight, state)),
        ("initial_state", lambda: decode.linear_attention_steps(X, X, X, -X, None, STATE.astype(jnp.float16))),
        ("initial_state", lambda: decode.dplr_attention_steps(X, X, X, -X, -X, X, STATE.astype(jnp.float16))),
    ):
        with pytest.raises(ValueError, match=f"{name} has dtype float16"):
            call()
    assert short_convolution(x.astype(jnp.float16), weight, initial_state=state)[1].dtype == jnp.float16
