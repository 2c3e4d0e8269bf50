# SPDX-License-Identifier: Apache-2.0
"""A report of all scores in an output folder: JSON, Markdown and a picture, beside the paper's numbers."""

import json
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from evaluation.json_files import write_json
from evaluation.tasks import TASKS

SPATIAL = ("POS", "SR", "OL", "PR", "SEED SR", "SEED IL")  # POS is out of 200, the others are percentages
# Table of the paper: projector, number of visual tokens -> the six spatial tasks
PAPER_SPATIAL = {
    "resampler, 144 tokens": (75.0, 22.2, 43.2, 62.5, 47.5, 50.6),
    "C-Abs, 144 tokens": (135.0, 24.4, 54.3, 66.7, 49.0, 58.8),
    "linear, 256 tokens": (140.0, 24.4, 40.7, 70.8, 48.9, 60.9),
    "C-Abs, 256 tokens": (136.7, 26.7, 55.6, 75.0, 52.7, 59.3),
}
MAIN = ("MMBench", "MME", "SEED-I", "LLaVA-W")
# The published models -> their scores (MME: perception + cognition)
PAPER_MODELS = {
    "7B-C-Abs-M144": (70.1, 1891.3, 64.5, 67.1),
    "7B-D-Abs-M144": (70.8, 1835.5, 63.8, 66.3),
    "7B-C-Abs-M256": (71.0, 1951.3, 65.5, 70.6),
    "13B-C-Abs-M256": (73.2, 1944.0, 68.2, 75.7),
    "13B-D-Abs-M256": (73.5, 1950.0, 66.6, 72.9),
    "13B-C-Abs-M576": (73.6, 1976.5, 68.6, 77.5),
}
MARK = "honeybee-evaluation"
NAMES = ("report.json", "report.md", "spatial.png")


def spatial_average(scores: dict[str, float]) -> float:
    """AvgN of the six spatial scores; MME's position is out of 200 and counts half."""
    return (scores["POS"] / 2 + sum(scores[name] for name in SPATIAL[1:])) / len(SPATIAL)


def main_average(mmbench: float, seed_image: float, mme_perception: float) -> float:
    return (mmbench + seed_image + mme_perception / 20) / 3


def spatial_scores(summaries: dict[str, dict]) -> dict[str, float]:
    """The six spatial scores among the tasks' summaries; those that are there."""
    sources = {
        "POS": ("mme", "position"),
        "SR": ("mmbench", "spatial_relationship"),
        "OL": ("mmbench", "object_localization"),
        "PR": ("mmbench", "physical_relation"),
        "SEED SR": ("seed", "spatial_relation"),
        "SEED IL": ("seed", "instance_location"),
    }
    found = {}
    for name, (task, key) in sources.items():
        for path, value in summaries.get(task, {}).items():
            if path.split("/")[-1].lower().replace(" ", "_") == key:
                found[name] = value
    return found


