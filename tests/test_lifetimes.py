"""What lies on the devices while a stage runs: what the stage uses, and nothing of the stages before it."""

import gc
import json
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid import pipeline
from jaxhybrid.files import remove
from jaxhybrid.model.blueprint import Exact, is_variable
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.transformer import Model, model_variables
from jaxhybrid.pipeline import Pipeline
from jaxhybrid.plan.program import Program, Request
from jaxhybrid.selection import kl_guided
from jaxhybrid.settings.read import load_config
from jaxhybrid.settings.stages import STAGES
from jaxhybrid.stages.programs import stage_program
from jaxhybrid.stages.score import candidate_params
from jaxhybrid.train.checkpoint import Checkpoints
from jaxhybrid.weights.huggingface import load_teacher
from tests.runs import write_text
from tests.tiny import write_config, write_teacher

KEPT = [1]


class Reached(Exception):
    """The moment of which the arrays are counted."""


def parameter_bytes(declared, dtype):
    """Of parameters in `dtype`, those that are declared exact in float32."""
    width = jnp.dtype(dtype).itemsize
    leaves = jax.tree.leaves(declared, is_leaf=is_variable)
    return sum(4 * leaf.size if isinstance(leaf, Exact) else width * leaf.size for leaf in leaves)


def arrays():
    gc.collect()
    return {id(x): x for x in jax.live_arrays()}


