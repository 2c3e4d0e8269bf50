# SPDX-License-Identifier: Apache-2.0
"""OwlEval: open questions. People judge the answers, so there is no score."""

from evaluation.data_files import DataFolder
from evaluation.json_files import read_lines
from evaluation.prompts import Question
from evaluation.task import Task


def read_owl(data: DataFolder) -> list[Question]:
    questions = []
    for row in read_lines(data.files("questions.jsonl")[0], remedy="download the file again"):
        fields = {"question": row["question"], "question_id": row["question_id"], "image_path": row["image"]}
        image = str(data.path / "images" / row["image"])
        questions.append(Question(str(row["question_id"]), "free", row["question"], fields, image))
    return questions


TASK = Task(name="owl", display_name="OwlEval", folder="OwlEval", read=read_owl, max_new_tokens=512)
