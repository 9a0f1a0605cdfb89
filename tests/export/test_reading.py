"""Exported folders, read by processes without jax: with the oldest and the newest transformers that they are for."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from filelock import FileLock
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from jaxhybrid.export.card import TRANSFORMERS
from jaxhybrid.export.folder import export
from jaxhybrid.families.native import GRANITE_HYBRID, NATIVE
from jaxhybrid.model.transformer import Model, forward
from tests.export.students import CASES, GRANITE_CASES, NATIVE_CASES, make_student

ROOT = Path(__file__).parents[2]
ALL_CASES = CASES | NATIVE_CASES
READERS = {"transformers-oldest": (), "transformers-newest": ("--other-ways",)}
LENGTH = 90
# KL of the whole model and the quantized one, nats per token. With its gates in 8 bits it is 0.01 to 0.1.
MOST_KL = {"bnb8": 0.003, "ao8": 0.002, "bnb4": 0.3}


def requirements(name):
    return (ROOT / "tests" / "environments" / f"{name}.txt").read_text()


def pinned(name):
    return dict(line.split("==") for line in requirements(name).splitlines() if "==" in line)


def environment(name):
    """The folder of packages that stand in for those of the main environment."""
    folder = Path(sys.prefix) / name
    made = folder / "requirements.txt"
    assert made.exists(), f"{folder} is not there: make environments"
    assert made.read_text() == requirements(name), f"{folder} is old: make environments"
    return folder


def arrays(file):
    with np.load(file) as found:
        return dict(found)


def run_isolated(arguments, place, packages):
    """In the environment of a user's process: own caches, no hub, and this repository not on the path."""
    caches = {"HF_HOME": str(place / "home"), "HF_MODULES_CACHE": str(place / packages.name)}
    result = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | caches | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(packages)},
        cwd=place,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def exports(tmp_path_factory, teacher_folder):
    """A folder per case: `model`, the tokens and documents in inputs.npz, and our logits in ours.npz.

    Shared by the processes of pytest-xdist, as what the readers write into it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    place = root / "exports"
    with FileLock(root / "exports.lock"):
        if not place.exists():
            export_all(ALL_CASES, teacher_folder, root / "exports.draft").rename(place)
    return place


def export_all(cases, teacher_folder, place):
    tokens = np.random.default_rng(0).integers(1, 61, (2, LENGTH)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[0, 20:], segments[0, 21:] = 2, 3
    segments[1, :13], segments[1, 80:] = 0, 2
    documents = {"logits": np.ones_like(tokens), "padded": np.minimum(segments, 1), "packed": segments}
    for name, changes in cases.items():
        student = make_student(teacher_folder, least_scale=0.5 if name in NATIVE_CASES else None, **changes)
        export(student, place / name / "model", dtype="float32")
        np.savez(place / name / "inputs.npz", tokens=tokens, segments=segments)
        run = jax.jit(lambda params, ids, config=student.config: forward(Model(params, config), tokens, ids))
        np.savez(place / name / "ours.npz", **{kind: run(student.params, ids) for kind, ids in documents.items()})
    return place


@pytest.fixture(scope="module", params=READERS)
def read_back(request, exports):
    """Per case: what the reader got from the folder."""
    return read_all(ALL_CASES, exports, request.param)


def read_all(cases, exports, versions):
    packages, version = environment(versions), pinned(versions)["transformers"]
    if Version(version) < Version(NATIVE[GRANITE_HYBRID].since):  # it loads them there, and computes something else
        cases = [case for case in cases if case not in GRANITE_CASES]
    written = [exports / name / f"{version}.npz" for name in cases]
    with FileLock(exports / f"{version}.lock"):
        if not all(file.exists() for file in written):
            folders = [str(exports / name / "model") for name in cases]
            reader = str(Path(__file__).with_name("reader.py"))
            run_isolated([reader, *READERS[versions], *folders], exports, packages)
    return dict(zip(cases, map(arrays, written)))


@pytest.fixture
def theirs(read_back, case):
    if case not in read_back:
        pytest.skip(f"{GRANITE_HYBRID} is for transformers from {NATIVE[GRANITE_HYBRID].since} on")
    return read_back[case]


@pytest.mark.parametrize("case", ALL_CASES)
def test_logits_equal_ours(theirs, exports, case, record_property):
    ours = arrays(exports / case / "ours.npz")
    real = arrays(exports / case / "inputs.npz")["segments"][..., None] > 0
    assert np.std(ours["logits"]) > 0.3  # else equal would mean little
    packed = () if case in NATIVE_CASES else ("packed",)  # without fla, transformers' own layers read rows as one text
    for name in ("logits", "padded", *packed):
        difference = (np.abs(theirs[name] - ours[name]) * (real | (name == "logits"))).max()
        record_property(f"max_difference_{name}", float(difference))
        assert difference < 1e-4, name
    assert np.array_equal(theirs["saved"], theirs["logits"])  # by save_pretrained, with its code


@pytest.mark.parametrize("case", CASES)
def test_loads_whole_and_only_with_trust(theirs):
    assert str(theirs["loading"]) == "{}"
    assert "trust_remote_code=True" in str(theirs["refusal"])
    assert str(theirs["dtype"]) == "torch.float32"


@pytest.mark.parametrize("case", NATIVE_CASES)
def test_native_needs_no_trust(theirs, exports, case):
    assert str(theirs["loading"]) == "{}"
    assert str(theirs["refusal"]) == ""
    assert str(theirs["dtype"]) == "torch.float32"
    assert not list((exports / case / "model").glob("*.py"))


@pytest.mark.parametrize("case", ALL_CASES)
def test_generation(theirs):
    """From a cache as without one; a batch with padding as each prompt alone."""
    assert theirs["singles"].shape == (3, 6)
    for other in ("uncached", "static", "in_pieces", "batch", "batch_static"):
        assert np.array_equal(theirs["singles"], theirs[other]), other
    assert np.array_equal(theirs["beams"], theirs["beams_uncached"])


@pytest.mark.parametrize("case", ALL_CASES)
def test_the_card_runs_without_a_warning(theirs, case):
    assert str(theirs["card_prints"]).strip()
    warned = theirs["card_warns"].tolist()
    if case in NATIVE_CASES:  # that faster kernels are not installed
        warned = [text for text in warned if "falling back to its reference PyTorch implementation" not in text]
    assert warned == []


@pytest.mark.parametrize("read_back", ["transformers-newest"], indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_other_ways_of_loading(theirs):
    for name in ("in_memory", "on_disk"):
        assert np.abs(theirs[name] - theirs["logits"]).max() < 1e-6, name
    for kind, most in MOST_KL.items():
        assert theirs[f"{kind}_layers"] >= 14, kind  # else nothing was quantized
        assert theirs[f"{kind}_changed_gates"].tolist() == []
        assert theirs[f"{kind}_kl"] < most, kind


def test_versions_are_the_ones_claimed():
    """What pyproject.toml, README and model card allow begins with the oldest and ends with the newest tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    locked = {p["name"]: p["version"] for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    assert allowed["transformers"] == SpecifierSet(TRANSFORMERS)
    assert f"`transformers{TRANSFORMERS}`" in (ROOT / "README.md").read_text()
    assert locked["transformers"] == pinned("transformers-newest")["transformers"]
    for name, oldest in (("transformers", "transformers-oldest"), ("jax", "jax-oldest")):
        for version in (pinned(oldest)[name], locked[name]):
            assert allowed[name].contains(version)
        bounds = {s.operator: Version(s.version).release for s in allowed[name]}
        assert Version(pinned(oldest)[name]).release[: len(bounds[">="])] == bounds[">="]
        major, minor = Version(locked[name]).release[:2]
        assert bounds["<"] == (major, minor + 1)
