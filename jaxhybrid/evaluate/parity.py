"""How far the forms of one model differ: training (chunked), decoding (token by token), and transformers.

What is compared is the log probability of each next token of a text. All forms compute the same function; they add up
in other orders. The reference is the training form in float32.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module, util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.model import decode
from jaxhybrid.model.transformer import Model, forward

Form = Callable[[np.ndarray], np.ndarray]  # tokens [B,T] -> log probabilities [B,T-1] of tokens[:, 1:]
CHUNKED, RECURRENT, TRANSFORMERS = "training (chunked)", "decoding (recurrent)", "transformers"


def parity(
    model: Model, tokens: np.ndarray, dtype: str = "float32", *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """For each form its differences to the reference, in nats, and how far its first row depends on the other rows.

    Args:
        tokens: [B,T], at least two rows of text.
        dtype: in which the forms compute; the reference is in float32.
        trust_remote_code: let transformers run the Python files of the model's folder.

    Raises:
        ConfigError: `dtype` is unknown.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype={dtype}: use float32 or bfloat16.")
    forms: dict[str, Form] = {CHUNKED: partial(_chunked, model, dtype), RECURRENT: _recurrent(model, dtype)}
    left_out = _why_not_transformers(model, trust_remote_code)
    if not left_out:
        forms[TRANSFORMERS] = _transformers(model, dtype, trust_remote_code)
    reference = _chunked(model, "float32", tokens)
    return {
        "model": str(model.folder),
        "rows": tokens.shape[0],
        "tokens": tokens.shape[1],
        "dtype": dtype,
        "reference_nats_per_token": float(-reference.mean()),
        "forms": {name: _figures(form, tokens, reference) for name, form in forms.items()},
        "left_out": {TRANSFORMERS: left_out} if left_out else {},
    }


def rows_of(documents: Iterable[Sequence[int]], rows: int, length: int) -> np.ndarray:
    """[rows,length] of the tokens of documents, one after another.

    Raises:
        ConfigError: there is nothing to compare in so few.
        DataError: the documents are too short.
    """
    if rows < 2 or length < 2:
        raise ConfigError(f"rows={rows}, length={length}: both have to be at least 2.")
    ids: list[int] = []
    for document in documents:
        ids += document
        if len(ids) >= rows * length:
            return np.array(ids[: rows * length], np.int32).reshape(rows, length)
    raise DataError(f"The text has {len(ids):,} tokens; {rows} rows of {length} need {rows * length:,}.")


def parity_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row for each form."""
    columns = {
        "mean_difference": "mean difference",
        "difference_99": "99 %",
        "largest_difference": "largest",
        "by_batch": "by batch, largest",
    }
    rows = [[name, *(f"{figures[key]:.1e}" for key in columns)] for name, figures in found["forms"].items()]
    return [f"in {found['dtype']}", *columns.values()], rows


def _figures(form: Form, tokens: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Absolute differences, in nats a token."""
    together, alone = form(tokens), form(tokens[:1])
    difference = np.abs(together - reference)
    return {
        "mean_difference": float(difference.mean()),
        "difference_99": float(np.quantile(difference, 0.99)),
        "largest_difference": float(difference.max()),
        "by_batch": float(np.abs(together[:1] - alone).max()),
    }


def _chunked(model: Model, dtype: str, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_chunked_program(model, tokens, dtype))


@partial(jax.jit, static_argnames="dtype")
def _chunked_program(model: Model, tokens: jax.Array, dtype: str) -> jax.Array:
    logits = forward(model, tokens, dtype=jnp.dtype(dtype))
    return _of_next(logits[:, :-1], tokens[:, 1:])


def _recurrent(model: Model, dtype: str) -> Form:
    unstacked = decode.unstack(model, dtype)
    return lambda tokens: np.asarray(_recurrent_program(unstacked, tokens))


@jax.jit
def _recurrent_program(model: decode.Unstacked, tokens: jax.Array) -> jax.Array:
    rows, length = tokens.shape

    def step(states: decode.LayerStates, given: Any) -> tuple[decode.LayerStates, jax.Array]:
        token, following, place = given
        logits, states = decode.decode_token(model, token, states, jnp.full(rows, place))
        return states, _of_next(logits, following)

    states = decode.initial_states(model.config, rows, length, model.dtype)
    places = jnp.arange(length - 1, dtype=jnp.int32)
    return jax.lax.scan(step, states, (tokens[:, :-1].T, tokens[:, 1:].T, places))[1].T


def _of_next(logits: jax.Array, following: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), following[..., None], -1)[..., 0]


def _why_not_transformers(model: Model, trusted: bool) -> str:
    if util.find_spec("torch") is None:
        return "torch is not installed (the extra `torch`)"
    if not trusted and list(Path(model.folder).glob("*.py")):
        return "the folder has Python files; --trust-remote-code lets transformers run them"
    return ""


def _transformers(model: Model, dtype: str, trusted: bool) -> Form:
    # By name, for nothing here depends on torch.
    torch, transformers = import_module("torch"), import_module("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=getattr(torch, dtype), trust_remote_code=trusted, local_files_only=True
    ).eval()

    def run(tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(tokens).long()
        with torch.no_grad():
            logits = theirs(ids).logits[:, :-1].float()
        found: np.ndarray = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].numpy()
        return found

    return run
