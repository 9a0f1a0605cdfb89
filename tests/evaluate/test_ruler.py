"""RULER's prompts: that the answers are in them, where they are said to be, in as many tokens as asked for."""

import json
import re
from collections import Counter
from itertools import product
from typing import get_args

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.evaluate.prompts import Asker
from jaxhybrid.evaluate.ruler import TASKS, ruler_prompts
from jaxhybrid.evaluate.ruler.fit import largest
from jaxhybrid.evaluate.ruler.task import NOISE
from jaxhybrid.settings.evaluate import RulerConfig, RulerTask

LENGTH = 1200
NEEDLES = re.compile(r"One of the special magic (?:numbers|uuids) for ([\w-]+) is: ([\w-]+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def word_vocabulary():
    """A token for every word, number and sign; one begins each text."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<s>": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Vocabulary(None, tokenizer, "words", 1, end_id=1, begin_ids=(1,))


ASKER = Asker(word_vocabulary(), chat=False)


def made(folder, *tasks, **settings):
    settings = {"tasks": tasks, "lengths": (LENGTH,), "samples": 4} | settings
    return ruler_prompts(RulerConfig(**settings), ASKER, folder)


@pytest.fixture(scope="module")
def data_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"Fact {a} {p}. The colour of item {a}-{p} is shade{a}-{p}. " + "More words. " * 5,
                    "qas": [
                        {"question": f"Which colour has item {a}-{p}?", "is_impossible": False,
                         "answers": [{"text": f"shade{a}-{p}"}, {"text": f"is shade{a}-{p}"}]},
                        {"question": "Nobody knows?", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(3)
            ]
        }
        for a in range(20)
    ]  # fmt: skip
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    rows = [
        {"question": f"Who made {n}?", "answer": f"maker{n}",
         "context": [[f"Title {n} {d}", [f"Line {d}.", f" By maker{n}." if d == 3 else " No."]] for d in range(10)]}
        for n in range(12)
    ]  # fmt: skip
    (folder / "hotpot.json").write_text(json.dumps(rows))
    return {"squad": str(folder / "squad.json"), "hotpotqa": str(folder / "hotpot.json")}


@pytest.fixture(scope="module")
def sets(data_files, tmp_path_factory):
    return {given.task: given for given in made(tmp_path_factory.mktemp("sets"), *TASKS, **data_files)}


def context(given, prompt):
    """The haystack, between the instructions."""
    if given.task == "vt":
        return prompt.text.rpartition("hidden in the following text.\n\n")[2].rpartition("\nQuestion:")[0]
    return prompt.text.partition("afterwards.\n")[2].rpartition("\nWhat ")[0]


def test_the_settings_name_all_tasks():
    assert tuple(TASKS) == get_args(RulerTask)
    assert len(TASKS) == 13


@pytest.mark.parametrize("name", TASKS)
def test_prompts_fill_their_length_and_hold_their_answers(name, sets):
    given = sets[name]
    assert len(given.prompts) == 4
    for prompt, tokens in zip(given.prompts, given.tokens):
        assert len(tokens) + given.new_tokens <= LENGTH
        if not name.startswith("qa"):  # whose documents may run out
            assert len(tokens) + given.new_tokens > 0.93 * LENGTH
        assert tokens[0] == 1
        assert prompt.answers
        for answer in (*prompt.answers, *prompt.others):
            assert answer in prompt.text
        assert not set(prompt.answers) & set(prompt.others)
    assert len({prompt.text for prompt in given.prompts}) == 4


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("niah")])
def test_needles_stand_where_they_are_said_to_and_answer_the_question(name, sets):
    given = sets[name]
    several = {"niah_multikey_1": (4, 1, 1), "niah_multivalue": (1, 4, 1), "niah_multiquery": (4, 1, 4)}
    keys, values, queries = several.get(name, (1, 1, 1))
    for prompt in given.prompts:
        hay, needles = context(given, prompt), NEEDLES.findall(context(given, prompt))
        asked = re.search(r"for ([\w,\- ]+) mentioned in the provided text\?$", prompt.text)[1]
        asked = asked.replace(", and ", ", ").split(", ")
        assert len(asked) == len(set(asked)) == queries
        told = [(asked.index(key), value) for key, value in needles if key in asked]
        order = [(place // values, value) for place, value in enumerate(prompt.answers)]
        assert sorted(told) == sorted(order)
        assert len(prompt.answers) == queries * values
        assert {value for key, value in needles if key not in asked} == set(prompt.others)
        if name not in ("niah_multikey_2", "niah_multikey_3"):
            assert len(needles) == keys * values
        if name in ("niah_single_3", "niah_multikey_3"):
            assert all(UUID.fullmatch(answer) for answer in prompt.answers)
        else:
            assert all(re.fullmatch(r"[1-9]\d{6}", answer) for answer in prompt.answers)
        for answer, depth in zip(prompt.answers, prompt.depths):
            before = hay[: hay.index(answer)].rpartition("One of the special")[0]
            assert len(before) / len(hay) == pytest.approx(depth, abs=0.05)
        many = len(prompt.answers) > 1
        assert prompt.prefix.endswith(" are" if many else " is")
        assert prompt.text.startswith("Some special magic" if many else "A special magic")
        assert prompt.text.count("magic numbers for") + prompt.text.count("magic uuids for") >= len(needles)


def test_haystacks_are_what_the_tasks_say(sets):
    lines = context(sets["niah_single_1"], sets["niah_single_1"].prompts[0]).split("\n")
    assert Counter(lines)[NOISE] == len(lines) - 1
    lines = context(sets["niah_multikey_3"], sets["niah_multikey_3"].prompts[0]).split("\n")
    assert all(UUID.match(NEEDLES.fullmatch(line)[1]) for line in lines)
    assert len({NEEDLES.fullmatch(line)[1] for line in lines}) == len(lines)
    essays = [NEEDLES.sub("", context(sets["niah_single_2"], prompt)) for prompt in sets["niah_single_2"].prompts]
    assert all(re.fullmatch(r"(The [a-z ]+\. *)+", essay) for essay in essays)


@pytest.mark.parametrize(
    "name", ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multiquery"]
)
def test_asked_needles_go_to_the_depths_that_are_named(name, tmp_path):
    (given,) = made(tmp_path, name, depths=(0, 50, 100))
    for number, prompt in enumerate(given.prompts):
        hay = context(given, prompt)
        before = hay[: hay.index(prompt.answers[0])].rpartition("One of the special")[0]
        share = len(before) / (len(hay) - len("One of the special magic numbers for quiet-harbor is: 1234567."))
        assert share == pytest.approx((0, 0.5, 1)[number % 3], abs=0.06)
        assert prompt.depths[0] == pytest.approx((0, 0.5, 1)[number % 3], abs=0.03)


def test_variables_are_a_chain_behind_a_solved_example(sets):
    given = sets["vt"]
    for prompt in given.prompts:
        example, _, asked = prompt.text.partition("\n\nMemorize")
        value = re.search(r"assigned the value (\d{5}) in the text above\.$", asked)[1]
        chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", context(given, prompt))
        assert [name for name, _ in chain] == list(prompt.answers)
        assert [source for _, source in chain] == [value, *prompt.answers[:-1]]
        assert prompt.prefix.endswith(f"5 variables are assigned the value {value}, they are: ")
        solved = re.findall(r"VAR ([A-Z]{3}) = (?:VAR )?(\w+)", example)
        assert example.endswith("they are:  " + " ".join(name for name, _ in solved))
        assert len(solved) == 5
        assert 400 < len(ASKER.vocabulary.prompt(example)) <= 500
        lines = context(given, prompt).split("\n")
        for answer, depth in zip(prompt.answers, prompt.depths):
            (place,) = (n for n, line in enumerate(lines) if line.startswith(f"VAR {answer} ="))
            assert place / len(lines) == pytest.approx(depth, abs=0.1)


@pytest.mark.parametrize(("length", "often", "seldom"), [(1200, 6, 1), (4096, 30, 3)])
def test_common_words_are_the_most_common(length, often, seldom, tmp_path):
    (given,) = made(tmp_path, "cwe", lengths=(length,), samples=2)
    for prompt in given.prompts:
        example, _, asked = prompt.text.rpartition("Below is a numbered list")
        listed = re.findall(r"(\d+)\. ([\w-]+)", asked)
        assert [int(place) for place, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {word: counts[word] for word in prompt.answers} == dict.fromkeys(prompt.answers, often)
        assert {word: counts[word] for word in prompt.others} == dict.fromkeys(prompt.others, seldom)
        assert len(prompt.answers) == 10
        assert counts.keys() == {*prompt.answers, *prompt.others}
        shown, _, solved = example.partition("Answer: The top 10 words that appear most often in the list are:")
        top = [word for word, _ in Counter(re.findall(r"\d+\. ([\w-]+)", shown)).most_common(10)]
        assert sorted(re.findall(r"\d+\. ([\w-]+)", solved)) == sorted(top)


def test_frequent_words_follow_the_zeta_distribution(sets):
    for prompt in sets["fwe"].prompts:
        words = prompt.text.partition("coded words. ")[2].partition("\nQuestion:")[0].split(" ")
        ranked = Counter(words).most_common()
        assert ranked[0][0] == "..."
        assert [word for word, _ in ranked[1:4]] == list(prompt.answers)
        total = ranked[0][1] * 1.6449 / 1  # counts are N / (k^2 zeta(2))
        for rank, (_, count) in enumerate(ranked[:6], 1):
            assert count == pytest.approx(total / (1.6449 * rank**2), abs=1)
        assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked[1:])


def test_questions_have_their_documents_among_others(sets, data_files, tmp_path):
    for name in ("qa_1", "qa_2"):
        for number, prompt in enumerate(sets[name].prompts):
            documents = re.findall(r"Document (\d+):\n(.*?)(?=\n\nDocument |\n\nAnswer the)", prompt.text, re.S)
            assert [int(place) for place, _ in documents] == list(range(1, len(documents) + 1))
            assert len({text for _, text in documents}) == len(documents)
            if name == "qa_1":
                (holds,) = (place for place, (_, text) in enumerate(documents) if prompt.answers[0] in text)
                assert prompt.depths == (holds / len(documents),) * 2
                # The other paragraphs of the same article come before those of others.
                assert sum(f"Fact {number // 3} " in text for _, text in documents) == 3
            else:
                assert {f"Title {number} {d}" for d in range(10)} <= {text.split("\n")[0] for _, text in documents}
            asked = f"Which colour has item {number // 3}-{number % 3}?" if name == "qa_1" else f"Who made {number}?"
            assert prompt.text.endswith(f"Question: {asked}")
    with pytest.raises(DataError, match="has 12 questions"):
        made(tmp_path, "qa_2", samples=13, **data_files)


def test_prompts_are_frozen(tmp_path):
    first, again = (made(tmp_path, "niah_single_2", "cwe", "vt") for _ in range(2))
    elsewhere = made(tmp_path / "other", "niah_single_2", "cwe", "vt")
    assert first == again == elsewhere
    path = tmp_path / f"niah_single_2-{LENGTH}.jsonl"
    written = path.read_text()
    path.write_text(written.replace("hidden", "hiding", 1))
    with pytest.warns(UserWarning, match="does not match its hash"):
        assert made(tmp_path, "niah_single_2")[0] == first[0]
    assert path.read_text() == written
    for damaged in (b"?" + written.encode(), written.encode() + b"\xff"):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="not readable as prompts: it is damaged, and made again"):
            made(tmp_path, "niah_single_2")
        assert path.read_text() == written
    (other,) = made(tmp_path, "niah_single_2", seed=1)
    assert other.digest != first[0].digest
    assert not {prompt.answers for prompt in other.prompts} & {prompt.answers for prompt in first[0].prompts}


def test_prompts_do_not_depend_on_those_before_them(tmp_path):
    """With tokens whose number the drawn letters change, and so how much of a solved example fits."""
    vocabulary = word_vocabulary()
    vocabulary.encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex("[A-M]"), "isolated")]
    )
    tasks, asker = ("vt", "cwe", "niah_single_2"), Asker(vocabulary, chat=False)

    def of(lengths, tasks):
        settings = RulerConfig(tasks=tasks, lengths=lengths, samples=4, seed=0)
        return ruler_prompts(settings, asker, tmp_path / f"{lengths[0]}")

    assert of((LENGTH,), tasks) == of((LENGTH + 300, LENGTH), tasks[::-1])[:2:-1]


def test_essays_may_be_ones_own(tmp_path):
    text = tmp_path / "essays.txt"
    text.write_text("First things come first.  Then\nsecond ones! Is there a third? Yes.")
    (given,) = made(tmp_path, "niah_single_2", essays=(str(text),), samples=1)
    hay = NEEDLES.sub("", context(given, given.prompts[0]))
    assert "First things come first. Then second ones! Is there a third? Yes. First things" in hay


def test_what_cannot_be_made_is_refused(tmp_path, data_files):
    with pytest.raises(
        ConfigError, match=r"evaluate.ruler.lengths has 200: the shortest prompt of cwe takes \d+ tokens"
    ):
        made(tmp_path, "cwe", lengths=(200,))
    with pytest.raises(DataError, match=r"evaluate.ruler.squad: there is no file"):
        made(tmp_path, "qa_1", squad="nowhere.json")
    with pytest.raises(DataError, match=r"evaluate.ruler.squad: .*hotpot.json has not the form"):
        made(tmp_path, "qa_1", squad=data_files["hotpotqa"])
    with pytest.raises(ConfigError, match=r"evaluate.ruler.chat is true, but the tokenizer of 'words' has no chat"):
        Asker.of(word_vocabulary(), True, "evaluate.ruler.chat")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("bound", "most"), product((0, 2, 3, 17, 40), (None, 3, 30)))
def test_the_largest_size_is_found(bound, most):
    expected = [size for size in range(2, 100) if size <= bound and (most is None or size <= most)]
    assert largest(lambda size: size <= bound, 2, most) == (expected[-1] if expected else None)
