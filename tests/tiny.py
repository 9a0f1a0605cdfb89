"""A tiny teacher in a Hugging Face folder, with a tokenizer of its own, and a config that runs every stage on it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxhybrid.families import config_to_hf
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.transformer import random_params
from jaxhybrid.settings.stages import DistillConfig, StabilityConfig
from jaxhybrid.weights.save import save_weights

TEXT = "".join(f"{name} has the number {n * 37 % 1000} and likes the {name[::-1]}. " for n, name in enumerate(["anna",
       "bert", "carl", "dora", "emil"] * 8))  # fmt: skip


def write_tokenizer(folder: Path, form: str | None = None) -> None:
    """A byte-level tokenizer trained on TEXT.

    `form` is what it makes of a text by itself: "<begin> $A" puts its BOS there, "$A" does not. None: it has no BOS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    marks = {"eos_token": "<end>"}
    if form is not None:
        tokenizer.add_special_tokens(["<begin>"])
        ids = [(mark, tokenizer.token_to_id(mark)) for mark in ("<begin>", "<end>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
        marks["bos_token"] = "<begin>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)


def write_teacher(folder: Path, layers: int = 3, dtype: str = "float32") -> Path:
    """A random Llama with the tokenizer above, which has no BOS."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    config = ModelConfig(
        family="llama",
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        max_position_embeddings=128,
        tie_embeddings=True,
    )
    params = jax.jit(lambda key: random_params(config, key))(jax.random.key(7))
    save_weights(jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params), config, folder, jnp.dtype(dtype))
    hf = config_to_hf(config) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


def training(steps: int, **changes) -> DistillConfig:
    """Settings of a stage of so many steps, with no warm-up, for what asks for no more than steps and rates."""
    return DistillConfig(**{"tokens": 2 * steps, "sequence_length": 2, "batch_size": 1, "warmup_steps": 0} | changes)


def stop_rule(**changes) -> StabilityConfig:
    """A rule to end scoring, even one that a config is refused for."""
    return StabilityConfig.model_construct(**{"window_tokens": None} | changes)


def stage(**changes):
    return {"tokens": 8 * 64 * 6, "sequence_length": 64, "batch_size": 8, "warmup_steps": 0, "log_every": 2} | changes


def write_config(path: Path, teacher: Path, **changes) -> Path:
    """A run of a few seconds. `changes` replace whole top-level settings."""
    settings = {
        "name": "tiny",
        "run_dir": str(path.parent / "run"),
        "teacher": str(teacher),
        "dtype": "float32",
        "data": {"train": "pydoc", "heldout_tokens": 2048, "cache_dir": str(path.parent / "tokens")},
        "align": stage(checkpoint_every=2),
        "score": stage(budgets=[1, 2], tokens=8 * 64 * 4, heldout_tokens=512, evaluate_every=2, checkpoint_every=1),
        "select": {"method": "kl_guided", "budget": 1},
        "distill": stage(checkpoint_every=2),
        "finetune": stage(tokens=8 * 64 * 2, checkpoint_every=1),
        "evaluate": {
            "heldout_tokens": 1000,  # the last row is padded
            "sequence_length": 64,
            "batch_size": 8,
            "recall": {"pairs": [2], "samples": 8},
        },
        "export": {"dtype": "float32"},
    }
    path.write_text(yaml.safe_dump(settings | changes))
    return path
