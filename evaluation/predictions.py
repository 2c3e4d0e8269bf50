# SPDX-License-Identifier: Apache-2.0
"""Predictions on disk: appended while a run goes on, found again by the next one, never mixed with another run's.

A task's folder has `run.json` (what was asked of which model) and `predictions.jsonl`. Processes after the first write
`predictions.rank1.jsonl` and so on; these are joined when all are done, or when a run continues.
"""

import json
from pathlib import Path

from evaluation.json_files import read_lines, write_lines

PREDICTIONS = "predictions.jsonl"


def part_of_rank(folder: Path, rank: int) -> Path:
    return folder / (PREDICTIONS if rank == 0 else f"predictions.rank{rank}.jsonl")


def check_folder(folder: Path, settings: dict) -> None:
    """Refuses to continue what another run began.

    Args:
        settings: what decides the answers; `run.json` of an earlier run must say the same.

    Raises:
        ValueError: names the first setting that differs, with both values.
    """
    described = folder / "run.json"
    if not described.exists():
        if next(folder.glob("predictions*.jsonl"), None) is not None:
            raise ValueError(
                f"{folder} has predictions but no run.json that says of which model; give another --output, or move them away"
            )
        return
    earlier = json.loads(described.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if earlier.get(name) != value:
            other = f" ({earlier.get('model_name')})" if name == "model" else ""
            raise ValueError(
                f"{folder} holds predictions with {name} {earlier.get(name)!r}{other}, and this run has {name} {value!r}; "
                "give another --output, or the earlier setting"
            )


def collect(folder: Path, asked: dict[str, str], model: str) -> dict[str, dict]:
    """Answers so far by id, of all processes of an earlier run; joined into one file, in the benchmark's order.

    Args:
        asked: id -> prompt, of all questions of the task in order.
        model: fingerprint that every answer must have.

    Raises:
        ValueError: another model's answer, one to a question or a prompt that is not asked now, or two to one question.
    """
    parts = sorted(folder.glob("predictions*.jsonl"))
    answers, places = {}, {}
    for path in parts:
        for record in read_lines(path, torn=True):
            key = str(record.get("id"))
            if record.get("model") != model:
                raise ValueError(
                    f"{path}: the answer to {key!r} is of model {record.get('model')}, and this run has {model}; "
                    "give another --output, or move the file away"
                )
            if asked.get(key) != record.get("prompt"):
                what = "has another prompt now" if key in asked else "is not asked now"
                raise ValueError(
                    f"{path}: question {key!r} {what}; the data has changed since: give another --output, or the earlier data"
                )
            # A run killed while it joined the files leaves the same answer in two of them.
            if key in answers and (places[key] == path or answers[key] != record):
                raise ValueError(f"{path}: question {key!r} is answered twice; remove one of the lines")
            answers[key], places[key] = record, path
    answers = {key: answers[key] for key in asked if key in answers}
    if parts:
        write_lines(folder / PREDICTIONS, list(answers.values()))
        for path in parts:
            if path.name != PREDICTIONS:
                path.unlink()
    return answers
