# SPDX-License-Identifier: Apache-2.0
"""SEED-Bench, its questions about images: one of four options, nine types of questions."""

from collections import defaultdict
from pathlib import Path

from evaluation.data_files import DataFolder
from evaluation.json_files import read_json, write_lines
from evaluation.prompts import LETTERS, Question, with_options
from evaluation.scoring import Score, option_letter, percent
from evaluation.task import TEXT, Task

TYPES = {
    1: "Scene Understanding", 2: "Instance Identity", 3: "Instance Attribute", 4: "Instance Location",
    5: "Instances Counting", 6: "Spatial Relation", 7: "Instance Interaction", 8: "Visual Reasoning",
    9: "Text Recognition",
}  # fmt: skip
LAST_IMAGE_TYPE = 9  # later types are about videos


def read_seed(data: DataFolder) -> list[Question]:
    files = data.files("SEED-Bench.json")
    if files is None:
        rows = (
            (row, "", image)
            for row, image in data.parquet_rows()
            if row["data_type"] == "image" and int(row["question_type_id"]) <= LAST_IMAGE_TYPE
        )
        names = TYPES
    else:
        content = read_json(files[0])
        names = {number: name for name, number in content["question_type"].items()}
        paths = ((row, str(data.path / "SEED-Bench-image" / row["data_id"])) for row in content["questions"])
        rows = ((row, path, path) for row, path in paths if row["question_type_id"] <= LAST_IMAGE_TYPE)
    questions = []
    for row, path, image in rows:
        choices = [row[f"choice_{letter}"] for letter in "abcd"]
        kind = int(row["question_type_id"])
        fields = {
            "question": row["question"],
            "answer": row["answer"],
            "choices": choices,
            "image_path": path,
            "question_id": row["question_id"],
            "question_type_id": kind,
            "question_type": names[kind],
        }
        text = with_options(row["question"], dict(zip(LETTERS, choices)))
        questions.append(Question(str(row["question_id"]), "choice", text, fields, image))
    return questions


def score_seed(records: list[dict]) -> Score:
    """Accuracy by question type; an answer is right when it is the letter, in either case."""
    types = defaultdict(list)
    parsed, wrapped = [], 0
    for record in records:
        letter = record["pred"].strip().lower()
        correct = letter == record["answer"].strip().lower()
        types[record["question_type"]].append(correct)
        parsed.append({"id": record["id"], "parsed": letter.upper(), "correct": correct})
        wrapped += not correct and option_letter(record["pred"]) == record["answer"]
    scores = {name: {"total": len(f), "correct": sum(f), "acc": percent(sum(f), len(f))} for name, f in types.items()}
    flags = [item["correct"] for item in parsed]
    scores["Total"] = {"total": len(flags), "correct": sum(flags), "acc": percent(sum(flags), len(flags))}
    names = ["Total", *(name for name in scores if name != "Total")]
    return Score(
        {name.lower().replace(" ", "_"): scores[name]["acc"] for name in names},
        {"scores": scores},
        parsed,
        {"not_a_bare_letter": wrapped},
    )


def write_submission(records: list[dict], folder: Path) -> Path:
    rows = [{"question_id": r.get("question_id", r["id"]), "prediction": r["pred"]} for r in records]
    write_lines(folder / "submission.jsonl", rows)
    return folder / "submission.jsonl"


TASK = Task(
    name="seed", display_name="SEED-Bench", folder="SEED-Bench", hub="lmms-lab/SEED-Bench", max_new_tokens=20,
    read=read_seed, score=score_seed, category=lambda q: q.fields["question_type"],
    fields={"pred": TEXT, "answer": TEXT, "question_type": TEXT},
    quirks={"not_a_bare_letter": 'wrong although the right letter is there, as in "A." or "(A)"'},
    submission=write_submission,
)  # fmt: skip
