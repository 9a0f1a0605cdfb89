"""Where a run is: its stages, its results, and what comes next, read from whatever is left of its folder."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from jaxhybrid.checksums import MANIFEST, read_result, verify
from jaxhybrid.disk import used_bytes
from jaxhybrid.errors import RunError
from jaxhybrid.report.table import evaluation_rows
from jaxhybrid.selection.methods import METHODS
from jaxhybrid.selection.ranking import CandidateScore
from jaxhybrid.settings.select import SelectConfig
from jaxhybrid.settings.stages import STAGES
from jaxhybrid.train.metrics import Record, read_metrics, training_figures

Found = dict[str, Any]


def inspect_run(path: Path, check: bool = False) -> Found:
    """What the run folder `path` holds; the messages of what cannot be read are under `damaged`.

    Args:
        check: compare finished parameters and checkpoints with their checksums, too; that reads all of them.

    Raises:
        RunError: it is no run folder.
    """
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path} is not a run folder: it has no config.yaml.")
    reader = _Reader()
    config = reader.read(path / "config.yaml", _config) or {}
    layers = reader.read(path / "layers.json", _layers) or {}
    stages = {name: _stage(reader, path / name, config.get(name) or {}) for name in STAGES}
    method = layers.get("method") or (config.get("select") or {}).get("method", SelectConfig().method)
    export = Path((config.get("export") or {}).get("folder") or path / "export").expanduser()
    report = path / "report" / "index.html"
    found = {
        "path": str(path),
        "name": config.get("name"),
        "teacher": config.get("teacher"),
        "method": method,
        "needs_scores": _needs_scores(method, config.get("select") or {}),
        "softmax_layers": layers.get("softmax_layers"),
        "layers": stages["align"].pop("layers"),
        "stages": stages,
        "evaluation": reader.read(path / "evaluation.json", _evaluation),
        "export": str(export) if (export / "config.json").exists() else None,
        "report": str(report) if report.exists() else None,
    }
    if check:
        for manifest in sorted(path.glob(f"**/{MANIFEST}")):
            reader.read(manifest, lambda file: verify(file.parent))
    return found | {"damaged": reader.damaged, "next": _next(found)}


class _Reader:
    """Reads what can be read."""

    def __init__(self) -> None:
        self.damaged: list[str] = []

    def read(self, path: Path, parse: Callable[[Path], Any]) -> Any:
        """None if there is no such file, or it is damaged."""
        try:
            return parse(path) if path.exists() else None
        except RunError as error:
            if path.exists():  # else a run that is at work there has removed it meanwhile
                self.damaged.append(str(error))
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            self.damaged.append(f"{path} is damaged ({type(error).__name__}: {reason}).")
        return None


def _config(path: Path) -> Found:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section in (config, *(config.get(name) or {} for name in (*STAGES, "select", "export"))):
        section.keys()
    return config


def _needs_scores(method: str, select: Found) -> bool:
    """Whether the method rests on the score stage, or one of those that it asks."""
    asked = (method, *((select.get(method) or {}).get("of") or ()))
    return any(METHODS[name].needs == "scores" for name in asked if name in METHODS)


def _layers(path: Path) -> Found:
    layers = read_result(path)
    return layers | {"softmax_layers": [int(layer) for layer in layers["softmax_layers"]]}


def _evaluation(path: Path) -> Found:
    evaluation = read_result(path)
    evaluation_rows(evaluation)
    return evaluation


def _stage(reader: _Reader, folder: Path, settings: Found) -> Found:
    """State and figures of one stage; `steps` is how many it is to take, `step` how many are recorded."""
    summary = reader.read(folder / "done.json", lambda path: read_result(path) | {})
    count = (summary or {}).get("records")
    records = reader.read(folder / "metrics.jsonl", lambda path: read_metrics(path.parent, count)) or []
    figures = summary or training_figures(records)
    begun = "begun" if folder.exists() else "not begun"
    found = {
        "state": "done" if summary is not None else "damaged" if (folder / "done.json").exists() else begun,
        "step": figures.get("steps"),
        "steps": _steps(settings),
        "checkpoint": max(
            (int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdecimal()), default=None
        ),
        "tokens": figures.get("tokens"),
        "tokens_per_second": figures.get("tokens_per_second"),
        "loss_first": figures.get("loss_first"),
        "loss_last": figures.get("loss_last"),
        "seconds": _seconds(records),
        "disk_bytes": used_bytes([folder]),
    }
    if folder.name == "align":
        found["layers"] = len(figures.get("heldout_layer_loss_before", [])) or None
    if folder.name == "score":
        scores = [reader.read(path, _score) for path in sorted((folder / "scores").glob("*.json"))]
        tokens = sum(score.heldout[-1][0] for score in scores if score)
        found |= {
            "scored": len(scores),
            "tokens": figures.get("candidate_tokens", tokens or None),
            "seconds": figures.get("seconds"),
        }
    return found


def _score(path: Path) -> CandidateScore:
    return CandidateScore.from_json(read_result(path))


def _steps(settings: Found) -> int | None:
    match settings:
        case {"tokens": int(tokens), "sequence_length": int(length), "batch_size": int(batch)} if length * batch > 0:
            return tokens // (length * batch)
    return None


def _seconds(records: list[Record]) -> float | None:
    """Spent on steps, by the speeds that were recorded."""
    measured = [record for record in records if "loss" in record]
    ends = [0, *(record["tokens"] for record in measured)]
    parts = [(end - start) / r["tokens_per_second"] for start, end, r in zip(ends, ends[1:], measured)]
    return sum(parts) if parts else None


def _next(found: Found) -> str:
    """The command to give next."""
    needed = [name for name in STAGES if name != "score" or found["needs_scores"]]
    whole = all(found["stages"][name]["state"] == "done" for name in needed)
    if whole and all(found[name] for name in ("softmax_layers", "evaluation", "export", "report")):
        return f'jaxhybrid generate {shlex.quote(found["export"])} "The capital of France is"'
    return f"jaxhybrid run {shlex.quote(found['path'])}"
