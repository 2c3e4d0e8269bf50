# SPDX-License-Identifier: Apache-2.0
import random
import re
from collections import Counter

import pytest
import yaml

from processing.processing_honeybee import SYSTEM_BASE
from training.conversations import normalize_conversation
from training.recipe.catalogue import DATASETS, TURN
from training.recipe.config import OPTION_MARKS, Options, Recipe
from training.recipe.instructize import TEMPLATES, Instructions, instructize
from training.samples import BadSampleError

TASKS = {name: dataset.task for name, dataset in DATASETS.items()}
SHORT = "Answer the question using a single word or phrase. "
LOCATE = "Provide the bounding box coordinate of the region this sentence describes. "
BOX = "[0.100,0.200,0.300,0.400]"
FIELDS = {
    "vqa-open": {"question": "What {is} it?", "answer": "a {dog}"},
    "vqa-multiple-choice": {
        "question": "Which?",
        "options": ["fork", "knife", "pan"],
        "answer": "B",
        "context": "A {shop}.",
    },
    "referring-expression": {"phrase": "left {guy}", "bbox": BOX},
}


def record(dataset="gqa", image="a.jpg", **fields) -> dict:
    task = TASKS[dataset]
    return {
        "dataset": dataset,
        "task": task,
        "image": image,
        "turns": [{**dict.fromkeys(TURN), **(fields or FIELDS[task])}],
    }


def worded(sample) -> list[str]:
    return [item.get("text", "<image>") for message in sample["messages"] for item in message["content"]]


def wording(shuffle=True, marks="A.", answer_with_text=False, **settings) -> Instructions:
    return Instructions(Recipe(data_root="", options=Options(shuffle, marks, answer_with_text), **settings))


def drawn(of: dict, count=300, **settings) -> Counter:
    instructions = wording(**settings)
    samples = (instructize(of, instructions, random.Random(seed)) for seed in range(count))
    return Counter(tuple(worded(sample)[2:]) for sample in samples)


WORDED = [name for name, task in TASKS.items() if task in FIELDS]


@pytest.mark.parametrize(
    "dataset, expected",
    [
        ("vqav2", {(SHORT + "What {is} it?", "a {dog}")}),
        ("ocrvqa", {(SHORT + "What {is} it?", "a {dog}")}),
        ("vsr", {(SHORT + "What {is} it? Please answer yes or no.", "a {dog}")}),
        ("vg", {(LOCATE + "left {guy}", BOX), (f"Provide a short description for this region. {BOX}", "left {guy}")}),
    ],
)
def test_single_fine_texts(dataset, expected):
    assert set(drawn(record(dataset), shuffle=False)) == expected


def test_a_sample_is_what_the_collator_reads():
    sample = instructize(record(), wording(), random.Random(0))
    assert sample["images"] == ["a.jpg"] and sample["dataset"] == "gqa" and sample["chat_template"] == "default"
    assert [message["role"] for message in sample["messages"]] == ["system", "user", "assistant"]
    assert worded(sample)[:2] == [SYSTEM_BASE, "<image>"]
    assert normalize_conversation(sample) == (sample["messages"], ["a.jpg"])
    assert instructize(record(image=None), wording(), random.Random(0))["images"] == []


@pytest.mark.parametrize("dataset", WORDED)
@pytest.mark.parametrize("granularity", ["fine", "coarse"])
def test_wordings(dataset, granularity):
    single = drawn(record(dataset), granularity=granularity, shuffle=False)
    multi = drawn(record(dataset), granularity=granularity, diversity="multi", shuffle=False)
    flipped = drawn(record(dataset), 600, granularity=granularity, diversity="multi+flip", shuffle=False)
    directions = 2 if TASKS[dataset] == "referring-expression" else 1
    assert len(single) == directions
    assert len(multi) >= 5 * directions and set(single) < set(multi)
    assert len(flipped) == len(multi) + 1 and set(multi) < set(flipped)
    ((question, answer),) = set(flipped) - set(multi)
    asked = {"vqa-open": "What {is} it?", "vqa-multiple-choice": "Which?", "referring-expression": "left {guy}"}[
        TASKS[dataset]
    ]
    assert answer == asked and asked not in question
    assert not re.search(r"\{(question|answer|options|context|phrase|bbox|identifier)\}", str(flipped))


