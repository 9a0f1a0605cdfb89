"""The text of a study in one file, for a machine that has neither the corpus nor the packages that read it.

    python benchmarks/study_rows.py CONFIG.yaml rows.npz [KEY=VALUE]...

Writes int arrays: `train` and `heldout` [rows,T] with `train_segments` and `heldout_segments` (0: padding); `long`
[rows,L], each a single held-out document, and `choose_long`, such rows of the training text to choose by; for every
number of pairs the prompts of the recall probe that the evaluation asks (`recall_4_tokens`, ...), and others to choose
by (`choose_tokens`, ...); for each of `--lengths` the probe with prose between list and questions
(`recall_16@4096_tokens`, ...), and for each of `--needle-lengths` the tasks of RULER that `--needles` names, which have
one answer each, behind the tokenizer's chat template where it has one.
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhybrid.assembly import RunModels
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.run_folder import RunFolder, folder_of
from jaxhybrid.settings.read import load_config

if TYPE_CHECKING:
    from jaxhybrid.data.vocabulary import Vocabulary

Rows = dict[str, np.ndarray]
ANSWERED = ("tokens", "places", "answers")


class StudyRows:
    """What is in such a file."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            self._arrays = dict(file)
        # Of the sets of prompts that are asked: `4`, `16@4096`, `niah_single_2@4096`; short ones first.
        self.asked = sorted(
            (name.removeprefix("recall_").removesuffix("_places") for name in self._arrays if name.endswith("_places")),
            key=lambda name: (self._arrays[f"recall_{name}_tokens"].shape[1], name),
        )

    def text(self, part: str) -> Rows:
        """`tokens` and `segment_ids` of the part train, heldout, long or choose_long."""
        tokens = self._arrays[part].astype(np.int32)
        segments = self._arrays.get(f"{part}_segments", np.ones_like(tokens))
        return {"tokens": tokens, "segment_ids": segments.astype(np.int32)}

    def recall(self, asked: str) -> Rows:
        """`tokens`, `places` and `answers` of the evaluation's prompts, as RecallTask has them."""
        return {name: self._arrays[f"recall_{asked}_{name}"] for name in ANSWERED}

    @property
    def prompts_to_choose_by(self) -> Rows:
        return {name: self._arrays[f"choose_{name}"] for name in ("tokens", "segment_ids", "counted")}


def batches_of(rows: Rows, size: int, order: np.ndarray | None = None) -> list[Rows]:
    """Whole batches, in the order given."""
    numbers = np.arange(len(rows["tokens"])) if order is None else order
    cut = [numbers[i : i + size] for i in range(0, len(numbers) - size + 1, size)]
    return [{name: array[chosen] for name, array in rows.items()} for chosen in cut]


