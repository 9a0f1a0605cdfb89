"""The method written out plainly: what the fast paths are compared with."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.model.blueprint import bind
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.layers import Block
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.transformer import embed, token_context

DECAYED = {"kernel", "embedding"}  # leaves that weight decay may touch here: matrices


def row(stack, index):
    return jax.tree.map(lambda w: w[index], stack)


def plain_alignment(mixers, teacher, config, batch):
    """Loss of every linear layer, teacher's walk written as a Python loop, no scan."""
    params = teacher.params
    context = token_context(teacher.config, batch["tokens"], batch["segment_ids"], None)
    mask, x, losses = batch["segment_ids"] != 0, embed(teacher, batch["tokens"]), []
    for layer, kind in enumerate(config.layer_types):
        block = bind(Block, teacher.config, row(params["blocks"], layer))
        normed = block.mixer_input(x)
        attention = bind(MIXERS[FULL_ATTENTION], teacher.config, row(params["mixers"][FULL_ATTENTION], layer))
        target, _ = attention(normed, context)
        if kind != FULL_ATTENTION:
            mixed, _ = bind(MIXERS[kind], config, row(mixers[kind], len(losses)))(normed, context)
            distance = jnp.sqrt(jnp.sum((target - mixed) ** 2, -1) + 1e-12) / np.sqrt(config.hidden_size)
            losses.append(jnp.sum(distance * mask) / mask.sum())
        x = block.add_mlp(x + target)
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
