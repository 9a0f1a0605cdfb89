"""A GGUF teacher against transformers' own reading of the file: weights, logits, token ids, and a needle to be found.

    python benchmarks/compare_gguf.py model.gguf [--text pydoc] [--documents 300] [--tokens 256]

The file is one whole file, since transformers reads no other. Memory: the model twice over in float32, one after the
other. Needs the extras gguf and torch.
"""

import argparse
import random
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from jaxhybrid.complete import complete
from jaxhybrid.data import open_source
from jaxhybrid.model.transformer import forward
from jaxhybrid.weights.gguf.folder import gguf_folder
from jaxhybrid.weights.huggingface import load_teacher
from jaxhybrid.weights.safetensors import stored_tensors

# What prose lacks.
ODD_TEXTS = [
    "Straße, naïve, Ελληνικά, русский, 日本語のテキスト, 中文, العربية, हिन्दी, 🙂👩‍👩‍👧 e\u0301 ½ ٣ \u200b\ufeff",
    "def f(x):\n\treturn {'a': x ** 2, \"b\": [i for i in range(x)]}  # comment\n\n\n    pass\r\n",
    "It's they'll I'm WE'VE don't; \"quoted\" -- dash - 100% $3.50 1,234,567.89 2024-01-31 0x1F 3rd a1b2",
    "table:\n  1   2   3\n  4   5   6\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><tool_call>{}</tool_call><|im_sta",
    "",
    "   ",
    "\x00\x01\x7f",
]
TALK = [{"role": "user", "content": "What is 12 + 34?"}, {"role": "assistant", "content": "46\n"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", default="pydoc", help="text source, as data.train of a run")
    parser.add_argument("--documents", type=int, default=300, help="documents whose token ids are compared")
    parser.add_argument("--tokens", type=int, default=256, help="length of the text whose logits are compared")
    parser.add_argument("--needles", type=int, default=4, help="numbers to be found again in a long text")
    arguments = parser.parse_args()

    folder = gguf_folder(str(arguments.file))
    documents = list(islice(open_source(arguments.text).documents(), arguments.documents))
    ours = AutoTokenizer.from_pretrained(folder)
    compare_tokenizers(ours, arguments.file, [*documents, *ODD_TEXTS])
    ids = np.array(ours("\n\n".join(documents[:20])).input_ids[: arguments.tokens])[None]
    expected = reference_logits(arguments.file, folder, ids)
    found = own_logits(arguments.file, ids)
    agreed = (found.argmax(-1) == expected.argmax(-1)).mean()
    print(f"logits of {ids.size} tokens: up to {np.abs(expected).max():.1f}, apart at most", end=" ")
    print(f"{np.abs(found - expected).max():.1e}; the same first choice at {agreed:.1%} of the places")
    find_needles(str(arguments.file), ours, documents, arguments.needles)


def compare_tokenizers(ours: Any, file: Path, texts: list[str]) -> None:
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    pairs = [(text, ours(text).input_ids, theirs(text).input_ids) for text in texts]
    different = [text for text, a, b in pairs if a != b]
    tokens = sum(len(a) for _, a, _ in pairs)
    print(f"token ids of {len(texts)} texts, {tokens} tokens: {len(different)} texts differ {[text[:60] for text in different[:3]]!r}")
    returned = sum(ours.decode(a, skip_special_tokens=True) == text for text, a, _ in pairs)
    print(f"texts that come back the same: {returned} of {len(texts)}")
    if ours.chat_template is None:
        print("chat template: none in the file")
        return
    talk = [t.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) for t in (ours, theirs)]
    print(f"chat template: {'the same' if talk[0] == talk[1] else talk}")
    ids = [t(talk[0], add_special_tokens=False).input_ids for t in (ours, theirs)]
    print(f"ids of a chat: {'the same' if ids[0] == ids[1] else ids}, {len(ids[0])} tokens")


def reference_logits(file: Path, folder: Path, ids: np.ndarray) -> np.ndarray:
    """Of transformers' reading; its weights are compared with ours on the way."""
    settings = load_gguf_checkpoint(str(file))["config"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    stored = stored_tensors(folder)
    different = [name for name, value in tensors.items() if not np.array_equal(stored[name].view(), value.numpy())]
    alone = stored.keys() ^ tensors.keys()
    print(f"{len(tensors)} tensors: {len(different)} differ {different[:3]}; {len(alone)} on one side only")
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    # These buffers are in no file.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    embedding = model.model.embed_tokens
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def own_logits(file: Path, ids: np.ndarray) -> np.ndarray:
    teacher = load_teacher(file)
    return np.asarray(jax.jit(partial(forward, config=teacher.config))(teacher.params, tokens_BT=jnp.asarray(ids)))


def find_needles(file: str, tokenizer: Any, documents: list[str], count: int) -> None:
    """A number of seven digits hidden in prose, asked for at the end by the chat template."""
    rng, found, lengths = random.Random(0), 0, []
    for _ in range(count):
        number = str(rng.randrange(10**6, 10**7))
        words = rng.choice([text for text in documents if len(text.split()) > 600]).split()[:500]
        place = rng.randrange(100, 400)
        words[place:place] = f"The secret number is {number}.".split()
        question = f"{' '.join(words)}\n\nWhat is the secret number in the text above? Answer with the number."
        (answer,) = complete(file, [question], 16, chat=True)
        lengths.append(len(tokenizer(question).input_ids))
        found += number in answer.replace(",", "")
        print(f"  {number}: {answer!r}")
    print(f"numbers found: {found} of {count}, in {min(lengths)} to {max(lengths)} tokens")


if __name__ == "__main__":
    main()
