"""Written answers: what is right, by hand; what models write, against writing it for one prompt alone."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhybrid.decoding.generate import generate
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.evaluate import written
from jaxhybrid.evaluate.ablation import ablated, ablations
from jaxhybrid.evaluate.completion import completion_prompts, source_name
from jaxhybrid.evaluate.prompts import Asker, Prompt, PromptSet
from jaxhybrid.evaluate.written import chance, compare_written, require_room, score, write_answers, written_figures
from jaxhybrid.model.config import FULL_ATTENTION
from jaxhybrid.model.mixers.gated_deltanet import GatedDeltaNetConfig
from jaxhybrid.model.partition import make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, forward, model_variables
from jaxhybrid.settings.evaluate import CompletionConfig
from jaxhybrid.weights.convert import convert
from tests.evaluate.test_recall import letters


def prompt_set(prompts, vocabulary, scoring="all", stop="", new_tokens=5, length=None):
    tokens = Asker(vocabulary, chat=False).tokens(prompts)
    return PromptSet("ruler", "t", length, new_tokens, scoring, stop, tokens, prompts, "hash")


# --- scores, by hand


@pytest.mark.parametrize(
    ("said", "answers", "every", "any_of"),
    [
        (" 1234567 and more", ["1234567"], 1.0, 1.0),
        ("123456", ["1234567"], 0.0, 0.0),
        ("AMBER, wolf", ["Wolf", "amber", "fox", "owl"], 0.5, 1.0),
        ("", ["x"], 0.0, 0.0),
        ("two\twords\x00here", ["words\nhere"], 1.0, 1.0),  # control characters are line ends
        ("the moon", ["sun", "star", "moon"], 1 / 3, 1.0),
    ],
)
def test_answers_are_scored_as_ruler_scores_them(said, answers, every, any_of):
    prompt = Prompt("", "", tuple(answers))
    assert score(prompt, said, "all") == pytest.approx(every)
    assert score(prompt, said, "part") == any_of


def test_figures_are_plain_counts():
    prompts = [
        Prompt("q", "", ("111", "222"), ("333", "444"), (0.1, 0.9)),
        Prompt("q", "", ("555", "666"), ("777", "888"), (0.1, 0.5)),
        Prompt("q", "", ("123", "456"), ("789", "987"), (0.95, 1.0)),
    ]
    said = ["111 222 333", "777 then 666", " 1 456"]
    figures, scores = written_figures(prompt_set(prompts, letters()), said, letters())
    assert scores.tolist() == [1.0, 0.5, 0.5]
    assert figures["score"]["share"] == pytest.approx(2 / 3)
    assert figures["another"]["share"] == pytest.approx(1 / 3)  # of the second: the first is all right
    assert figures["first_token"]["share"] == pytest.approx(2 / 3)  # a letter is a token: 1, not 7, 1
    found = {(part["first"], part["end"]): (part["share"], part["answers"]) for part in figures["depths"]}
    assert found == {(0.0, 0.2): (0.5, 2), (0.4, 0.6): (1.0, 1), (0.8, 1.0): (2 / 3, 3)}
    for figure in (figures["score"], figures["another"], *figures["depths"]):
        assert figure["low"] <= figure["share"] <= figure["high"]
    assert chance(prompts) == 0.5
    alone = [Prompt("q", "", ("111",))]
    figures, _ = written_figures(prompt_set(alone, letters()), ["111"], letters())
    assert set(figures) == {"score", "first_token"}
    assert chance(alone) is None


def test_alternatives_are_one_answer_at_their_depth():
    prompts = [Prompt("q", "", ("111", "222", "333"), depths=(0.1,) * 3), Prompt("q", "", ("444",), depths=(0.15,))]
    figures, _ = written_figures(prompt_set(prompts, letters(), scoring="part"), ["222", "no"], letters())
    (part,) = figures["depths"]
    assert (part["share"], part["answers"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("said", "begins", "another"),
    [
        (" 1. able 2. table", True, False),  # as the solved example of cwe has it
        ("able, quiet-harbor", True, False),
        ("12. cable", False, False),
        ("1234567. able", False, False),  # a number that is said, not a place in a list
        ("the Harbor", False, True),
        ("1. harbors\n2. HARBOR.", False, True),
    ],
)
def test_words_are_read_with_and_without_numbers_and_whole(said, begins, another):
    prompt = Prompt("q", "", ("able", "wolf"), ("harbor",))
    figures, _ = written_figures(prompt_set([prompt], letters()), [said], letters())
    assert (figures["first_token"]["share"], figures["another"]["share"]) == (begins, another)


def test_chance_is_that_of_naming_values_at_random():
    prompts = [Prompt("", "", ("aa", "bb"), ("cc", "dd", "ee")), Prompt("", "", ("ff",), ("gg",))]
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(4000):
        for prompt in prompts:
            named = rng.permutation([*prompt.answers, *prompt.others])[: len(prompt.answers)]
            draws.append(score(prompt, " ".join(named), "all"))
    assert chance(prompts) == pytest.approx(np.mean(draws), abs=0.01)


# --- what models write


@pytest.fixture(scope="module")
def hybrid(teacher):
    types = ("gated_deltanet", FULL_ATTENTION, "gated_deltanet", "gated_deltanet")
    return convert(teacher, types, GatedDeltaNetConfig(), jax.random.key(1))


class Digits:
    """A tokenizer of 61 tokens, which are the letters from "0" on; what `letters` is, small enough for the model."""

    begin_ids: tuple[int, ...] = ()
    encoder = None

    def __init__(self):
        self.encoder = self

    def prompts(self, texts, begin=True):
        return [[ord(sign) - ord("0") for sign in text] for text in texts]

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(token + ord("0")) for token in tokens)

    def encode(self, text, add_special_tokens=False):
        return type("Encoding", (), {"offsets": [(place, place + 1) for place in range(len(text))]})


def random_prompts(count, longest=20):
    rng = np.random.default_rng(0)
    lengths = [longest, *rng.integers(3, longest, count - 1)]
    return [Prompt("".join(chr(c) for c in 48 + rng.integers(0, 61, n)), "", ("zz",)) for n in lengths]


@pytest.fixture(scope="module")
def alone(hybrid):
    """Prompts, and what the model writes after each of them alone."""
    given = prompt_set(random_prompts(7), Digits(), new_tokens=4, length=24)
    said = [generate(hybrid, [tokens], 4, eos_ids=[5])[0] for tokens in given.tokens]
    return given, [Digits().decode(tokens) for tokens in said]


def test_answers_of_batches_come_back_in_order_and_end_with_the_line(monkeypatch):
    """What is written here: the prompt backwards, a line end in the middle."""
    engines, sizes = [], []

    def answered(engine, requests):
        sizes.append(list(requests))
        assert all((request.max_new_tokens, request.end_ids) == (4, (5,)) for request in requests.values())
        return [request.prompt[::-1] for request in requests.values()]

    monkeypatch.setattr(written, "Engine", lambda model, slots, dtype: engines.append(slots))
    monkeypatch.setattr(written, "answered", answered)
    given = prompt_set(random_prompts(7), Digits(), new_tokens=4)
    backwards = [prompt.text[::-1] for prompt in given.prompts]
    stop = backwards[0][2]
    for each, expected in ((given, backwards), (replace(given, stop=stop), [t.split(stop)[0] for t in backwards])):
        assert write_answers(None, each, Digits(), [5], batch_tokens=24 * 3) == expected
    assert engines == [3, 3]  # one for all batches of a set
    assert sizes == [[0, 1, 2]] * 6


@pytest.mark.slow
def test_batches_on_a_mesh_write_what_each_prompt_alone_gives(hybrid, alone):
    given, expected = alone
    stop = expected[0][2]
    mesh = make_mesh(1, -1, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        params = jax.device_put(hybrid.params, param_shardings(model_variables(hybrid.config), mesh))
        settings = {"batch_tokens": 24 * 4, "dtype": jnp.float32}
        said, stopped = (
            write_answers(Model(params, hybrid.config), each, Digits(), [5], **settings)
            for each in (given, replace(given, length=None, stop=stop))
        )
    assert said == expected
    assert stopped == [text.split(stop)[0] for text in expected]
    assert len(set(said)) > 3


def test_a_task_that_the_teacher_cannot_do_measures_no_student(monkeypatch):
    monkeypatch.setattr(written, "write_answers", lambda model, given, *_, **__: model)
    prompts = [Prompt("q", "", ("7",), ("8",))] * 5
    given, kept = prompt_set(prompts, letters()), []
    keep = lambda name, given, said, scores: kept.append((name, scores.tolist()))  # noqa: E731
    settings = {"batch_tokens": 1, "keep": keep}
    able = {"teacher": ["7"] * 4 + ["8"], "distill": ["8"] * 5}
    (record,) = compare_written(able, [given], letters(), [], **settings)
    assert record["applies"]
    assert [record["models"][name]["score"]["share"] for name in able] == [0.8, 0.0]
    assert (record["task"], record["prompts"], record["hash"], record["chance"]) == ("t", 5, "hash", 0.5)
    (record,) = compare_written(
        {"teacher": ["7"] * 3 + ["8"] * 2, "distill": ["7"] * 5}, [given], letters(), [], **settings
    )
    assert not record["applies"]
    assert list(record["models"]) == ["teacher"]
    assert [name for name, _ in kept] == ["teacher", "distill", "teacher"]
    assert kept[0][1] == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_no_prompt_is_cut():
    given = prompt_set([Prompt("x" * 30, "", ("y",)), Prompt("x" * 50, "", ("y",))], letters())
    require_room(given, 55)
    with pytest.raises(ConfigError, match=r"prompt 1 of t takes 50 tokens and its answer up to 5; .* context of 54"):
        require_room(given, 54)


# --- ablations


def test_layers_that_are_off_add_nothing(hybrid):
    tokens = np.random.default_rng(0).integers(0, 61, (2, 16)).astype(np.int32)
    off = ablations("distill", hybrid)
    assert list(off) == ["distill, linear off", "distill, softmax off"]
    run = jax.jit(forward)
    logits = {name: run(model, tokens) for name, model in {"whole": hybrid, **off}.items()}
    # Where a kind is off, its other parameters do not matter; those of the other kind do.
    for name, kind, other in (
        ("linear", "gated_deltanet", FULL_ATTENTION),
        ("softmax", FULL_ATTENTION, "gated_deltanet"),
    ):
        model, expected = off[f"distill, {name} off"], logits[f"distill, {name} off"]
        assert float(jnp.abs(expected - logits["whole"]).max()) > 0.1
        for changed, same in ((kind, True), (other, False)):
            stack = model.params["mixers"][changed]
            stack = stack | {"v_proj": jax.tree.map(lambda x: -x, stack["v_proj"])}
            again = run(
                Model(model.params | {"mixers": model.params["mixers"] | {changed: stack}}, model.config), tokens
            )
            assert bool(jnp.allclose(again, expected, atol=1e-6)) is same
    both = run(ablated(ablated(hybrid, True), False), tokens)
    # Without any mixing a token knows of itself alone.
    other = tokens.copy()
    other[:, :-1] = 0
    np.testing.assert_allclose(run(ablated(ablated(hybrid, True), False), other)[:, -1], both[:, -1], atol=1e-5)


def test_a_teacher_has_nothing_to_switch_off(teacher):
    assert ablations("teacher", teacher) == {}


# --- completion


ROWS = [{"text": " Height: 3 m. Width: 4 m. Width: ", "value": " 4 m "}, {"text": "Name: Ann. Name:", "value": "Ann"}]


def test_rows_become_prompts(tmp_path):
    (tmp_path / "fda.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sources = (str(tmp_path / "fda.jsonl"),)
    asker = Asker(letters(begin=True), chat=False)
    (given,) = completion_prompts(CompletionConfig(sources=sources), asker, tmp_path / "prompts")
    assert [(p.text, p.answers) for p in given.prompts] == [
        ("Height: 3 m. Width: 4 m. Width:", ("4 m",)), ("Name: Ann. Name:", ("Ann",))
    ]  # fmt: skip
    assert (given.suite, given.task, given.new_tokens, given.stop, given.length) == (
        "completion",
        "fda",
        48,
        "\n",
        None,
    )
    assert [tokens[0] for tokens in given.tokens] == [letters(begin=True).begin_ids[0]] * 2
    (first,) = completion_prompts(CompletionConfig(sources=sources, samples=1), asker, tmp_path / "prompts")
    assert len(first.prompts) == 1
    assert [path.name for path in (tmp_path / "prompts").iterdir()] == ["fda.jsonl"]
    for settings, message in (
        ({"answer_field": "answer"}, r"row 0: 'answer' is None, not text; it has \['text', 'value'\]"),
        ({"sources": (*sources, str(tmp_path / "fda.parquet"))}, "two are called 'fda'"),
        ({"sources": (str(tmp_path / "fda.txt"),)}, "no known kind"),
        ({"sources": (str(tmp_path / "none.jsonl"),)}, "Cannot read"),
    ):
        with pytest.raises((DataError, ConfigError), match=message):
            completion_prompts(CompletionConfig(**{"sources": sources} | settings), asker, tmp_path / "prompts")


def test_sources_have_names():
    assert source_name("hub:hazyresearch/based-fda::validation") == "based-fda"
    assert source_name("data/squad.jsonl") == "squad"


def test_chat_templates_stand_before_the_beginning_of_the_answer():
    vocabulary = letters(begin=True)

    class Chat:
        chat_template = "there is one"

        def apply_chat_template(self, turns, tokenize, add_generation_prompt):
            ((turn),) = turns
            return f"<s>[{turn['role']}: {turn['content']}] it: "

    chatting = replace(vocabulary, tokenizer=Chat())
    (tokens,) = Asker.of(chatting, None, "").tokens([Prompt("Which?", " The one is", ())])
    assert vocabulary.encoder.decode(tokens) == "<s>[user: Which?] it:  The one is"
    (tokens,) = Asker.of(chatting, False, "").tokens([Prompt("Which?", " The one is", ())])
    text = vocabulary.encoder.encode("Which? The one is", add_special_tokens=False).ids
    assert tokens == [*vocabulary.begin_ids, *text]
