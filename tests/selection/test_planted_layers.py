"""Methods that measure the student, on one whose mixers give nothing: two layers' attention changes much, that of the
others hardly anything. Each method must keep those two; and what it measures is compared with plain loops."""

from contextlib import contextmanager
from functools import cache, partial
from itertools import combinations, repeat
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.errors import ConfigError, DivergenceError
from jaxhybrid.model.blueprint import bind
from jaxhybrid.model.layers import Block
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import make_mesh
from jaxhybrid.model.transformer import Model, embed, final_norm, forward, token_context
from jaxhybrid.selection import methods
from jaxhybrid.selection.ablated import ablated_states
from jaxhybrid.selection.choice import Choice, Given, Method, exactly
from jaxhybrid.selection.gated import gated_kl, gated_states
from jaxhybrid.selection.gram import quadratic_kl
from jaxhybrid.selection.measured import rank
from jaxhybrid.selection.methods import METHODS, choose, supernet, trained_greedy
from jaxhybrid.selection.methods.joint_gates import train_gates
from jaxhybrid.selection.rounds import RoundLog
from jaxhybrid.selection.trained_mixers import train_supernet
from jaxhybrid.settings.select import MethodConfig, select_config
from jaxhybrid.settings.stages import AlignConfig
from jaxhybrid.train.placement import place_batch
from jaxhybrid.weights.convert import convert
from tests.conftest import make_batch, make_teacher
from tests.oracles import row
from tests.selection.test_measured import DEPTH, LENGTH, ROWS, F, G, Made, measured

PLANTED, SHARES = (1, 2), np.array([0.02, 1.0, 0.8, 0.02], np.float32)
TEXT = [make_batch(61, ROWS, LENGTH, seed) for seed in range(2)]
MEASURE = {"tokens": 2 * ROWS * LENGTH, "sequence_length": LENGTH, "batch_size": ROWS}
SUPERNET = AlignConfig(tokens=3 * ROWS * LENGTH, sequence_length=LENGTH, batch_size=ROWS, warmup_steps=0)
TRAINING = {"tokens": 4 * ROWS * LENGTH, "sequence_length": LENGTH, "batch_size": ROWS}
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def aligned(one_device):
    """The teacher, and a student whose mixers say something."""
    teacher = make_teacher(num_layers=DEPTH)
    attention = teacher.params["mixers"][F]
    scaled = attention["o_proj"]["kernel"] * SHARES[:, None, None, None]
    mixers = {F: attention | {"o_proj": {**attention["o_proj"], "kernel": scaled}}}
    embed = {"embedding": 50 * teacher.params["embed"]["embedding"]}  # so that no layer changes the whole stream
    teacher = Model({**teacher.params, "embed": embed, "mixers": mixers}, teacher.config)
    linear = convert(teacher, (G,) * DEPTH, GatedDeltaNetConfig(), jax.random.key(3))
    return teacher, linear


@pytest.fixture(scope="module")
def models(aligned):
    """The same with mixers that give nothing."""
    teacher, linear = aligned
    silent = linear.params["mixers"][G]
    silent = silent | {"o_proj": jax.tree.map(jnp.zeros_like, silent["o_proj"])}
    return teacher, Model({**linear.params, "mixers": {G: silent}}, linear.config)


@pytest.fixture(scope="module")
def student(models):
    return measured(models, ((1.0, TEXT),))


