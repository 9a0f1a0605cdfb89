"""Sequences split over a mesh axis: results and each gradient equal those of the whole sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxhybrid_kernels import context_dplr_attention, context_linear_attention, dplr_attention

SHARDS = 8
TOKENS = SHARDS * 17


def make_mesh(kind=AxisType.Explicit, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def segments():
    """Two rows: changes inside shards and at a border, padding at both ends, over borders and for whole shards."""
    ids = np.zeros((2, TOKENS), np.int32)
    ids[0, 5:34] = 4
    ids[0, 34:60] = 2  # from a border on
    ids[0, 90:120] = 2  # a whole shard of padding within the document
    ids[1, 40:50] = 7  # two shards of padding before, and some inside this document's own shard
    ids[1, 70:] = 9
    return ids


@partial(
    jax.jit,
    static_argnames=("operator", "mesh", "batch_axis", "check_vma"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def sharded(arrays, segment_ids, d_out, d_state, operator, mesh, batch_axis=None, check_vma=True):
    """((out, state), gradients by name) with the tokens over the axis "context" and the batch over `batch_axis`."""
    tokens = P(batch_axis, "context")
    specs = {name: P(batch_axis) if name == "initial_state" else tokens for name in arrays}

    def run(arrays):
        mapped = jax.shard_map(
            lambda arrays, segment_ids: operator(**arrays, segment_ids=segment_ids, axis_name="context"),
            mesh=mesh,
            in_specs=(specs, tokens),
            out_specs=(tokens, P(batch_axis)),
            check_vma=check_vma,
        )
        return mapped(arrays, segment_ids)

    (out, state), pull = jax.vjp(run, arrays)
    return (out, state), pull((d_out.astype(out.dtype), d_state))[0]


def run(case, operator, mesh, dtype=jnp.float32, batch_axis=None, **options):
    def place(array, dtype, spec):
        return jax.device_put(jnp.asarray(array, dtype), jax.NamedSharding(mesh, spec))

    tokens, state = P(batch_axis, "context"), P(batch_axis)
    arrays = {
        name: place(array, jnp.float32, state)
        if name == "initial_state"
        else place(array, dtype if name in "qkv" else jnp.float32, tokens)
        for name, array in case.arrays.items()
    }
    ids = None if case.segment_ids is None else place(case.segment_ids, jnp.int32, tokens)
    d_out, d_state = place(case.d_out, jnp.float32, tokens), place(case.d_state, jnp.float32, state)
    return sharded(arrays, ids, d_out, d_state, operator, mesh, batch_axis, **options)


def test_whole_sequences(suite, recurrence):
    case = suite.make_case(recurrence, TOKENS)
    suite.check(run(case, context_linear_attention, make_mesh(context=SHARDS)), suite.oracle(case))


def test_packed_sequences(suite, recurrence):
    """Padding holds NaN. Key heads shared by value heads, or queries that read one state."""
    Hq, Hk, N = (2, 1, 2) if recurrence in ("gla", "gated_deltanet") else (4, 2, 2)
    case = suite.make_case(recurrence, TOKENS, Hq=Hq, Hk=Hk, N=N)
    case.segment_ids = segments()
    expected = suite.oracle(case)
    for name, array in case.arrays.items():
        if name != "initial_state":
            array[case.segment_ids == 0] = np.nan
    suite.check(run(case, context_linear_attention, make_mesh(context=SHARDS)), expected)


@pytest.mark.parametrize("implementation", ["reference", "recurrent", "pallas_tpu"])
@pytest.mark.parametrize("recurrence", ["simple_gla", "gated_deltanet"])
def test_every_implementation(suite, recurrence, implementation):
    case = suite.make_case(recurrence, TOKENS)
    case.segment_ids = segments()
    operator = partial(context_linear_attention, implementation=implementation)
    interpreted = implementation == "pallas_tpu"  # Pallas' interpreter loses track of varying axes
    suite.check(run(case, operator, make_mesh(context=2), check_vma=not interpreted), suite.oracle(case))


@pytest.mark.parametrize("kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)])
def test_batch_and_sequence_both_split(suite, kind):
    """Also rematerialised, with another scale, and in several chunks a shard."""
    case = suite.make_case("gated_deltanet", TOKENS)
    case.segment_ids = segments()
    expected = suite.oracle(case)

    def operator(axis_name, **arrays):
        split = partial(context_linear_attention, scale=1.0, chunk_size=16, axis_name=axis_name)
        return jax.checkpoint(lambda arrays: split(**arrays))(arrays)

    usual = case.arrays["q"].shape[-1] ** -0.5
    case.d_out *= usual
    (out, state), gradients = run(case, operator, make_mesh(kind, data=2, context=4), batch_axis="data")
    suite.check(((usual * out, state), gradients), expected)


def test_without_check_of_varying_axes(suite):
    case = suite.make_case("gated_deltanet", TOKENS)
    results = run(case, context_linear_attention, make_mesh(context=SHARDS), check_vma=False)
    suite.check(results, suite.oracle(case))


@pytest.mark.parametrize("rate", [1.0, 2.0])
def test_correlated_keys_that_never_decay(suite, rate):
    """Every shard's map has norm one here: nothing that an earlier shard got wrong would fade."""
    case = suite.make_case("deltanet", TOKENS, correlation=0.99, rate=rate)
    suite.check(run(case, context_linear_attention, make_mesh(context=SHARDS)), suite.oracle(case))


