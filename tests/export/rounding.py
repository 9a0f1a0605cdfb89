"""How far bfloat16 takes a student's native export from float32, beside its own code and a softmax model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from jaxhybrid.export.folder import export
from jaxhybrid.families import config_to_hf
from jaxhybrid.model.transformer import Model, forward
from jaxhybrid.weights.huggingface import load_student, load_teacher
from jaxhybrid.weights.save import save_weights

TOKENS = np.random.default_rng(0).integers(1, 61, (2, 40)).astype(np.int32)


def logits(model):
    return np.asarray(jax.jit(lambda params: forward(Model(params, model.config), TOKENS))(model.params))


def read(folder, dtype):
    """(transformers' model, its logits)."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values())
    with torch.no_grad():
        return model, model(torch.from_numpy(TOKENS).long()).logits.float().numpy()


def errors_in_16_bits(folder, student, softmax):
    """RMS difference of transformers' bfloat16 logits to our float32 ones of the same weights, in standard deviations.

    Of the student's native export, which stays in `folder`/native, its export with its own code, and `softmax`.
    """

    def rms(path, exact):
        return float(np.sqrt(np.mean((read(path, torch.bfloat16)[1] - exact) ** 2)) / exact.std())

    exact = logits(load_student(export(student, folder / "native")))
    errors = [rms(folder / "native", exact), rms(export(student, folder / "own-code", format="remote-code"), exact)]
    (folder / "teacher").mkdir()
    (folder / "teacher" / "config.json").write_text(json.dumps(config_to_hf(softmax.config)))
    save_weights(softmax.params, softmax.config, folder / "teacher", jnp.bfloat16)
    return *errors, rms(folder / "teacher", logits(load_teacher(folder / "teacher")))