def paper_model(folder: Path) -> str | None:
    """Name of the published model that a folder's configuration has the shape of, or None."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, vision, projector = (config.get(f"{part}_config", {}) for part in ("text", "vision", "projector"))
    size = {(4096, 32): "7B", (5120, 40): "13B"}.get((text.get("hidden_size"), text.get("num_hidden_layers")))
    kind = {"c-abs": "C-Abs", "d-abs": "D-Abs"}.get(projector.get("projector_type"))
    name = f"{size}-{kind}-M{projector.get('num_query_tokens')}"
    image = 224 if size == "7B" else 336
    return name if name in PAPER_MODELS and vision.get("image_size") == image else None


def scores_in(output: Path) -> dict[str, dict]:
    """Task -> content of its scores.json."""
    return {
        path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*/scores.json"))
    }


def check_ours(output: Path, names: tuple[str, ...]) -> None:
    """Refuses a folder with files of these names, of which the first bears our mark, that somebody else wrote.

    Raises:
        ValueError: says which.
    """
    files = [output / name for name in names]
    there = [file for file in files if file.exists()]
    if there and not (files[0].exists() and f'"{MARK}"' in files[0].read_text(encoding="utf-8", errors="replace")):
        raise ValueError(f"{there[0]} is not from an evaluation; give another --output")


def check_output(output: Path, model: str | None) -> None:
    """Refuses an output folder that has somebody else's report, or scores of another model.

    Raises:
        ValueError: says which.
    """
    check_ours(output, NAMES)
    for task, scores in scores_in(output).items():
        if scores.get("model") != model:
            raise ValueError(
                f"{output / task} has scores of model {scores.get('model')} ({scores.get('model_name')}), and this is "
                f"{model}; give another --output, or one report would mix two models"
            )


def build(tasks: dict[str, dict], model_name: str | None, published: str | None) -> dict:
    """The report as data.

    Args:
        tasks: what `scores_in` returns.
        published: the published model to compare with.
    """
    summaries = {task: scores["summary"] for task, scores in tasks.items() if scores["summary"]}
    spatial = spatial_scores(summaries)
    mme, seed, mmbench = (summaries.get(name, {}) for name in ("mme", "seed", "mmbench"))
    main = {
        "MMBench": mmbench.get("total_acc"),
        "MME": mme.get("total"),
        "SEED-I": seed.get("total"),
        "LLaVA-W": summaries.get("llava_w", {}).get("all"),
    }
    notes = []
    for task, scores in tasks.items():
        whole = TASKS[task].questions if task in TASKS else None
        if whole is not None and scores["questions"] != whole:
            notes.append(f"{task}: {scores['questions']} questions, and the benchmark has {whole}")
        notes += [f"{task}: {note}" for note in scores.get("notes", ())]
    return {
        "report": MARK,
        "model": model_name,
        "averages": {
            "AvgN": spatial_average(spatial) if len(spatial) == len(SPATIAL) else None,
            "main": main_average(mmbench["total_acc"], seed["total"], mme["perception"])
            if mmbench and seed and mme
            else None,
        },
        "spatial": spatial,
        "main": main,
        "paper": {
            "spatial": {
                name: {**dict(zip(SPATIAL, row)), "AvgN": spatial_average(dict(zip(SPATIAL, row)))}
                for name, row in PAPER_SPATIAL.items()
            },
            "published": {published: dict(zip(MAIN, PAPER_MODELS[published]))} if published else {},
        },
        "tasks": tasks,
        "notes": notes,
    }


def number(value: float | int | str | None, digits: int = 1) -> str:
    """As people round: a half goes up. 53.45 is 53.5, as in the paper."""
    if isinstance(value, float):
        exact = Decimal(str(round(value, 8)))  # without the error that binary fractions leave in a sum
        return str(exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))
    return "-" if value is None else str(value).replace("|", "\\|")


def table(head: tuple, rows: list[tuple], digits: int = 1) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(number(cell, digits) for cell in row) + " |" for row in rows), ""]


def as_markdown(report: dict) -> str:
    ours = report["model"] or "these predictions"
    lines = [f"# Evaluation of {ours}", ""]
    if report["notes"]:
        lines += [*(f"- **{note}**" for note in report["notes"]), ""]
    lines += ["## Main", ""]
    rows = [(ours, *(report["main"][name] for name in MAIN), report["averages"]["main"])]
    rows += [
        (f"paper, {name}", *(row[key] for key in MAIN), None) for name, row in report["paper"]["published"].items()
    ]
    lines += table(("model", "MMBench", "MME (both parts)", "SEED-I", "LLaVA-W", "main average"), rows)
    lines += ["The main average is (MMBench + SEED-I + MME perception / 20) / 3.", "", "## Spatial", ""]
    rows = [(ours, *(report["spatial"].get(name) for name in SPATIAL), report["averages"]["AvgN"])]
    rows += [(f"paper, {name}", *row.values()) for name, row in report["paper"]["spatial"].items()]
    lines += table(("model", *SPATIAL, "AvgN"), rows)
    lines += [
        "POS: MME position (out of 200); SR, OL, PR: MMBench spatial relationship, object localization, physical relation; "
        "SEED-Bench spatial relation and instance location. The paper's rows are its short schedule. "
        "AvgN is the mean of the six, POS taken as a percentage.",
        "",
    ]
    if report["spatial"]:
        lines += ["![spatial tasks](spatial.png)", ""]
    for task, scores in report["tasks"].items():
        lines += _section(task, scores)
    return "\n".join(lines)


def _section(task: str, scores: dict) -> list[str]:
    """The lines about one task."""
    lines = [f"## {task}", "", f"{scores['questions']} questions.", ""]
    if scores["summary"]:
        lines += table(("", "score"), list(scores["summary"].items()), TASKS[task].digits if task in TASKS else 1)
    else:
        lines += ["Not scored.", ""]
    if scores.get("judge"):
        judge = scores["judge"]
        cost = ", ".join(f"{name} {value}" for name, value in judge["cost"].items())
        lines += [f"Judged by {judge['model']}: {judge['judged']}; not judged: {len(judge['failed'])}. {cost}.", ""]
        lines += [f"- not judged {key!r}: {reason}" for key, reason in list(judge["failed"].items())[:20]] + [""]
    counted = [(TASKS[task].quirks[name], count) for name, count in scores["quirks"].items() if count]
    if counted:
        lines += ["Items that an odd rule of the official scorer decided:", ""]
        lines += table(("rule", "items"), counted)
    return lines


def draw(report: dict, path: Path) -> None:
    """Bars of the six spatial tasks, beside the paper's rows; one that was not scored has none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = {Path(report["model"] or "these predictions").name: report["spatial"]}
    rows.update({f"paper: {name}": row for name, row in report["paper"]["spatial"].items()})
    width = 1 / (len(rows) + 1)
    for place, (label, row) in enumerate(rows.items()):
        heights = [row.get(name, 0) / (2 if name == "POS" else 1) for name in SPATIAL]
        color = "C1" if place == 0 else str(0.35 + 0.12 * place)
        axes.bar([at + place * width for at in range(len(SPATIAL))], heights, width, label=label, color=color)
    axes.set_xticks([at + (len(rows) - 1) * width / 2 for at in range(len(SPATIAL))], ["POS / 2", *SPATIAL[1:]])
    axes.set_ylabel("score (higher is better)")
    axes.set_ylim(0, 100)
    figure.legend(fontsize="small", frameon=False, ncols=3, loc="outside upper center")
    figure.savefig(path, dpi=120)


def write(output: Path, model_name: str | None, published: str | None) -> dict:
    report = build(scores_in(output), model_name, published)
    write_json(output / "report.json", report)
    (output / "report.md").write_text(as_markdown(report), encoding="utf-8")
    if report["spatial"]:
        draw(report, output / "spatial.png")
    return report
