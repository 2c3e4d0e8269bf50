# SPDX-License-Identifier: Apache-2.0
"""MMMU: questions of thirty college subjects, multiple-choice and open."""

import ast
import random
import re
from collections import defaultdict

from evaluation.data_files import DataFolder
from evaluation.json_files import read_json
from evaluation.prompts import LETTERS, Question, with_options
from evaluation.scoring import Score, add_in_order
from evaluation.task import ANY, LIST, TEXT, Task, of_type

DOMAINS = {
    "Art and Design": ["Art", "Art_Theory", "Design", "Music"],
    "Business": ["Accounting", "Economics", "Finance", "Manage", "Marketing"],
    "Science": ["Biology", "Chemistry", "Geography", "Math", "Physics"],
    "Health and Medicine": [
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health",
    ],
    "Humanities and Social Science": ["History", "Literature", "Sociology", "Psychology"],
    "Tech and Engineering": [
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power", "Materials",
        "Mechanical_Engineering",
    ],
}  # fmt: skip
KNOWN = {name for names in DOMAINS.values() for name in names}


def read_mmmu(data: DataFolder) -> list[Question]:
    files = data.files("validation.json")
    if files is None:
        rows = list(data.parquet_rows(only="validation|dev_?val"))
    else:
        rows = [(row, str(data.path / "images" / row["image_1"])) for row in read_json(files[0])]
    questions = []
    for row, image in rows:
        options = row["options"] if isinstance(row["options"], list) else ast.literal_eval(row["options"])
        several = row["question_type"] == "multiple-choice"  # an open question may have options, which are not shown
        choices = dict(zip(LETTERS, options)) if several else {}
        text = with_options(row["question"], choices) if several else row["question"]
        fields = {
            "question": text,
            "answer": row["answer"],
            "question_type": row["question_type"],
            "all_choices": list(choices),
            "num_option_images": 0,  # the official reader looks for images in the options' single characters: never any
        }
        questions.append(Question(row["id"], "choice" if several else "short", text, fields, image))
    return questions


# Rules and patterns of MMMU's own evaluation of open answers (github.com/MMMU-Benchmark/MMMU, eval_utils).
_ANSWER_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def _normalise(text: str) -> list[float | str]:
    """A number rounded to two decimals, or the lower-cased text; one letter gets a blank at either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def parse_mmmu_open(pred: str) -> list[float | str]:
    """Candidate answers in an open answer: what follows a cue in each line, and every number in it."""
    pred = pred.strip().strip(".").lower()
    # The text is lower-cased already, so that no sentence ever begins with a capital and only lines are split.
    lines = re.split(r"\.\s(?=[A-Z])|\n", pred)
    keys = []
    for number, line in enumerate(lines, 1):
        cues = (*_ANSWER_CUES, "=") if number == len(lines) else _ANSWER_CUES
        shortest = ""  # an empty tail gives way to the next one
        for tail in (line.split(cue)[-1].strip() for cue in cues if cue in line):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            keys.append(shortest)
    keys = keys or [pred]
    candidates = keys + [number for key in keys for pattern in _NUMBERS for number in re.findall(pattern, key)]
    return sorted({item for candidate in candidates for item in _normalise(candidate)}, key=str)


def is_right_mmmu_open(gold: str | list[str], candidates: list[float | str]) -> bool:
    """A text candidate is right when it contains an accepted text, a number when it equals an accepted number."""
    accepted = [item for answer in (gold if isinstance(gold, list) else [gold]) for item in _normalise(answer)]
    return any(
        any(isinstance(a, str) and a in candidate for a in accepted)
        if isinstance(candidate, str)
        else candidate in accepted
        for candidate in candidates
    )


def _subject(record: dict) -> str:
    """validation_Art_Theory_12 -> Art_Theory. A prediction file may number its lines and keep this in question_id."""
    name = next((str(record[k]) for k in ("question_id", "id") if str(record.get(k, "")).count("_") >= 2), None)
    if name is None:
        raise ValueError(f"id {record['id']!r} does not name a MMMU subject; it looks like validation_Art_Theory_12")
    return "_".join(name.split("_")[1:-1])


def _read_answer(record: dict, guess: random.Random, quirks: dict[str, int]) -> tuple[object, bool]:
    """(what was read in the answer, whether it is right). Counts what an odd rule decided."""
    gold = record["answer"]
    if record["question_type"] != "multiple-choice":
        found = parse_mmmu_open(record["pred"])
        quirks["list_as_text"] += isinstance(gold, str) and gold.startswith("[")
        return found, is_right_mmmu_open(gold, found)
    letter = record["pred"]
    if letter not in record["all_choices"] or record.get("num_option_images"):
        if not record["all_choices"]:
            raise ValueError(f"MMMU id {record['id']!r}: a multiple-choice question with empty all_choices")
        letter = guess.choice(record["all_choices"])
        quirks["guess"] += 1
    return letter, letter in gold if isinstance(gold, list) else letter == gold


def score_mmmu(records: list[dict], seed: int = 0) -> Score:
    """Accuracy (0 to 1) by subject, and over all questions.

    Args:
        seed: of the guesses; the official scorer draws unseeded.
    """
    guess = random.Random(seed)
    subjects, parsed, quirks = defaultdict(list), [], {"guess": 0, "list_as_text": 0, "unknown_subject": 0}
    for record in records:
        found, correct = _read_answer(record, guess, quirks)
        subject = _subject(record)
        if subject in KNOWN:
            subjects[subject].append(correct)
        else:
            quirks["unknown_subject"] += 1
        parsed.append({"id": record["id"], "parsed": found, "correct": correct})
    if not subjects:
        raise ValueError(
            f"no id names a MMMU subject (the first is {records[0]['id']!r}); they are {', '.join(sorted(KNOWN))}"
        )
    scores = {name: {"acc": sum(f) / len(f), "num_example": len(f)} for name, f in sorted(subjects.items())}

    def mean(names):
        count = sum(scores[name]["num_example"] for name in names)
        return add_in_order(scores[name]["acc"] * scores[name]["num_example"] for name in names) / count

    domains = {
        domain: mean(present)
        for domain, names in DOMAINS.items()
        if (present := [name for name in names if name in scores])
    }
    summary = {"overall": mean(list(scores)), **{name: row["acc"] for name, row in scores.items()}}
    return Score(summary, {"scores": scores, "domains": domains}, parsed, quirks)


TASK = Task(
    name="mmmu", display_name="MMMU", folder="mmmu", hub="MMMU/MMMU", questions=900, max_new_tokens=40, digits=3,
    read=read_mmmu, score=score_mmmu, seed=0, category=lambda q: _subject({"id": q.id}),
    fields={
        "pred": TEXT, "answer": of_type((str, list), "a text or a list of them"), "question_type": ANY, "all_choices": LIST,
    },
    quirks={
        "guess": 'not exactly one of the letters ("A." is not): a random one',
        "list_as_text": "an open question whose several accepted answers are compared as one text, brackets included",
        "unknown_subject": "not one of the 30 subjects: in no score",
    },
)  # fmt: skip