def main() -> None:
    # Only here: who reads such a file has none of the packages that these want.
    from jaxhybrid.data import open_text
    from jaxhybrid.evaluate.recall_prompts import answer_batches, recall_task
    from jaxhybrid.selection.questions import CHOOSING_SEED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("settings", nargs="*", help="over the config")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--train-tokens", type=int, default=10_000_000)
    parser.add_argument("--heldout-tokens", type=int, default=262_144)
    parser.add_argument("--long-length", type=int, default=2048)
    parser.add_argument("--long-rows", type=int, default=48)
    parser.add_argument("--pairs", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--prompts", type=int, default=128, help="for each number of pairs")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096], help="of lists with prose behind them")
    parser.add_argument("--long-pairs", type=int, default=16, help="of these lists")
    parser.add_argument("--long-prompts", type=int, default=64, help="of these lists, for each length")
    parser.add_argument("--needles", nargs="*", default=["niah_single_2", "niah_multikey_1"])
    parser.add_argument("--needle-lengths", type=int, nargs="*", default=[4096])
    parser.add_argument("--needle-prompts", type=int, default=128, help="for each task and length")
    parser.add_argument("--choose-pairs", type=int, default=16)
    parser.add_argument("--choose-prompts", type=int, default=64)
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.settings)
    models = RunModels(config, RunFolder(folder_of(config)), make_mesh(**config.mesh.sizes))
    files, length = models.teacher_files, options.length
    text = open_text(config.data, str(files.folder), files.config.vocab_size)
    stage = config.align.model_copy(update={"sequence_length": length, "batch_size": 16})
    found: dict[str, Any] = {
        "train": islice(text.training_batches(stage, config.seed), -(-options.train_tokens // (16 * length))),
        "heldout": text.heldout_batches(length, 16, options.heldout_tokens),
    }
    arrays: Rows = {}
    for part, batches in found.items():
        rows = list(batches)
        arrays[part] = _small(np.concatenate([batch["tokens"] for batch in rows]))
        arrays[f"{part}_segments"] = np.concatenate([batch["segment_ids"] for batch in rows]).astype(np.uint8)
    size, count = options.long_length, options.long_rows
    held = islice(text.heldout_batches(size, 1, text.heldout.num_tokens), -(-options.heldout_tokens // size), None)
    arrays["long"] = _single_documents(held, count)
    arrays["choose_long"] = _single_documents(
        text.training_batches(stage.model_copy(update={"sequence_length": size, "batch_size": 1}), config.seed), count
    )
    for pairs in options.pairs:
        task = recall_task(text.vocabulary, pairs, prompts=options.prompts)
        arrays |= {f"recall_{pairs}_{name}": getattr(task, name) for name in ANSWERED}
    for name, asked in _long_prompts(text.vocabulary, options):
        arrays |= {f"recall_{name}_{part}": getattr(asked, part) for part in ANSWERED}
    chosen_by = recall_task(text.vocabulary, options.choose_pairs, prompts=options.choose_prompts, seed=CHOOSING_SEED)
    (batch,) = answer_batches(chosen_by, options.choose_prompts)
    arrays |= {f"choose_{name}": array for name, array in batch.items()}
    np.savez_compressed(options.rows, **arrays)
    print(f"wrote {options.rows}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()))


def _long_prompts(vocabulary: "Vocabulary", options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Prompts that take nearly so many tokens with their answers, by name and length."""
    from jaxhybrid.evaluate.prompts import Asker
    from jaxhybrid.evaluate.recall_prompts import ROUND_TO, recall_task
    from jaxhybrid.evaluate.ruler import ruler_prompts
    from jaxhybrid.selection.questions import answers_after
    from jaxhybrid.settings.evaluate import RulerConfig

    pairs, count = options.long_pairs, options.long_prompts
    for length in options.lengths:
        lists = recall_task(vocabulary, pairs, prompts=count).tokens.shape[1]
        yield f"{pairs}@{length}", recall_task(vocabulary, pairs, length - lists - ROUND_TO, count)
    lengths = tuple(options.needle_lengths)
    settings = RulerConfig(tasks=tuple(options.needles), lengths=lengths, samples=options.needle_prompts)
    asker = Asker.of(vocabulary, settings.chat, "chat")
    with tempfile.TemporaryDirectory() as folder:
        for given in ruler_prompts(settings, asker, Path(folder)):
            answered = [replace(prompt, prefix=f"{prompt.prefix} {prompt.answers[0]}") for prompt in given.prompts]
            found = answers_after(given.tokens, asker.tokens(answered), given.length or 0)
            yield f"{given.task}@{given.length}", found


def _single_documents(batches: Iterable[Rows], count: int) -> np.ndarray:
    """Rows of one document each, from its beginning or not, of batches of one row."""
    whole = (batch for batch in batches if (batch["segment_ids"] == 1).all())
    return _small(np.concatenate([batch["tokens"] for batch in islice(whole, count)]))


def _small(tokens: np.ndarray) -> np.ndarray:
    return tokens.astype(np.uint16) if tokens.max() < 1 << 16 else tokens.astype(np.uint32)


if __name__ == "__main__":
    main()