class Watched:
    """A run of the tiny teacher, in bfloat16, with made-up results of its stages."""

    def __init__(self, folder, teacher_dtype):
        self.folder = write_teacher(folder / "teacher", dtype=teacher_dtype)
        data = {"train": str(write_text(folder / "text.jsonl", 300)), "heldout_tokens": 2048,
                "cache_dir": str(folder / "tokens")}  # fmt: skip
        config = write_config(folder / "config.yaml", self.folder, dtype="bfloat16", data=data)
        self.pipeline = Pipeline(load_config(config), devices=jax.devices()[:1])
        self.models, results = self.pipeline.models, self.pipeline.folder
        results.finish("align", {}, self.models.initial_mixers())
        (results.path / "layers.json").write_text(json.dumps({"softmax_layers": KEPT}))
        for stage in ("distill", "finetune"):
            results.finish(stage, {}, self.models.hybrid())
        self.teacher, self.linear, self.hybrid = (
            model_variables(config)
            for config in (self.models.teacher_config, self.models.linear_config, self.models.hybrid_config)
        )

    def held_at(self, monkeypatch, module, function, run):
        """Bytes that came to lie on the devices when the run calls this function, and what the function is given."""
        found = []

        def reached(*given, **named):
            found.extend([sum(x.nbytes for number, x in arrays().items() if number not in before), given])
            raise Reached

        self.models.drop_teacher()
        before = arrays()
        assert self.models.frozen_teacher  # left by an earlier stage
        monkeypatch.setattr(module, function, reached)
        monkeypatch.setattr(Pipeline, "_begins", lambda *given: True)
        with self.pipeline, pytest.raises(Reached):
            run()
        return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Of a teacher whose files are in float32, so that the frozen one is rounded."""
    return Watched(tmp_path_factory.mktemp("float32"), "float32")


@pytest.fixture(scope="module")
def unrounded(tmp_path_factory):
    """Of a teacher whose files are in bfloat16: all that the students take of it is in the frozen one."""
    return Watched(tmp_path_factory.mktemp("bfloat16"), "bfloat16")


@pytest.fixture(params=["watched", "unrounded"])
def either(request):
    return request.getfixturevalue(request.param)


def assert_holds(held, *parts):
    """Beside them there is room for scalars, random keys and a batch."""
    assert sum(parts) <= held <= sum(parts) + 5000, (held, parts)


def test_alignment_holds_the_teacher_and_the_mixers_state(watched, monkeypatch):
    monkeypatch.setattr(pipeline, "align_loss", lambda *given, **settings: jnp.zeros(3))
    held, _ = watched.held_at(monkeypatch, pipeline, "train", watched.pipeline.align)
    mixers = parameter_bytes(watched.linear["mixers"], jnp.float32)
    assert_holds(held, parameter_bytes(watched.teacher, jnp.bfloat16), 3 * mixers)


def test_scoring_holds_the_teacher_what_candidates_start_from_and_one_candidate(either, monkeypatch):
    monkeypatch.setattr(kl_guided._Programs, "heldout_kl", lambda *given: 1.0)
    held, _ = either.held_at(monkeypatch, kl_guided, "train", either.pipeline.score)
    teacher = parameter_bytes(either.teacher, jnp.bfloat16)
    head = 2 * either.teacher["embed"]["embedding"].size
    start = parameter_bytes(either.linear["mixers"], jnp.float32)
    if either.models.teacher_files.types == {"F32"}:
        start += parameter_bytes(either.teacher, jnp.float32)
    attention = parameter_bytes(either.teacher["mixers"], jnp.float32) // 3
    assert_holds(held, teacher, head, start, 3 * (parameter_bytes(either.linear, jnp.float32) + attention))


def test_distillation_holds_the_teacher_and_one_state(either, monkeypatch):
    held, _ = either.held_at(monkeypatch, pipeline, "train", either.pipeline.distill)
    student = parameter_bytes(either.hybrid, jnp.float32)
    assert_holds(held, parameter_bytes(either.teacher, jnp.bfloat16), 3 * student)


def test_a_stage_that_goes_on_makes_no_state_before_it_reads_one(watched, monkeypatch):
    folder = watched.pipeline.folder.stage("distill") / "checkpoints"
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
    held, (state, *_) = watched.held_at(monkeypatch, pipeline, "train", watched.pipeline.distill)
    assert_holds(held, parameter_bytes(watched.teacher, jnp.bfloat16))
    remove(folder)
    _, (made, *_) = watched.held_at(monkeypatch, pipeline, "train", watched.pipeline.distill)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), made
    )


def test_finetuning_holds_one_state_and_no_teacher(watched, monkeypatch):
    held, _ = watched.held_at(monkeypatch, pipeline, "train", watched.pipeline.finetune)
    assert_holds(held, 3 * parameter_bytes(watched.hybrid, jnp.float32))


def test_evaluation_holds_its_models_in_the_compute_dtype(watched, monkeypatch):
    held, (models, *_) = watched.held_at(monkeypatch, pipeline, "evaluation_record", watched.pipeline.evaluate)
    assert list(models) == ["teacher", "distill", "finetune"]
    student = parameter_bytes(watched.hybrid, jnp.bfloat16)
    assert_holds(held, parameter_bytes(watched.teacher, jnp.bfloat16), 2 * student)


def test_export_holds_one_student_in_the_type_of_its_files(watched, monkeypatch):
    held, _ = watched.held_at(monkeypatch, pipeline, "export", watched.pipeline.export)
    assert_holds(held, parameter_bytes(watched.hybrid, jnp.float32))


def test_students_start_from_the_values_of_the_files(either):
    """Where the frozen teacher is rounded, too."""
    models, exact = either.models, load_teacher(either.folder).params
    assert models.frozen_teacher.params["embed"]["embedding"].dtype == jnp.bfloat16
    assert_equal(models.hybrid()["blocks"], exact["blocks"])
    attention = jax.tree.map(lambda stack: stack[1:2], exact["mixers"][FULL_ATTENTION])
    assert_equal(models.hybrid()["mixers"][FULL_ATTENTION], attention)
    candidate = candidate_params(models.candidates(), models.frozen_teacher, jnp.int32(1))
    assert_equal(candidate["blocks"], exact["blocks"])
    assert_equal(candidate["mixers"][FULL_ATTENTION], attention)
    source = exact["mixers"][FULL_ATTENTION]["o_proj"]["kernel"]
    assert_equal(models.initial_mixers()["gated_deltanet"]["o_proj"]["kernel"], source)


def test_a_trained_student_is_rounded_once(watched):
    whole, rounded = watched.models.trained(), watched.models.trained(dtype=jnp.bfloat16)
    assert_equal(rounded.params, whole.cast(jnp.bfloat16).params)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_is_of_what_a_run_gives_to_its_step(unrounded, monkeypatch, stage):
    """The very arguments in shape, type and place, and beside them what the stage holds."""
    given = []

    def recorded(*arguments):
        def step(*arrays):
            given.extend(arrays)
            raise Reached

        return step

    run = unrounded.pipeline
    for module in (pipeline, kl_guided):
        monkeypatch.setattr(module, "stage_step", recorded)
    monkeypatch.setattr(pipeline, "align_loss", lambda *given, **settings: jnp.zeros(3))
    monkeypatch.setattr(kl_guided._Programs, "heldout_kl", lambda *given: 1.0)
    monkeypatch.setattr(Pipeline, "_begins", lambda *given: True)
    student = run.models.linear_config if stage in ("align", "score") else run.models.hybrid_config
    with run:
        with pytest.raises(Reached):
            getattr(run, stage)()
        _, planned = stage_program(stage, run.config, student, run.models.teacher_config, run.mesh)
    ours, theirs = jax.tree.leaves(planned), jax.tree.leaves(tuple(given))
    assert jax.tree.structure(tuple(given)) == jax.tree.structure(_with_folder(planned, run.models))
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]
    for own, real in zip(ours, theirs):
        assert not real.ndim or own.sharding.is_equivalent_to(real.sharding, real.ndim)


def _with_folder(arguments, models):
    """A run's teacher knows where it came from."""
    folder = str(models.teacher_files.folder)
    return tuple(Model(x.params, x.config, folder) if isinstance(x, Model) else x for x in arguments)


def test_a_plan_counts_what_scoring_holds(unrounded, monkeypatch):
    monkeypatch.setattr(kl_guided._Programs, "heldout_kl", lambda *given: 1.0)
    held, _ = unrounded.held_at(monkeypatch, kl_guided, "train", unrounded.pipeline.score)
    keys = json.loads((unrounded.folder / "config.json").read_text())
    run = unrounded.pipeline
    with jax.set_mesh(run.mesh):
        program = Program(Request("score", run.config, keys, ()), run.mesh)
    assert_holds(held, sum(program.given_bytes.values()) - program.given_bytes["batch"], program.held_bytes)
