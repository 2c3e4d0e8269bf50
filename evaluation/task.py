# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is made of: a `Task`, one in each file of `tasks/`."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

from evaluation.data_files import DataFolder
from evaluation.judge import Request
from evaluation.prompts import Question
from evaluation.scoring import Score

# What a field of a prediction has to be: a test, and the words for the error.
Kind = tuple[Callable[[object], bool], str]


def of_type(types: type | tuple[type, ...], words: str) -> Kind:
    return lambda value: isinstance(value, types), words


ANY, TEXT, LIST = of_type(object, "anything"), of_type(str, "a text"), of_type(list, "a list")


@dataclass(frozen=True)
class Judging:
    """What a judge is asked about the answers to a task.

    Attributes:
        request: makes a record's request; ValueError says what the record lacks.
        choose: of all records those that need a judge.
        optional: rules score the task, and the judge is asked only with `--judge_NAME`.
    """

    request: Callable[[dict], Request]
    choose: Callable[[list[dict]], list[dict]] = list
    optional: bool = False


def first_of_summary(score: Score) -> float:
    return next(iter(score.summary.values()))


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: in `--tasks`, in errors, and of the folder with the scores.
        display_name: in reports and model cards.
        folder: below the data root.
        read: the questions, in the benchmark's order. Their `fields` are those that the official code keeps.
        max_new_tokens: the longest answer.
        hub: repository on the Hub with the same questions as parquet files.
        questions: how many the whole benchmark has, where the report says when some are missing.
        fields: what a prediction has beside `id`, and the scorer reads.
        together: which questions a subset takes whole or not at all, because they are scored together: those with one key.
        category: the questions over which a subset is spread evenly: those of each key.
        score: of the records; takes `seed` where the task has one and `judged` where it has `judging`. None: the task
            has no automatic score.
        headline: the one number that stands for a score.
        seed: of the guesses, where a run gives none. None: the scorer does not guess.
        quirks: odd rules of the official scorer, name -> one line. A `Score` counts how many items each decided.
        digits: decimals that are shown; 1 for percentages and points, 3 for fractions.
        judging: what a judge is asked.
        complete: adds to saved predictions what is in the data.
        submission: writes the file that the benchmark's own server or script takes, and returns its path.
        submission_needs: the library that `submission` imports.
    """

    name: str
    display_name: str
    folder: str
    read: Callable[[DataFolder], list[Question]]
    max_new_tokens: int
    hub: str | None = None
    questions: int | None = None
    fields: dict[str, Kind] = field(default_factory=lambda: {"pred": TEXT})
    together: Callable[[Question], Hashable] = lambda question: question.id
    category: Callable[[Question], Hashable] = lambda question: None
    score: Callable[..., Score] | None = None
    headline: Callable[[Score], float] = first_of_summary
    seed: int | None = None
    quirks: dict[str, str] = field(default_factory=dict)
    digits: int = 1
    judging: Judging | None = None
    complete: Callable[[list[dict], DataFolder], list[dict]] | None = None
    submission: Callable[[list[dict], Path], Path] | None = None
    submission_needs: str | None = None

    def data(self, root: str | Path) -> DataFolder:
        return DataFolder(self.name, Path(root), Path(root) / self.folder, self.hub)


def read_task(task: Task, root: str | Path) -> list[Question]:
    """The questions of a task, checked: there are some, no id stands twice, and every image file exists.

    Raises:
        ValueError: names what is wrong and what to do.
    """
    data = task.data(root)
    try:
        questions = task.read(data)
    except KeyError as error:
        raise ValueError(f"{task.name}: a record in {data.path} has no field {error}; download it again") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{task.name}: {data.path} is not in the benchmark's layout ({error}); download it again"
        ) from error
    if not questions:
        raise ValueError(f"{task.name}: {data.path} has no questions; download the benchmark again")
    seen = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(
                f"{task.name}: the question id {question.id!r} stands twice in {root}; remove one of the two"
            )
        seen.add(question.id)
    missing = [q for q in questions if isinstance(q.image, str) and not Path(q.image).is_file()]
    if missing:
        raise ValueError(
            f"{task.name}: the image {missing[0].image} of question {missing[0].id!r} does not exist ({len(missing)} "
            f"images of {len(questions)} questions are missing); download the benchmark's images to that folder"
        )
    return questions


def subset(task: Task, questions: list[Question], limit: int | None) -> list[Question]:
    """At most `limit` of a task's questions, the same ones each time, in the benchmark's order; all of them for None.

    Categories take turns. Within one, the order is that of a hash: benchmarks are sorted by image and alternate between
    answers, so that neither the first questions nor every n-th would stand for the rest.

    Raises:
        ValueError: the limit is less than what has to stay together.
    """
    if limit is None or limit >= len(questions):
        return questions
    groups, categories = defaultdict(list), defaultdict(dict)
    for question in questions:
        groups[task.together(question)].append(question)
    for key, group in groups.items():
        categories[task.category(group[0])][hashlib.sha256(repr(key).encode()).digest()] = group
    parts = [categories[name] for name in sorted(categories, key=repr)]
    in_turn = zip_longest(*([part[key] for key in sorted(part)] for part in parts), fillvalue=[])
    chosen = set()
    for group in chain.from_iterable(in_turn):
        if len(chosen) + len(group) <= limit:
            chosen.update(question.id for question in group)
    if not chosen:
        smallest = min(map(len, groups.values()))
        raise ValueError(
            f"{task.name}: a limit of {limit} leaves no question, because {smallest} or more of them are scored together; "
            "raise it"
        )
    return [question for question in questions if question.id in chosen]


def check_records(task: Task, records: list[dict], source: str) -> None:
    """Refuses what cannot be scored, by line number and field.

    Raises:
        ValueError: no records, a field that is missing or of another kind, or the same `id` twice.
    """
    if not records:
        raise ValueError(f"{source} has no predictions; give a file with one JSON object a line")
    seen = {}
    for number, record in enumerate(records, 1):
        missing = [name for name in ("id", *task.fields) if name not in record]
        if missing:
            raise ValueError(
                f"{source}, line {number}: no {', '.join(missing)}; a prediction of {task.name} has the fields "
                f"id, {', '.join(task.fields)}"
            )
        for name, (fits, words) in task.fields.items():
            if not fits(record[name]):
                raise ValueError(f"{source}, line {number}: {name} {record[name]!r} is not {words}")
        key = str(record["id"])
        if key in seen:
            raise ValueError(
                f"{source}: id {key!r} stands on line {seen[key]} and again on line {number}; keep one of them"
            )
        seen[key] = number
