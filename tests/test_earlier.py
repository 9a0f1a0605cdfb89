"""What commit efc3cc5 wrote (tests/earlier) is read: its run goes on to its own figures, exports give its logits."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxhybrid.cli import read_settings
from jaxhybrid.model.transformer import forward
from jaxhybrid.pipeline import Pipeline
from jaxhybrid.train.metrics import read_metrics
from jaxhybrid.weights.huggingface import load_student
from tests.runs import read, records, snapshot


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The folder of what was written then: see tests/earlier/README.md."""
    folder = tmp_path_factory.mktemp("earlier")
    shutil.unpack_archive(Path(__file__).parent / "earlier" / "data.tar.xz", folder, filter="data")
    return folder


@pytest.fixture
def run(earlier, tmp_path, monkeypatch):
    """A copy of the run, in a place where the relative paths of its config hold."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def go_on(run):
    cheaper = [f"{stage}.remat=false" for stage in ("score", "distill", "finetune")]
    return Pipeline(read_settings(run, [*cheaper, "evaluate.recall.pairs=[]"]), devices=jax.devices()[:1])


def logits(folder, tokens):
    model = load_student(folder)
    return jax.jit(lambda tokens: forward(model, tokens))(tokens)


def losses(folder):
    return {record["step"]: record["loss"] for record in records(folder)}


def test_a_run_goes_on_to_the_same_figures(run, earlier):
    (step,) = (int(path.name) for path in (run / "distill" / "checkpoints").iterdir())
    total = len(losses(earlier / "afterwards" / "distill"))
    assert 0 < step < total
    done = [snapshot(run / stage) for stage in ("align", "score")]
    metrics = read_metrics(run / "distill")
    unverified = pytest.warns(UserWarning, match=f"distill/checkpoints/{step} has no checksums: an earlier version")
    with unverified, go_on(run) as pipeline:
        pipeline.run()

    assert [snapshot(run / stage) for stage in ("align", "score")] == done
    assert read_metrics(run / "distill")[:step] == metrics  # with the speeds of that time, so not done again
    for stage in ("distill", "finetune"):
        assert losses(run / stage) == pytest.approx(losses(earlier / "afterwards" / stage), rel=1e-4)
    figures, expected = (read(folder / "evaluation.json")["models"] for folder in (run, earlier / "afterwards"))
    for stage in ("teacher", "distill", "finetune"):
        for name in ("perplexity", "kl"):
            assert figures[stage][name] == pytest.approx(expected[stage][name], rel=1e-4, abs=1e-8)
    kept = np.load(earlier / "exports" / "qwen3.npz")
    np.testing.assert_allclose(logits(run / "export", kept["tokens"]), kept["logits"], rtol=1e-3, atol=1e-3)


def test_candidates_go_on_between_their_rounds(run, earlier):
    expected = [read(path) for path in sorted((run / "score" / "scores").iterdir())]
    for name in ("scores.json", "layers.json"):
        (run / name).unlink()
    for name in ("score", "distill"):
        shutil.rmtree(run / name)
    shutil.copytree(earlier / "scoring", run / "score")
    checkpoints = {path.parts[-3]: path for path in (run / "score" / "candidates").glob("*/checkpoints/*")}
    assert checkpoints["001"].name == "5"
    assert checkpoints["002"].name == "3"
    with pytest.warns(UserWarning, match="no checksums") as told, go_on(run) as pipeline:
        pipeline.score()
    messages = [str(warning.message) for warning in told]
    for candidate in ("001", "002"):
        assert any(message.startswith(f"{checkpoints[candidate]} has no checksums") for message in messages)
    for found, candidate in zip(sorted((run / "score" / "scores").iterdir()), expected, strict=True):
        for curve in ("heldout", "train"):
            np.testing.assert_allclose(read(found)[curve], candidate[curve], rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_an_export_gives_the_same_logits(name, earlier):
    """Between them the two have every tensor that there was."""
    kept = np.load(earlier / "exports" / f"{name}.npz")
    np.testing.assert_allclose(logits(earlier / "exports" / name, kept["tokens"]), kept["logits"], rtol=1e-4, atol=1e-4)
