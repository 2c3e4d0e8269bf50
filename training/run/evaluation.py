# SPDX-License-Identifier: Apache-2.0
"""What is evaluated while training, datasets and benchmarks: whether the settings ask for it rightly, and what is read for it."""

from pathlib import Path

import datasets
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from evaluation.prompts import Question
from evaluation.task import read_task, subset
from evaluation.tasks import TASKS
from training.collator import HoneybeeDataCollator
from training.conversations import check_dataset, image_root, load_conversations, with_images_opened
from training.recipe.config import Recipe
from training.recipe.mixture import Mixture
from training.recipe.sources import keep_share
from training.run.arguments import HoneybeeArguments
from training.run.checks import check_number
from training.run.settings import Settings, is_set


def check_evaluation(settings: Settings, recipe: Recipe | None) -> None:
    """Whether there is something to evaluate if, and only if, the settings ask for it.

    Raises:
        ValueError: with the value and the remedy.
    """
    own, training = settings.honeybee, settings.training
    given = [f"--{name}" for name in ("eval_dataset", "eval_split_size") if getattr(own, name) is not None]
    kept = recipe.eval if recipe is not None else {}
    given += ["the recipe's eval"] if kept else []
    _check_tasks(own)
    if not given and own.eval_tasks is None:
        asking = [name for name in ("eval_strategy", "load_best_model_at_end", "metric_for_best_model", "eval_on_start")
                  if is_set(training, name)]  # fmt: skip
        asking += [name for name in ("early_stopping_patience", "eval_dataset_split") if is_set(own, name)]
        if asking:
            raise ValueError(
                f"{', '.join(asking)}: there is nothing to evaluate; give --eval_dataset, or the share of --dataset to "
                "keep for it, --eval_split_size 0.01, or benchmarks, --eval_tasks pope, or leave it out"
            )
        return
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them")
    if own.eval_dataset is None and is_set(own, "eval_dataset_split"):
        raise ValueError(f"--eval_dataset_split {own.eval_dataset_split} is for --eval_dataset; leave it out")
    names = own.eval_dataset
    if isinstance(names, dict) and not (names and all(isinstance(path, str) and path for path in names.values())):
        raise ValueError(f"--eval_dataset {names}: each name needs a path or a Hub name, such as validation: val.jsonl")
    if training.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            f"{given[0] if given else '--eval_tasks'} alone evaluates nothing; say when: --eval_strategy steps --eval_steps "
            "100, or --eval_strategy epoch"
        )
    names = list(names) if isinstance(names, dict) else list(kept)
    losses = [f"eval_{name}_loss" for name in names] or ["eval_loss", "eval_mean_token_accuracy"]
    _check_best_model(settings, [*(losses if given else []), *(f"eval_{name}" for name in own.eval_tasks or ())])


def _check_tasks(own: HoneybeeArguments) -> None:
    if own.eval_tasks is None:
        for name in ("eval_tasks_data", "eval_limit"):
            if getattr(own, name) is not None:
                raise ValueError(
                    f"--{name} {getattr(own, name)} is for the benchmarks of --eval_tasks; give it, for instance "
                    "--eval_tasks pope, or leave this out"
                )
        return
    scored = [n for n, task in TASKS.items() if task.score and (task.judging is None or task.judging.optional)]
    unknown = [name for name in own.eval_tasks if name not in scored]
    if unknown or not own.eval_tasks:
        why = "has no score without a judge or people" if unknown and unknown[0] in TASKS else "is no task"
        raise ValueError(f"--eval_tasks: {unknown[0] if unknown else 'nothing'} {why}; use {', '.join(scored)}")
    if own.eval_tasks_data is None:
        raise ValueError(
            "--eval_tasks needs the folder with the benchmarks' files; give --eval_tasks_data DIR, laid out as in "
            "docs/evaluation.md"
        )
    if not Path(own.eval_tasks_data).is_dir():
        raise ValueError(f"--eval_tasks_data {own.eval_tasks_data} does not exist; give the folder of the benchmarks")


