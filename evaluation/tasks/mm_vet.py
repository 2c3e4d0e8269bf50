# SPDX-License-Identifier: Apache-2.0
"""MM-Vet: open questions that take several capabilities. A judge compares each answer with the truth, as MM-Vet's evaluator
does."""

import re
from collections import defaultdict
from pathlib import Path

from evaluation.data_files import DataFolder
from evaluation.json_files import read_json, write_json
from evaluation.judge import Request
from evaluation.prompts import Question
from evaluation.scoring import Score, add_in_order
from evaluation.task import ANY, TEXT, Judging, Task


def read_mm_vet(data: DataFolder) -> list[Question]:
    files = data.files("mm-vet.json")
    if files is None:
        rows = [
            (row["question_id"], {**row, "capability": [c.strip() for c in row["capability"].split(",")]}, image)
            for row, image in data.parquet_rows()
        ]
    else:
        rows = [(k, row, str(data.path / "images" / row["imagename"])) for k, row in read_json(files[0]).items()]
    questions = []
    for number, (key, row, image) in enumerate(rows):
        fields = {
            "index": number,
            "question": row["question"],
            "question_id": key,
            "answer": row["answer"],
            "capability": row.get("capability", []),
        }
        questions.append(Question(key, "free", row["question"], fields, image))
    return questions


def score_mm_vet(records: list[dict], judged: dict[str, float]) -> Score:
    """Mean of the judge's correctness (0 to 1) as a percentage, in total and by capability.

    Args:
        judged: id -> correctness, of the judged records.
    """
    groups = defaultdict(list)
    for record in records:
        if str(record["id"]) in judged:
            for name in ("total", *record.get("capability", ())):
                groups[name].append(judged[str(record["id"])])
    details = {
        name: {"acc": add_in_order(rows) / len(rows) * 100, "judged": len(rows)} for name, rows in groups.items()
    }
    parsed = [{"id": r["id"], "parsed": judged.get(str(r["id"]))} for r in records]
    return Score({name: row["acc"] for name, row in details.items()}, {"scores": details}, parsed)


_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and Greenland "
    "are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered "
    "in ice and snow. The meme is saying that the person has trust issues because the names of these countries do not "
    "accurately represent their landscapes. | "
)
JUDGE_PROMPT = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in the "
    "ground truth means it is totally right only when all elements in the ground truth are present in the prediction, and "
    "<OR> means it is totally right when any one element in the ground truth is present in the prediction. The correctness "
    "score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the "
    "last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    + _MEME
    + "The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy and "
    "Greenland isn't very green. | 0.4\n"
    + _MEME
    + "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite its "
    "name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have trust "
    "issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor in this meme "
    "is derived from the unexpected contrast between the names of the countries and their actual physical characteristics. "
    "| 1.0\n"
)


def read_correctness(reply: str) -> float:
    """The number that the reply begins with."""
    number = re.match(r"\s*\|?\s*([01](?:\.\d+)?)(?![\d.]*\d)", reply)
    if not number or float(number[1]) > 1:
        raise ValueError(f"the reply does not begin with a number from 0 to 1: {reply[:80]!r}")
    return float(number[1])


def mm_vet_request(record: dict) -> Request:
    truth = record["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    text = JUDGE_PROMPT + "\n" + " | ".join((record["question"], truth, record["pred"], ""))
    return Request(str(record["id"]), [{"role": "user", "content": text}], read_correctness, 0.0, 16)


def write_submission(records: list[dict], folder: Path) -> Path:
    write_json(folder / "submission.json", {str(r.get("question_id", r["id"])): r["pred"] for r in records})
    return folder / "submission.json"


TASK = Task(
    name="mm_vet", display_name="MM-Vet", folder="mm_vet", hub="lmms-lab/MMVet", questions=218, max_new_tokens=1024,
    read=read_mm_vet, score=score_mm_vet, fields={"pred": TEXT, "question": ANY, "answer": TEXT},
    judging=Judging(mm_vet_request), submission=write_submission,
)  # fmt: skip
