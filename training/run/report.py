# SPDX-License-Identifier: Apache-2.0
"""What is left to read when a run ends: a plot of the loss, and a page that says what was trained, on what, and how."""

import logging
import os
import platform
import re
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState

from evaluation.report import number
from evaluation.tasks import TASKS
from training.collator import CROPS
from training.recipe.table import mixture_table
from training.run.checkpoints import RECORDED
from training.run.plan import Plan
from training.run.settings import Settings, is_set
from training.stages import parts_table

logger = logging.getLogger(__name__)

# Our own settings that the page shows where they are given.
OWN = (
    "train_vision_tower", "lora_vision", "vision_learning_rate", "projector_learning_rate", "max_tokens_per_batch", "elastic",
)  # fmt: skip
PLOT, TASKS_PLOT, SUMMARY = "loss.png", "tasks.png", "run_summary.md"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "bitsandbytes", "deepspeed")


class Report(TrainerCallback):
    """Writes [`loss_plot`], [`tasks_plot`] where benchmarks were asked, and [`run_summary`] into the output folder. The
    trainer only carries it, and whoever has saved the model calls `write`: a callback's own turn, the end of training, comes
    before that."""

    def __init__(self, settings: Settings, plan: Plan):
        self.settings, self.plan = settings, plan

    def write(self, state: TrainerState, interrupted: bool) -> None:
        """Writes them; a failure is only a warning."""
        page = partial(run_summary, self.settings, self.plan, state, interrupted)
        writers = {
            PLOT: lambda path: loss_plot(state, path),
            SUMMARY: lambda path: Path(path).write_text(page(), encoding="utf-8"),
        }
        if _scored(state, self.plan):
            writers[TASKS_PLOT] = lambda path: tasks_plot(_scored(state, self.plan), path)
        for name, write in writers.items():
            try:
                write(os.path.join(self.settings.training.output_dir, name))
            except Exception as error:  # plotting and its fonts, the disk, the table: none is worth a run
                logger.warning("%s could not be written (%s: %s)", name, type(error).__name__, error)


def _logged(state: TrainerState) -> list[dict]:
    return [row for row in state.log_history if "loss" in row]


def _evaluated(state: TrainerState) -> dict[str, list[tuple[int, float]]]:
    """Dataset, "" where it has no name -> step and loss of each evaluation."""
    found = {}
    for row in state.log_history:
        for key, loss in row.items():
            if match := re.fullmatch(r"eval_(?:(.+)_)?loss", key):
                found.setdefault(match[1] or "", []).append((row["step"], loss))
    return found


def _scored(state: TrainerState, plan: Plan) -> dict[str, list[tuple[int, float]]]:
    """Benchmark -> step and score of each evaluation, of those that were asked."""
    rows = state.log_history
    found = {name: [(row["step"], row[f"eval_{name}"]) for row in rows if f"eval_{name}" in row] for name in plan.tasks}
    return {name: points for name, points in found.items() if points}


def loss_plot(state: TrainerState, path: str) -> None:
    """Loss, of what is evaluated as well, and learning rate over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _logged(state)
    steps = [row["step"] for row in rows]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, [row["loss"] for row in rows], label="loss")
    for name, points in _evaluated(state).items():
        axes.plot(*zip(*points), marker=".", label=f"eval loss {name}".strip())
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    rates = axes.twinx()
    rates.plot(steps, [row.get("learning_rate") for row in rows], color="grey", linestyle=":", label="learning rate")
    rates.set_ylabel("learning rate")
    figure.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def tasks_plot(scored: dict[str, list[tuple[int, float]]], path: str) -> None:
    """The score of each benchmark over the steps, each with a scale of its own, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 2 * len(scored)), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(len(scored), squeeze=False, sharex=True)[:, 0], scored.items()):
        axes.plot(*zip(*points), marker=".")
        axes.set_ylabel(TASKS[name].display_name)
    axes.set_xlabel("step")
    figure.savefig(path, dpi=120)


