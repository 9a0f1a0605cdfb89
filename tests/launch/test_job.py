"""What is refused before any file is written, and the folder that files are written into."""

import sys

import pytest

from jaxhybrid.cli import main
from jaxhybrid.errors import ConfigError, JaxHybridError, RunError, TopologyError
from jaxhybrid.launch.job import slurm_job
from jaxhybrid.launch.slices import FLAT, SMALL, TPUS, find_slice
from jaxhybrid.launch.write import write_job
from jaxhybrid.settings.read import load_config
from tests.launch.jobs import RECIPE, make_job


@pytest.mark.parametrize(
    ("name", "hosts", "per_host", "devices"),
    [
        ("v5p:4x4x4", 16, 4, 64),
        ("v5p:2x2x1", 1, 4, 4),
        ("v5p:4x8x8", 64, 4, 256),
        ("v4:2x2x2", 2, 4, 8),
        ("v6e:1x1", 1, 1, 1),
        ("v6e:2x4", 1, 8, 8),
        ("v6e:8x8", 16, 4, 64),
        ("v5e:16x16", 64, 4, 256),
        ("tpu7x:4x4x4", 16, 4, 128),
        ("h100:16", 2, 8, 16),
        ("h100:4", 1, 4, 4),
        ("h200:4x4", 4, 4, 16),
    ],
)
def test_slices(name, hosts, per_host, devices):
    found = find_slice(name)
    assert (found.hosts, found.per_host, found.devices) == (hosts, per_host, devices)


def test_every_slice_is_whole_machines():
    for kind, tpu in TPUS.items():
        for shape in FLAT if tpu.torus == 2 else SMALL:
            found, chips = find_slice(f"{kind}:{shape}"), 1
            for size in shape.split("x"):
                chips *= int(size)
            assert found.hosts * found.per_host == chips


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("v5p", ["no such slice of v5p", "such as 4x4x8"]),
        ("v5p:4x4x6", ["no such slice of v5p", "multiples of 4"]),
        ("v5p:8x4x4", ["no such slice of v5p"]),
        ("v5p:16x24x24", ["no such slice", "6144 chips"]),
        ("v5e:32x16", ["no such slice of v5e", "16x16"]),
        ("v6e:2x2x2", ["no such slice of v6e"]),
        ("v9:2x2", ["'v9:2x2' is of no known kind", "v6e"]),
        ("h100:12", ["nodes of 8", "h100:NODESxGPUS"]),
        ("h100:2x8x1", ["h100:NODESxGPUS"]),
    ],
)
def test_slices_that_there_are_not(name, parts):
    with pytest.raises(TopologyError) as refused:
        find_slice(name)
    assert all(part in str(refused.value) for part in parts)


