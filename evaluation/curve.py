# SPDX-License-Identifier: Apache-2.0
"""One model with several numbers of visual tokens: its scores and the time of a prompt against M, as a table and a plot."""

import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from evaluation import report
from evaluation.generate import prepare
from evaluation.json_files import write_json
from evaluation.predictions import check_folder
from evaluation.prompts import Question
from evaluation.tasks import TASKS

NAMES = ("curve.json", "curve.md", "curve.png")
ROUNDS = 7  # of each M, after one that is not counted


def folder_of(output: Path, num_query_tokens: int) -> Path:
    """Where the answers and scores with this M are."""
    return output / f"M{num_query_tokens}"


def numbers_in(output: Path) -> list[int]:
    """The M that were scored, ascending."""
    folders = {path.parent.parent.name.removeprefix("M") for path in output.glob("M*/*/scores.json")}
    return sorted(int(name) for name in folders if name.isdecimal())


@torch.no_grad()
def prefill_seconds(model, processor, question: Question, template: str, settings: list[dict]) -> list[float]:
    """Seconds until the first token of an answer is known, the vision tower included, for each of `settings`.

    They take turns, so that what else the machine does is spread over all of them; a number is a median.

    Args:
        settings: of the processor's call, with `num_query_tokens`.
    """
    prompts = [prepare(processor, [question], template, asked).to(model.device, model.dtype) for asked in settings]
    seconds = [[] for _ in prompts]
    for turn in range(1 + ROUNDS):
        for inputs, measured in zip(prompts, seconds):
            start = time.perf_counter()
            model(**inputs, use_cache=True, logits_to_keep=1).logits.argmax().item()  # which waits for the device
            if turn:
                measured.append(time.perf_counter() - start)
    return list(map(statistics.median, seconds))


def write(
    output: Path,
    model_name: str,
    numbers: list[int],
    default: int,
    extra: int,
    seconds: list[float] | None,
    max_crops: int = 1,
) -> dict:
    """curve.json, curve.md and curve.png in the output folder, from the scores in the folders of `numbers`.

    Args:
        default: M of the model where nothing is asked for.
        extra: visual tokens of an image beside M.
        seconds: of a prompt, for each of `numbers`; None where no question has an image.
        max_crops: the most crops of a picture, with all of these numbers.
    """
    rows = []
    for place, num_query_tokens in enumerate(numbers):
        scores = report.scores_in(folder_of(output, num_query_tokens))
        rows.append(
            {
                "num_query_tokens": num_query_tokens,
                "visual_tokens": num_query_tokens + extra,
                "prefill_seconds": None if seconds is None else seconds[place],
                "scores": {task: scores[task]["score"] for task in scores if scores[task]["score"] is not None},
            }
        )
    device = f"{torch.get_num_threads()} threads of a CPU"
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    curve = {"report": report.MARK, "model": model_name, "default": default, "device": device, "rows": rows}
    if max_crops > 1:
        curve["max_crops"] = max_crops
    curve["text"] = as_text(curve)
    write_json(output / "curve.json", curve)
    title = f"# {model_name}: scores and time against M"
    (output / "curve.md").write_text(f"{title}\n\n{curve['text']}\n\n![against M](curve.png)\n", encoding="utf-8")
    draw(curve, output / "curve.png")
    return curve


def tasks_of(curve: dict) -> list[str]:
    return list(dict.fromkeys(task for row in curve["rows"] for task in row["scores"]))


def as_text(curve: dict) -> str:
    """Markdown: the table, and what its times are."""
    tasks, rows = tasks_of(curve), []
    for row in curve["rows"]:
        mark = " (default)" if row["num_query_tokens"] == curve["default"] else ""
        took = None if row["prefill_seconds"] is None else f"{row['prefill_seconds'] * 1000:.1f} ms"
        scores = (report.number(row["scores"].get(task), TASKS[task].digits) for task in tasks)
        rows.append((f"{row['num_query_tokens']}{mark}", row["visual_tokens"], took, *scores))
    names = (TASKS[task].display_name for task in tasks)
    crops = curve.get("max_crops", 1)
    lines = report.table(
        ("M", f"visual tokens {'an image' if crops == 1 else 'a crop'}", "first token after", *names), rows
    )
    if crops > 1:
        lines += [f"Pictures are cut into at most {crops} crops."]
    took = f"The time is that of a prompt with one image, on {curve['device']}; the tower's share of it does not depend on M."
    return "\n".join([*lines, took])


def draw(curve: dict, path: Path) -> None:
    """A panel for each task and one for the time, over M; a line marks the default."""
    rows, tasks = curve["rows"], tasks_of(curve)
    panels = {TASKS[task].display_name: [row["scores"].get(task) for row in rows] for task in tasks}
    if rows[0]["prefill_seconds"] is not None:
        panels["first token, ms"] = [row["prefill_seconds"] * 1000 for row in rows]
    figure = Figure(figsize=(7, 1 + 1.8 * max(1, len(panels))), layout="constrained")
    numbers = [row["num_query_tokens"] for row in rows]
    for axes, (name, values) in zip(
        figure.subplots(max(1, len(panels)), squeeze=False, sharex=True)[:, 0], panels.items()
    ):
        axes.plot(numbers, [float("nan") if value is None else value for value in values], marker="o")
        axes.set_ylabel(name)
        if curve["default"] in numbers:
            axes.axvline(curve["default"], color="grey", linestyle=":", label="default")
            axes.legend(fontsize="small", frameon=False)
        axes.set_xticks(numbers)
    figure.supxlabel("M, visual tokens of an image")
    figure.savefig(path, dpi=120)


def check_output(output: Path, model: str, max_crops: int | None) -> None:
    """Refuses a folder with another's files of these names, or with scores of another model or of other crops.

    Raises:
        ValueError: says which.
    """
    report.check_ours(output, NAMES)
    for number in numbers_in(output):
        folder = folder_of(output, number)
        report.check_output(folder, model)
        for path in folder.glob("*/run.json"):
            check_folder(path.parent, {"max_crops": max_crops})