@pytest.fixture
def select(student):
    @contextmanager
    def training(settings):
        assert (settings.sequence_length, settings.batch_size) == (LENGTH, ROWS)
        yield repeat(TEXT[0])

    def run(method, budget=2, made=None, measure=MEASURE, log=None, **own):
        settings = select_config(method=method, budget=budget, measure=measure, **{method: own} if own else {})
        given = Given(DEPTH, settings, student=lambda: made or student, training=training, log=log or RoundLog())
        return choose(given)

    return run


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("single_kl", {}),
        ("replacement_kl", {}),
        ("perplexity", {}),
        pytest.param("activation_mse", {}, marks=pytest.mark.slow),
        ("smart", {}),
        ("average_rank", {}),
        ("greedy_kl", {"beam": 2}),
        ("greedy_kl", {"lazy": 1.0}),
        ("removal", {}),
        ("removal", {"lazy": 1.0}),
        ("gram", {"start": "linear"}),
        ("gram", {"start": "softmax", "confirm": 3}),
        pytest.param("joint_gates", {"tokens": 40 * ROWS * LENGTH, "learning_rate": 0.05}, marks=pytest.mark.slow),
        pytest.param("supernet", TRAINING | {"beam": 2}, marks=pytest.mark.slow),
        pytest.param("trained_greedy", TRAINING, marks=pytest.mark.slow),
    ],
)
def test_the_planted_layers_are_kept(select, method, own):
    found = select(method, **own)
    assert found.layers == PLANTED
    assert found.cost[0] > 0
    assert (found.cost[1] > 0) == (method in ("joint_gates", "supernet", "trained_greedy"))


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def logits(models):
    """Of the teacher with the mixers of some layers left out, in float64."""
    teacher, _ = models
    kernel = teacher.params["mixers"][F]["o_proj"]["kernel"]
    run = jax.jit(forward)

    @cache
    def of(without, number):
        own = kernel * np.array([layer not in without for layer in range(DEPTH)], np.float32)[:, None, None, None]
        mixers = {F: teacher.params["mixers"][F] | {"o_proj": {"kernel": own}}}
        batch = TEXT[number]
        found = run(Model({**teacher.params, "mixers": mixers}, teacher.config), batch["tokens"], batch["segment_ids"])
        return np.asarray(found, np.float64)[batch["segment_ids"] != 0]

    return lambda without: np.concatenate([of(frozenset(without), number) for number in range(2)])