@pytest.mark.parametrize(
    ("given", "kind", "parts"),
    [
        ({"image": None}, ConfigError, ["--image must be given"]),
        ({"image": "a b"}, ConfigError, ["--image 'a b'"]),
        ({"zone": "us-east5"}, ConfigError, ["--zone 'us-east5'", "us-east5-a"]),
        ({"nfs": "10.0.0.2:/runs"}, ConfigError, ["one of --bucket NAME and --nfs"]),
        ({"bucket": None}, ConfigError, ["one of --bucket NAME and --nfs"]),
        ({"bucket": "My Runs"}, ConfigError, ["--bucket 'My Runs'"]),
        ({"bucket": None, "nfs": "10.0.0.2"}, ConfigError, ["--nfs '10.0.0.2'"]),
        ({"overrides": ["name=7b"]}, ConfigError, ["name '7b'", "begin with a letter"]),
        ({"overrides": [f"name={'a' * 37}"]}, ConfigError, ["at most 36"]),
        ({"overrides": ["teacher=/models/llama"]}, ConfigError, ["teacher /models/llama", "/mnt/runs"]),
        ({"overrides": ["data.train=[pydoc, dclm/*.jsonl]"]}, ConfigError, ["data.train dclm/*.jsonl"]),
        ({"overrides": ["export.folder=out"]}, ConfigError, ["export.folder out"]),
        *(
            ({"overrides": [f"evaluate.{key}={value}"]}, ConfigError, [f"evaluate.{key} mine", "/mnt/runs"])
            for key, value in {
                "lm_eval.task_folder": "mine",
                "completion.sources": "[hub:some/swde, mine]",
                "ruler.essays": "[mine]",
                "ruler.squad": "mine",
                "ruler.hotpotqa": "mine",
            }.items()
        ),
        ({"topology": "h100:2x8"}, TopologyError, ["h100:2x8", "--on slurm"]),
        ({"overrides": ["mesh.fsdp=16"]}, TopologyError, ["v5p:4x4x4 has 64 devices", "needs 32", "fsdp=-1 takes"]),
        ({"overrides": ["mesh.context=3"]}, TopologyError, ["64 devices", "do not divide by the 3"]),
        (
            {"overrides": ["mesh.context=1"]},
            TopologyError,
            ["align: batch_size=96", "1 microbatches x 64", "mesh.context"],
        ),
        (
            {"overrides": ["score.gradient_accumulation=2"]},
            TopologyError,
            ["score: batch_size=96", "2 microbatches x 32"],
        ),
        ({"overrides": ["evaluate.batch_size=8"]}, TopologyError, ["evaluate: batch_size=8 "]),
        ({"overrides": ["evaluate.sequence_length=4095"]}, TopologyError, ["evaluate: Rows of 4095"]),
        ({"overrides": ["evaluate.lengths=[1023]"]}, TopologyError, ["evaluate.lengths: Rows of 1023"]),
        (
            {"overrides": ["select.method=supernet", "select.supernet.batch_size=16", "select.measure.batch_size=32"]},
            TopologyError,
            ["select.supernet: batch_size=16"],
        ),
        ({"slices": 3, "overrides": ["mesh.data=1"]}, TopologyError, ["3 x v5p:4x4x4", "data=1", "multiple of 3"]),
    ],
)
def test_what_is_refused(given, kind, parts):
    with pytest.raises(JaxHybridError) as refused:
        make_job(**given)
    assert type(refused.value) is kind
    assert all(part in str(refused.value) for part in parts), refused.value


def test_files_in_the_storage_are_taken():
    job = make_job(overrides=["teacher=/mnt/runs/llama", "data.train=/mnt/runs/dclm/*.jsonl", "name=Mine_1"])
    make_job(overrides=["evaluate.completion.sources=[hub:some/swde, /mnt/runs/fda.jsonl]"])
    make_job(overrides=["select.supernet.batch_size=16"])  # another method is chosen
    assert (job.config.teacher, job.config.run_dir, job.name) == ("/mnt/runs/llama", "/mnt/runs/Mine_1", "mine-1")


def test_a_launcher_has_its_own_machines(tmp_path):
    with pytest.raises(TopologyError, match="there are no TPU VMs"):
        write_job(make_job("tpu7x:4x4x4", overrides=["mesh.context=4"]), "tpu-vm", tmp_path / "files")
    assert not (tmp_path / "files").exists()
    with pytest.raises(TopologyError, match="--on gke or --on tpu-vm"):
        slurm_job(load_config(RECIPE), find_slice("v5p:4x4x4"))


def test_a_folder_holds_one_launch(tmp_path):
    folder = tmp_path / "files"
    write_job(make_job(), "tpu-vm", folder)
    write_job(make_job(), "gke", folder)
    assert {path.name for path in folder.iterdir()} == {"Dockerfile", "config.yaml", "jobset.yaml", "pod.sh"}
    (folder / "notes.txt").touch()
    with pytest.raises(RunError, match=r"holds notes\.txt"):
        write_job(make_job(), "gke", folder)


def test_the_command(tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxhybrid", "launch", str(RECIPE), *arguments])
        main()

    monkeypatch.chdir(tmp_path)
    cloud = ["--zone", "us-east5-a", "--image", "host/jaxhybrid", "--bucket", "gs://my-runs", "--spot"]
    with pytest.raises(SystemExit):
        command("mesh.context=2", "evaluate.batch_size=32", "--topology", "v5p:4x4x4", *cloud)
    folder = tmp_path / "launch" / "llama-3.2-3b-instruct"
    assert load_config(folder / "config.yaml").mesh.context == 2
    assert f"read {folder.relative_to(tmp_path)}/pod.sh" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        command("--on", "slurm", "--topology", "h100:1x8", *cloud)
    assert stopped.value.code == 2
    assert "--zone, --image, --bucket, --spot: not for --on slurm" in capsys.readouterr().err
