"""Reads exported folders as a user without jaxhybrid does: run as a program, never imported by tests.

reader.py FOLDER...                 each FOLDER has inputs.npz beside it; writes VERSION.npz there, of transformers
reader.py --other-ways FOLDER...    the same, and reads it offloaded and quantized
"""

import contextlib
import io
import logging
import os
import re
import sys
import warnings

# As if not installed: jax and jaxhybrid, which exports must not need, and what transformers would import for seconds.
for name in ("jax", "jaxlib", "flax", "jaxhybrid", "jaxhybrid_kernels", "sklearn", "pandas"):
    sys.modules[name] = None

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
GATES = tuple(  # of a linear layer itself, not of its token shift
    f"linear_attn.{name}"
    for name in (
        "a_proj.weight",
        "b_proj.weight",
        "A_log",
        "dt_bias",
        "a_down_proj.weight",
        "a_up_proj.weight",
        "a_up_proj.bias",
        "dt_proj.weight",
        "D",
        "decay_bias",
        "r_down_proj.weight",
        "r_up_proj.weight",
        "rate_bias",
        "removal",
    )
)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def refusal_without_trust(folder):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        return str(error)
    return ""


class Heard(logging.Handler):
    """Keeps what is logged as a warning."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def run_card(folder):
    """What the example of the folder's README prints, and what it warns of."""
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    heard, printed, before = Heard(), io.StringIO(), os.getcwd()
    transformers.utils.logging.get_logger("transformers").addHandler(heard)
    os.chdir(folder)
    with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(printed):
        exec(example, {})
    os.chdir(before)
    transformers.utils.logging.get_logger("transformers").removeHandler(heard)
    return printed.getvalue(), heard.messages + [str(w.message) for w in warned]


def positions(segments):
    """Restarting at each segment; 0 on padding, which is segment 0."""
    places = torch.zeros_like(segments)
    for row, segment in zip(places, segments):
        for s in set(segment.tolist()) - {0}:
            row[segment == s] = torch.arange(int((segment == s).sum()))
    return places


def generate(model, tokens):
    prompts = [tokens[:1, :length] for length in (3, 9, 17)]
    batch = torch.cat([torch.nn.functional.pad(p, (17 - p.shape[1], 0)) for p in prompts])
    padded = {"inputs": batch, "attention_mask": (batch != 0).long()} | GREEDY
    beams = {"inputs": prompts[1], "num_beams": 3} | GREEDY

    def singles(**options):
        return torch.stack([model.generate(p, **GREEDY, **options)[0, p.shape[1] :] for p in prompts])

    return {
        "singles": singles(),
        "uncached": singles(use_cache=False),
        "static": singles(cache_implementation="static"),
        "in_pieces": singles(prefill_chunk_size=4),
        "batch": model.generate(**padded)[:, 17:],
        "batch_static": model.generate(**padded, cache_implementation="static")[:, 17:],
        "beams": model.generate(**beams)[0],
        "beams_uncached": model.generate(**beams, use_cache=False)[0],
    }


def read(folder, inputs, other_ways):
    tokens, segments = (torch.from_numpy(inputs[name]).long() for name in ("tokens", "segments"))
    model, loading = load(folder, output_loading_info=True)
    mask = (segments != 0).long()
    again = folder.parent / f"saved-{transformers.__version__}"
    model.save_pretrained(again)
    found = {
        "logits": model(tokens).logits,
        "padded": model(tokens, attention_mask=mask).logits,
        "packed": model(tokens, attention_mask=mask, position_ids=positions(segments)).logits,
        "saved": load(again)(tokens).logits,
        "refusal": refusal_without_trust(folder),
        "loading": str({name: sorted(map(str, found)) for name, found in loading.items() if found}),
        "dtype": str(AutoConfig.from_pretrained(folder, trust_remote_code=True).dtype),
    }
    found["card_prints"], found["card_warns"] = run_card(folder)
    found |= generate(model, tokens)
    if other_ways and list(folder.glob("*.py")):  # what becomes of an architecture of transformers is its own affair
        found |= offloaded(folder, tokens) | quantized(folder, tokens, found["logits"])
    np.savez(folder.parent / f"{transformers.__version__}.npz", **found)


def offloaded(folder, tokens):
    """Logits with the weights outside the device, as accelerate brings them in: module by module."""
    from accelerate import cpu_offload, disk_offload

    on_disk = folder.parent / "offload"
    models = {"in_memory": cpu_offload(load(folder)), "on_disk": disk_offload(load(folder), on_disk)}
    return {name: model(tokens).logits for name, model in models.items()}


def quantized(folder, tokens, logits):
    """Per kind: KL(whole, quantized) in nats per token, how many layers were quantized, and the gates that changed."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig

    kinds = {
        "bnb8": BitsAndBytesConfig(load_in_8bit=True),
        "bnb4": BitsAndBytesConfig(load_in_4bit=True),
        "ao8": TorchAoConfig(Int8WeightOnlyConfig()),
    }
    whole, found = dict(load(folder).named_parameters()), {}
    log_p = logits.log_softmax(-1)
    for kind, config in kinds.items():
        model = load(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)
        kl = (log_p.exp() * (log_p - model(tokens).logits.log_softmax(-1))).sum(-1).mean()
        layers = [name for name, p in model.named_parameters() if type(p) is not type(whole[name])]
        gates = {name: p for name, p in model.named_parameters() if name.endswith(GATES)}
        changed = [name for name, p in gates.items() if name in layers or not p.equal(whole[name])]
        found |= {f"{kind}_kl": kl, f"{kind}_layers": len(layers), f"{kind}_changed_gates": changed}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folders = [Path(name) for name in sys.argv[1:] if not name.startswith("--")]
    with torch.no_grad():
        for folder in folders:
            read(folder, np.load(folder.parent / "inputs.npz"), "--other-ways" in sys.argv)