@pytest.mark.parametrize("recurrence", ["simple_gla", "gla", "kimi_delta"])
def test_strong_decay(suite, recurrence):
    case = suite.make_case(recurrence, TOKENS, decay=30.0)
    suite.check(run(case, context_linear_attention, make_mesh(context=SHARDS)), suite.oracle(case))


@pytest.mark.parametrize("recurrence", ["simple_gla", "gated_deltanet", "kimi_delta"])
def test_bfloat16(suite, recurrence):
    case = suite.make_case(recurrence, TOKENS, correlation=0.9)

    def run_split(case, implementation, dtype):
        operator = partial(context_linear_attention, implementation=implementation)
        return run(case, operator, make_mesh(context=SHARDS), dtype)

    suite.check_bfloat16(case, "xla", run_split)


def test_padding_alone_keeps_the_state(suite):
    case = suite.make_case("gated_deltanet", TOKENS)
    case.segment_ids = np.zeros((2, TOKENS), np.int32)
    (out, state), gradients = run(case, context_linear_attention, make_mesh(context=SHARDS))
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(state, case.arrays["initial_state"].astype(np.float32))
    np.testing.assert_array_equal(gradients["initial_state"], case.d_state.astype(np.float32))


def test_one_shard_and_no_initial_state(suite):
    case = suite.make_case("gated_deltanet", TOKENS)
    del case.arrays["initial_state"]
    results = [run(case, context_linear_attention, make_mesh(context=n)) for n in (1, SHARDS)]
    suite.check(*results)


def test_dplr(suite):
    case = suite.make_case("gla", TOKENS)
    kappa, rate = case.arrays["k"], np.random.default_rng(1).uniform(size=case.arrays["k"].shape)
    case.arrays |= {"k": 0.3 * case.arrays["q"], "a": -kappa, "b": kappa * rate}
    case.segment_ids = segments()
    whole = run(case, lambda axis_name, **arrays: dplr_attention(**arrays), make_mesh(context=1), check_vma=False)
    suite.check(run(case, context_dplr_attention, make_mesh(context=SHARDS)), whole)


def test_wrong_arguments_are_refused(suite):
    case = suite.make_case("gated_deltanet", TOKENS)
    with pytest.raises(ValueError, match="axis_name='sequence' is no mesh axis"):
        run(
            case, lambda axis_name, **rest: context_linear_attention(**rest, axis_name="sequence"), make_mesh(context=2)
        )
    with pytest.raises(ValueError, match="axis_name='context' is no mesh axis"):
        context_linear_attention(*(jnp.ones((1, 4, 1, 8)),) * 3, axis_name="context")
    case.arrays["initial_state"] = case.arrays["initial_state"][:, :1]
    with pytest.raises(ValueError, match="initial_state has shape"):
        run(case, context_linear_attention, make_mesh(context=2))
