"""Small random students, exported, with the log probabilities that JAX gives: what vLLM is compared with.

    python -m plugins.vllm.tests.write_students FOLDER

from the root of a checkout, in jaxhybrid's environment. FOLDER/NAME is an export, FOLDER/NAME.npz has for each prompt
`tokens_0` [T] and `log_probs_0` [T,S], of the token after each. FOLDER/answers.json has prompts as texts and greedy
answers of the student `SERVED`, by JAX.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from jaxhybrid.decoding.generate import generate
from jaxhybrid.export.folder import export
from jaxhybrid.model.config import FULL_ATTENTION, RopeConfig, WindowConfig
from jaxhybrid.model.mixers.deltanet import DeltaNetConfig
from jaxhybrid.model.mixers.fixed_decay import FixedDecayConfig
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.mixers.gla import GLAConfig
from jaxhybrid.model.mixers.kimi_delta import KimiDeltaConfig
from jaxhybrid.model.mixers.mamba2 import Mamba2Config
from jaxhybrid.model.mixers.rwkv6 import RWKV6Config
from jaxhybrid.model.mixers.rwkv7 import RWKV7Config
from jaxhybrid.model.transformer import forward
from tests.export.students import LLAMA3, make_student

VOCABULARY = 61
LENGTHS = (3, 300, 1, 77, 140, 78)
SHAPE = {"vocab_size": VOCABULARY, "head_dim": 32, "max_position_embeddings": 1024}  # vLLM's CPU attention wants 32
LLAMA = {"family": "llama", "rope": LLAMA3}
QWEN2 = {"family": "qwen2", "qkv_bias": True}
QWEN3 = {"family": "qwen3", "qk_norm": True}
EVERYTHING = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "tie_embeddings": True}
GEMMA3 = {
    "family": "gemma3_text", "qk_norm": True, "activation": "gelu_tanh", "norms": "around", "norm_offset": True,
    "embedding_scale": 8.0, "attention_scale": 0.2, "tie_embeddings": True,
    "rope": RopeConfig("linear", 500.0, factor=8.0), "window": WindowConfig(16, (1,), RopeConfig("default", 100.0)),
}  # fmt: skip
GRANITE = {
    "family": "granite",
    "embedding_scale": 2.0,
    "residual_scale": 0.5,
    "logit_scale": 0.25,
    "attention_scale": 0.3,
}


def student(mixer, *, carried=(False, False), pattern="LSL", **settings):
    """carried: the teacher's q, k, v biases and norms into the linear layers. pattern: S for softmax, L for linear."""
    mixer = replace(mixer, qkv_bias=carried[0], qk_norm=carried[1])
    kinds = {"S": FULL_ATTENTION, "L": mixer.kind}
    types = tuple(kinds[letter] for letter in pattern)
    return {"mixer": mixer, "num_layers": len(types), "layer_types": types, **SHAPE, **settings}


STUDENTS = {
    "gated_deltanet": student(GatedDeltaNetConfig(), **LLAMA, pattern="LSLLS"),
    "gated_deltanet_everything": student(
        GatedDeltaNetConfig(expand_kv=False, conv_size=4, rope=True), carried=(True, False), **LLAMA, **EVERYTHING
    ),
    "deltanet": student(DeltaNetConfig(conv_size=3), carried=(True, False), **QWEN2),
    "gla": student(GLAConfig(decay_rank=4, rope=True), carried=(True, False), **QWEN2, tie_embeddings=True),
    "fixed_decay": student(FixedDecayConfig(), **LLAMA),
    "mamba2": student(Mamba2Config(expand_kv=False), **QWEN2),
    "kimi_delta": student(KimiDeltaConfig(conv_size=4, low_rank=64), carried=(False, True), **QWEN3),
    "rwkv6": student(RWKV6Config(expand_kv=False, low_rank=64, rope=True), **LLAMA),
    "rwkv7": student(RWKV7Config(low_rank=64), **QWEN2),
    "gemma3": student(GatedDeltaNetConfig(conv_size=2), carried=(False, True), **GEMMA3, pattern="LSLS"),
    "granite": student(GLAConfig(decay_rank=4), **GRANITE),
}  # fmt: skip


SERVED = "gated_deltanet"
ANSWERS = ((5, 24), (60, 32), (1, 16), (200, 24), (33, 40), (129, 20), (12, 32), (90, 8))  # tokens of prompt and answer
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def write_tokenizer(folder: Path) -> None:
    """A word for each token: w0 w1 ..."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT).save_pretrained(folder)


def write(name: str, folder: Path) -> None:
    model = make_student(folder / "tokenizer", **STUDENTS[name])
    export(model, folder / name, "float32", format="remote-code")
    rng = np.random.default_rng(1)
    rows = rng.integers(1, VOCABULARY, (len(LENGTHS), max(LENGTHS)))  # what stands behind a prompt does not reach it
    log_probs = jax.nn.log_softmax(jax.jit(partial(forward, model))(jnp.asarray(rows, jnp.int32)))
    found = {}
    for number, length in enumerate(LENGTHS):
        found |= {f"tokens_{number}": rows[number, :length], f"log_probs_{number}": log_probs[number, :length]}
    np.savez(folder / f"{name}.npz", **found)
    if name == SERVED:
        texts = [rng.integers(1, VOCABULARY, length).tolist() for length, _ in ANSWERS]
        longest = max(new for _, new in ANSWERS)
        answers = [answer[:new] for answer, (_, new) in zip(generate(model, texts, longest), ANSWERS)]
        pairs = [{"prompt": words(text), "answer": words(answer)} for text, answer in zip(texts, answers)]
        (folder / "answers.json").write_text(json.dumps(pairs, indent=1))


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_tokenizer(folder / "tokenizer")
    for name in STUDENTS:
        write(name, folder)
        print(name, flush=True)
