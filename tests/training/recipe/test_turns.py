# SPDX-License-Identifier: Apache-2.0
import random
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.recipe.catalogue import TURN
from training.recipe.records import FEATURES
from training.recipe.turns import choose_turns, clusters, merge_turns

ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a.jpg", "b.jpg", "c.jpg", None]),
        st.lists(st.sampled_from(["yes", "no", "red", "", None]), max_size=3),
    ),
    min_size=1,
    max_size=12,
)
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True, scope="module")
def uncached():
    from datasets import disable_caching, disable_progress_bars, enable_caching, enable_progress_bars

    disable_caching()
    disable_progress_bars()
    yield
    enable_caching()
    enable_progress_bars()


def records(rows, task="vqa-open") -> Dataset:
    number = iter(range(10_000))
    return Dataset.from_list(
        [
            {
                "dataset": "gqa",
                "task": task,
                "image": image,
                "turns": [{**dict.fromkeys(TURN), "question": str(next(number)), "answer": a} for a in answers],
            }
            for image, answers in rows
        ],
        features=FEATURES,
    )


def questions(record) -> list[int]:
    return [int(turn["question"]) for turn in record["turns"]]


@relaxed
@given(ROWS, st.none() | st.integers(1, 4), st.sampled_from([None, "answer"]), st.none() | st.integers(0, 9))
def test_every_turn_once_with_its_image(rows, max_turns, key, seed):
    dataset = records(rows)
    merged = merge_turns(dataset, max_turns, key, seed)
    assert merged.features == dataset.features

    def turns_by_image(some):
        return Counter((record["image"], str(turn)) for record in some for turn in record["turns"])

    assert turns_by_image(merged) == turns_by_image(dataset)
    # What has no turns stays visible, to be counted.
    assert sum(not r["turns"] for r in merged) == sum(not r["turns"] for r in dataset)


@relaxed
@given(ROWS, st.integers(1, 4), st.sampled_from([None, "answer"]), st.sampled_from(["draw", "first"]))
def test_max_turns_holds_once_duplicates_are_gone(rows, max_turns, key, keep):
    for record in merge_turns(records(rows), max_turns, key):
        if record["image"] is not None:
            chosen = choose_turns(record["turns"], key, keep, random.Random(0))
            assert len(chosen) <= max_turns
            assert bool(chosen) == bool(record["turns"])


@relaxed
@given(ROWS, st.none() | st.integers(1, 4))
def test_order_is_stable(rows, max_turns):
    merged = merge_turns(records(rows), max_turns)
    images = [record["image"] for record in merged]
    assert list(dict.fromkeys(images)) == list(dict.fromkeys(image for image, _ in rows))
    for image in set(images):
        of_image = [number for record in merged if record["image"] == image for number in questions(record)]
        assert of_image == sorted(of_image)
    if max_turns is not None:
        full = [len(r["turns"]) for r in merged if r["image"] == "a.jpg" and r["turns"]]
        assert full[:-1] == [max_turns] * (len(full) - 1)


@relaxed
@given(ROWS)
def test_records_without_an_image_are_not_merged(rows):
    alone = [questions(record) for record in merge_turns(records(rows), None) if record["image"] is None]
    assert alone == [questions(record) for record in records(rows) if record["image"] is None]


@relaxed
@given(st.lists(st.sampled_from(["yes", "no", "", None])), st.integers())
def test_one_of_each_set_of_duplicates_is_kept_in_order(answers, seed):
    turns = [{"answer": answer, "number": number} for number, answer in enumerate(answers)]
    first = choose_turns(turns, "answer", "first", random.Random(seed))
    drawn = choose_turns(turns, "answer", "draw", random.Random(seed))
    assert [turn["answer"] for turn in drawn] == [turn["answer"] for turn in first]
    kept = [turn["answer"] for turn in first if turn["answer"]]
    assert len(kept) == len(set(kept)) and set(kept) == {answer for answer in answers if answer}
    assert sum(not turn["answer"] for turn in first) == sum(not answer for answer in answers)
    assert [turn["number"] for turn in first] == sorted(turn["number"] for turn in first)
    assert choose_turns(turns, None, "draw", random.Random(seed)) == turns


def test_a_draw_reaches_every_duplicate_about_equally():
    turns = [{"bbox": "[0,0,1,1]", "number": number} for number in range(4)]
    seen = Counter(choose_turns(turns, "bbox", "draw", random.Random(seed))[0]["number"] for seed in range(4000))
    assert all(900 < seen[number] < 1100 for number in range(4))


def test_duplicates_stand_in_one_conversation():
    rows = [("a.jpg", ["yes"]), ("a.jpg", ["no"]), ("a.jpg", ["yes"]), ("a.jpg", ["red"])]
    merged = merge_turns(records(rows), 2, "answer")
    assert [questions(record) for record in merged] == [[0, 2, 1], [3]]
    assert [questions(record) for record in merge_turns(records(rows), 1, "answer")] == [[0], [1], [2], [3]]


def test_clusters_keep_what_has_no_key_apart():
    assert clusters(["a", "", "a", "", None]) == [[0, 2], [1], [3], [4]]


def test_dialogues_stay():
    dataset = records([("a.jpg", ["yes"]), ("a.jpg", ["no"])], task="visual-instruction")
    assert len(merge_turns(dataset, 5)) == 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: merge_turns(records([("a.jpg", ["x"])]), 0), "max_turns=0 must be at least 1"),
        (lambda: merge_turns(records([("a.jpg", ["x"])]), 2, "phrase"), "key='phrase' is not one of answer, bbox"),
        (lambda: choose_turns([], "answer", "last", random.Random(0)), "keep='last' is not one of draw, first"),
    ],
)
def test_settings_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()