@pytest.mark.parametrize("task", FIELDS)
def test_coarse_is_the_same_for_the_datasets_of_a_task(task):
    texts = [
        set(drawn(record(name), 40, granularity="coarse", shuffle=False)) for name in WORDED if TASKS[name] == task
    ]
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize(
    "dataset, kind, expected",
    [
        ("gqa", "dataset-name", {("[GQA] What {is} it?", "a {dog}")}),
        ("vsr", "task-name", {("[Visual question answering] What {is} it?", "a {dog}")}),
        (
            "sqa",
            "dataset-name",
            {("[ScienceQA] Which?\nContext: A {shop}.\nA. fork\nB. knife\nC. pan\n", "B")},
        ),
        ("refcoco", "dataset-name", {("[RefCOCO] left {guy}", BOX), (f"[RefCOCO] {BOX}", "left {guy}")}),
    ],
)
def test_identifiers_replace_the_instruction(dataset, kind, expected):
    assert set(drawn(record(dataset), identifiers=kind, shuffle=False)) == expected


def test_a_context_that_is_not_there_leaves_no_line():
    fields = {**FIELDS["vqa-multiple-choice"], "context": None}
    for granularity in ("fine", "coarse"):
        for texts in drawn(record("aokvqa", **fields), granularity=granularity, diversity="multi+flip"):
            assert "Context" not in "".join(texts) and "None" not in "".join(texts)
    ((question, _),) = drawn(record("sqa", **{**fields, "context": ""}), shuffle=False)
    assert "\nContext: \n" in question


def test_the_letter_moves_with_its_option():
    seen = drawn(record("aokvqa"), 600)
    assert len(seen) == 6 and all(60 < count < 140 for count in seen.values())
    for question, letter in seen:
        assert f"\n{letter}. knife\n" in question
    # Of two options with the same words only the right one's letter counts.
    twins = {**FIELDS["vqa-multiple-choice"], "options": ["two", "two", "one"], "answer": "B"}
    instructions, turns = wording(), record("aokvqa", **twins)
    before = str(turns)
    for seed in range(50):
        instructize(turns, instructions, random.Random(seed))
    assert str(turns) == before, "a record is not changed by being read"
    assert {letter for _, letter in drawn(record("aokvqa", **twins))} == {"A", "B", "C"}


def test_option_marks_and_answers_with_text():
    seen = drawn(record("aokvqa"), shuffle=False, marks="random", answer_with_text=True)
    assert {answer for _, answer in seen} == {
        "B. knife", "B) knife", "(B) knife", "b. knife", "b) knife", "(b) knife", "2. knife", "2) knife", "(2) knife"
    }  # fmt: skip
    for mark in OPTION_MARKS:
        ((question, answer),) = drawn(record("aokvqa"), 5, shuffle=False, marks=mark)
        assert f"{mark} fork\n" in question and answer in ("B", "b", "2")


def test_one_wording_for_all_turns_of_a_sample():
    of = record("vqav2")
    of["turns"] = [{**of["turns"][0], "question": "Q"}] * 3
    for texts in drawn(of, diversity="multi"):
        assert len(set(texts[::2])) == 1


def test_the_random_numbers_given_decide_alone():
    for dataset in WORDED:
        instructions = wording(diversity="multi+flip", marks="random")
        random.seed(1)
        first = [instructize(record(dataset), instructions, random.Random(seed)) for seed in range(20)]
        random.seed(2)
        assert first == [instructize(record(dataset), instructions, random.Random(seed)) for seed in range(20)]


def test_captions():
    sample = instructize(record("coyo", answer="  words\n"), wording(), random.Random(0))
    assert sample["chat_template"] == "caption"
    assert worded(sample) == ["<image>", "  words\n"]
    assert normalize_conversation(sample)[1] == ["a.jpg"]


def dialogue(*turns, dataset="llava150k", image="a.jpg"):
    of = record(dataset, image, question="-")
    of["turns"] = [{**dict.fromkeys(TURN), "question": question, "answer": answer} for question, answer in turns]
    return of


