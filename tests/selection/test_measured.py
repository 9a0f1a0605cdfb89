"""Methods that measure the aligned student: greedy search on true KL against the same search over separate hybrids,
rankings against plain loops over the layers, what is compiled, resumed and split over devices."""

import json
import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.errors import DivergenceError
from jaxhybrid.model.blueprint import bind
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.layers import Block
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, embed, forward, model_variables, token_context
from jaxhybrid.selection.choice import Given
from jaxhybrid.selection.gram import quadratic_kl
from jaxhybrid.selection.masked import MaskedStudent
from jaxhybrid.selection.methods import choose, layer_types
from jaxhybrid.selection.rounds import RoundLog
from jaxhybrid.settings.select import select_config
from jaxhybrid.weights.convert import convert, with_softmax_layers
from tests.conftest import make_batch, make_teacher
from tests.oracles import row

DEPTH, ROWS, LENGTH = 4, 8, 24
F, G = FULL_ATTENTION, GatedDeltaNetConfig.kind
TEXT = [make_batch(61, ROWS, LENGTH, seed) for seed in range(4)]
MEASURE = {"tokens": 4 * ROWS * LENGTH, "sequence_length": LENGTH, "batch_size": ROWS}
PROMPTS = [batch | {"counted": (np.arange(LENGTH) % 5 == 0) * np.float32(batch["segment_ids"] != 0)} for batch in TEXT]
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def models(one_device):
    teacher = make_teacher(num_layers=DEPTH)
    linear = convert(teacher, (G,) * DEPTH, GatedDeltaNetConfig(), jax.random.key(3))
    return teacher, linear


def beside(teacher, linear):
    """As a run has it: the teacher's attention beside the aligned mixers."""
    return Model({**linear.params, "mixers": linear.params["mixers"] | teacher.params["mixers"]}, linear.config)


def measured(models, texts=((1.0, TEXT),), devices=1):
    mesh = make_mesh(devices=jax.devices()[:devices])
    teacher, student = (on(model, mesh) for model in (models[0], beside(*models)))
    return MaskedStudent(teacher, student, texts, mesh, jnp.float32)


def on(model, mesh):
    """The model with its parameters, and those of mixers that its config does not name, on a mesh."""
    configs = model.config, model.config.with_layers((F,) * DEPTH)
    own, attention = (param_shardings(model_variables(config), mesh) for config in configs)
    mixers = {kind: (attention["mixers"] | own["mixers"])[kind] for kind in model.params["mixers"]}
    return Model(jax.device_put(model.params, own | {"mixers": mixers}), model.config)


def select(student, tmp_path=None, log=None, depth=DEPTH, **settings):
    settings = select_config(**{"measure": MEASURE} | settings)
    log = log or RoundLog(tmp_path and tmp_path / "rounds.json")
    return choose(Given(depth, settings, student=student if callable(student) else lambda: student, log=log))


@pytest.fixture(scope="module")
def plain(models):
    """KL of a hybrid of its own, by whole logits in float64, on some batches."""
    teacher, linear = models
    run = jax.jit(forward)

    def log_probabilities(model, batch):
        x = np.asarray(run(model, batch["tokens"], batch["segment_ids"]), np.float64)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    @cache
    def teachers(number):
        return log_probabilities(teacher, TEXT[number])

    @cache
    def sums(kept, number):
        hybrid = with_softmax_layers(linear, teacher, layer_types(DEPTH, kept, G)) if kept else linear
        log_q, log_p = log_probabilities(hybrid, TEXT[number]), teachers(number)
        return np.sum(np.exp(log_p) * (log_p - log_q), -1)

    def kl(kept, batches=range(4), counted=None):
        masks = [(TEXT[n]["segment_ids"] != 0) if counted is None else counted[n]["counted"] for n in batches]
        total = sum(np.sum(sums(frozenset(kept), n) * mask) for n, mask in zip(batches, masks))
        return total / sum(mask.sum() for mask in masks)

    return kl


@pytest.fixture(scope="module")
def student(models):
    return measured(models)


def test_the_mask_gives_the_kl_of_a_hybrid_of_its_own(student, plain):
    for kept in ((), (2,), (0, 4), range(1, DEPTH)):
        assert student.kl(kept) == pytest.approx(plain(kept), rel=1e-4)
        assert student.kl(kept, 2) == pytest.approx(plain(kept, range(2)), rel=1e-4)
    assert student.kl(range(DEPTH)) == pytest.approx(0, abs=1e-6)


def brute_force(kl, kept, count):
    """Greedy addition or removal over separate hybrids: (layers in order, KL after each)."""
    order, kls, kept = [], [], set(kept)
    while len(kept) != count:
        options = {i: kept ^ {i} for i in range(DEPTH) if (i in kept) == (len(kept) > count)}
        best = min(options, key=lambda i: kl(options[i]))
        kept = options[best]
        order.append(best)
        kls.append(kl(kept))
    return order, kls


