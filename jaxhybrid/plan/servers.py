"""Which server loads an exported folder, why another does not and what to change; and what a sequence takes there.

What servers can do is data, in servers.yaml, with sources; most of it was read, not run.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from jaxhybrid import checksums
from jaxhybrid.disk import size_text
from jaxhybrid.errors import ConfigError
from jaxhybrid.export.form import native_of, why_not_native
from jaxhybrid.families.native import NATIVE
from jaxhybrid.families.native_qwen3_5 import attention_interval
from jaxhybrid.families.student import is_student
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.plan.serving import Serving, as_json, serving_of
from jaxhybrid.report.table import aligned
from jaxhybrid.weights.huggingface import open_student
from jaxhybrid.weights.safetensors import read_table

FACTS = Path(__file__).with_name("servers.yaml")
BLOCK_TOKENS = 16  # K/V caches are made of blocks of a multiple of this
PERIODIC = (
    "select the layers with select.method=uniform select.uniform=last, and a select.budget that divides the depth into "
    "equal groups"
)


@cache
def server_facts() -> dict[str, Any]:
    facts: dict[str, Any] = yaml.safe_load(FACTS.read_text())
    return facts


def check(folder: Path, verify: bool = False) -> dict[str, Any]:
    """What is known of an export's servers, for programs. Of the weights only names, shapes and types are read.

    verify: compare all files with their checksums, too.

    Raises:
        DamageError: a file is not as it was exported.
        ConfigError: the folder is no export.
        WeightsError: its weights are not those that its config asks for.
    """
    if not is_student(folder):
        raise ConfigError(f"{folder} is not an exported folder: no config.json of an export in it.")
    has_checksums = checksums.verify(folder) if verify else None
    hf, files = read_table(folder / "config.json"), open_student(folder)
    config, dtype = files.config, str(hf.get("dtype", "float32"))
    found, form = serving_of(config, dtype), hf["model_type"]
    return {
        "folder": str(folder),
        "verified": has_checksums,
        "form": form,
        "why_not_native": "" if form in NATIVE else why_not_native(config),
        "layers": config.num_layers,
        "softmax_layers": list(config.softmax_layers),
        "interval": attention_interval(config),
        "dtype": dtype,
        "servers": [_server(name, facts, form, config) for name, facts in server_facts().items()],
        "sequence": as_json(found) | {"kv_block_tokens_of_a_state": block_tokens(found)},
    }


def block_tokens(found: Serving) -> int:
    """Tokens whose keys and values, of one layer, are no less than a state: the block of a cache whose pages are of one
    size for both kinds of layers, as vLLM's are."""
    return math.ceil(found.state / found.token / BLOCK_TOKENS) * BLOCK_TOKENS


def _server(name: str, facts: dict[str, Any], form: str, config: ModelConfig) -> dict[str, Any]:
    """`loads` is True, False, or None where it is not known."""
    forms = facts.get("loads") or {}
    if form not in forms:
        loads = None if facts.get("known") is False and form in NATIVE else False
        natives = [one for one in NATIVE if one in forms and forms[one].get("known") is not False]
        lacking = [one for one in natives if _lacking(forms[one], config)]
        return _found(name, loads, facts["otherwise"], change=_ways(natives, lacking, config))
    known = forms[form]
    loads = None if known.get("known") is False else True
    found = _found(name, loads, known["note"], start=known.get("from"), sources=known.get("sources", []))
    if known.get("uniform") and attention_interval(config) is None:
        layers = ", ".join(map(str, config.softmax_layers))
        found["loads"] = False
        found["why"] += f"; with softmax in {layers} it would take other layers for softmax, without a word"
        found["change"].append(PERIODIC)
    if known.get("both_kinds") and len({*config.layer_types}) < 2:
        found["loads"] = False
        found["why"] += f"; it wants softmax layers beside linear ones, and all are {config.layer_types[0]} here"
    if lacking := _lacking(known, config):
        found["loads"] = False
        found["why"] += f"; it has no {', '.join(lacking)}"
    wanted = known.get("head_dim")
    if wanted and config.head_dim != wanted["wants"]:
        found["change"].append(wanted["remedy"])
    return found


def _ways(natives: list[str], lacking: list[str], config: ModelConfig) -> list[str]:
    """What to do so that a server loads it that has `natives` of transformers' own architectures, and of some of them
    not all that the model has."""
    possible = native_of(config)
    if possible is None:
        return [f"a student that {' or '.join(natives)} can express: see below"] if natives else []
    return ["export it with --format native"] if possible in natives and possible not in lacking else []


def _lacking(known: dict[str, Any], config: ModelConfig) -> list[str]:
    """What of a model a server has not in an architecture, in words."""
    return [words for trait, words in known.get("without", {}).items() if trait in _traits(config)]


def _traits(config: ModelConfig) -> set[str]:
    """What not every server has, by the names that servers.yaml uses."""
    has = {
        "windows": "window_attention" in config.layer_types,
        "caps": config.attention_cap is not None or config.logit_cap is not None,
        "experts": config.experts is not None,
        "length_scale": config.softmax.length_scale is not None,
        "rotation": config.softmax.rope,
        "biases": config.qkv_bias or config.o_bias,
    }
    return {trait for trait, present in has.items() if present}


def _found(name: str, loads: bool | None, why: str, start: str | None = None, **lists: list[str]) -> dict[str, Any]:
    return {"server": name, "loads": loads, "from": start, "why": why, "change": [], "sources": []} | {
        key: [*values] for key, values in lists.items()
    }


def check_text(found: dict[str, Any]) -> str:
    """For people."""
    words = {True: "yes", False: "no", None: "not known"}
    rows = [[one["server"], words[one["loads"]], one["from"] or "-"] for one in found["servers"]]
    kept = f"{len(found['softmax_layers'])} of {found['layers']} layers softmax"
    told = {None: "", True: ", all files as they were exported", False: ", without checksums"}[found["verified"]]
    lines = [f"{found['folder']}: {found['form']}, {kept}, {found['dtype']}{told}", ""]
    lines += [aligned(["server", "loads it", "from version"], rows, left=3), ""]
    for one in found["servers"]:
        lines.append(f"{one['server']}: {one['why']}")
        lines += [f"  change: {change}" for change in one["change"]]
        lines += [f"  source: {source}" for source in one["sources"]]
    if found["why_not_native"]:
        lines += ["", found["why_not_native"]]
    sequence = found["sequence"]
    sizes = [
        [f"{row['tokens']:,}", size_text(row["hybrid_bytes"]), size_text(row["teacher_bytes"])]
        for row in sequence["sequences"]
    ]
    lines += ["", aligned(["tokens of a sequence", "takes", "softmax everywhere"], sizes, left=0), ""]
    token, state = sequence["kv_bytes_per_token_and_softmax_layer"], sequence["state_bytes_per_linear_layer"]
    return "\n".join(
        [
            *lines,
            f"A softmax layer adds {token:,} bytes a token; a converted layer keeps {state:,}.",
            "Where a cache has pages of one size for both, as vLLM's, a block is of "
            f"{sequence['kv_block_tokens_of_a_state']:,} tokens.",
            "transformers was run, and vLLM with the plugin; the rest is what sources and threads of the servers say "
            "(docs/serving.md).",
        ]
    )
