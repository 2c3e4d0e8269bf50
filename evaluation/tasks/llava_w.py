# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Bench (in the wild): open questions. A judge rates each answer beside GPT-4's, as LLaVA's
`eval_gpt_review_bench.py` does."""

from collections import defaultdict
from pathlib import Path

from evaluation.data_files import DataFolder
from evaluation.json_files import read_lines, write_lines
from evaluation.judge import Request
from evaluation.prompts import Question
from evaluation.scoring import Score, add_in_order, percent
from evaluation.task import ANY, TEXT, Judging, Task


def _question(index: int, row: dict, text: str, image, context: str | None, reference: str | None) -> Question:
    fields = {"index": index, "question": text, "category": row["category"], "question_id": row["question_id"]}
    if context is not None and reference is not None:  # what a judge needs
        fields.update(context=context, reference=reference)
    return Question(str(row["question_id"]), "free", text, fields, image)


def read_llava_w(data: DataFolder) -> list[Question]:
    files = data.files("questions.jsonl")
    if files is None:
        return [
            _question(index, row, row["question"], image, row.get("caption"), row.get("gpt_answer"))
            for index, (row, image) in enumerate(data.parquet_rows())
        ]
    captions = {row["image"]: row["caption"] for row in _lines(data.path / "context.jsonl")}
    references = {row["question_id"]: row["text"] for row in _lines(data.path / "answers_gpt4.jsonl")}
    questions = []
    for index, row in enumerate(_lines(files[0])):
        image = str(data.path / "images" / row["image"])
        context, reference = captions.get(row["image"]), references.get(row["question_id"])
        questions.append(_question(index, row, row["text"], image, context, reference))
    return questions


def _lines(path: Path) -> list[dict]:
    return read_lines(path, remedy="download the file again") if path.exists() else []


def score_llava_w(records: list[dict], judged: dict[str, tuple[float, float]]) -> Score:
    """The judge's points for the model, as a percentage of its points for GPT-4's answer.

    Args:
        judged: id -> (points of the reference answer, points of the model), of the judged records.
    """
    groups = defaultdict(list)
    for record in records:
        if str(record["id"]) in judged:
            for name in ("all", record["category"]):
                groups[name].append(judged[str(record["id"])])
    details = {
        name: {
            "reference": add_in_order(r for r, _ in rows) / len(rows) * 10,
            "model": add_in_order(m for _, m in rows) / len(rows) * 10,
            "judged": len(rows),
        }
        for name, rows in groups.items()
    }
    summary = {name: percent(row["model"], row["reference"]) for name, row in details.items() if row["reference"]}
    parsed = [{"id": r["id"], "parsed": judged.get(str(r["id"]))} for r in records]
    return Score(summary, {"scores": details}, parsed)


JUDGE_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
JUDGE_RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the image "
    "is represented with a few sentences describing the image. \nPlease rate the helpfulness, relevance, accuracy, level of "
    "details of their responses. Each assistant receives an overall score on a scale of 1 to 10, where a higher score "
    "indicates better overall performance.\nPlease first output a single line containing only two values indicating the "
    "scores for Assistant 1 and 2, respectively. The two scores are separated by a space.\nIn the subsequent line, please "
    "provide a comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the order in "
    "which the responses were presented does not affect your judgment."
)


def read_pair(reply: str) -> tuple[float, float]:
    """The two scores on the first line."""
    words = reply.strip().split("\n")[0].replace(",", " ").split()
    if len(words) != 2:
        raise ValueError(f"the first line of the reply is not two scores: {reply[:80]!r}")
    first, second = map(float, words)
    if not (0 <= first <= 10 and 0 <= second <= 10):
        raise ValueError(f"scores outside 0 to 10: {reply[:80]!r}")
    return first, second


def llava_w_request(record: dict) -> Request:
    if not (record.get("context") and record.get("reference")):
        raise ValueError(
            "no context or reference answer; put context.jsonl and answers_gpt4.jsonl beside questions.jsonl"
        )
    parts = (
        f"[Context]\n{record['context']}\n\n[Question]\n{record['question']}\n\n"
        f"[Assistant 1]\n{record['reference']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{record['pred']}\n\n[End of Assistant 2]\n\n[System]\n{JUDGE_RULE}\n\n"
    )
    messages = [{"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": parts}]
    return Request(str(record["id"]), messages, read_pair, temperature=0.2, max_tokens=1024)


def write_submission(records: list[dict], folder: Path) -> Path:
    rows = [
        {"question_id": r.get("question_id", r["id"]), "prompt": r["question"], "text": r["pred"], "metadata": {}}
        for r in records
    ]
    write_lines(folder / "submission.jsonl", rows)
    return folder / "submission.jsonl"


TASK = Task(
    name="llava_w", display_name="LLaVA-Bench (in the wild)", folder="llava-bench-in-the-wild",
    hub="lmms-lab/llava-bench-in-the-wild", questions=60, max_new_tokens=1024,
    read=read_llava_w, score=score_llava_w, fields={"pred": TEXT, "question": ANY, "category": ANY},
    judging=Judging(llava_w_request), submission=write_submission,
)  # fmt: skip