@pytest.mark.parametrize("softmax_first", [False, True])
def test_the_form_is_that_of_whole_logits(student, logits, softmax_first):
    every = set(range(DEPTH))
    target, first = logits(()), logits(() if softmax_first else every)
    changed = [logits({i} if softmax_first else every - {i}) for i in range(DEPTH)]
    p = np.exp(log_softmax(target))
    changes = np.stack([target - first, *(x - first for x in changed)])
    centred = changes - np.sum(p * changes, -1, keepdims=True)
    products = np.einsum("ns,ans,bns->ab", p, centred, centred) / len(p)
    form = quadratic_kl(student, softmax_first)
    np.testing.assert_allclose(form.products, products[1:, 1:], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(form.missing, products[0, 1:], rtol=1e-3, atol=1e-6)
    assert form.start == pytest.approx(products[0, 0] / 2, rel=1e-3, abs=1e-9)
    # Where the change is small the form is the KL: of the two layers that hardly count.
    small = {0, 3} if softmax_first else set(PLANTED)
    true = student.kl(every - small if softmax_first else small)
    assert abs(form(small) - true) < 0.1 * student.kl(())
    if softmax_first:
        assert form(small) == pytest.approx(true, rel=0.1)
    best = min(combinations(range(DEPTH), 2), key=lambda s: form(frozenset(s)))
    assert form.best(2) == set(best)


def test_confirmed_sets_are_measured_and_the_best_is_taken(select):
    """The form prefers 1 and 2; the true KL prefers 1 and 3."""
    log = RoundLog()
    first = select("gram", log=log)
    made = Made(lambda kept: {frozenset({1, 3}): 0.1}.get(kept, 1.0))
    found = select("gram", made=made, log=_replayed(log), confirm=5)
    assert first.layers == (1, 2)
    assert found.layers == (1, 3)
    assert len(found.rounds[1]["tried"]) == 5
    assert found.rounds[1]["tried"][0]["kept"] == [1, 2]
    assert found.rounds[1]["kl"] == 0.1


def _replayed(log):
    again = RoundLog()
    again._rounds = list(log._rounds)
    return again


def test_gates_mix_both_branches_on_the_stream_that_goes_on(aligned):
    (teacher, linear), batch = aligned, TEXT[0]
    gates = np.array([1.0, 0.25, 0.5, 0.0], np.float32)
    both = Model({**linear.params, "mixers": linear.params["mixers"] | teacher.params["mixers"]}, linear.config)

    @jax.jit
    def mix(params, soft, linear, x, gate):
        context = token_context(teacher.config, batch["tokens"], batch["segment_ids"], None)
        block = bind(Block, teacher.config, params)
        normed = block.mixer_input(x)
        branches = (bind(MIXERS[kind], both.config, p)(normed, context)[0] for kind, p in ((F, soft), (G, linear)))
        return block.add_mlp(x + gate * next(branches) + (1 - gate) * next(branches))

    x = embed(teacher, batch["tokens"])
    for layer, gate in enumerate(gates):
        stacks = both.params["blocks"], both.params["mixers"][F], both.params["mixers"][G]
        x = mix(*(row(stack, layer) for stack in stacks), x, gate)
    run = jax.jit(partial(gated_states, dtype=jnp.float32))
    found = run(both, gates, batch["tokens"], batch["segment_ids"])
    np.testing.assert_allclose(found, final_norm(teacher, x), rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_gates_that_are_open_or_closed_give_the_kl_of_a_set(student):
    placed = student.placed(0)[0]
    for kept in ((), (1, 3)):
        mask = np.isin(np.arange(DEPTH), kept).astype(np.float32)
        kl = jax.jit(partial(gated_kl, dtype=jnp.float32))(mask, student.student, placed, student.head)
        assert float(kl) == pytest.approx(student.kl(kept, 1), rel=1e-4)


@pytest.mark.slow
def test_gates_settle_by_what_a_layer_is_worth(select):
    found = select("joint_gates", tokens=40 * ROWS * LENGTH, learning_rate=0.05)
    gates = found.importance
    assert min(gates[layer] for layer in PLANTED) > 0.3
    assert max(gates[layer] for layer in (0, 3)) < 0.05
    assert found.cost[1] == 40 * ROWS * LENGTH
    free = select("joint_gates", tokens=10 * ROWS * LENGTH, price=0.0).importance
    assert free == dict.fromkeys(range(DEPTH), 1.0)  # nothing is gained by closing one


@pytest.mark.slow
def test_a_supernet_is_nearer_to_the_teacher_and_leaves_the_student_as_it_is(select, student):
    before = {kept: student.kl(kept) for kept in ((), (1,), (1, 2))}
    found = select("supernet", **TRAINING | {"tokens": 30 * ROWS * LENGTH, "beam": 2, "learning_rate": 3e-3})
    start, *_, last = found.rounds
    assert start["kl"] < 0.9 * before[()]
    assert len(last["kept"]) == 2
    assert {kept: student.of(student.student).kl(kept) for kept in before} == pytest.approx(before, rel=1e-6)
    assert found.cost == (30 * ROWS * LENGTH + MEASURE["tokens"] * (2 + 4 + 5), 30 * ROWS * LENGTH)


def test_a_supernet_search_that_was_stopped_begins_again(select, tmp_path, monkeypatch):
    """Its mixers are gone: no round of theirs is mixed with those of others."""
    trained = iter([Made(lambda kept: 9.0 - len(kept)), Made(lambda kept: 5.0 - len(kept))])
    monkeypatch.setattr(supernet, "train_supernet", lambda *_: next(trained))

    class Breaks(RoundLog):
        def round(self, compute):
            if self._next == 2:
                raise OSError("the machine went away")
            return super().round(compute)

    with pytest.raises(OSError, match="the machine"):
        select("supernet", log=Breaks(tmp_path / "rounds.json"), **TRAINING)
    found = select("supernet", log=RoundLog(tmp_path / "rounds.json"), **TRAINING)
    assert [one["kl"] for one in found.rounds] == [5.0, 4.0, 3.0]
    assert select("supernet", log=RoundLog(tmp_path / "rounds.json"), **TRAINING).rounds == found.rounds  # untrained


@pytest.mark.slow
def test_training_between_the_rounds_of_a_search_brings_it_nearer(select, student):
    """Its first layer is that of the untrained search; what comes after is measured on mixers trained beside it."""
    plain = select("greedy_kl")
    found = select("trained_greedy", **TRAINING | {"tokens": 30 * ROWS * LENGTH, "learning_rate": 3e-3})
    assert (found.layers, found.order[0]) == (PLANTED, plain.order[0])
    assert found.rounds[1]["kl"] == pytest.approx(plain.rounds[1]["kl"])
    assert found.rounds[2]["scores"]["0"] < 0.8 * plain.rounds[2]["scores"]["0"]  # with a layer that changes nothing
    assert found.cost == (30 * ROWS * LENGTH + MEASURE["tokens"] * (2 + 4 + 3), 30 * ROWS * LENGTH)


def test_training_between_rounds_is_under_the_layers_kept_so_far(select, tmp_path, monkeypatch):
    """In equal shares; the KL falls by what was trained, and the second layer is another than without training."""
    trained = []

    class Trains:
        def __init__(self, student, settings, remedy):
            assert settings.steps == 4

        def train(self, sets, batches):
            trained.append([sorted(kept) for kept, _ in zip(sets, batches)])
            steps = sum(map(len, trained))
            return Made(lambda kept: 9.0 - steps - (0 in kept) - 0.5 * (steps // 2 in kept))

    monkeypatch.setattr(trained_greedy, "MixerTraining", Trains)
    made = Made(lambda kept: 9.0 - (0 in kept) - 0.5 * (1 in kept))
    log = tmp_path / "rounds.json"
    found = select("trained_greedy", budget=3, made=made, log=RoundLog(log), **TRAINING)
    assert trained == [[[0], [0]], [[0, 1], [0, 1]]]
    assert (found.order, found.layers) == ((0, 1, 2), (0, 1, 2))
    assert [one["kl"] for one in found.rounds] == [9.0, 8.0, 5.5, 3.5]
    assert [one["trained_tokens"] for one in found.rounds] == [0, 0, 2 * ROWS * LENGTH, 2 * ROWS * LENGTH]
    assert select("trained_greedy", budget=3, made=made, log=RoundLog(log), **TRAINING).rounds == found.rounds
    assert len(trained) == 2  # not again


def test_a_beam_finds_a_pair_that_greedy_cannot(select):
    """0 is best alone, but 1 and 2 together are better than 0 with any other."""
    values = {frozenset({0}): 2.0, frozenset({1, 2}): 0.5}
    made = Made(lambda kept: values.get(kept, 4 - len(kept) - 0.5 * (0 in kept) - 0.25 * (1 in kept)))
    greedy = select("greedy_kl", made=made)
    beam = select("greedy_kl", made=made, beam=2)
    assert (greedy.layers, beam.layers) == ((0, 1), (1, 2))
    assert [one["kept"] for one in beam.rounds[1]["beam"]] == [[0], [1]]
    assert beam.rounds[2]["scores"].keys() == {"0 1", "0 2", "0 3", "1 2", "1 3"}
    exhaustive = select("greedy_kl", made=made, beam=6)
    assert exhaustive.rounds[2]["kl"] == min(made.kl(kept) for kept in combinations(range(DEPTH), 2))


def test_the_average_of_ranks_by_hand(select):
    alone = {0: 3.0, 1: 1.0, 2: 2.0, 3: 4.0}  # KL with it alone softmax: 1 2 0 3
    without = {0: 0.9, 1: 0.5, 2: 0.1, 3: 0.2}  # KL with it alone linear: 0 1 3 2
    every = frozenset(range(DEPTH))
    made = Made(lambda kept: alone[min(kept)] if len(kept) == 1 else without[min(every - kept)])
    made.depth = DEPTH
    found = select("average_rank", made=made)
    assert found.importance == {0: -1.0, 1: -0.5, 2: -2.0, 3: -2.5}
    assert found.layers == (0, 1)
    assert [one["of"] for one in found.rounds] == ["single_kl", "replacement_kl"]
    with pytest.raises(ConfigError, match="names greedy_kl, which ranks no more than"):
        select("average_rank", made=made, of=("single_kl", "greedy_kl"))


def test_answers_count_in_the_loss_as_they_do_in_the_kl(models):
    prompts = [b | {"counted": (np.arange(LENGTH) % 5 == 0) * np.float32(b["segment_ids"] != 0)} for b in TEXT]
    student = measured(models, ((0.75, TEXT), (0.25, prompts)))
    both = student.cross_entropy((1,))
    student.shares = (1.0, 0.0)
    text = student.cross_entropy((1,))
    student.shares = (0.0, 1.0)
    asked = student.cross_entropy((1,))
    assert abs(text - asked) > 0.01
    assert both == pytest.approx(0.75 * text + 0.25 * asked, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "own", "message"),
    [
        ("greedy_kl", {"beam": 2, "swaps": True}, "beam 2 goes without first_tokens, lazy, swaps and stop_kl"),
        ("average_rank", {"of": ("single_kl", "none")}, r"average_rank.of names \['none'\]"),
        ("supernet", {"tokens": 10}, "supernet.tokens 10 are less than one step, 16,384"),
        ("trained_greedy", {"tokens": 10}, "trained_greedy.tokens 10 are less than one step, 16,384"),
        ("joint_gates", {"tokens": 10}, "joint_gates.tokens 10 are less than one batch of measure, 192"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(select, method, own, message):
    with pytest.raises(ConfigError, match=message):
        select(method, **own)


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"cosine": Method(lambda *_: exactly([0]))}, r"b\.py declares the method 'cosine', .* another method"),
        ({"measure": Method(lambda *_: exactly([0]), settings=MethodConfig)}, "'measure', .* a setting of select"),
        ({"own": Method(lambda *_: exactly([0]), "studnt")}, "'own' needs 'studnt'; choose of nothing, scores"),
    ],
)
def test_a_method_that_cannot_be_told_apart_is_refused(declared, told):
    files = [SimpleNamespace(__file__=f"{name}.py", METHODS=own) for name, own in (("a", METHODS), ("b", declared))]
    with pytest.raises(ConfigError, match=told):
        methods._declared(files)


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (exactly([0, 9]), r"The method mine names layers \[9\]; the model's are 0 to 3"),
        (Choice((0,), order=(0, -1)), r"names layers \[-1\]"),
        (Choice((2, 1)), r"gives the layers \(2, 1\), which are not ascending"),
    ],
)
def test_layers_that_there_are_not_are_refused(monkeypatch, choice, told):
    monkeypatch.setitem(METHODS, "mine", Method(lambda *_: choice))
    with pytest.raises(ConfigError, match=told):
        choose(Given(DEPTH, select_config(method="uniform", budget=2).model_copy(update={"method": "mine"})))


