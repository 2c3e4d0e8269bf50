# SPDX-License-Identifier: Apache-2.0
"""ScienceQA: one of several choices, with or without an image. Read from LLaVA's conversion, or as its authors distribute it."""

import random
import re

from evaluation.data_files import DataFolder
from evaluation.json_files import read_json
from evaluation.prompts import LETTERS, Question, with_options
from evaluation.scoring import Score, percent
from evaluation.task import LIST, TEXT, Task, of_type

# Questions -------------------------------------------------------------------------------------------------------------


def read_scienceqa(data: DataFolder) -> list[Question]:
    converted, original = data.path / "llava_test_QCM-LEPA.json", data.path / "problems.json"
    if original.exists() and not converted.exists():
        return _from_problems(data)
    files = data.files(converted.name)
    if files is None:
        return [
            _from_row(str(number), row, f"row {number}" if image else "None", image)
            for number, (row, image) in enumerate(data.parquet_rows(only="test"))
        ]
    return [_from_conversation(data, row, str(files[0])) for row in read_json(files[0])]


def _from_problems(data: DataFolder) -> list[Question]:
    """Of the authors' problems.json the test split, or all where pid_splits.json is not there."""
    problems, splits = read_json(data.path / "problems.json"), data.path / "pid_splits.json"

    def path_of(key: str, name: str) -> str:
        path = data.path / "images" / "test" / key / name
        return str(path if path.exists() or not (data.path / "test").is_dir() else data.path / "test" / key / name)

    questions = []
    for key in read_json(splits)["test"] if splits.exists() else problems:
        row = problems[key]
        path = path_of(key, row["image"]) if row.get("image") else None
        questions.append(_from_row(key, row, path or "None", path))
    return questions


def _from_row(key: str, row: dict, path: str, image) -> Question:
    """A question in the authors' fields, also those of the parquet files."""
    fields = {
        "question": row["question"],
        "question_id": key,
        "image_path": path,
        "lecture": row.get("lecture") or None,
        "solution": row.get("solution") or None,
        "answer": LETTERS[row["answer"]],
        "answer_index": row["answer"],
        "choices": row["choices"],
    }
    context = (row.get("hint") or "").replace("\n", " ") or "N/A"
    text = with_options(row["question"], dict(zip(LETTERS, row["choices"])), context)
    return Question(key, "choice", text, fields, image)


def _from_conversation(data: DataFolder, row: dict, source: str) -> Question:
    """A question in LLaVA's form.

    In the official prompt every letter in brackets opens a choice, so "(A) vitamin (B)" is shown as more choices than
    there are. The answer's letter counts the true ones, which `split_options` finds.
    """
    from processing.lettered_options import split_options  # loads for seconds, and saved answers are scored without it

    asked, told = (row["conversations"][i]["value"] for i in (0, 1))
    question, _, rest = asked.removeprefix("<image>\n").partition("\nContext: ")
    context, _, listed = rest.partition("\nOptions: ")
    listed = listed.replace("<image>", "").strip()
    shown = [part.strip() for part in re.split(r"\([A-Z]\)", listed) if part.strip()]
    try:
        choices = split_options(listed)
    except ValueError:
        choices = []  # of which the answer is none
    letter = re.search(r"ANSWER: ([A-Z])", told)
    if not letter or LETTERS.index(letter[1]) >= len(choices):
        raise ValueError(f"{source}, id {row['id']!r}: {told[-40:]!r} names none of its {len(choices)} choices")
    lecture = re.search(r"LECTURE: (.*?)(?=SOLUTION: |###|$)", told, re.DOTALL)
    solution = re.search(r"SOLUTION: (.*?)(?=###|$)", told, re.DOTALL)
    path = str(data.path / "images" / "test" / row["image"]) if row.get("image") else None
    key = str(row["id"])
    fields = {
        "question": asked,
        "question_id": key,
        "image_path": path or "None",
        "lecture": lecture and lecture[1],
        "solution": solution and solution[1],
        "answer": letter[1],
        "answer_index": LETTERS.index(letter[1]),
        "choices": choices,
    }
    return Question(key, "choice", with_options(question, dict(zip(LETTERS, shown)), context), fields, path)