@pytest.mark.parametrize(("method", "begin", "count"), [("greedy_kl", (), 3), ("removal", range(DEPTH), 1)])
def test_greedy_search_is_that_over_separate_hybrids(student, plain, method, begin, count):
    chosen = select(student, method=method, budget=count)
    order, kls = brute_force(plain, begin, count)
    assert [found["layer"] for found in chosen.rounds[1:]] == order
    assert [found["kl"] for found in chosen.rounds] == pytest.approx([plain(begin), *kls], rel=1e-4, abs=1e-6)
    assert set(chosen.layers) == set(chosen.rounds[-1]["kept"]) == set(begin) ^ set(order)
    for found, before in zip(chosen.rounds[1:], chosen.rounds):
        expected = {str(i): plain(set(before["kept"]) ^ {i}) for i in map(int, found["scores"])}
        assert found["scores"] == pytest.approx(expected, rel=1e-4)
    for other in chosen.nested:  # what the method would have given for that count
        assert tuple(sorted(chosen.order[:other])) == select(student, method=method, budget=other).layers
    assert set(chosen.nested) == set(range(1, DEPTH + (method == "removal")))
    tokens = 4 * ROWS * LENGTH
    assert chosen.forward_tokens == tokens * (2 + 4 + 3 + 2)
    assert student.compiled() == {"kl": 1, "teacher_forward": 1}


def test_early_rounds_take_fewer_tokens_and_score_the_closest_again(student, plain):
    first = ROWS * LENGTH
    chosen = select(student, method="greedy_kl", budget=3, greedy_kl={"first_tokens": first, "rescore": 2})
    assert [found["tokens"] for found in chosen.rounds] == [4 * first, first, 2 * first, 4 * first]
    kept = set()
    for found, batches in zip(chosen.rounds[1:3], (1, 2)):
        few = {i: plain(kept | {i}, range(batches)) for i in range(DEPTH) if i not in kept}
        assert found["scores"] == pytest.approx({str(i): kl for i, kl in few.items()}, rel=1e-4)
        closest = {str(i): plain(kept | {i}) for i in sorted(few, key=few.get)[:2]}
        assert found["rescored"] == pytest.approx(closest, rel=1e-4)
        assert str(found["layer"]) == min(closest, key=closest.get)
        assert found["forward_tokens"] == first * (batches * len(few) + 2 * (4 - batches))
        kept = set(found["kept"])
    assert "rescored" not in chosen.rounds[3]


class Made:
    """A student whose KL is a given function of the kept set."""

    batches = 4

    def __init__(self, kl):
        self.kl = lambda kept, batches=4: kl(frozenset(kept))

    def tokens(self, batches=4):
        return batches * ROWS * LENGTH


def test_the_closest_are_scored_again_and_the_best_of_them_is_taken():
    """On few tokens 2 is best, 0 next and 1 last; on all 1 is best, then 0."""
    few, every = {0: 1.0, 1: 1.1, 2: 0.9, 3: 2.0}, {0: 0.7, 1: 0.5, 2: 0.8, 3: 0.1}

    def choose(rescore):
        made = Made(lambda kept: 3.0)
        made.kl = lambda kept, batches=4: 3.0 if not kept else sum((every if batches == 4 else few)[i] for i in kept)
        settings = {"first_tokens": ROWS * LENGTH, "rescore": rescore}
        return select(made, method="greedy_kl", budget=2, greedy_kl=settings).rounds[1]

    assert (choose(1)["layer"], choose(2)["layer"], choose(3)["layer"]) == (2, 0, 1)
    assert choose(3)["kl"] == 0.5


@pytest.mark.parametrize("own", [{}, {"first_tokens": ROWS * LENGTH, "rescore": 2}])
@pytest.mark.parametrize("method", ["greedy_kl", "removal"])
def test_a_lazy_search_finds_the_same_in_fewer_tokens(method, own):
    """Layers know facts, the KL is the weight of those that no kept one knows: what a layer brings only shrinks."""
    rng = np.random.default_rng(4)
    depth, fewer = 12, []
    for _ in range(5):
        knows, weights = rng.random((depth, 40)) < 0.15, rng.random((4, 40)) + 0.5

        def kl(kept, batches=4, knows=knows, weights=weights):
            missing = ~knows[sorted(kept)].any(0)
            return float(np.mean(weights[:batches] @ missing))

        made = Made(kl)
        made.kl = kl
        every = select(made, method=method, budget=5, depth=depth, **{method: own})
        lazy = select(made, method=method, budget=5, depth=depth, **{method: own | {"lazy": 1.0}})
        assert [(r["layer"], r["kl"]) for r in lazy.rounds] == [(r["layer"], r["kl"]) for r in every.rounds]
        assert (lazy.layers, lazy.order, lazy.nested) == (every.layers, every.order, every.nested)
        for found, known in zip(lazy.rounds, every.rounds):
            assert found["scores"].items() <= known["scores"].items()
            skipped = len(known["scores"]) - len(found["scores"])
            assert known["forward_tokens"] - found["forward_tokens"] == skipped * found["tokens"]
        fewer.append(lazy.forward_tokens / every.forward_tokens)
    assert max(fewer) < 0.9