def test_a_measure_gives_a_number_for_every_layer(student):
    given = Given(DEPTH, select_config(method="single_kl", budget=2), student=lambda: student)
    with pytest.raises(ConfigError, match="The method single_kl measured 2 values of 4 layers"):
        rank(given, 2, lambda _: [0.1, 0.2], 1)
    with pytest.raises(DivergenceError, match="measure of layer 1 by single_kl is nan"):
        rank(given, 2, lambda _: [0.1, float("nan"), 0.3, 0.4], 1)


def test_every_method_is_declared_with_settings_of_its_own():
    for name, method in METHODS.items():
        if method.settings is not None:
            assert select_config(method=name).own == method.settings()
            assert method.settings.__doc__


@pytest.mark.slow
def test_eight_devices_measure_as_one(models, student):
    settings = METHODS["joint_gates"].settings(tokens=6 * ROWS * LENGTH)
    batch, kept = TEXT[0], np.arange(DEPTH) != 1
    expected = (
        quadratic_kl(student, False).products,
        train_gates(student, settings, 1e-3)[0],
        ablated_states(models[0], batch["tokens"], batch["segment_ids"], kept, jnp.float32),
    )
    trained = train_supernet(student, repeat(TEXT[0]), SUPERNET, 2, 0)
    mesh = make_mesh(devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        many = measured(models, ((1.0, TEXT),), devices=8)
        placed = place_batch(batch, mesh)
        states = jax.jit(partial(ablated_states, dtype=jnp.float32))
        found = (
            quadratic_kl(many, False).products,
            train_gates(many, settings, 1e-3)[0],
            states(many.teacher, placed["tokens"], placed["segment_ids"], kept),
        )
        kl = train_supernet(many, repeat(TEXT[0]), SUPERNET, 2, 0).kl((1,))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=2e-3, atol=2e-5)
    assert kl == pytest.approx(trained.kl((1,)), rel=2e-3)
