"""Hugging Face folders -> models: weights are read tensor by tensor, straight to where they are kept, without torch."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxhybrid import hosts
from jaxhybrid.errors import ConfigError, WeightsError
from jaxhybrid.families import hf_to_config, hf_to_student_config
from jaxhybrid.families.native import NATIVE
from jaxhybrid.model.blueprint import Exact, Params, is_variable
from jaxhybrid.model.config import ModelConfig
from jaxhybrid.model.partition import param_shardings
from jaxhybrid.model.transformer import Model, model_variables
from jaxhybrid.weights.change import PartOfTensor
from jaxhybrid.weights.demo import DEMO_PREFIX, demo_teacher_folder, gguf_file
from jaxhybrid.weights.gguf.config import hugging_face_config
from jaxhybrid.weights.gguf.folder import gguf_folder
from jaxhybrid.weights.gguf.model import open_gguf
from jaxhybrid.weights.gguf.source import is_gguf
from jaxhybrid.weights.names import FileTensor, file_tensors, fused_tensors, stacked_tensors
from jaxhybrid.weights.native import native_tensors, own_tensors
from jaxhybrid.weights.safetensors import DTYPES, StoredTensor, read_table, stored_tensors
from jaxhybrid.weights.save import Written

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TERMS_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "ACCEPTABLE_USE*")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *TERMS_FILES)
# Buffers that older checkpoints carry and that the rotary settings of the config imply.
ROTARY_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# What quantisation leaves beside the weights or in their place: FP8, compressed-tensors, GPTQ and AWQ, bitsandbytes.
QUANTISED = re.compile(r"(_scale(_inv|_2)?|weight_packed|qweight|qzeros|\.scales|\.absmax|\.quant_map|\.SCB)$")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_teacher(
    path_or_id: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    ignore_config_keys: Iterable[str] = (),
    mesh: Mesh | None = None,
    shardings: Params | None = None,
) -> Model:
    """The softmax model of a local folder, a hub id, a GGUF file or a pattern of its parts, or `demo:smollm2-135m`.

    Args:
        dtype: of the parameters; the ones declared `Exact` stay float32.
        ignore_config_keys: config keys unknown to this package that do not matter.
        mesh: place the parameters on it by the package's sharding rules.
        shardings: place them by this tree of shardings instead. With neither they lie on the default device.

    Raises:
        ConfigError: the config has something this package cannot represent.
        WeightsError: the folder is missing, damaged, or does not match its config.
    """
    return _load(open_teacher(path_or_id, ignore_config_keys), dtype, mesh, shardings)


def load_student(
    folder: str | os.PathLike[str],
    dtype: Any = jnp.float32,
    *,
    mesh: Mesh | None = None,
    shardings: Params | None = None,
) -> Model:
    """A hybrid that `export` wrote; arguments and errors as for `load_teacher`."""
    return _load(open_student(folder), dtype, mesh, shardings)


def _load(files: "ModelFiles", dtype: Any, mesh: Mesh | None, shardings: Params | None) -> Model:
    if mesh is not None:
        if shardings is not None:
            raise ConfigError("Both mesh and shardings were given; pass one of them.")
        shardings = param_shardings(model_variables(files.config), mesh)
    return Model(files.read(dtype, shardings), files.config, str(files.folder))


def open_teacher(path_or_id: str | os.PathLike[str], ignore_config_keys: Iterable[str] = ()) -> "ModelFiles":
    """What `load_teacher` reads from, checked as far as it can be without reading the weights."""
    folder = _resolve(path_or_id)
    return _open(folder, hf_to_config(read_table(folder / "config.json"), ignore_config_keys))


def open_student(folder: str | os.PathLike[str]) -> "ModelFiles":
    """What `load_student` reads from, in either form of an export, checked without reading the weights."""
    path = _resolve(folder)
    hf = read_table(path / "config.json")
    model_type = str(hf.get("model_type"))
    return _open(path, hf_to_student_config(hf), model_type if model_type in NATIVE else None)


def teacher_keys(path_or_id: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys of a teacher's config.json, of which a hub id is asked for that file alone; no weights are needed.

    Raises:
        WeightsError: there is no such file.
    """
    name = os.fspath(path_or_id)
    if name.startswith(DEMO_PREFIX):
        name = str(gguf_file())
    if Path(name).expanduser().is_dir():
        return read_table(Path(name).expanduser() / "config.json")
    if is_gguf(name):
        return hugging_face_config(open_gguf(name))
    _check_hub_id(name)
    with _hub_errors(name):
        from huggingface_hub import hf_hub_download

        return read_table(Path(hf_hub_download(name, "config.json")))