def test_a_lazy_search_allows_for_growth_as_far_as_it_is_told():
    """2 brings 0.5, and 1.2 beside 0; 1 brings 0.8."""
    values = {(): 4.0, (0,): 3.0, (1,): 3.2, (2,): 3.5, (3,): 3.9, (0, 1): 2.2, (0, 2): 1.8, (0, 3): 2.9}
    made = Made(lambda kept: values[tuple(sorted(kept))])
    chosen = {
        lazy: select(made, method="greedy_kl", budget=2, greedy_kl={"lazy": lazy}) for lazy in (None, 1.0, 1.5, 8.0)
    }
    assert {lazy: found.layers for lazy, found in chosen.items()} == {
        None: (0, 2),
        1.0: (0, 1),
        1.5: (0, 1),
        8.0: (0, 2),
    }
    assert {lazy: set(found.rounds[2]["scores"]) for lazy, found in chosen.items()} == {
        None: {"1", "2", "3"}, 1.0: {"1"}, 1.5: {"1"}, 8.0: {"1", "2"},
    }  # fmt: skip


def test_swaps_leave_a_place_that_greedy_cannot():
    """0 is best alone, but 1 and 2 together are better than 0 with any other."""
    values = {frozenset(): 5.0, frozenset({0}): 2.0, frozenset({1, 2}): 0.5}
    kl = lambda kept: values.get(kept, 4 - len(kept) - 0.5 * (0 in kept) - 0.25 * (1 in kept))  # noqa: E731
    greedy = select(Made(kl), method="greedy_kl", budget=2)
    assert greedy.layers == (0, 1)
    swapped = select(Made(kl), method="greedy_kl", budget=2, greedy_kl={"swaps": True})
    assert swapped.layers == (1, 2)
    swaps = [(found["out"], found["layer"], found["kl"]) for found in swapped.rounds[3:]]
    assert swaps == [(0, 2, 0.5), (1, None, 0.5)]
    assert list(swapped.nested) == [2]  # the first one of it is not what greedy gives for one layer


@pytest.mark.parametrize(("method", "whole"), [("greedy_kl", [1, 2]), ("removal", [2, 3, 4])])
def test_rounds_whose_tokens_depend_on_the_budget_say_nothing_of_others(method, whole):
    """For one layer, or three, the rounds would take other tokens, and might keep other layers."""
    made = Made(lambda kept: 1.0 - 0.2 * len(kept))
    assert list(select(made, method=method, budget=2).nested) == whole
    assert list(select(made, method=method, budget=2, **{method: {"first_tokens": ROWS * LENGTH}}).nested) == [2]


def test_greedy_stops_at_a_kl_that_is_low_enough():
    kl = lambda kept: 1.0 - 0.2 * len(kept)  # noqa: E731
    assert select(Made(kl), method="greedy_kl", budget=4, greedy_kl={"stop_kl": 0.61}).layers == (0, 1)
    assert select(Made(kl), method="greedy_kl", budget=4, greedy_kl={"stop_kl": 2.0}).layers == (0,)


def test_a_search_that_was_stopped_goes_on_to_the_same_bits(models, tmp_path):
    expected = select(measured(models), method="greedy_kl", budget=3)

    class Breaks(RoundLog):
        def round(self, compute):
            if self._next == 2:
                raise OSError("the machine went away")
            return super().round(compute)

    with pytest.raises(OSError):
        select(measured(models), log=Breaks(tmp_path / "rounds.json", {"of": 1}), method="greedy_kl", budget=3)
    assert len(json.loads((tmp_path / "rounds.json").read_text())["rounds"]) == 2
    asked = []

    def student():
        asked.append(1)
        return measured(models)

    log = partial(RoundLog, tmp_path / "rounds.json")
    again = select(cache(student), log=log({"of": 1}), method="greedy_kl", budget=3)
    assert (again.rounds, again.layers) == (expected.rounds, expected.layers)
    assert len(asked) == 1
    assert select(student, log=log({"of": 1}), method="greedy_kl", budget=3).rounds == expected.rounds
    assert len(asked) == 1  # nothing was left to measure
    assert log({"of": 2})._rounds == []  # of another alignment, say


