# SPDX-License-Identifier: Apache-2.0
"""POPE: is an object in the picture? The absent ones are chosen in three ways, which are the categories."""

import re

from evaluation.data_files import DataFolder
from evaluation.json_files import read_lines
from evaluation.prompts import Question
from evaluation.scoring import Score, add_in_order
from evaluation.task import ANY, TEXT, Task

CATEGORIES = ("adversarial", "popular", "random")
MEASURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def _question(category: str, key, text: str, answer: str, path: str, image) -> Question:
    fields = {"question": text, "answer": answer, "image_path": path, "category": category}
    return Question(f"{category}/{key}", "short", text, fields, image)


def read_pope(data: DataFolder) -> list[Question]:
    home = next((name for name in ("old_coco", "coco", "output/coco") if (data.path / name).is_dir()), "old_coco")
    files = data.files(*(f"{home}/coco_pope_{category}.json" for category in CATEGORIES))
    if files is None:
        return [
            _question(row["category"], row["question_id"], row["question"], row["answer"], row["image_source"], image)
            for row, image in data.parquet_rows(only="^Full/")
        ]
    questions = []
    for category, path in zip(CATEGORIES, files):
        for row in read_lines(path, remedy="download the file again"):
            image = str(data.root / "opensets_coco" / "images" / "val2014" / row["image"])
            questions.append(_question(category, row["question_id"], row["text"], row["label"], image, image))
    return questions


def parse_pope(pred: str) -> str:
    words = pred.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _label(record: dict) -> str:
    return "no" if record["answer"] == "no" else "yes"


def _scores(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """Of (parsed, answer)."""
    tiny = 1e-12  # added to every denominator by the official code, and visible in its digits
    tp, fp, tn, fn = (
        sum(pair == kind for pair in pairs) for kind in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"))
    )
    precision, recall = tp / (tp + fp + tiny), tp / (tp + fn + tiny)
    return {
        "accuracy": (tp + tn) / (len(pairs) + tiny),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall + tiny),
        "yes_ratio": (tp + fp) / (len(pairs) + tiny),
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
    }


def score_pope(records: list[dict]) -> Score:
    """Accuracy, precision, recall, F1 and share of yes in each category.

    A category without questions has zeros, which are also in the average.

    Raises:
        ValueError: an unknown category.
    """
    unknown = {str(r["category"]) for r in records} - set(CATEGORIES)
    if unknown:
        raise ValueError(f"POPE has no category {sorted(unknown)}; they are {', '.join(CATEGORIES)}")
    scores = {
        category: _scores([(parse_pope(r["pred"]), _label(r)) for r in records if r["category"] == category])
        for category in CATEGORIES
    }
    average = {name: add_in_order(row[name] for row in scores.values()) / len(scores) for name in MEASURES}
    return Score(
        {f"{category}/{name}": row[name] for category, row in scores.items() for name in MEASURES},
        {"scores": scores, "average": average},
        [
            {"id": r["id"], "parsed": parse_pope(r["pred"]), "correct": parse_pope(r["pred"]) == _label(r)}
            for r in records
        ],
        {
            "yes_by_default": sum(
                parse_pope(r["pred"]) == "yes" and "yes" not in re.findall("[a-z]+", r["pred"].lower()) for r in records
            ),
            "label_not_no": sum(r["answer"] not in ("yes", "no") for r in records),
        },
    )


TASK = Task(
    name="pope", display_name="POPE", folder="POPE", hub="lmms-lab/POPE", max_new_tokens=20, digits=3,
    read=read_pope, score=score_pope, category=lambda q: q.fields["category"],
    headline=lambda score: score.details["average"]["accuracy"],
    fields={"pred": TEXT, "answer": TEXT, "category": ANY},
    quirks={
        "yes_by_default": 'everything is yes unless one of the words before the first dot is exactly "No", "no" or "not"; '
        'so are "NO", "Nope" and an empty answer',
        "label_not_no": 'every right answer but exactly "no" is taken for yes; counted where it is not "yes" either',
    },
)  # fmt: skip
