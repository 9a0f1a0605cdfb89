"""Operations, exchanges and memory of traced programs, against numbers that were worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.transformer import Model, hidden_states
from jaxhybrid.plan.collectives import exchanges
from jaxhybrid.plan.liveness import peak_bytes
from jaxhybrid.plan.operations import Branches, causal_share, operations
from jaxhybrid.plan.work import PRODUCTS, work
from jaxhybrid.weights.convert import convert
from tests.conftest import make_teacher

F32 = 4


def product(x, w):
    return x @ w


def traced(function, *shapes):
    return jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr.jaxpr


def flops(jaxpr, **branches):
    return work(operations(jaxpr, Branches(**{"platform": "tpu"} | branches))).flops[PRODUCTS]


def test_loops_count_with_all_their_turns():
    def program(x, w):
        return jax.lax.scan(lambda x, _: (jax.lax.fori_loop(0, 3, lambda i, x: x @ w, x), None), x, length=5)[0]

    jaxpr = traced(program, (8, 16), (16, 16))
    assert flops(jaxpr) == 5 * 3 * 2 * 8 * 16 * 16
    counted = work(operations(jaxpr, Branches("tpu")))
    assert counted.moved == 5 * 3 * F32 * (8 * 16 + 16 * 16 + 8 * 16)


def test_recomputation_counts():
    def loss(x, w):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(x @ w) @ w)(x))

    once = 2 * 8 * 16 * 16
    # Two forward; x @ w again, for the tanh; and of each product, what it gives back to x and to w.
    assert flops(traced(jax.grad(loss, argnums=(0, 1)), (8, 16), (16, 16))) == (2 + 1 + 4) * once


def test_products_that_are_kept_are_held_and_not_made_again():
    types = (GLAConfig.kind, FULL_ATTENTION) * 8
    teacher = make_teacher(intermediate_size=512, num_layers=len(types))
    model = jax.eval_shape(lambda: convert(teacher, types, GLAConfig(), jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def gradient(params, tokens, remat):
        return jax.grad(lambda params: jnp.sum(hidden_states(Model(params, model.config), tokens, remat=remat)))(params)

    block, mlp = (
        jax.jit(gradient, static_argnums=2).trace(model.params, tokens, remat).jaxpr.jaxpr for remat in ("block", "mlp")
    )
    layers, rows, (D, F) = len(types), 2 * 16, (32, 512)
    shares = {"layers": layers, "shares": (0.5, 0.5)}
    assert flops(block, **shares) - flops(mlp, **shares) == layers * 3 * 2 * rows * D * F
    kept = layers * rows * (2 * F + D) * F32
    # Less what one layer makes again.
    assert 0.85 * kept < peak_bytes(mlp) - peak_bytes(block) < kept


def test_layers_of_two_kinds_count_by_their_share():
    def program(x, w, kinds):
        def layer(x, kind):
            return jax.lax.switch(kind, [lambda x: x @ w, lambda x: (x @ w) @ w], x), None

        return jax.lax.scan(layer, x, kinds)[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 16), (16, 16))]
    jaxpr = jax.jit(program).trace(*shapes, jax.ShapeDtypeStruct((4,), jnp.int32)).jaxpr.jaxpr
    assert flops(jaxpr, layers=4, shares=(0.75, 0.25)) == pytest.approx((3 + 2) * 2 * 8 * 16 * 16)


def test_of_forms_for_platforms_the_one_counts_that_runs():
    def program(x, w):
        return jax.lax.platform_dependent(x, w, tpu=product, cpu=lambda x, w: (x @ w) @ w)

    jaxpr = traced(program, (8, 16), (16, 16))
    assert flops(jaxpr, platform="tpu") == 2 * 8 * 16 * 16
    assert flops(jaxpr, platform="cpu") == 2 * 2 * 8 * 16 * 16


def test_blocks_that_splash_attention_skips():
    assert causal_share("splash_mha_fwd", (16, 4, 4)) == (4 + 1) / (2 * 4)
    # Of two devices one has the first and the last of four pieces: its queries see 1 and 4 blocks of keys, of 4.
    assert causal_share("splash_mha_dq", (16, 1, 4)) == (1 + 4) / (2 * 4)
    assert causal_share("splash_mha_dkv", (4, 16, 1)) == (1 + 4) / (2 * 4)
    assert causal_share("linear_attention_forward", (2, 4, 8)) == 1


def test_exchanges_by_kind_and_axes():
    device = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = AbstractMesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2, abstract_device=device)

    def local(x):
        whole = jax.lax.all_gather(x, "a", tiled=True)
        part = jax.lax.psum_scatter(whole, "a", tiled=True)
        turned = jax.lax.all_to_all(part, "b", 1, 0, tiled=True)
        moved = jax.lax.ppermute(turned, "b", [(0, 1), (1, 0)])
        far = jax.lax.ppermute(moved, "a", [(0, 2), (1, 1), (2, 0), (3, 3)])
        return jax.lax.scan(lambda x, _: (jax.lax.psum(x, ("a", "b")) * 0 + x, None), far, length=3)[0]

    with jax.sharding.use_abstract_mesh(mesh):
        run = jax.shard_map(local, in_specs=P("a"), out_specs=P("a", "b"), check_vma=False)
        x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=jax.NamedSharding(mesh, P("a")))
        jaxpr = jax.jit(run).trace(x).jaxpr.jaxpr
    part = F32 * 4 * 8  # of a device
    found = exchanges(operations(jaxpr, Branches("tpu")), dict(mesh.shape))
    assert {(x.kind, x.axes): (x.received, x.times) for x in found} == {
        ("gather", ("a",)): (3 * part, 1),
        ("scatter", ("a",)): (3 * part, 1),
        ("exchange", ("a",)): (part, 1),
        ("exchange", ("b",)): (part / 2, 1),
        ("neighbour", ("b",)): (part, 1),
        ("reduce", ("a", "b")): (3 * 2 * part * 7 / 8, 3),
    }


def test_memory_is_held_until_it_is_last_used():
    big = F32 * 64 * 64

    def chain(x):  # one at a time, and the next one that is made of it
        return ((x @ x) @ x) @ x

    assert peak_bytes(traced(chain, (64, 64))) == 2 * big

    def kept(x):  # the first product waits for the last
        first = x @ x
        return first @ (((first @ x) @ x) @ x)

    assert peak_bytes(traced(kept, (64, 64))) == 3 * big

    def fused(x):  # what is not a product holds what it is made of
        return jnp.tanh(x @ x) * 2 + 1

    assert peak_bytes(traced(fused, (64, 64))) == big

    turn = jax.jit(chain)  # the same function again makes other arrays, and holds what it is given

    assert peak_bytes(traced(lambda x: turn(turn(turn(x))), (64, 64))) == 3 * big


def test_memory_of_a_loop_is_what_it_stacks_and_one_turn():
    big = F32 * 64 * 64

    def program(x):
        return jax.lax.scan(lambda x, _: ((x @ x) @ x, x), x, length=6)[1]

    # Six rows, what goes round, and within a turn two products.
    assert peak_bytes(traced(program, (64, 64))) == (6 + 1 + 2) * big