@pytest.mark.parametrize(
    "question, expected",
    [
        ("<image>\nWhat?", ["<image>", "What?"]),
        ("What?\n<image>", ["What?", "<image>"]),
        ("What?", ["<image>", "What?"]),
        ("<image>", ["<image>"]),
        ("See\n\n<image>\n\nthere", ["See\n", "<image>", "\n\nthere"]),
        ("See <image> there", ["See ", "<image>", " there"]),
    ],
)
def test_where_the_image_of_a_dialogue_stands(question, expected):
    sample = instructize(dialogue((question, "a"), ("And?", "b")), wording(), random.Random(0))
    assert worded(sample)[1:] == [*expected, "a", "And?", "b"]
    assert worded(sample)[0].startswith(SYSTEM_BASE + " The assistant gives")
    normalize_conversation(sample)


def test_dialogues_keep_who_speaks_when():
    turns = [(None, "I begin"), ("a <image>", None), ("b", "c")]
    sample = instructize(dialogue(*turns, dataset="sharegpt", image=None), wording(), random.Random(0))
    assert [message["role"] for message in sample["messages"]] == ["system", "assistant", "user", "assistant"]
    assert worded(sample)[1:] == ["I begin", "a <image>", "b", "c"], "without an image it is but text"


def test_the_last_question_may_stay_unanswered():
    sample = instructize(dialogue(("a", "b"), ("c", None)), wording(), random.Random(0))
    assert sample["messages"][-1] == {"role": "user", "content": [{"type": "text", "text": "c"}], "unanswered": True}
    assert normalize_conversation(sample)[0] == sample["messages"]


def test_bad_turns_are_left_out_and_named():
    of = record("vqav2")
    good = of["turns"][0]
    of["turns"] = [{**good, "answer": " "}, {**good, "question": None}, good]
    sample = instructize(of, wording(), random.Random(0))
    assert sample["skipped"] == ["empty answer", "malformed record"]
    assert worded(sample)[1:] == ["<image>", SHORT + "What {is} it?", "a {dog}"]
    sample = instructize(dialogue(("<image>\nWhat?", ""), ("And?", "b")), wording(), random.Random(0))
    assert sample["skipped"] == ["empty answer"] and worded(sample)[1:] == ["<image>", "And?", "b"]


@pytest.mark.parametrize(
    "of, reason",
    [
        ({**record(), "turns": []}, "malformed record"),
        (record(question="q", answer=""), "empty answer"),
        (record(question="q"), "malformed record"),
        (record("aokvqa", question="q", options=["a"], answer="B"), "malformed record"),
        (record("aokvqa", question="q", options=["a"], answer="AB"), "malformed record"),
        (record("aokvqa", question="q", options=["a"], answer=""), "empty answer"),
        (record("coyo", image=None, answer="words"), "malformed record"),
        (record("coyo"  , question="words"), "malformed record"),
        (record("coyo", answer=" \n"), "empty answer"),
        (dialogue(("<image> <image>", "a")), "malformed record"),
        (dialogue(("<image>", "a"), image=None), "malformed record"),
        (dialogue((None, "a")), "malformed record"),
        (dialogue(("a", " \n")), "empty answer"),
        (dialogue(("a", None)), "malformed record"),
    ],
)  # fmt: skip
def test_nothing_to_learn(of, reason):
    with pytest.raises(BadSampleError) as caught:
        instructize(of, wording(), random.Random(0))
    assert caught.value.reason == reason


def test_samples_with_words_of_their_own_keep_them():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    sample = instructize({"messages": messages, "images": None}, wording(diversity="multi"), random.Random(0))
    assert sample["messages"] == messages and sample["images"] == [] and sample["chat_template"] == "default"


def test_templates_are_checked_at_once(tmp_path):
    templates = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))
    templates["datasets"]["gqa"]["fine"][0]["single"] = "{query}"
    del templates["tasks"]["vqa-multiple-choice"]["flip"]
    del templates["datasets"]["vg"]
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(templates))
    with pytest.raises(ValueError) as caught:
        wording(templates=str(path))
    for fault in ("unknown field {query}", "tasks.vqa-multiple-choice.flip", "datasets.vg should be a dict"):
        assert fault in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        wording(templates="nowhere.yaml")
    templates = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))
    templates["datasets"]["gqa"]["fine"] = [{"answer": "{answer}", "single": "{question}!", "multi": ["?"]}]
    path.write_text(yaml.safe_dump(templates))
    assert set(drawn(record("gqa"), templates=str(path))) == {("What {is} it?!", "a {dog}")}