def test_eight_devices_choose_as_one(models, student):
    mesh = make_mesh(devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        many = measured(models, devices=8)
        assert many.mesh.size == 8
        chosen = {name: select(many, method=name, budget=3) for name in ("greedy_kl", "cosine")}
    for name, ours in chosen.items():
        one = select(student, method=name, budget=3)
        assert ours.layers == one.layers
        for a, b in zip(ours.rounds, one.rounds, strict=True):
            assert a["scores"] == pytest.approx(b["scores"], rel=1e-4, abs=1e-6)
            assert a["forward_tokens"] == b["forward_tokens"]


def test_answers_count_as_much_as_they_are_told_to(models, plain):
    student = measured(models, ((0.75, TEXT), (0.25, PROMPTS)))
    text, answers = plain((1,)), plain((1,), counted=PROMPTS)
    assert abs(text - answers) > 0.01 * text
    assert student.kl((1,)) == pytest.approx(0.75 * text + 0.25 * answers, rel=1e-4)


def test_rankings_are_those_of_plain_loops(models, student, plain):
    teacher, linear = models
    batch = TEXT[0]
    one = measured(models, ((1.0, TEXT[:1]),))
    mask, x = batch["segment_ids"] != 0, embed(teacher, batch["tokens"])
    context = token_context(teacher.config, batch["tokens"], batch["segment_ids"], None)
    errors, cosines = [], []
    for layer in range(DEPTH):
        block = bind(Block, teacher.config, row(teacher.params["blocks"], layer))
        normed = block.mixer_input(x)
        outputs = [
            bind(MIXERS[kind], config, row(params["mixers"][kind], layer))(normed, context)[0]
            for kind, config, params in ((F, teacher.config, teacher.params), (G, linear.config, linear.params))
        ]
        errors.append(float(np.mean(np.square(outputs[0] - outputs[1])[mask])))
        after = block.add_mlp(x + outputs[0])
        cosine = np.sum(x * after, -1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(after, axis=-1)
        cosines.append(float(np.mean(cosine[mask])))
        x = after
    measure = MEASURE | {"tokens": ROWS * LENGTH}
    found = {name: select(one, method=name, budget=2, measure=measure) for name in ("activation_mse", "cosine")}
    assert list(found["activation_mse"].importance.values()) == pytest.approx(errors, rel=1e-4)
    assert list(found["cosine"].importance.values()) == pytest.approx([-c for c in cosines], rel=1e-4)
    assert found["activation_mse"].layers == tuple(sorted(np.argsort(errors)[-2:]))
    single = select(student, method="single_kl", budget=2)
    assert list(single.importance.values()) == pytest.approx([-plain([i]) for i in range(DEPTH)], rel=1e-4)


def test_perplexity_is_of_the_teacher_with_one_layer_replaced(models, student):
    teacher, linear = models

    def cross_entropy(kept):
        hybrid = with_softmax_layers(linear, teacher, layer_types(DEPTH, kept, G))
        total = count = 0.0
        for batch in TEXT:
            x = np.asarray(jax.jit(forward)(hybrid, batch["tokens"], batch["segment_ids"]), np.float64)
            log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
            chosen = np.take_along_axis(log_p[:, :-1], batch["tokens"][:, 1:, None], -1)[..., 0]
            ids = batch["segment_ids"]
            mask = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
            total, count = total - np.sum(chosen * mask), count + mask.sum()
        return total / count

    whole = set(range(DEPTH))
    expected = cross_entropy(whole - {3}) - cross_entropy(whole)
    assert select(student, method="perplexity", budget=2).importance[3] == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("measure", ["activation_errors", "block_cosines"])
def test_weights_are_no_constants_of_a_program(student, measure):
    """Several processes cannot compile one that holds them."""
    jax.config.update("jax_captured_constants_warn_bytes", 1000)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            getattr(student, measure)()
    finally:
        jax.config.update("jax_captured_constants_warn_bytes", 2 * 10**9)


def test_a_kl_that_is_no_number_is_refused(models):
    teacher, linear = models
    broken = jax.tree.map(lambda w: w * np.nan, linear.params["mixers"])
    student = measured((teacher, Model({**linear.params, "mixers": broken}, linear.config)))
    with pytest.raises(DivergenceError, match=r"layers \[1\] softmax is nan. Align again at a lower"):
        student.kl([1])
    with pytest.raises(DivergenceError, match=r"cross entropy of the student with layers \[1\] softmax is nan"):
        student.cross_entropy([1])
    with pytest.raises(DivergenceError, match="error of the mixer of layer 0 is nan"):
        student.activation_errors()
    with pytest.raises(DivergenceError, match="quadratic form of the student's KL is nan"):
        quadratic_kl(student, softmax_first=True)
    student.teacher = Model(jax.tree.map(lambda w: w * np.nan, teacher.params), teacher.config)
    with pytest.raises(DivergenceError, match=r"block 0 is nan\. Try dtype=float32"):
        student.block_cosines()
