# SPDX-License-Identifier: Apache-2.0
"""A subset of a benchmark: whole groups, spread over the categories, the same each time."""

import random
from collections import Counter

import pytest

from evaluation.prompts import Question
from evaluation.run import main
from evaluation.task import read_task, subset
from evaluation.tasks import TASKS
from tests.evaluation.make_data_root import make_data_root


def ids(questions) -> list[str]:
    return [question.id for question in questions]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data_root(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.score])
def test_a_subset_can_be_scored_and_is_of_every_category(name, data):
    task = TASKS[name]
    questions = read_task(task, data)
    assert subset(task, questions, None) == subset(task, questions, 10**6) == questions
    for limit in range(4, len(questions)):
        chosen = subset(task, questions, limit)
        assert 0 < len(chosen) <= limit and ids(chosen) == [key for key in ids(questions) if key in ids(chosen)]
        groups, of_all = Counter(map(task.together, chosen)), Counter(map(task.together, questions))
        assert all(of_all[key] == number for key, number in groups.items())
        largest = max(of_all.values())
        assert len(chosen) > limit - largest or limit < largest * len(set(map(task.category, questions)))
        if task.judging is None or task.judging.optional:
            records = [question.answered("A", "") for question in chosen]
            assert task.headline(task.score(records)) >= 0
    assert ids(subset(task, questions[::-1], len(questions) - 1)[::-1]) == ids(
        subset(task, questions, len(questions) - 1)
    )


def test_categories_have_about_the_same_number():
    task = TASKS["pope"]
    kinds = ["random"] * 500 + ["popular"] * 300 + ["adversarial"] * 20
    asked = [Question(str(i), "short", "?", {"category": kind, "answer": i % 2}) for i, kind in enumerate(kinds)]
    for limit, numbers in ((31, (10, 10, 11)), (100, (40, 40, 20)), (600, (290, 290, 20))):
        chosen = subset(task, asked, limit)
        found = Counter(question.fields["category"] for question in chosen)
        assert (found["random"], found["popular"], found["adversarial"]) == numbers
        answers = sum(question.fields["answer"] for question in chosen)
        assert abs(answers / limit - 0.5) < 0.2, "answers alternate in the file, and both are asked about"
    # The first ones of a larger subset, whatever else there is.
    smaller = subset(task, random.Random(0).sample(asked, len(asked)), 31)
    assert set(ids(smaller)) <= set(ids(subset(task, asked, 100)))


def test_wrong_limits(data, tmp_path, capsys):
    run = ["--tasks", "mme", "--output", str(tmp_path / "out")]
    asking = [*run, "--model", "nowhere", "--data_root", str(data)]
    for limit, given, words in (
        ("0", asking, "--limit 0 must be at least 1"),
        ("5", [*run, "--predictions", str(data)], "leave it out with --predictions"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*given, "--limit", limit])
        assert words in str(end.value)
    with pytest.raises(ValueError, match="mme: a limit of 1 leaves no question, because 2 or more"):
        subset(TASKS["mme"], read_task(TASKS["mme"], data), 1)
