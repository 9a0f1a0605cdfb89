"""Jitted decoding: steps equal the sequence, the state is donated, and drafts are accepted in part."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxhybrid_kernels import decode, dplr_attention, linear_attention, short_convolution

whole_linear_attention = jax.jit(partial(linear_attention, implementation="reference"))
whole_dplr_attention = jax.jit(partial(dplr_attention, implementation="reference"))
whole_short_convolution = jax.jit(short_convolution)


def arguments(suite, recurrence, T):
    """Of a few-token step, with optional arguments named; float32; the state apart."""
    case = suite.make_case(recurrence, T, Hq=4, Hk=1)
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in case.arrays.items()}
    state = arrays.pop("initial_state")
    return {"log_decay": None, "beta": None} | arrays, state


def dplr_arguments(T):
    rng = np.random.default_rng(0)
    names = ("q", "k", "v", "log_decay", "a", "b")
    arrays = {name: jnp.asarray(rng.normal(size=(2, T, 3, 16)) / 4, jnp.float32) for name in names}
    arrays["log_decay"] = -jnp.abs(arrays["log_decay"])
    return arrays, jnp.asarray(rng.normal(size=(2, 3, 16, 16)), jnp.float32)


def convolution_arguments(T):
    rng = np.random.default_rng(0)
    x, weight, state = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, T, 5), (4, 5), (2, 3, 5)))
    return {"x_BTC": x, "weight_WC": weight}, state


def one_token(arrays, t):
    names = {"x_BTC": "x_BC"}
    return {
        names.get(name, name): array if array is None or name == "weight_WC" else array[:, t]
        for name, array in arrays.items()
    }


def every_operator(suite, T):
    """(what defines it, its step, its few-token step, arguments, state) by name."""
    for name in suite.recurrences:
        steps = (decode.linear_attention_step, decode.linear_attention_steps)
        yield name, (whole_linear_attention, *steps, *arguments(suite, name, T))
    steps = (decode.dplr_attention_step, decode.dplr_attention_steps)
    yield "dplr", (whole_dplr_attention, *steps, *dplr_arguments(T))
    steps = (decode.short_convolution_step, decode.short_convolution_steps)
    yield "convolution", (whole_short_convolution, *steps, *convolution_arguments(T))


def test_steps_equal_the_sequence(suite):
    T = 5
    for name, (operator, step, steps, arrays, state) in every_operator(suite, T):
        out, final = operator(**arrays, initial_state=state)
        one, outs = jnp.array(state), []
        for t in range(T):
            out_t, one = step(**one_token(arrays, t), state=one)
            outs.append(out_t)
        few_out, few = steps(**arrays, state=state)
        for result, expected in ((jnp.stack(outs, axis=1), out), (few_out, out), (one, final), (few, final)):
            assert suite.relative_error(result, expected) < 1e-5, name


def test_more_tokens_than_few(suite):
    arrays, state = arguments(suite, "gated_deltanet", decode.FEW_TOKENS + 1)
    expected = whole_linear_attention(**arrays, initial_state=state)
    for result, wanted in zip(decode.linear_attention_steps(**arrays, state=state), expected):
        assert suite.relative_error(result, wanted) < 1e-5


def test_state_is_donated(suite):
    """The state passed in is gone, and the compiled step writes the new state where the old one was."""
    for name, (_, step, steps, arrays, state) in every_operator(suite, 5):
        for function, given in ((step, one_token(arrays, 0)), (steps, arrays)):
            memory = function.lower(**given, state=state).compile().memory_analysis()
            assert memory.alias_size_in_bytes == state.nbytes, name
            _, new = function(**given, state=state)
            assert state.is_deleted(), name
            state = new
        assert not any(array.is_deleted() for array in arrays.values() if array is not None)


def test_part_of_a_draft_is_accepted(suite):
    """Rows accept 0 and 3 of 5 tokens: their states are those after so many; others' outputs are zero."""
    accepted, T = np.asarray([0, 3]), 5
    segment_ids = jnp.asarray(np.arange(T) < accepted[:, None], jnp.int32)
    for name, (operator, _, steps, arrays, state) in every_operator(suite, T):
        expected = np.asarray(state).copy()
        first = {n: a if a is None or n == "weight_WC" else a[:, :3] for n, a in arrays.items()}
        out, final = operator(**first, initial_state=state)
        expected[1] = final[1]
        actual, new = steps(**arrays, segment_ids=segment_ids, state=state)
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(actual[1, :3], out[1], rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.all(np.asarray(actual[0]) == 0), name
        assert np.all(np.asarray(actual[1, 3:]) == 0), name


def test_left_padding_of_any_content(suite):
    for name, (operator, _, steps, arrays, state) in every_operator(suite, 5):
        bare = {n: a if a is None or n == "weight_WC" else a[:, 2:] for n, a in arrays.items()}
        padded = {n: a if a is None or n == "weight_WC" else a.at[:, :2].set(jnp.nan) for n, a in arrays.items()}
        out, final = operator(**bare, initial_state=state)
        segment_ids = jnp.asarray([[0, 0, 1, 1, 1]] * 2, jnp.int32)
        actual, new = steps(**padded, segment_ids=segment_ids, state=state)
        np.testing.assert_allclose(actual[:, 2:], out, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(new, final, rtol=1e-5, atol=1e-5, err_msg=name)


def test_gradients_of_padding_are_zero(suite, recurrence):
    """Of the scan of steps, differentiated by JAX, whatever the padding holds."""
    arrays, state = arguments(suite, recurrence, 4)
    arrays = {name: a.at[:, 1].set(jnp.nan) for name, a in arrays.items() if a is not None}

    def loss(arrays):
        segment_ids = jnp.asarray([[1, 0, 1, 1]] * 2)
        out, final = linear_attention(
            **arrays, segment_ids=segment_ids, initial_state=state, implementation="recurrent"
        )
        return jnp.sum(out**2) + jnp.sum(final**2)

    for name, gradient in jax.grad(loss)(arrays).items():
        assert np.all(np.isfinite(gradient)), name
        assert np.all(np.asarray(gradient[:, 1]) == 0), name
