"""A teacher whose recall is set by hand: layer 1 tells each token the one before it, layer 2 finds where the present
token was before and says what came next. Layers 0 and 3 write noise that changes what is said of any text.

Its tokenizer has a token for each word; RoPE turns three pairs of a head's dimensions and leaves the rest nearly alone.
"""

import json

import jax
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxhybrid.data.vocabulary import load_vocabulary
from jaxhybrid.evaluate.recall_prompts import NAMES
from jaxhybrid.model.config import ModelConfig, RopeConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import Model, random_params
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.weights.convert import convert

RECALLS = (1, 2)  # the layers without which nothing is recalled
WORDS = ["<unknown>", "<end>", "<begin>", *(f"{name}:" for name in NAMES), *NAMES, *map(str, range(10))]
HEADS, WIDTH = 2, 32
FREE = np.r_[3:16, 19:32]  # dimensions of a head that RoPE hardly turns
CODE = 25
CONST, SINK, NOISE = 0, 1, slice(2, 16)
OWN, BEFORE, SAID = (slice(16 + CODE * i, 16 + CODE * (i + 1)) for i in range(3))
HIDDEN = 96


def vocabulary(folder, numbers):
    """Of the words above and so many numbers from 1000."""
    words = WORDS + [str(1000 + n) for n in range(numbers)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 2)])
    marks = {"eos_token": "<end>", "bos_token": "<begin>", "unk_token": "<unknown>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load_vocabulary(folder), len(words)


def teacher(vocab_size, seed=0):
    """Four layers; greedy decoding answers every question of the recall probe right."""
    config = ModelConfig(
        family="llama", vocab_size=vocab_size, hidden_size=HIDDEN, intermediate_size=8, num_layers=4, num_heads=HEADS,
        num_kv_heads=HEADS, head_dim=WIDTH, norm_eps=1e-6, rope=RopeConfig(theta=1e16), max_position_embeddings=2048,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: random_params(config, key), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    for norm in (params["blocks"]["input_norm"], params["blocks"]["post_norm"], params["final_norm"]):
        norm["scale"][:] = 1
    codes = rng.choice(2**CODE, vocab_size, replace=False)
    codes = 2.0 * ((codes[:, None] >> np.arange(CODE)) & 1) - 1
    embedding = params["embed"]["embedding"]
    embedding[:, CONST], embedding[:, OWN] = 4, codes
    embedding[2, SINK], embedding[2, OWN] = 9, 0  # <begin>, as long as others: where attention rests
    params["head"]["kernel"][SAID] = 4 * codes.T
    params["head"]["kernel"][NOISE] = 3 * rng.normal(size=(14, vocab_size))
    q, k, v, o = (params["mixers"]["full_attention"][f"{name}_proj"]["kernel"] for name in "qkvo")  # [4,D,H,K] or back

    # Layer 1: the score is a sum of cosines of (distance - 1) times each of the three fast frequencies.
    frequencies = 1e16 ** (-np.arange(3) / 16)
    k[1, CONST, 0, :3] = 30
    q[1, CONST, 0, :3], q[1, CONST, 0, 16:19] = 30 * np.cos(frequencies), -30 * np.sin(frequencies)
    v[1, OWN, 0, :CODE], o[1, 0, :CODE, BEFORE] = np.eye(CODE), np.eye(CODE)
    # Layer 2: own code against the code before; without a match the beginning is looked at, which says nothing.
    dims = FREE[:CODE]
    q[2, OWN, 0, dims], k[2, BEFORE, 0, dims] = 60 * np.eye(CODE), np.eye(CODE)
    q[2, CONST, 0, FREE[CODE]], k[2, SINK, 0, FREE[CODE]] = 60, 6 / 9
    v[2, OWN, 0, :CODE], o[2, 0, :CODE, SAID] = np.eye(CODE), np.eye(CODE)
    for layer in (0, 3):
        q[layer], k[layer], v[layer] = (0.3 * rng.normal(size=(HIDDEN, HEADS, WIDTH)) for _ in range(3))
        o[layer][..., NOISE] = 0.02 * rng.normal(size=(HEADS, WIDTH, 14))
    return Model(jax.tree.map(jax.numpy.asarray, params), config)


def student(teacher, texts):
    """The all-linear student as it is before alignment, beside its teacher on one device."""
    linear = convert(teacher, ("gated_deltanet",) * 4, GatedDeltaNetConfig(), jax.random.key(3))
    mixers = linear.params["mixers"] | teacher.params["mixers"]
    both = Model({**linear.params, "mixers": mixers}, linear.config)
    return MaskedStudent(teacher, both, texts, make_mesh(devices=jax.devices()[:1]), jax.numpy.float32)


def text(batches=2, rows=4, length=16, seed=0):
    """Rows of names, none of which is twice in a row."""
    rng = np.random.default_rng(seed)
    names = [[3 + len(NAMES) + rng.permutation(len(NAMES))[:length] for _ in range(rows)] for _ in range(batches)]
    return [{"tokens": np.array(part, np.int32), "segment_ids": np.ones((rows, length), np.int32)} for part in names]
