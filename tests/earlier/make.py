"""Wrote this folder's data, with the code of commit efc3cc5 and not with today's: see README.md."""

import json
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jaxhybrid.model.params import is_spec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxhybrid.export.folder import export
from jaxhybrid.families import config_to_hf
from jaxhybrid.model.config import FULL_ATTENTION, GATED_DELTANET, GatedDeltaNetConfig, ModelConfig
from jaxhybrid.model.transformer import Model, declare, forward
from jaxhybrid.weights.huggingface import load_student
from jaxhybrid.weights.save import save_weights
from tests.runs import Workshop, write_text

ALPHABET = "NTabcdefghijklmnopqrstuvwxyz0123456789.:ĠĊ"  # a token each; the last two are space and line feed
SHAPE = {
    "vocab_size": 48,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "qkv_bias": True,
    "o_bias": True,
}
# Between them they have every parameter there was, and both ways of tying and of grouping queries.
QWEN3 = ModelConfig(family="qwen3", num_layers=3, qk_norm=True, **SHAPE)
LLAMA = ModelConfig(
    family="llama",
    num_layers=2,
    mlp_bias=True,
    tie_embeddings=True,
    layer_types=(GATED_DELTANET, FULL_ATTENTION),
    gated_deltanet=GatedDeltaNetConfig(expand_kv=False, conv_size=3, rope=True, qkv_bias=True, qk_norm=False),
    **SHAPE,
)
TOKENS = np.random.default_rng(1).integers(0, 48, (2, 20))


def stage(steps, **changes):
    return {
        "tokens": steps * 8 * 32,
        "sequence_length": 32,
        "batch_size": 8,
        "warmup_steps": 0,
        "log_every": 1,
        "learning_rate": 1e-3,
    } | changes


def draw(config, seed):
    """Parameters none of which is without effect: no zero bias, no norm of ones."""
    rng = np.random.default_rng(seed)

    def leaf(path, spec):
        noise = rng.standard_normal(spec.shape)
        values = 1 + 0.3 * noise if path[-1].key.endswith("norm") else 0.3 * noise
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, declare(config), is_leaf=is_spec)


def write_teacher(folder):
    folder.mkdir()
    words = {word: number for number, word in enumerate(["<end>", *ALPHABET])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    save_weights(draw(QWEN3, 0), QWEN3, folder)
    (folder / "config.json").write_text(json.dumps(config_to_hf(QWEN3) | {"eos_token_id": 0}))


def write_config(path):
    """Paths are relative, so that the folder can be anywhere."""
    mixers = {"mixer_learning_rate": 3e-3}
    settings = {
        "name": "tiny",
        "run_dir": "run",
        "teacher": "teacher",
        "dtype": "float32",
        "mixer": {"conv_size": 3, "output_gate": True, "rope": True},
        "data": {"train": "text.jsonl", "heldout_tokens": 512, "cache_dir": "tokens"},
        "align": stage(6),
        "score": stage(
            6,
            budgets=[1, 2],
            heldout_tokens=256,
            evaluate_every=3,
            stop_when_stable={"window": 2},
            **mixers,
        ),
        "select": {"budget": 1},
        "distill": stage(8, schedule="cosine", warmup_steps=2, weight_decay=0.0, **mixers),
        "finetune": stage(4, **mixers),
        "evaluate": {
            "heldout_tokens": 256,
            "sequence_length": 32,
            "batch_size": 8,
            "recall": {"pairs": [2], "samples": 2},
        },
        "export": {"dtype": "float32"},
    }
    path.write_text(yaml.safe_dump(settings))


def write_logits(folder, target):
    """Token ids, and the logits that the folder's model gives for them."""
    model = load_student(folder)
    logits = forward(model.params, model.config, jnp.asarray(TOKENS))
    np.savez(target, tokens=TOKENS, logits=np.asarray(logits, np.float32))


def keep(source, target, *left_out):
    """Copies a folder without what is not read again or is made again by itself."""
    ignored = shutil.ignore_patterns("tensorboard", "report", "versions.json", "teacher-*", *left_out)
    shutil.copytree(source, target, ignore=ignored)


def newest_checkpoints_only(folder):
    for checkpoints in folder.rglob("checkpoints"):
        for path in sorted(checkpoints.iterdir(), key=lambda path: int(path.name))[:-1]:
            shutil.rmtree(path)


def main(data, work):
    workshop = Workshop(work)
    write_teacher(work / "teacher")
    write_text(work / "text.jsonl", documents=80)
    write_config(workshop.config)
    shutil.copytree(work / "teacher", data / "teacher")
    shutil.copy(work / "text.jsonl", data)
    command = ("run", "config.yaml")

    stopped = workshop.interrupt("score layer 1", 4, signal.SIGTERM, 0.0, *command)
    print(stopped.stderr[-300:])
    keep(work / "run" / "score", data / "scoring")
    shutil.rmtree(data / "scoring" / "candidates" / "000")  # at its end, so that its state is not read again
    stopped = workshop.interrupt("distill", 4, signal.SIGTERM, 0.0, *command)
    print(stopped.stderr[-300:])
    keep(work / "run", data / "run")
    newest_checkpoints_only(data)
    workshop.finish(*command)
    after = data / "afterwards"
    for name in ("distill/metrics.jsonl", "finetune/metrics.jsonl", "evaluation.json"):
        (after / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(work / "run" / name, after / name)

    # transformers' code and the tokenizer are not what is tried here.
    unread = ("*.py", "tokenizer*", "README.md", "chat_template*")
    keep(work / "run" / "export", data / "exports" / "qwen3", *unread)
    shutil.rmtree(work / "llama", ignore_errors=True)
    export(Model(draw(LLAMA, 1), LLAMA), work / "llama", "float32")
    keep(work / "llama", data / "exports" / "llama", *unread)
    for name in ("qwen3", "llama"):
        write_logits(data / "exports" / name, data / "exports" / f"{name}.npz")
    shutil.make_archive(str(data), "xztar", data)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
