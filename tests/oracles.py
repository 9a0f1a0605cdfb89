"""The method written out plainly: what the fast paths are compared with."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.model import attention
from jaxhybrid.model.config import FULL_ATTENTION, GATED_DELTANET
from jaxhybrid.model.layers import rms_norm
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.transformer import add_mlp, embed, take_layer, token_context

# Leaves that weight decay may touch: matrices. Norms, biases, taps and decays it leaves alone.
DECAYED = {
    "embed", "head", "gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj",
    "a_proj", "b_proj", "g_proj",
}  # fmt: skip


def plain_alignment(mixers, teacher, student_config, batch):
    """Loss of every linear layer, teacher's walk written as a Python loop, no scan."""
    config, params = teacher.config, teacher.params
    context = token_context(config, batch["tokens"], batch["segment_ids"], None)
    mask, x, losses, row = batch["segment_ids"] != 0, embed(params, batch["tokens"]), [], 0
    for layer, kind in enumerate(student_config.layer_types):
        block = take_layer(params["blocks"], layer)
        normed = rms_norm(x, block["input_norm"], config.norm_eps)
        attended = take_layer(params["mixers"][FULL_ATTENTION], layer)
        target, _ = attention.apply(attended, config, normed, context)
        if kind == GATED_DELTANET:
            own = take_layer(mixers[GATED_DELTANET], row)
            mixed, _ = MIXERS[GATED_DELTANET].apply(own, student_config, normed, context)
            row += 1
            distance = jnp.sqrt(jnp.sum((target - mixed) ** 2, -1) + 1e-12) / np.sqrt(config.hidden_size)
            losses.append(jnp.sum(distance * mask) / mask.sum())
        x = add_mlp(block, config, x + target)
    return jnp.stack(losses)


class AdamW:
    """Clipped AdamW with two groups of rates in float64 (arXiv 1711.05101), leaf by leaf."""

    def __init__(self, params, config):
        paths, self.tree = jax.tree_util.tree_flatten_with_path(params)
        self.names = [{str(key.key) for key in path} for path, _ in paths]
        self.leaves = [np.asarray(leaf, np.float64) for _, leaf in paths]
        self.first = [np.zeros_like(leaf) for leaf in self.leaves]
        self.second = [np.zeros_like(leaf) for leaf in self.leaves]
        self.config, self.step = config, 0

    def params32(self):
        return jax.tree.unflatten(self.tree, [jnp.asarray(leaf, jnp.float32) for leaf in self.leaves])

    def rate(self, peak, final):
        """Linear warm-up to the peak, then half a cosine down to `final` at the last step."""
        c = self.config
        done = max(self.step - c.warmup_steps, 0) / (c.steps - c.warmup_steps)
        return min(1, (self.step + 1) / c.warmup_steps) * (final + (peak - final) * (1 + np.cos(np.pi * done)) / 2)

    def update(self, gradients):
        """One update; the gradients' norm before clipping."""
        c, (b1, b2) = self.config, self.config.betas
        gradients = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradients)]
        norm = np.sqrt(sum(np.sum(g * g) for g in gradients))
        mixer_rate, rate = (
            self.rate(c.mixer_learning_rate, c.final_mixer_learning_rate),
            self.rate(c.learning_rate, c.final_learning_rate),
        )
        self.step += 1
        for i, g in enumerate(gradients):
            g = g * min(1, c.clip_norm / norm)
            self.first[i] = b1 * self.first[i] + (1 - b1) * g
            self.second[i] = b2 * self.second[i] + (1 - b2) * g * g
            scaled = self.first[i] / (1 - b1**self.step) / (np.sqrt(self.second[i] / (1 - b2**self.step)) + c.eps)
            decay = c.weight_decay * self.leaves[i] if self.names[i] & DECAYED else 0
            group_rate = mixer_rate if self.names[i] & {"mixers", "input_norm"} else rate
            self.leaves[i] = self.leaves[i] - group_rate * (scaled + decay)
        return norm
