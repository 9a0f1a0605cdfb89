"""Sums for the KL of two models' logits: both forms against float64, and the kernel lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh
from jaxhybrid_kernels import kl_sums

NVIDIA = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda"))
NO_WORD = -1e30  # of a column that is padding


def logits(tokens, words, padded=0, scale=8.0):
    rng = np.random.default_rng(0)
    both = [scale * rng.normal(size=(tokens, words)).astype(np.float32) for _ in range(2)]
    for x in both:
        x[:, words - padded :] = NO_WORD
    return both


def in_float64(logits, teacher):
    z, y = (np.asarray(x, np.float64) for x in (logits, teacher))
    top, teacher_top = z.max(1), y.max(1)
    weight = np.exp(y - teacher_top[:, None])
    return top, np.exp(z - top[:, None]).sum(1), teacher_top, weight.sum(1), (weight * (y - z)).sum(1)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(("words", "padded"), [(7, 0), (2048, 0), (5000, 0), (5000, 3000)])
def test_equals_sums_in_float64(implementation, words, padded):
    z, y = logits(3, words, padded)
    z[1] = y[1]  # no difference at all
    y[2] += 1e4  # exponentials that would overflow
    found = kl_sums(jnp.asarray(z), jnp.asarray(y), implementation=implementation)
    for name, a, b in zip(found._fields, found, in_float64(z, y)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_by_devices_that_have_a_part_of_the_words(implementation):
    z, y = logits(4, 4096)
    mesh = jax.make_mesh((2,), ("words",), axis_types=(jax.sharding.AxisType.Explicit,))
    columns, parts = jax.P(None, "words"), jax.P("words")

    def local(z, y):
        return jax.tree.map(lambda x: x[None], kl_sums(z, y, implementation=implementation))

    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, jax.NamedSharding(mesh, columns)) for x in (z, y)]
        # Pallas' interpreter loses track of what varies along the mesh.
        checked = implementation == "xla"
        run = jax.shard_map(local, in_specs=(columns, columns), out_specs=parts, check_vma=checked)
        found = jax.jit(run)(*placed)
    for half in range(2):
        own = slice(2048 * half, 2048 * (half + 1))
        for a, b in zip(found, in_float64(z[:, own], y[:, own])):
            np.testing.assert_allclose(np.asarray(a)[half], b, rtol=2e-5, atol=1e-4)


def test_refusal_names_the_value():
    z, y = (jnp.asarray(x, jnp.bfloat16) for x in logits(2, 16))
    with pytest.raises(ValueError, match="logits have dtype bfloat16"):
        kl_sums(z, y, implementation="triton")


def calls(dtype, mesh, run=kl_sums):
    columns = jax.P(None, *mesh.axis_names)
    given = [jax.ShapeDtypeStruct((4, 4096), dtype, sharding=jax.NamedSharding(mesh, columns))] * 2
    check = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(mesh):
        text = export.export(jax.jit(run), platforms=["cuda"], disabled_checks=[check])(*given).mlir_module()
    return text.count("xla.gpu.triton")


def test_chosen_on_nvidia_for_float32_alone():
    assert [calls(dtype, NVIDIA) for dtype in (jnp.float32, jnp.bfloat16)] == [1, 0]


def test_lowered_for_devices_that_have_a_part_of_the_words():
    mesh = AbstractMesh((2,), ("words",), (jax.sharding.AxisType.Explicit,), abstract_device=NVIDIA.abstract_device)
    columns, parts = jax.P(None, "words"), jax.P("words")
    assert calls(jnp.float32, mesh, jax.shard_map(kl_sums, in_specs=(columns, columns), out_specs=parts)) == 1
