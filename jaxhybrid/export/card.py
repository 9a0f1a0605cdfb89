"""The README.md of an exported folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxhybrid.families import is_student_config
from jaxhybrid.families.native import NATIVE
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.mixers import LINEAR_MIXERS, STUDENT_MIXERS

OLDEST, BEFORE = "5.16", "5.25"
TRANSFORMERS = f">={OLDEST},<{BEFORE}"  # what exports are tested with

CARD = """\
---
{metadata}
---

# {name}

A hybrid of {base} ({family} architecture) with {layers} layers, counted from 0.
Softmax attention is kept in {softmax}; {converted} of the layers use {mixing},
whose memory does not grow with the text.

{kept}{mixer}Weights are {dtype}{decays}.

## Use

{needs}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

{made}Made with jaxhybrid. {terms}
"""

OWN_CODE = f"""\
Needs `torch` and `transformers{TRANSFORMERS}`. The Python files in this folder are the model; `trust_remote_code` lets
transformers run them."""
OWN_ARCHITECTURE = """\
Needs `torch` and `transformers>={since},<{before}`, which has this architecture itself: `{native}`."""


def base_model_name(source: Path | None, teacher_config: dict[str, Any]) -> str | None:
    """What the base model is called: "org/name" where a hub cache or its config tells, else its folder's name."""
    if is_student_config(teacher_config):  # a student trained further
        return teacher_config.get("base_model")
    if source is None:
        return None
    for part in source.absolute().parts:
        if part.startswith("models--") and part.count("--") == 2:  # a repository's folder in the hub cache
            return part.removeprefix("models--").replace("--", "/")
    name = teacher_config.get("_name_or_path", "")
    return name if _is_repository(name) else source.absolute().name


def model_card(
    config: ModelConfig, name: str, base: str | None, dtype: str, *, native: str | None, made: str, terms: Sequence[str]
) -> str:
    """Markdown with the hub's metadata block: what the model is, which layers are softmax, how to load it.

    native: the architecture of transformers' own that it is in, if it is.
    made: how it was trained, and its figures, in Markdown. terms: files of the base model's terms in the folder.
    """
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [jaxhybrid, linear-attention]"]
    if base is not None and _is_repository(base):
        metadata.append(f"base_model: {base}")
    if terms:  # the hub's word for terms that are not one of its list
        metadata += ["license: other", f"license_link: {terms[0]}"]
    softmax, changed = config.softmax_layers, config.softmax.describe()
    mixer = None if config.mixer is None else STUDENT_MIXERS[config.mixer.kind]
    is_linear = config.mixer is None or config.mixer.kind in LINEAR_MIXERS
    mixing = [*["linear attention"] * is_linear, *([] if mixer is None else [mixer.title])]
    return CARD.format(
        metadata="\n".join(metadata),
        name=name,
        base=base or "a pretrained transformer",
        family=config.family,
        layers=config.num_layers,
        softmax=f"layers {', '.join(map(str, softmax))}" if softmax else "no layer",
        converted=config.num_layers - len(softmax),
        mixing=mixing[0] + "".join(f" ({title})" for title in mixing[1:]),
        kept=f"A softmax layer has {' and '.join(changed)}. " if changed else "",
        mixer="" if mixer is None else f"Such a layer has: {', '.join(mixer.describe(config))}. ",
        dtype=dtype,
        decays="; the decays of linear layers are float32" * is_linear,
        needs=OWN_CODE if native is None else _needs(native),
        made=f"{made}\n\n" if made else "",
        terms=f"The terms of the base model apply: {', '.join(terms)}."
        if terms
        else "The terms of the base model apply.",
        trust="" if native else ", trust_remote_code=True",
    )


def _needs(native: str) -> str:
    found = NATIVE[native]
    needs = OWN_ARCHITECTURE.format(since=found.since or OLDEST, before=BEFORE, native=native)
    return f"{needs} {found.warning}".strip()


def _is_repository(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~"))