def _check_best_model(settings: Settings, evaluated: list[str]) -> None:
    """`evaluated`: names of what can be compared."""
    own, training = settings.honeybee, settings.training
    if own.early_stopping_patience is not None and not training.load_best_model_at_end:
        raise ValueError(
            f"early_stopping_patience={own.early_stopping_patience} would save the last model, which is not the best; give "
            "--load_best_model_at_end as well"
        )
    metric = training.metric_for_best_model
    if metric is not None:
        if metric.removeprefix("eval_") not in [name.removeprefix("eval_") for name in evaluated]:
            raise ValueError(
                f"metric_for_best_model={metric!r} is not evaluated; with --metric_for_best_model use "
                f"{' or '.join(evaluated)}"
            )
        if training.greater_is_better != (not metric.endswith("loss")):
            raise ValueError(f"greater_is_better={training.greater_is_better} is wrong for {metric}; leave it out")
    if not training.load_best_model_at_end:
        return
    if training.save_strategy == SaveStrategy.STEPS and training.save_steps != training.eval_steps:
        raise ValueError(
            f"load_best_model_at_end needs a checkpoint of each step that is evaluated, and save_steps={training.save_steps} "
            f"with eval_steps={training.eval_steps}; give them the same number"
        )
    if training.save_total_limit == 1:
        raise ValueError(
            "save_total_limit=1 with load_best_model_at_end leaves no checkpoint to go on from but the best; use "
            "--save_total_limit 2 for the best and the last"
        )


def open_evaluation(
    settings: Settings, dataset: datasets.Dataset, mixture: Mixture | None, collator: HoneybeeDataCollator
) -> tuple[datasets.Dataset, datasets.Dataset | dict[str, datasets.Dataset] | None]:
    """What is left of a dataset to train on, and what is evaluated: a share of it, what a mixture keeps, other datasets, or
    nothing.

    Raises:
        ValueError, FileNotFoundError: samples that cannot be evaluated, or nothing is left to train on.
    """
    own, training = settings.honeybee, settings.training
    if own.eval_split_size is not None:
        # Also what a resumed run has not trained on: the seed is part of what makes it the same run.
        with training.main_process_first(desc="splitting the data"):
            dataset, kept = keep_share(dataset, own.eval_split_size, settings.data_seed)
        check_number(kept, settings, "eval")
        return dataset, kept
    if own.eval_dataset is None:
        held_out = {} if mixture is None else mixture.held_out()
        held_out = {name: part.as_dataset() for name, part in held_out.items()}
        for part in held_out.values():
            check_number(part, settings, "eval")
        return dataset, held_out or None

    def opened(name: str) -> datasets.Dataset:
        root = image_root(name)
        try:
            evaluated = load_conversations(name, own.eval_dataset_split)
            check_dataset(evaluated, root, check_length=collator.check_length)
            check_number(evaluated, settings, "eval")
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"--eval_dataset {name}: {error}") from error
        return evaluated if root == collator.image_root else with_images_opened(evaluated, root)

    with training.main_process_first(desc="opening the data to evaluate"):
        if isinstance(own.eval_dataset, dict):
            return dataset, {name: opened(path) for name, path in own.eval_dataset.items()}
        return dataset, opened(own.eval_dataset)


def read_tasks(settings: Settings) -> dict[str, list[Question]]:
    """Benchmark -> its questions, or those of the subset. Images are opened when they are asked about.

    Raises:
        ValueError: files are missing, or not in the benchmark's layout.
    """
    own = settings.honeybee
    with settings.training.main_process_first(desc="reading the benchmarks"):
        return {
            name: subset(TASKS[name], read_task(TASKS[name], own.eval_tasks_data), own.eval_limit)
            for name in own.eval_tasks or ()
        }