def _table(rows: list[list[str]]) -> str:
    head, *body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def run_summary(settings: Settings, plan: Plan, state: TrainerState, interrupted: bool = False) -> str:
    """One page of Markdown."""
    own, rows = settings.honeybee, _logged(state)
    start = settings.model.model_name_or_path or f"{own.vision_model} + {own.text_model} + {own.projector}"
    state_words = f"finished after {state.global_step} steps"
    if interrupted:
        state_words = (
            f"stopped after {state.global_step} of {state.max_steps} steps; the same command with `--resume` goes on"
        )
    elif state.global_step < state.max_steps:
        state_words += f" of {state.max_steps}, because the evaluation did not get better"
    samples = state.global_step * settings.global_batch_size
    sections = {
        "Model": f"From {start}.\n\n```\n" + "\n".join(parts_table(plan.parameters)) + "\n```",
        "Data": _data(settings, plan, samples),
        "Loss": _losses(rows),
        **({"Evaluation": _evaluation(settings, plan, state)} if plan.evaluation is not None or plan.tasks else {}),
        "Throughput": _throughput(rows),
        "Settings": _table([["setting", "value"], *_settings(settings, plan)]),
        "Versions": ", ".join([f"Python {platform.python_version()}", *_versions()]) + f"; {_device()}",
    }
    page = [f"# Stage {own.stage}: {state_words}"]
    page += [f"## {title}\n\n{text}" for title, text in sections.items()]
    return "\n\n".join(page) + "\n"


def _settings(settings: Settings, plan: Plan) -> list[list[str]]:
    rows = [[name, getattr(settings.honeybee, name)] for name in OWN if is_set(settings.honeybee, name)]
    processor = plan.collator.processor
    if processor.max_crops > 1:  # whether the run was told or its model knew
        rows += [[name, getattr(processor, name)] for name in CROPS if getattr(processor, name) is not None]
    rows += [[name, getattr(settings.training, name)] for name in RECORDED]
    return [[name, str(getattr(value, "value", value))] for name, value in rows]


def _data(settings: Settings, plan: Plan, samples: int) -> str:
    if plan.mixture is None:
        return f"`{settings.honeybee.dataset}`: {samples:,} draws of {len(plan.dataset):,} samples."
    table = mixture_table(plan.mixture.sources, plan.mixture.weights, samples)
    return f"{_table(table)}\n\nSkipped by the first process: {plan.mixture.report()}."


def _losses(rows: list[dict]) -> str:
    if not rows:
        return "Nothing was logged; lower `logging_steps`."
    losses = [row["loss"] for row in rows]
    last = losses[-max(1, len(losses) // 10) :]
    text = f"{losses[0]:.4f} at step {rows[0]['step']}, {losses[-1]:.4f} at step {rows[-1]['step']}, "
    text += f"{sum(last) / len(last):.4f} on average over the last tenth.\n\n![Loss]({PLOT})"
    return text


def _evaluation(settings: Settings, plan: Plan, state: TrainerState) -> str:
    datasets = plan.evaluation if isinstance(plan.evaluation, dict) else {"": plan.evaluation or ()}
    table = [["dataset", "samples", "first loss", "lowest", "at step", "last"]]
    for name, points in _evaluated(state).items():
        step, lowest = min(points, key=lambda point: point[1])
        losses = [f"{points[0][1]:.4f}", f"{lowest:.4f}", step, f"{points[-1][1]:.4f}"]
        # A run may be resumed with other datasets.
        samples = f"{len(datasets[name]):,}" if name in datasets else "not here"
        table.append([name or "evaluation", samples, *losses])
    scores = [["benchmark", "questions", "first score", "highest", "at step", "last"]]
    for name, points in _scored(state, plan).items():
        step, highest = max(points, key=lambda point: point[1])
        shown = [number(score, TASKS[name].digits) for score in (points[0][1], highest, points[-1][1])]
        scores.append([TASKS[name].display_name, f"{len(plan.tasks[name]):,}", shown[0], shown[1], step, shown[2]])
    tables = [_table(rows) for rows in (table, scores) if len(rows) > 1]
    if not tables:
        return "Nothing was evaluated; lower `eval_steps`."
    if len(scores) > 1:
        tables.append(f"![Benchmarks]({TASKS_PLOT})")
    text = "\n\n".join(tables)
    if settings.training.load_best_model_at_end and state.best_model_checkpoint:
        metric, best = settings.training.metric_for_best_model, os.path.basename(state.best_model_checkpoint)
        text += f"\n\nThe best model is that of {best}: {metric} {state.best_metric:.4f}."
    return text


def _throughput(rows: list[dict]) -> str:
    names = ("samples_per_second", "tokens_per_second", "padding_share", "visual_tokens_per_step")
    rows = [row for row in rows if "samples_per_second" in row]
    if not rows:
        return "Nothing was logged; lower `logging_steps`."
    body = []
    for name in names:
        values = sorted(row[name] for row in rows)
        body.append([name.replace("_", " "), f"{values[len(values) // 2]:,.4g}", f"{rows[-1][name]:,.4g}"])
    return _table([["over all processes", "median", "last"], *body])


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
