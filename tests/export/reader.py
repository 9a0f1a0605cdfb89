"""Reads exported folders as a user without jaxhybrid does: run as a program, never imported by tests.

reader.py FOLDER...    each FOLDER has inputs.npz beside its model; writes outputs.npz there
"""

import sys


class Blocker:
    """Importing jax or jaxhybrid fails, as where neither is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "jaxhybrid", "jaxhybrid_kernels"):
            raise ImportError(f"{name} is blocked: the exported folder must not need it")


sys.meta_path.insert(0, Blocker())

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402


def refusal_without_trust(folder):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        return str(error)
    return ""


def read(folder):
    inputs = np.load(folder.parent / "inputs.npz")
    tokens, mask = torch.from_numpy(inputs["tokens"]).long(), torch.from_numpy(inputs["mask"]).long()
    model, loading = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    model.eval()
    with torch.no_grad():
        logits = model(tokens).logits
        padded = model(tokens, attention_mask=mask).logits
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    np.savez(
        folder.parent / "outputs.npz",
        logits=logits,
        padded=padded,
        generated=model.generate(tokens[:1, :9], **greedy),
        uncached=model.generate(tokens[:1, :9], use_cache=False, **greedy),
        refusal=refusal_without_trust(folder),
        loading=str({name: sorted(map(str, found)) for name, found in loading.items() if found}),
        dtype=str(AutoConfig.from_pretrained(folder, trust_remote_code=True).dtype),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        read(Path(name))
