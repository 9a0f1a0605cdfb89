"""Compiled for a TPU slice, on a machine without one: alignment with the linear layers' kernels, and a teacher
whose MLPs multiply in float8."""

import json
from functools import partial

from tests.tpu import needs_libtpu, printed_with_compiler


@needs_libtpu
def test_alignment_step_and_float8_teacher_compile():
    found = printed_with_compiler(__file__)
    assert found == ["f8e4m3fn", "linear_attention_backward", "linear_attention_forward"]


def compile_for_a_slice():
    """Prints what of kernels and types is in the programs for four v5e chips, parameters and batch split over them."""
    import re
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from jaxhybrid.model.config import ModelConfig
    from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
    from jaxhybrid.model.partition import batch_sharding, make_mesh
    from jaxhybrid.model.transformer import Model, abstract_params, hidden_states
    from jaxhybrid.settings.stages import AlignConfig
    from jaxhybrid.stages.align import align_step, linear_mixers
    from jaxhybrid.train.optimizer import make_optimizer, start

    slice_of_four = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = make_mesh(data=1, fsdp=4, devices=slice_of_four.devices)
    teacher = ModelConfig(
        family="llama",
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
        norm_eps=1e-5,
        max_position_embeddings=2048,
        tie_embeddings=True,
    )
    mixer = GatedDeltaNetConfig().resolve(teacher)
    student = replace(teacher, layer_types=(mixer.kind,) * 2, mixer=mixer)

    with jax.set_mesh(mesh):
        mixers = linear_mixers(abstract_params(student, mesh))
        optimizer = make_optimizer(AlignConfig(), mixers)
        state = jax.eval_shape(lambda params: start(params, optimizer), mixers)
        tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=batch_sharding(mesh))
        step = partial(align_step, config=student, optimizer=optimizer)
        batch = {"tokens": tokens, "segment_ids": tokens}
        compiled = (
            jax.jit(step, donate_argnums=0)
            .lower(state, Model(abstract_params(teacher, mesh), teacher), batch)
            .compile()
        )
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=slice_of_four.devices)
    with jax.set_mesh(mesh):
        frozen = Model(abstract_params(teacher, mesh, jnp.bfloat16), replace(teacher, float8_mlp=True))
        tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=batch_sharding(mesh))
        states = jax.jit(partial(hidden_states, dtype=jnp.bfloat16)).lower(frozen, tokens).compile()
    names = re.findall(r"linear_attention_(?:forward|backward)", compiled.as_text())
    print(json.dumps(sorted({*names, *re.findall("f8e4m3fn", states.as_text())})))


if __name__ == "__main__":
    compile_for_a_slice()
