# SPDX-License-Identifier: Apache-2.0
"""Predictions in the form that a benchmark's own server or script takes."""

from pathlib import Path

from evaluation.predictions import write_json, write_lines


def _mmbench(records: list[dict], folder: Path) -> Path:
    """One row for each rotation, as the evaluation server wants it."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet")
    sheet.append(["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "prediction"])
    for record in records:
        texts = [record.get("question"), record.get("hint"), *(record["options_dict"].get(k) for k in "ABCD")]
        texts = [None if text == "N/A" else text for text in texts]
        texts += [record["answer"], record["category"], record["l2_category"], record["pred"]]
        row = [ILLEGAL_CHARACTERS_RE.sub("", text) if isinstance(text, str) else text for text in texts]
        cells = [WriteOnlyCell(sheet, value) for value in (record["index"], *row)]
        for cell in cells:
            if isinstance(cell.value, str):
                cell.data_type = "s"  # an answer that begins with = is no formula
        sheet.append(cells)
    path = folder / "submission.xlsx"
    book.save(path)
    return path


def _seed(records, folder):
    rows = [{"question_id": r.get("question_id", r["id"]), "prediction": r["pred"]} for r in records]
    write_lines(folder / "submission.jsonl", rows)
    return folder / "submission.jsonl"


def _llava_w(records, folder):
    rows = [
        {"question_id": r.get("question_id", r["id"]), "prompt": r["question"], "text": r["pred"], "metadata": {}}
        for r in records
    ]
    write_lines(folder / "submission.jsonl", rows)
    return folder / "submission.jsonl"


def _mm_vet(records, folder):
    write_json(folder / "submission.json", {str(r.get("question_id", r["id"])): r["pred"] for r in records})
    return folder / "submission.json"


WRITERS = {"mmbench": _mmbench, "seed": _seed, "llava_w": _llava_w, "mm_vet": _mm_vet}
NEEDS = {"mmbench": "openpyxl"}


def write_submission(task: str, records: list[dict], folder: Path) -> str | None:
    """Name of the file that was written, None where the task has none or its library is not installed."""
    if task not in WRITERS:
        return None
    try:
        return WRITERS[task](records, folder).name
    except ModuleNotFoundError as error:
        if error.name != NEEDS.get(task):
            raise
        return None
