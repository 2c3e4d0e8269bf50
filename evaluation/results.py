# SPDX-License-Identifier: Apache-2.0
"""The answers to one task become its files: scores.json, parsed.jsonl, and the submission where the task has one."""

import hashlib
import importlib.util
from pathlib import Path

from evaluation.json_files import write_json, write_lines
from evaluation.judge import ENVIRONMENT, Judge, Verdicts
from evaluation.predictions import PREDICTIONS
from evaluation.report import number
from evaluation.scoring import Score
from evaluation.task import Task


def ask_judge(task: Task, records: list[dict], judge: Judge) -> Verdicts:
    """A record that lacks what its request takes is among the failed."""
    requests, failed = [], {}
    for record in task.judging.choose(records):
        try:
            requests.append(task.judging.request(record))
        except ValueError as error:
            failed[str(record["id"])] = str(error)
    verdicts = judge(requests)
    verdicts.failed.update(failed)
    return verdicts


def score(task: Task, records: list[dict], seed: int | None = None, judge: Judge | None = None) -> dict:
    """What goes into scores.json, without where it comes from. The parsed answers are under `parsed`.

    Args:
        seed: of guesses, in place of the task's own.
        judge: asked where the task has something to judge.
    """
    settings, notes, verdicts = {}, [], None
    if task.seed is not None:
        settings["seed"] = task.seed if seed is None else seed
    if task.judging is not None:
        verdicts = ask_judge(task, records, judge) if judge is not None else None
        settings["judged"] = verdicts.judged if verdicts else {}
    if task.score is None:
        result = Score({})
        notes.append(f"has no automatic score; the answers are in {PREDICTIONS}")
    else:
        result = task.score(records, **settings)
    if result.quirks.get("guess"):
        notes.append(f"{result.quirks['guess']} of {len(records)} answers were guesses")
    if task.judging is not None and not task.judging.optional:
        if verdicts is None:
            notes.append(f"not judged; set {ENVIRONMENT['url']} and {ENVIRONMENT['model']}")
        elif verdicts.failed:
            notes.append(f"{len(verdicts.failed)} of {len(records)} answers were not judged, and are not in the score")
    out = {
        "task": task.name,
        "display_name": task.display_name,
        "questions": len(records),
        "score": task.headline(result) if result.summary else None,
        "summary": result.summary,
        "quirks": result.quirks,
        "notes": notes,
        "details": result.details,
        "parsed": result.parsed,
    }
    if verdicts is not None:
        out["judge"] = {
            "model": judge.model, "judged": len(verdicts.judged), "failed": verdicts.failed, "cost": verdicts.cost,
        }  # fmt: skip
    return out


def origin_of(source: Path, model: str | None, model_name: str | None) -> dict:
    """Where answers come from, as in scores.json."""
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    return {"predictions": str(source), "sha256": sha256, "model": model, "model_name": model_name}


def write_results(task: Task, records: list[dict], folder: Path, origin: dict, arguments, judge: Judge | None) -> None:
    """Scores a task's records and writes scores.json, parsed.jsonl and the submission."""
    if task.judging is not None and task.judging.optional and not getattr(arguments, f"judge_{task.name}"):
        judge = None
    result = score(task, records, arguments.seed, judge)
    if arguments.limit is not None:
        result["notes"].append(f"a subset of the questions: --limit {arguments.limit}")
    if arguments.max_crops is not None:
        result["notes"].append(f"asked with --max_crops {arguments.max_crops}")
    write_lines(folder / "parsed.jsonl", result.pop("parsed"))
    submission = None
    if task.submission_needs is not None and importlib.util.find_spec(task.submission_needs) is None:
        result["notes"].append(f"no submission file: pip install {task.submission_needs}")
    elif task.submission is not None:
        submission = task.submission(records, folder).name
    write_json(folder / "scores.json", {**result, "submission": submission, **origin})
    shown = ", ".join(f"{name} {number(value, task.digits)}" for name, value in list(result["summary"].items())[:4])
    notes = (f"  note: {note}" for note in result["notes"])
    print(f"{task.name}: {len(records)} questions; {shown or 'no score'}", *notes, sep="\n")