@dataclass(frozen=True)
class ModelFiles:
    """A folder whose tensors are those that its config asks for."""

    folder: Path
    config: ModelConfig
    stored: Mapping[str, StoredTensor | PartOfTensor]
    entries: list[FileTensor]

    @property
    def types(self) -> set[str]:
        """safetensors' names of the types that the parameters have in the files."""
        return {self.stored[entry.name].dtype for entry in self.entries}

    def read(self, dtype: Any = jnp.float32, shardings: Params | None = None, parts: Iterable[str] = ()) -> Params:
        """The parameter tree, one leaf at a time, or only these of its top-level `parts`.

        With shardings every process reads only what its devices keep.
        """
        by_path: dict[tuple[str, ...], list[FileTensor]] = {}
        for entry in self.entries:
            by_path.setdefault(entry.path, []).append(entry)
        declared = model_variables(self.config)
        declared = {part: declared[part] for part in parts or declared}

        def read(path: Any, variable: nnx.Variable, sharding: Any = None) -> jax.Array:
            rows = by_path[tuple(key.key for key in path)]
            kept = jnp.float32 if isinstance(variable, Exact) else dtype
            return _read_leaf(rows, self.stored, variable.shape, kept, sharding)

        rest = () if shardings is None else ({part: shardings[part] for part in declared},)
        return jax.tree_util.tree_map_with_path(read, declared, *rest, is_leaf=is_variable)


def _open(folder: Path, config: ModelConfig, native: str | None = None) -> ModelFiles:
    """native: the architecture of transformers' own that the files are in, if they are.

    Raises WeightsError: a tensor is quantised, missing, unexpected, or of another shape than the config says.
    """
    _check_tokenizer(folder, config)
    stored, entries = stored_tensors(folder), file_tensors(config)
    tensors: Sequence[Written] = native_tensors(config, native) if native else entries
    _refuse_quantised(folder, stored)
    stored = _parted(stored, entries, config)
    _check_names(folder, stored, tensors, config)
    for entry in tensors:
        found, expected = stored[entry.name].shape, entry.file_shape
        if found != expected:
            raise WeightsError(
                f"{entry.name} in {stored[entry.name].file} has shape {list(found)}, expected {list(expected)} "
                "from config.json; weights and config do not belong together."
            )
    return ModelFiles(folder, config, own_tensors(stored, config, native) if native else stored, entries)