def with_problems(records: list[dict], data: DataFolder) -> list[dict]:
    """Saved predictions with choices and answers of the data's problems.json, where there is one."""
    path = data.path / "problems.json"
    if not path.exists():
        return records
    problems = read_json(path)
    keys = [str(record.get("question_id", record.get("id"))) for record in records]
    unknown = [key for key in keys if key not in problems]
    if unknown:
        raise ValueError(f"question_id {unknown[0]!r} is not in {path}; give the predictions of this data")
    return [
        {**record, "choices": problems[key]["choices"], "answer": problems[key]["answer"]}
        for record, key in zip(records, keys)
    ]


# Scores ----------------------------------------------------------------------------------------------------------------


def _clean(pred: str) -> str:
    return re.sub(r"[().]", "", pred)


def parse_scienceqa(pred: str, choices: list[str]) -> str | None:
    """A single character as it is, else the letter of the last choice that occurs in the answer, else None."""
    text = _clean(pred)
    if len(text) == 1:
        return text
    found = [letter for letter, choice in zip(LETTERS, choices) if choice in text]
    return found[-1] if found else None


def _answer_index(record: dict) -> int:
    answer = record["answer"]
    index = answer if isinstance(answer, int) else LETTERS.find(str(answer))
    if not 0 <= index < len(record["choices"]) or (isinstance(answer, str) and len(answer) != 1):
        raise ValueError(f"id {record['id']!r}: answer {answer!r} is none of its {len(record['choices'])} choices")
    return index


def _has_image(record: dict) -> bool:
    if "image_path" in record:
        return record["image_path"] not in (None, "None")
    return "<image>" in record.get("prompt", "")


def score_scienceqa(records: list[dict], seed: int = 0) -> Score:
    """Accuracy over all questions, those with an image, and those without.

    Args:
        seed: of the guesses; the official scorer draws unseeded, twice a guess, and uses the first draw.
    """
    guess = random.Random(seed)
    parsed, guesses, several = [], 0, 0
    right = {"image": [], "text": []}
    for record in records:
        choices, gold = record["choices"], _answer_index(record)
        letter = parse_scienceqa(record["pred"], choices)
        if letter in list(LETTERS[: len(choices)]):
            index = LETTERS.index(letter)
            text = _clean(record["pred"])
            several += len(text) > 1 and sum(choice in text for choice in choices) > 1
        else:
            index, _ = (guess.choice(range(len(choices))) for _ in range(2))
            guesses += 1
        right["image" if _has_image(record) else "text"].append(index == gold)
        parsed.append({"id": record["id"], "parsed": letter or "FAILED", "correct": index == gold})
    flags = right["image"] + right["text"]
    summary = {"acc": percent(sum(flags), len(flags))}
    summary.update({f"acc-{kind}": percent(sum(f), len(f)) if f else 0.0 for kind, f in right.items()})
    return Score(
        summary,
        {"correct": sum(flags), "incorrect": len(flags) - sum(flags), "count": len(flags)},
        parsed,
        {"last_choice": several, "guess": guesses},
    )


TASK = Task(
    name="scienceqa", display_name="ScienceQA", folder="ScienceQA", hub="derek-thomas/ScienceQA", questions=4241,
    max_new_tokens=128, read=read_scienceqa, complete=with_problems, score=score_scienceqa, seed=0,
    category=lambda q: q.image is not None,
    fields={"pred": TEXT, "answer": of_type((int, str), "a letter or an index"), "choices": LIST},
    quirks={
        "last_choice": "several choices occur in the answer: the last one in the list counts",
        "guess": "no choice could be matched: a random one",
    },
)  # fmt: skip
