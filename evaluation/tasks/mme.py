# SPDX-License-Identifier: Apache-2.0
"""MME: two questions about each image, answered with yes or no, in fourteen subsets."""

import re
from collections import defaultdict
from pathlib import Path

from evaluation.data_files import DataFolder
from evaluation.prompts import Question
from evaluation.scoring import Score, add_in_order, percent
from evaluation.task import ANY, TEXT, Task

SUBSETS = {
    "perception": [
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ],
    "cognition": ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"],
}  # fmt: skip
KNOWN = [name for names in SUBSETS.values() for name in names]


def _question(subset: str, image_id: str, number: int, text: str, answer: str, path: str, image) -> Question:
    fields = {"question": text, "answer": answer, "image_path": path, "image_id": image_id, "dataset_name": subset}
    return Question(f"{subset}/{image_id}/{number}", "short", text, fields, image)


def read_mme(data: DataFolder) -> list[Question]:
    if not any((data.path / name).is_dir() for name in KNOWN) and data.files(KNOWN[0]) is None:
        return _from_parquet(data)
    questions = []
    for subset in KNOWN:
        texts = data.path / subset
        if (texts / "questions_answers_YN").is_dir():
            texts = texts / "questions_answers_YN"
        images = data.path / subset / "images" if (data.path / subset / "images").is_dir() else data.path / subset
        for path in sorted(texts.glob("*.txt")):
            image = next(
                (images / (path.stem + end) for end in (".jpg", ".png") if (images / (path.stem + end)).exists()),
                images / f"{path.stem}.jpg",
            )
            for number, (text, answer) in enumerate(_pairs(path)):
                questions.append(_question(subset, image.name, number, text, answer, str(image), str(image)))
    return questions


def _pairs(path: Path) -> list[tuple[str, str]]:
    """(question, Yes or No) of each line of a file."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            text, tab, answer = line.strip().partition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise ValueError(f"{path}: {line!r} is not a question, a tab, and Yes or No; download the file again")
            pairs.append((text, answer.strip()))
    return pairs


def _from_parquet(data: DataFolder) -> list[Question]:
    questions, counts = [], defaultdict(int)
    for row, image in data.parquet_rows():
        key = (row["category"], row["question_id"].split("/")[-1])
        questions.append(_question(*key, counts[key], row["question"], row["answer"], row["question_id"], image))
        counts[key] += 1
    return questions


def parse_mme(pred: str) -> str:
    """`yes`, `no` or `other`. A tab ends the answer, because the official code saves answers in columns."""
    text = pred.split("\t")[0].lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def parse_mme_relaxed(pred: str) -> str:
    """`yes` or `no` where exactly one of them is among the words, else `other`."""
    words = set(re.findall(r"\b(?:yes|no)\b", pred.lower()))
    return words.pop() if len(words) == 1 else "other"


def _subset(pairs: list[tuple[str, str]]) -> tuple[list[float], dict]:
    """[score, accuracy, accuracy+] out of 200, 100, 100, and the confusion counts, of (parsed, answer) in order."""
    right = [parsed == answer for parsed, answer in pairs]
    images = [all(right[i : i + 2]) for i in range(0, len(right), 2)]
    accuracy, plus = percent(sum(right), len(right)), percent(sum(images), len(images))
    tp, fn, tn, fp = (
        sum(pair == kind for pair in pairs) for kind in (("yes", "yes"), ("no", "yes"), ("no", "no"), ("yes", "no"))
    )
    confusion = {
        "TP": tp,
        "FN": fn,
        "TN": tn,
        "FP": fp,
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "other_num": sum(parsed == "other" for parsed, _ in pairs),
        "acc": sum(right) / len(right),
    }
    return [accuracy + plus, accuracy, plus], confusion


def _tables(records: list[dict], parse) -> tuple[dict, dict]:
    subsets = defaultdict(list)
    for record in records:
        subsets[record["dataset_name"]].append((parse(record["pred"].split("\t")[0]), record["answer"].lower()))
    scores, confusion = {}, {}
    for group, names in SUBSETS.items():
        table = {}
        for name in names:
            if name in subsets:
                table[name], confusion[name] = _subset(subsets[name])
        totals = [add_in_order(row[i] for row in table.values()) for i in (1, 2)]
        scores[group.capitalize()] = {**table, "Total": [sum(totals), *totals]}
    totals = [scores["Perception"]["Total"][i] + scores["Cognition"]["Total"][i] for i in (1, 2)]
    scores["Total"] = [sum(totals), *totals]
    return scores, confusion


def _check(records: list[dict]) -> None:
    subsets = defaultdict(list)
    for record in records:
        if record["dataset_name"] not in KNOWN:
            raise ValueError(f"dataset_name {record['dataset_name']!r} is no MME subset; they are {', '.join(KNOWN)}")
        if record["answer"].lower() not in ("yes", "no"):
            raise ValueError(f"MME id {record['id']!r}: answer {record['answer']!r} is neither Yes nor No")
        subsets[record["dataset_name"]].append(record)
    for name, rows in subsets.items():
        for first, second in zip(rows[::2], [*rows[1::2], None]):
            if second is None or first["image_id"] != second["image_id"]:
                raise ValueError(
                    f"MME {name}: the question {first['id']!r} about {first['image_id']} is not followed by the second one "
                    "about this image; give the predictions in the order of the data, two for each image"
                )


def score_mme(records: list[dict]) -> Score:
    """Accuracy plus accuracy+ (both questions of an image right), each out of 100, summed over the subsets.

    The two questions of an image follow each other in `records`.

    Raises:
        ValueError: an unknown subset, or a question without its second.
    """
    _check(records)
    scores, confusion = _tables(records, parse_mme)
    summary = {"total": scores["Total"][0]}
    for group, names in SUBSETS.items():
        table = scores[group.capitalize()]
        summary[group] = table["Total"][0]
        summary.update({f"{group}/{name}": table[name][0] for name in names if name in table})
    parsed = [(record, parse_mme(record["pred"])) for record in records]
    return Score(
        summary,
        {
            "scores": scores,
            "per_subset_metric": confusion,
            "scores_relaxed": _tables(records, parse_mme_relaxed)[0],
        },
        [{"id": r["id"], "parsed": p, "correct": p == r["answer"].lower()} for r, p in parsed],
        {
            "first_four_characters": sum(p not in ("other", parse_mme_relaxed(r["pred"])) for r, p in parsed),
            "neither": sum(p == "other" for _, p in parsed),
        },
    )


TASK = Task(
    name="mme", display_name="MME", folder="MME", hub="lmms-lab/MME", questions=2374, max_new_tokens=20,
    read=read_mme, score=score_mme,
    together=lambda q: (q.fields["dataset_name"], q.fields["image_id"]), category=lambda q: q.fields["dataset_name"],
    fields={"pred": TEXT, "answer": TEXT, "image_id": ANY, "dataset_name": ANY},
    quirks={
        "first_four_characters": 'only the first four characters are searched: "Not sure" and "uno" are no, "eyes" is yes',
        "neither": "neither yes nor no was found: wrong, whatever the answer is",
    },
)  # fmt: skip
