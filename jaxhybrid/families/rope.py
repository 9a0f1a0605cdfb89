"""Rotary settings of a Hugging Face config: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""

from collections.abc import Sequence
from typing import Any

from jaxhybrid.errors import ConfigError
from jaxhybrid.model.config import RopeConfig
from jaxhybrid.model.rope import yarn_attention_factor

CONFIG_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
DEFAULT_THETA = 10_000.0
# What each rule needs, and what else it reads.
REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_position_embeddings",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor"),
}
LISTS = ("short_factor", "long_factor")


def ropes_from_hf(
    hf: dict[str, Any],
    max_position_embeddings: int,
    ignored: Sequence[str] = (),
    sliding_theta: float | None = None,
    partial: bool = False,
) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary settings of a config: of all layers, or of full and of sliding ones where they are told apart.

    Args:
        sliding_theta: the base of sliding layers in a config that says nothing of it; None: they are not told apart.
    """
    if sliding_theta is None:
        return rope_from_hf(hf, max_position_embeddings, ignored, partial), None
    given = hf.get("rope_parameters") or {}
    if not given or not isinstance(given, dict) or any(not isinstance(value, dict | None) for value in given.values()):
        # Older keys: `rope_scaling` and `rope_theta` are those of full layers.
        sliding = {"rope_theta": hf.get("rope_local_base_freq", sliding_theta)}
        return rope_from_hf(hf, max_position_embeddings, ignored), rope_from_hf(sliding, max_position_embeddings)
    unknown = given.keys() - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(
            f"rope_parameters has {', '.join(sorted(unknown))}; known: full_attention, sliding_attention."
        )
    older = {key: value for key, value in hf.items() if key not in ("rope_parameters", "rope_local_base_freq")}
    full = older | {"rope_parameters": given.get("full_attention"), "rope_scaling": hf.get("rope_scaling")}
    sliding = {"rope_parameters": given.get("sliding_attention"), "rope_theta": sliding_theta}
    return rope_from_hf(full, max_position_embeddings, ignored), rope_from_hf(sliding, max_position_embeddings, ignored)


def rope_from_hf(
    hf: dict[str, Any], max_position_embeddings: int, ignored: Sequence[str] = (), partial: bool = False
) -> RopeConfig:
    """The rotary settings of a config. `rope_scaling`, where filled, wins over `rope_parameters`, as in transformers.

    Args:
        ignored: keys to pass over that the rule does not know, as `rope_scaling.attn_factor`.
        partial: whether the family can leave a part of the head unrotated.

    Raises:
        ConfigError: an unknown rule, a key the rule does not have, a missing key, or a part of the head left unrotated.
    """
    source = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    given = hf.get(source) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"{source}={given!r} is not a table of settings.")
    nested = [name for name, value in given.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(
            f"{source} differs by layer type ({', '.join(nested)}); one rule for all layers is supported."
        )
    rope = {name: value for name, value in given.items() if value is not None}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind not in REQUIRED:
        raise ConfigError(f"{source} has rope_type={kind!r}; supported: {', '.join(REQUIRED)}.")
    share = 1.0
    for where, value in (
        ("partial_rotary_factor", hf.get("partial_rotary_factor")),
        (f"{source}.partial_rotary_factor", rope.pop("partial_rotary_factor", None)),  # it wins
    ):
        if value in (None, 1):
            continue
        if not partial or isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ConfigError(f"{where}={value!r}: this family's heads are rotated whole.")
        share = float(value)
    theta = rope.pop("rope_theta", hf.get("rope_theta"))
    length = _original_length(hf, rope, kind, source, max_position_embeddings)
    missing = [name for name in REQUIRED[kind] if name not in rope]
    if missing:
        raise ConfigError(f"{source} of rope_type={kind!r} lacks {', '.join(missing)}.")
    known = REQUIRED[kind] + OPTIONAL[kind]
    for name in known:
        if f"{source}.{name}" in ignored:
            raise ConfigError(
                f"ignore_config_keys has '{source}.{name}', which rope_type={kind!r} depends on; it stays."
            )
    unknown = {name: rope.pop(name) for name in [*rope] if name not in known}
    for name, value in rope.items():
        numbers = value if name in LISTS and isinstance(value, list | tuple) else [value]
        if name not in ("truncate",) and any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers):
            raise ConfigError(f"{source}.{name}={value!r} is not a number.")
        if name in LISTS:
            rope[name] = tuple(map(float, numbers))
    if kind in ("yarn", "longrope") and "factor" not in rope:
        rope["factor"] = max_position_embeddings / (length or max_position_embeddings)
    rope |= {"original_max_position_embeddings": length}
    for name in ("beta_fast", "beta_slow"):  # transformers takes a zero as absent
        if not rope.get(name, True):
            del rope[name]
    config = RopeConfig(kind=kind, theta=float(DEFAULT_THETA if theta is None else theta), partial=share, **rope)
    for name, value in unknown.items():
        if f"{source}.{name}" not in ignored:
            raise ConfigError(_unknown(source, name, value, config))
    return config


def _unknown(source: str, name: str, value: Any, rope: RopeConfig) -> str:
    """The message about a key that the rule does not have. transformers warns of it and computes without it."""
    ignore = f"ignore_config_keys=('{source}.{name}',)"
    if (rope.kind, name) != ("yarn", "attn_factor") or not isinstance(value, int | float):
        return (
            f"{source}.{name}={value!r} is not known to rope_type={rope.kind!r}. transformers passes it over; "
            f"to do the same, pass {ignore}."
        )
    scale = yarn_attention_factor(rope)
    return (
        f"{source}.{name}={value!r}: transformers passes it over and scales attention by {scale:.6f} all the same; to "
        f"compute what it does, pass {ignore}. Engines that read the key multiply the two; to compute what they do, "
        f'write "attention_factor": {round(scale * value, 6)} in its place in config.json, which transformers knows.'
    )


def _original_length(
    hf: dict[str, Any], rope: dict[str, Any], kind: str, source: str, max_positions: int
) -> int | None:
    """The context length before extension, for the rules that read one; a key of the config itself wins."""
    inner = rope.pop("original_max_position_embeddings", None)
    outer = hf.get("original_max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope"):
        return next(length for length in (outer, inner, max_positions) if length is not None)
    for where, length in (
        (f"{source}.original_max_position_embeddings", inner),
        ("original_max_position_embeddings", outer),
    ):
        if kind == "dynamic" and length not in (None, max_positions):
            raise ConfigError(
                f"{where}={length!r} with rope_type='dynamic': transformers scales from max_position_embeddings="
                f"{max_positions} and ignores it; make the two agree."
            )
    return None


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """The `rope_parameters` of a rotary setting."""
    hf: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.partial != 1:
        hf["partial_rotary_factor"] = rope.partial
    for name in REQUIRED[rope.kind] + OPTIONAL[rope.kind]:
        value = getattr(rope, name)
        if value is not None:
            hf[name] = list(value) if name in LISTS else value
    return hf