def _parted(stored: dict[str, StoredTensor], entries: list[FileTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """Tensors that the family's files keep fused, each part as if it were by itself: it is a range of their bytes."""
    shapes, parted = {entry.name: entry.file_shape for entry in entries}, dict(stored)
    stacked = stacked_tensors(config)
    for whole, names in (fused_tensors(config) | stacked).items():
        if whole not in stored:
            continue
        tensor, rows = stored[whole], [shapes[name][0] for name in names]
        expected: tuple[int, ...] = (sum(rows), *shapes[names[0]][1:])
        if whole in stacked and config.experts is not None:
            expected = (config.experts.count, sum(rows) // config.experts.count, *expected[1:])
        if tensor.shape != expected:
            raise WeightsError(
                f"{whole} in {tensor.file} has shape {list(tensor.shape)}, expected {list(expected)} from config.json; "
                "weights and config do not belong together."
            )
        del parted[whole]
        for name, first in zip(names, itertools.accumulate([0, *rows])):
            parted[name] = replace(tensor, shape=(sum(rows), *shapes[name][1:])).rows(first, shapes[name][0])
    return parted


def _read_leaf(
    rows: list[FileTensor],
    stored: Mapping[str, StoredTensor | PartOfTensor],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Any,
) -> jax.Array:
    """One leaf, placed part by part: the host holds one part of it, and the pages of one tensor, at a time."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*one.indices(size)) for one, size in zip(index, shape)]
        out = np.empty([len(one) for one in ranges], dtype)
        for row in rows:
            if all(number in one for number, one in zip(row.rows, ranges)):
                place = tuple(one.index(number) for number, one in zip(row.rows, ranges))
                view = row.layout.from_file(stored[row.name].view(), row.shape)
                out[place] = view[index[len(place) :]]
        return out

    if sharding is None:
        return jax.block_until_ready(jax.device_put(part((slice(None),) * len(shape))))
    keepers: dict[tuple[slice, ...], list[jax.Device]] = {}  # of one part: several where it is replicated
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        keepers.setdefault(index, []).append(device)
    placed = []
    for index, devices in keepers.items():
        values = part(index)
        placed += [jax.device_put(values, device) for device in devices]
        jax.block_until_ready(placed)  # else more parts would be read while this one waits to be copied
    return jax.make_array_from_single_device_arrays(shape, sharding, placed, dtype=jnp.dtype(dtype))


def _refuse_quantised(folder: Path, stored: dict[str, StoredTensor]) -> None:
    """By type and by name, for config.json does not always say it."""
    names = [
        name
        for name, tensor in stored.items()
        if (name.endswith("weight") and tensor.dtype not in DTYPES) or QUANTISED.search(name)
    ]
    if names:
        told = _some([f"{name} ({stored[name].dtype})" for name in names])
        raise WeightsError(
            f"{folder} holds quantised weights, which are not read: {told}; fetch the unquantised model."
        )


def _check_names(
    folder: Path, stored: dict[str, StoredTensor], entries: Sequence[Written], config: ModelConfig
) -> None:
    expected = {entry.name for entry in entries}
    missing = [entry.name for entry in entries if entry.name not in stored]
    if missing:
        hint = " Is tie_word_embeddings in config.json wrong?" if missing == [HEAD] else ""
        raise WeightsError(f"{folder} lacks {_some(missing)}, which its config.json asks for.{hint}")
    unexpected = [name for name in stored if name not in expected and not ROTARY_BUFFER.fullmatch(name)]
    if config.tie_embeddings and HEAD in unexpected:
        unexpected.remove(HEAD)
        head, embedding = stored[HEAD], stored[EMBEDDING]
        if head.shape != embedding.shape or not np.array_equal(head.view(), embedding.view()):
            raise WeightsError(
                f"{folder} has a {HEAD} that differs from {EMBEDDING}, but config.json says tie_word_embeddings=true; "
                "set it to false to use the head, or remove the tensor."
            )
    if unexpected:
        raise WeightsError(
            f"{folder} has {_some(unexpected)}, which a {config.family} model of its config.json does not use; "
            "they would be dropped. Correct config.json (biases, number of layers), or remove the tensors."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_tokenizer(folder: Path, config: ModelConfig) -> None:
    """An embedding padded beyond the tokenizer is common, and so is a padding token that fine-tuning added and that has
    no row: no text gives it (see `load_vocabulary`). Other ids beyond the embedding are a mix-up."""
    beyond = {token: index for token, index in token_ids(folder).items() if index >= config.vocab_size}
    if beyond.keys() - {_padding_token(folder)}:
        raise WeightsError(
            f"The tokenizer in {folder} has ids up to {max(beyond.values())}, the embedding has "
            f"vocab_size={config.vocab_size} rows; put the tokenizer this model was trained with there."
        )


def token_ids(folder: Path) -> dict[str, int]:
    """Every token in a folder's tokenizer files; empty when it has no JSON ones."""
    ids: dict[str, int] = {}
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_table(folder / "tokenizer.json")
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        is_list = not isinstance(vocabulary, dict)  # of (token, score)
        ids |= {token: index for index, (token, _) in enumerate(vocabulary)} if is_list else vocabulary
        ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    elif (folder / "vocab.json").is_file():
        ids |= read_table(folder / "vocab.json")
        if (folder / "added_tokens.json").is_file():
            ids |= read_table(folder / "added_tokens.json")
    return ids


def _padding_token(folder: Path) -> str | None:
    """The token that pads and does nothing else, by the folder's settings."""
    roles: dict[str, Any] = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        roles |= {role: token for role, token in (read_table(path) if path.is_file() else {}).items() if token}
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    tokens = [token["content"] if isinstance(token, dict) else token for token in map(roles.get, names)]
    return None if tokens[0] in tokens[1:] else tokens[0]


def _resolve(path_or_id: str | os.PathLike[str]) -> Path:
    """A local folder with the files of the model, fetched from the hub when it is a hub id."""
    with hosts.first_in_turn("model files"):
        return _local_folder(path_or_id)


def _local_folder(path_or_id: str | os.PathLike[str]) -> Path:
    name = os.fspath(path_or_id)
    if name.startswith(DEMO_PREFIX):
        return demo_teacher_folder(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        if ggufs and not (folder / "config.json").is_file():
            raise WeightsError(f"{name} is a folder of GGUF files; name the file: {folder / ggufs[0]}.")
        return folder.absolute()
    if is_gguf(name):
        return gguf_folder(name)
    if folder.suffix in (".safetensors", ".bin", ".pt") or folder.is_file():
        raise WeightsError(f"{name} is a file; name the folder that holds it and its config.json.")
    _check_hub_id(name)
    with _hub_errors(name):
        from huggingface_hub import snapshot_download

        # Folders inside a repository hold other formats of the same weights.
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]))


def _check_hub_id(name: str) -> None:
    if not HUB_ID.fullmatch(name):
        raise WeightsError(f"{name} is neither a folder nor a hub id of the form owner/name.")


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turns what the hub raises into an error that names the model and the way out."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, HFValidationError) as error:  # the hub's own errors are OSErrors
        raise WeightsError(
            f"{name} is not a local folder and could not be fetched from the hub: {error}. "
            "Check the name and your access, or download it and pass the folder."
        ) from error
